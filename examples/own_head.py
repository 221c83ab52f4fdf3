"""A head of one's own on the features of a frozen backbone.

    python examples/own_head.py --images FOLDER --backbone PATH --finding Effusion

FOLDER holds images with a manifest.csv (docs/data.md), PATH is what `chexfound.load_backbone` reads. Without the two,
images are drawn and a small model is made, which was never trained: its AUROC says nothing.

What it shows:

1. `ingest` takes a folder in once, into a store: images of one size, mapped from the disk, with labels and patients.
2. Labels are 1, 0 or -1. The last means "not known": such an image takes no part, in training or in testing.
3. `Membership` splits by patient. Two images of one patient are never on both sides.
4. The backbone is frozen, so its features are computed once. The head is any module on patch tokens (B, P, D).
5. AUROC is by `areas.auroc`, the function that the reports use.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import made_up
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chexfound
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.evaluate.areas import auroc
from chexfound.recipe.schema import Split


class LargestPatch(nn.Module):
    """Scores each patch and takes a soft maximum: a finding may be small, and anywhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.score = nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch tokens (B, P, D) to logits (B,)."""
        scores = self.score(self.norm(patches)).squeeze(-1)  # (B, P)
        return scores.logsumexp(1) - np.log(scores.shape[1])


def patch_tokens(backbone: nn.Module, images: np.ndarray) -> Tensor:
    """Compute the patch tokens (N, P, D) of uint8 images (N, px, px)."""
    with torch.inference_mode():
        parts = [
            backbone.forward_features(torch.from_numpy(images[start : start + 16]))["x_norm_patchtokens"]
            for start in range(0, len(images), 16)
        ]
    return torch.cat(parts).clone()  # outside of inference mode, so that the head may be trained on them


def train(head: nn.Module, patches: Tensor, labels: np.ndarray, steps: int) -> None:
    """Train the head by binary cross entropy, with both classes weighing the same."""
    targets = torch.from_numpy(labels).float()
    weight = (1 - targets).sum() / targets.sum()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(head(patches), targets, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Take images in, train a head on the training patients, judge it on the test patients."""
    parser = argparse.ArgumentParser(description="a head of one's own on frozen features")
    parser.add_argument("--images", type=Path, help="folder with a manifest.csv (default: images are drawn)")
    parser.add_argument("--backbone", type=Path, help="weights (default: a small model, never trained)")
    parser.add_argument("--finding", default="Effusion")
    parser.add_argument("--px", type=int, default=made_up.PX, help="side of the images that the model sees")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        images = given.images or made_up.radiographs(Path(folder) / "images", sites=1, patients=40)
        backbone = chexfound.load_backbone(given.backbone or made_up.backbone_file(Path(folder)))
        ingest(images, Path(folder) / "store", given.px)
        store = Store.open(Path(folder) / "store")
        view, split = View.of(store, "all"), Membership.simulated(0, Split())
        sides = []
        for which in ("train", "test"):
            ids = view.split(split, which)
            labels = store.labels(ids, [given.finding])[:, 0]
            sides.append((store.pixels(ids[labels >= 0]), labels[labels >= 0]))
    (train_images, train_labels), (test_images, test_labels) = sides
    for name, labels in (("training", train_labels), ("test", test_labels)):
        if len(np.unique(labels)) < 2:
            raise SystemExit(f"error: the {name} images are not of both classes of {given.finding!r}; give more images")
    patches = patch_tokens(backbone, train_images)
    head = LargestPatch(patches.shape[-1])
    train(head, patches, train_labels, given.steps)
    with torch.inference_mode():
        scores = head(patch_tokens(backbone, test_images)).numpy()
    print(f"{given.finding}: {len(train_labels)} training images, {len(test_labels)} test images")
    print(f"AUROC {auroc(test_labels, scores):.3f}")


if __name__ == "__main__":
    main()
