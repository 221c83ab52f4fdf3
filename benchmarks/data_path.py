"""From stored images to the crops of a step: ours against torchvision, and what reading costs.

    python benchmarks/data_path.py [--data DIR] [--rounds 20] [--cold-rows 0] [--json]

DIR is a store of 256 px, or a folder of images, which is then read into a temporary store; without it the
images are drawn.  Ours: rows of the memory-mapped store in the sampler's order, 2 x 112 + 8 x 48 px crops by
OpenCV on grey uint8.  Rival: the same pixels as PNG files, opened as RGB by Pillow, and torchvision's v2
transforms on uint8 tensors, normalised at the end (ours is normalised by the model).  Both on one thread, in
turns.  Settings:

    plain    crop and flip on both sides
    grey     DINOv2's photometry as far as it means something on grey: brightness, contrast, blur, solarisation
    colour   ours as in grey; the rival as DINOv2 publishes it, hue, saturation and random greyscale included

`read` gives rows read a second from the store in the sampler's order (ours) and sorted within each batch
(rival), from the page cache; with --cold-rows N also `read-cold`, from a file of N rows that was dropped from
the page cache before each pass.  `sampler` gives seconds for the permutation of a million images.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from chexfound import rng
from chexfound.data.crops import opencv
from chexfound.data.crops.sampler import EndlessSampler
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError, DataError
from chexfound.host.machine import benchmark_line
from chexfound.recipe.schema import Crops

PX, BATCH = 256, 32
SIZES = {"global": (2, 112, (0.32, 1.0)), "local": (8, 48, (0.05, 0.32))}
PLAIN = Crops(
    global_crops_size=112,
    global_crops_scale=(0.32, 1.0),
    local_crops_number=8,
    local_crops_size=48,
    local_crops_scale=(0.05, 0.32),
    rotation_deg=0.0,
    jitter=0.0,
)
GREY = Crops(**{**vars(PLAIN), "brightness": 0.4, "contrast": 0.4, "solarize": 0.2, "blur": (1.0, 0.1, 0.5)})
SETTINGS = {"plain": PLAIN, "grey": GREY, "colour": GREY}
PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="a store of 256 px, or a folder of images; default: drawn ones")
    parser.add_argument("--images", type=int, default=256, help="at most so many of them (default 256)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side (default 20)")
    parser.add_argument("--cold-rows", type=int, default=0, help="also read a file of so many rows off the disk")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for row in measure(options, Path(scratch)):
                print(benchmark_line("data_path", PACKAGES, **row) if options.json else told(row), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield one row a setting, then those about reading."""
    store = open_store(options.data, scratch)
    ids = rng.numpy_generator(0, "images").permutation(len(store))[: options.images]
    files = write_png(store, ids, scratch / "png")
    sampler = EndlessSampler(len(ids), BATCH, 0, "data_path")
    for name, config in SETTINGS.items():
        transforms = rival_transforms(name)

        def ours(turn: int, config: Crops = config) -> int:
            images = store.pixels(ids[sampler.batch(turn)])
            opencv.multi_crop(images, config, rng.numpy_generator(0, "crops", turn))
            return len(images)

        def rival(turn: int, transforms: list[v2.Transform] = transforms) -> int:
            chosen = [files[place] for place in sampler.batch(turn)[:8]]
            for file in chosen:
                image = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
                for transform in transforms:
                    transform(image)
            return len(chosen)

        yield {"setting": name, **in_turns(ours, rival, options.rounds), "unit": "img/s"}
    yield {"setting": "read", **reads(store.pixels, ids, options.rounds * 10), "unit": "img/s"}
    if options.cold_rows:
        yield {"setting": "read-cold", **cold_reads(scratch / "rows", options.cold_rows), "unit": "img/s"}
    start = time.perf_counter()
    EndlessSampler(1_000_000, BATCH, 0, "data_path").batch(0)
    yield {"setting": "sampler", "seconds": round(time.perf_counter() - start, 4)}


def in_turns(ours: Callable[[int], int], rival: Callable[[int], int], rounds: int) -> dict[str, float]:
    """Images a second of both, a turn of one after a turn of the other; the first of each is not counted."""
    spent, done = np.zeros(2), np.zeros(2)
    for turn in range(rounds + 1):
        for side, run in enumerate((ours, rival)):
            start = time.perf_counter()
            n_images = run(turn)
            if turn:
                spent[side] += time.perf_counter() - start
                done[side] += n_images
    first, other = done / spent
    return {"ours": round(first, 1), "rival": round(other, 1), "ratio": round(first / other, 2)}


