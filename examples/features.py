"""Features of a folder of images with a released backbone.

    python examples/features.py --images FOLDER --backbone PATH --out features.npz

FOLDER holds DICOM, PNG or JPEG files at any depth. PATH is whatever `chexfound.load_backbone` reads: a published
checkpoint, a folder that `chexfound weights import` or `export` wrote, or the folder of a run. Without the two, images
are drawn and a small model is made, so that the example runs anywhere.

Three things are worth knowing.

1. The backbone takes grey pixels as they are, uint8 (B, height, width), and normalises them as its weights need.
   Give it squares: images are squeezed, not cropped, as they were in training (docs/decisions/0003-square-store.md).
2. `forward_features` gives DINOv2's dictionary. `x_norm_clstoken` (B, D) is one vector an image; `x_norm_patchtokens`
   (B, patches, D) has one for each patch, which a head of findings reads.
3. A file that cannot be read is told and left out. Medical images come damaged, and one of them must not end a night.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cv2
import made_up
import numpy as np
import torch

import chexfound
from chexfound.data.intake import dicom
from chexfound.data.intake.pictures import READERS
from chexfound.data.intake.walk import is_dicom
from chexfound.errors import DataError


def read(path: Path, px: int) -> np.ndarray:
    """Read one image as grey uint8 (px, px)."""
    grey = dicom.read(path)[0] if is_dicom(path) else READERS[path.suffix.lower()](path)
    return cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA)


def features(images: Path, backbone: Path, px: int, batch: int = 16) -> tuple[list[str], np.ndarray]:
    """Give the names of the images that could be read, and their features (N, D)."""
    model = chexfound.load_backbone(backbone)
    names, vectors, waiting = [], [], []

    def flush() -> None:
        with torch.inference_mode():
            vectors.append(model.forward_features(torch.from_numpy(np.stack(waiting)))["x_norm_clstoken"].numpy())
        waiting.clear()

    for path in sorted(path for path in images.rglob("*") if is_dicom(path) or path.suffix.lower() in READERS):
        try:
            waiting.append(read(path, px))
        except DataError as error:
            print(f"left out: {error}")
            continue
        names.append(path.relative_to(images).as_posix())
        if len(waiting) == batch:
            flush()
    if waiting:
        flush()
    if not names:
        raise SystemExit(f"error: {images}: no image that can be read")
    return names, np.concatenate(vectors)


def main() -> None:
    """Read the options, and write names and features into one file."""
    parser = argparse.ArgumentParser(description="features of a folder of images with a released backbone")
    parser.add_argument("--images", type=Path, help="folder of images (default: some are drawn)")
    parser.add_argument("--backbone", type=Path, help="weights (default: a small model, never trained)")
    parser.add_argument("--px", type=int, default=made_up.PX, help="side of the images that the model sees")
    parser.add_argument("--out", type=Path, default=Path("features.npz"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = given.images or made_up.radiographs(Path(folder) / "images", sites=1, patients=8)
        backbone = given.backbone or made_up.backbone_file(Path(folder))
        names, vectors = features(images, backbone, given.px)
    np.savez(given.out, names=np.array(names), features=vectors)
    print(f"wrote {given.out}: {vectors.shape[0]} images, {vectors.shape[1]} features each")


if __name__ == "__main__":
    main()
