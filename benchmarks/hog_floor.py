"""HOG and a logistic regression: what the centralized arm has to reach before a comparison counts.

    python benchmarks/hog_floor.py --data DIR [--finding Pneumonia] [--seeds 0,1,2] [--sources A,B] [--json]

DIR is a store, or a folder of images, which is then read into a temporary store.  The patients are
split as in a run of the same seed.  One model is fitted on the training images of all sources that
label the finding; the penalty is the one with the best mean AUROC over the sources on the validation
patients; the test patients are looked at once, with it.  Source: Dalal and Triggs 2005.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from chexfound.data.split import View
from chexfound.data.store import Store
from chexfound.errors import ChexfoundError, ConfigError, DataError
from chexfound.evaluate.floors import fit_scores
from chexfound.evaluate.metrics import Scores, auroc, result_rows
from chexfound.machine import benchmark_line
from chexfound.recipe import Evaluate, Split

PX = 128
HOG = {"orientations": 9, "pixels_per_cell": (16, 16), "cells_per_block": (2, 2), "block_norm": "L2-Hys"}
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, strongest first
MIN_JUDGED = 5  # validation images of each class
PACKAGES = ("numpy", "scikit-learn", "scikit-image")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a store, or a folder of images to ingest")
    parser.add_argument("--finding", default="Pneumonia")
    parser.add_argument("--seeds", default="0,1,2", help="of the split by patient (default 0,1,2)")
    parser.add_argument("--sources", help="comma-separated; default: all that label the finding")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        seeds = parse_seeds(options.seeds)
        with tempfile.TemporaryDirectory() as scratch:
            store = open_data(options.data, Path(scratch) / "store")
            rows = measure(
                store, options.finding, seeds, options.sources.split(",") if options.sources else None
            )
    except ChexfoundError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for row in rows:
        print(benchmark_line("hog_floor", PACKAGES, **row) if options.json else _told(row))
    return 0


def parse_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text!r}: write whole numbers with commas between, as 0,1,2") from error


def open_data(folder: Path, scratch: Path) -> Store:
    """The store at `folder`; a folder of images is read into a store at `scratch` first."""
    if not (folder / "index.sqlite").is_file():
        from chexfound.data.sources import ingest

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reading images", total=None)
            ingest(
                folder,
                scratch,
                PX,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        folder = scratch
    store = Store.open(folder)
    if store.px != PX:
        raise DataError(
            f"{folder}: the store holds images of {store.px} px; this floor is defined at {PX} px"
        )
    return store


@dataclass(frozen=True)
class Part:
    """One source's images of one part of the split, with a known label."""

    source: str
    ids: np.ndarray
    labels: np.ndarray  # (n, 1)


Scorer = Callable[[Sequence[Part], float], list[np.ndarray]]


def measure(
    store: Store, finding: str, seeds: Sequence[int], sources: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each seed and source: AUROC on the source's test patients, with its interval."""
    if finding not in store.findings:
        raise ConfigError(
            f"--finding {finding!r}: no image has a label for it; there are {', '.join(store.findings)}"
        )
    names = sorted(set(store.sources)) if sources is None else list(sources)
    for name in names:
        if name not in store.sources:
            raise ConfigError(f"--sources {name!r}: the store has {', '.join(sorted(set(store.sources)))}")
    known = store.ids[store.labels(store.ids, [finding])[:, 0] >= 0]
    known = known[np.isin(np.array(store.sources)[known], names)]
    features = dict(zip(known.tolist(), hog_features(store.pixels(known)), strict=True))
    return [row for seed in seeds for row in _measure_seed(store, finding, seed, names, features)]


def hog_features(images: np.ndarray) -> np.ndarray:
    """(n, 128, 128) uint8 -> (n, 1764): 7 x 7 blocks of 2 x 2 cells of 9 orientations."""
    from skimage.feature import hog

    console = Console(stderr=True)
    shown = track(images, "HOG", console=console, transient=True, disable=not console.is_terminal)
    return np.array([hog(image, **HOG) for image in shown])


def _measure_seed(
    store: Store, finding: str, seed: int, names: Sequence[str], features: dict[int, np.ndarray]
) -> list[dict[str, Any]]:
    parts = {
        which: _parts(store, finding, seed, names, which, features) for which in ("train", "val", "test")
    }
    train = _stacked(parts["train"], features)
    labels = np.concatenate([part.labels for part in parts["train"]])

    def scored(held_out: Sequence[Part], c: float) -> list[np.ndarray]:
        scores, unscored = fit_scores(train, labels, _stacked(held_out, features), [finding], c)
        if unscored:
            raise DataError(f"seed {seed}, {finding!r}: {unscored[finding]}")
        return np.split(scores, np.cumsum([len(part.ids) for part in held_out])[:-1])

    c = choose(parts["val"], scored, seed)
    trained = [part.source for part in parts["train"] if len(part.ids)]
    judge = Evaluate()
    rows = []
    for part, values in zip(parts["test"], scored(parts["test"], c), strict=True):
        scores = Scores([store.patients[index] for index in part.ids], part.labels, values, [finding])
        (row,) = result_rows(
            "hog", trained, part.source, scores, judge.bootstrap_samples, judge.confidence, seed
        )
        del row["arm"]
        rows.append({"seed": seed, **row, "c": c, "trained_images": len(train)})
    return rows


def _stacked(parts: Sequence[Part], features: dict[int, np.ndarray]) -> np.ndarray:
    width = len(next(iter(features.values())))
    return np.array([features[index] for part in parts for index in part.ids.tolist()]).reshape(-1, width)


def _parts(
    store: Store, finding: str, seed: int, names: Sequence[str], which: str, features: dict[int, np.ndarray]
) -> list[Part]:
    parts = []
    sources = np.array(store.sources)
    for name in names:
        ids = View(store, store.ids[sources == name], name).split(seed, Split(), which)
        ids = np.array([index for index in ids.tolist() if index in features], np.int64)
        parts.append(Part(name, ids, store.labels(ids, [finding])))
    return parts


def choose(validation: Sequence[Part], scored: Scorer, seed: int) -> float:
    """The penalty with the best mean AUROC over the sources' validation patients; ties: the stronger one.

    A source with under `MIN_JUDGED` validation images of a class has no say: its area is mostly noise.
    """
    judged = [
        part for part in validation if min((part.labels == 0).sum(), (part.labels == 1).sum()) >= MIN_JUDGED
    ]
    if not judged:
        raise DataError(
            f"seed {seed}: no source has {MIN_JUDGED} validation images of each class to choose C by"
        )
    means = []
    for c in PENALTIES:
        areas = [
            auroc(part.labels[:, 0], values[:, 0])
            for part, values in zip(judged, scored(judged, c), strict=True)
        ]
        means.append(np.mean(areas))
    return PENALTIES[int(np.argmax(means))]


def _told(row: dict[str, Any]) -> str:
    counts = f"n {row['n']:>4}, positive {row['positives']:>4}"
    where = f"seed {row['seed']}  {row['tested_on']:<24} {counts}  C {row['c']:g}"
    if row["auroc"] is None:
        return f"{where}  AUROC –  {row['reason']}"
    limits = (
        f"[{row['auroc_ci'][0]:.3f}, {row['auroc_ci'][1]:.3f}]" if row["auroc_ci"] else f"({row['reason']})"
    )
    return f"{where}  AUROC {row['auroc']:.3f} {limits}"


if __name__ == "__main__":
    sys.exit(main())