def rival_transforms(setting: str) -> list[v2.Transform]:
    """A transform for each of the ten crops, as DINOv2 composes them, with the blur as often as it means to."""
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    jitter: list[v2.Transform] = []
    if setting == "grey":
        jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4)], p=0.8)]
    elif setting == "colour":
        jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]
    extras: dict[str, list[list[v2.Transform]]] = {"global": [[], []], "local": [[]] * 8}
    if setting != "plain":
        blur = v2.GaussianBlur(9, (0.1, 2.0))
        solarize = v2.RandomSolarize(128, p=0.2)
        extras = {
            "global": [[blur], [v2.RandomApply([blur], p=0.1), solarize]],
            "local": [[v2.RandomApply([blur], p=0.5)]] * 8,
        }
    result = []
    for kind, (_, size, scale) in SIZES.items():
        crop = v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        for extra in extras[kind]:
            result.append(v2.Compose([crop, v2.RandomHorizontalFlip(), *jitter, *extra, *normalize]))
    return result


def reads(pixels: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, rounds: int) -> dict[str, float]:
    """Rows a second in the sampler's order, and sorted within the batch; other batches, lest one warms the caches."""
    sampler, other = (EndlessSampler(len(ids), BATCH, 0, "reads", order) for order in ("drawn", "sorted"))
    return in_turns(
        lambda turn: len(pixels(ids[sampler.batch(turn)])),
        lambda turn: len(pixels(np.sort(ids[other.batch(turn)]))),
        rounds,
    )


def cold_reads(path: Path, n_rows: int, passes: int = 3) -> dict[str, float]:
    """As `reads`, each batch off the disk: the file is dropped from the page cache before every pass."""
    with open(path, "wb") as file:
        for _ in range(n_rows):
            file.write(os.urandom(PX * PX))
        file.flush()
        os.fsync(file.fileno())

    def one_pass(order: Callable[[np.ndarray], np.ndarray], turn: int) -> int:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rows = np.memmap(path, np.uint8, "r", shape=(n_rows, PX, PX))
        sampler = EndlessSampler(n_rows, BATCH, 0, "cold", turn)
        batches = max(1, n_rows // BATCH // 4)  # a quarter of the rows: none is read twice
        for step in range(batches):
            np.take(rows, order(sampler.batch(step)), axis=0)
        return batches * BATCH

    figures = in_turns(lambda turn: one_pass(np.asarray, turn), lambda turn: one_pass(np.sort, turn), passes)
    path.unlink()
    return figures


def open_store(folder: Path | None, scratch: Path) -> Store:
    """The store at `folder`; images, or drawn ones if None, are read into a temporary store first."""
    if folder is None:
        folder = draw_images(scratch / "drawn")
    if not (folder / "index.sqlite").is_file():
        ingest(folder, scratch / "store", PX)
        folder = scratch / "store"
    store = Store.open(folder)
    if store.px != PX:
        raise DataError(f"{folder}: the store holds images of {store.px} px; this is measured at {PX} px")
    return store


def draw_images(folder: Path, count: int = 64) -> Path:
    """Smooth images with fine noise, about as well compressible as radiographs."""
    folder.mkdir()
    lots = rng.numpy_generator(0, "drawn")
    rows = ["file,source,patient_id,findings"]
    for number in range(count):
        coarse = cv2.resize(lots.normal(128, 60, (9, 9)), (PX, PX), interpolation=cv2.INTER_CUBIC)
        image = np.clip(coarse + lots.normal(0, 3, (PX, PX)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        rows.append(f"{number}.png,drawn,{number},")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_png(store: Store, ids: np.ndarray, folder: Path) -> list[Path]:
    """The stored pixels as files for the rival."""
    folder.mkdir()
    files = []
    for image in ids.tolist():
        files.append(folder / f"{image}.png")
        cv2.imwrite(str(files[-1]), store.pixels([image])[0])
    return files


def told(row: dict[str, Any]) -> str:
    if "seconds" in row:
        return f"{row['setting']:<10} {row['seconds']:.4f} s"
    return f"{row['setting']:<10} ours {row['ours']:>10,.1f}  rival {row['rival']:>10,.1f} img/s  ratio {row['ratio']}"


if __name__ == "__main__":
    sys.exit(main())
