"""HOG and a logistic regression: what the centralized arm has to reach before a comparison counts.

    python benchmarks/hog_floor.py --data DIR [--finding Pneumonia] [--seeds 0,1,2] [--sources A,B] [--json]
    python benchmarks/hog_floor.py --run OUT [--finding NAME] [--json]

DIR is a store, or a folder of images, which is then read into a temporary store.  The patients are
split as in a run of the same seed.  One model is fitted on the training images of all sources that
label the finding; the penalty is the one with the best mean AUROC over the sources on the validation
patients; the test patients are looked at once, with it.  Source: Dalal and Triggs 2005.

OUT is a simulation's folder: the floor is measured on its store, sites and seeds, and the centralized
arm held against it; the finding is Pneumonia where the run has it, else the one that leads its report.
The figures go into OUT's metrics.json (`floor`) and report.  Where the arm stays more than 0.02 below
(mean over the seeds), the comparison is declared void there; where it does not, an earlier such word is
taken back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.errors import ChexfoundError, ConfigError, DataError
from chexfound.evaluate.areas import auroc
from chexfound.evaluate.floors import fit_scores, linear
from chexfound.evaluate.rows import result_rows
from chexfound.evaluate.scores import Scores
from chexfound.host.machine import benchmark_line
from chexfound.recipe import check
from chexfound.recipe.schema import Evaluate, Split

PX = 128
HOG = {"orientations": 9, "pixels_per_cell": (16, 16), "cells_per_block": (2, 2), "block_norm": "L2-Hys"}
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, strongest first
MARGIN = 0.02  # of AUROC that the centralized arm may stay below the floor
MIN_JUDGED = 5  # validation images of each class
FINDING = "Pneumonia"
PACKAGES = ("numpy", "scikit-learn", "scikit-image")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="a store, or a folder of images to ingest")
    where.add_argument("--run", type=Path, help="a simulation's folder: hold its centralized arm against the floor")
    parser.add_argument("--finding", help=f"default {FINDING}, or what leads the report of a run without it")
    parser.add_argument("--seeds", default="0,1,2", help="of the split by patient (default 0,1,2)")
    parser.add_argument("--sources", help="comma-separated; default: all that label the finding")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        if options.run:
            return judge_run(options.run, options.finding, options.json)
        seeds = parse_seeds(options.seeds)
        finding = options.finding or FINDING
        with tempfile.TemporaryDirectory() as scratch:
            store = open_data(options.data, Path(scratch) / "store")
            views = source_views(store, options.sources.split(",") if options.sources else None)
            rows = measure(store, finding, seeds, views)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
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
        from chexfound.data.intake.ingest import ingest

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
        raise DataError(f"{folder}: the store holds images of {store.px} px; this floor is defined at {PX} px")
    return store


@dataclass(frozen=True)
class Part:
    """One source's images of one part of the split, with a known label."""

    source: str
    ids: np.ndarray
    labels: np.ndarray  # (n, 1)


Scorer = Callable[[Sequence[Part], float], list[np.ndarray]]


def source_views(store: Store, sources: Sequence[str] | None = None) -> list[View]:
    """One view a source, sorted; all sources if none is named."""
    for name in sources or ():
        if name not in store.sources:
            raise ConfigError(f"--sources {name!r}: the store has {', '.join(sorted(set(store.sources)))}")
    of = np.array(store.sources)
    return [View(store, store.ids[of == name], name) for name in sources or sorted(set(store.sources))]


def measure(
    store: Store, finding: str, seeds: Sequence[int], views: Sequence[View], split: Split | None = None
) -> list[dict[str, Any]]:
    """A row for each seed and view: AUROC on the view's test patients, with its interval."""
    if finding not in store.findings:
        raise ConfigError(f"--finding {finding!r}: no image has a label for it; there are {', '.join(store.findings)}")
    ids = np.concatenate([view.ids for view in views])
    known = ids[store.labels(ids, [finding])[:, 0] >= 0]
    features = dict(zip(known.tolist(), hog_features(store.pixels(known)), strict=True))
    return [row for seed in seeds for row in _measure_seed(store, finding, seed, views, features, split or Split())]


def judge_run(out: Path, finding: str | None, as_json: bool) -> int:
    """Hold a simulation's centralized arm against the floor, and tell its report.

    Raises: ConfigError if there is no such arm; DataError if both have figures at no site.
    """
    from chexfound.durable.files import write_json
    from chexfound.report.build import build
    from chexfound.report.run_folder import read
    from chexfound.report.story import listed, ranked_findings
    from sim.options import Options
    from sim.partition import partition

    options, run = Options.read(out), read(out)
    if "centralized" not in run.arms:
        raise ConfigError(f"{out}: the run has no centralized arm to hold against the floor; run it with that arm")
    finding = finding or (FINDING if FINDING in run.findings else [*ranked_findings(run), *run.findings][0])
    store = Store.open(out / "store" if (out / "store").is_dir() else Path(options.data))
    sites = partition(store, options.by, options.seeds[0]).sites
    views = [View.of(store, name, keys) for name, keys in sites.items()]
    recipe = check.validate(options.recipe, str(out / "simulation.json"))
    floor = measure(store, finding, options.seeds, views, recipe.split)
    metrics = json.loads((out / "metrics.json").read_text())
    arm = [row for one in (metrics, *metrics["replicates"]) for row in one["results"] if row["arm"] == "centralized"]
    held: list[dict[str, Any]] = []
    for site in sites:
        reached = [row["auroc"] for row in arm if (row["tested_on"], row["finding"]) == (site, finding)]
        bar = [row["auroc"] for row in floor if row["tested_on"] == site and row["auroc_ci"]]
        if not reached or len(reached) != len(bar) or None in reached:
            continue
        ours, rival = float(np.mean(reached)), float(np.mean(bar))
        held.append({"finding": finding, "tested_on": site, "seeds": list(options.seeds), "ours": ours, "rival": rival})
        line = benchmark_line("hog_floor", PACKAGES, **held[-1], unit="AUROC", ratio=ours / rival)
        print(line if as_json else f"{site:<24} centralized {ours:.3f}, HOG + logistic regression {rival:.3f}")
    if not held:
        raise DataError(f"{out}, {finding!r}: no site has a figure of both in each seed")
    short = [row["tested_on"] for row in held if row["ours"] < row["rival"] - MARGIN]
    metrics["floor"] = held
    metrics["void"] = (
        f"{finding}: the pooled model is more than {MARGIN:g} AUROC below HOG with a logistic regression "
        f"at {listed(short)}. The arms are too weak to compare."
        if short
        else None
    )
    write_json(out / "metrics.json", metrics)
    verdict = f"void: {metrics['void']}" if short else f"the comparison counts (bar: the floor less {MARGIN})"
    print(f"{verdict}\nreport: {build(out)}", file=sys.stderr)
    return 0


def hog_features(images: np.ndarray) -> np.ndarray:
    """(n, 128, 128) uint8 -> (n, 1764): 7 x 7 blocks of 2 x 2 cells of 9 orientations."""
    from skimage.feature import hog

    console = Console(stderr=True)
    shown = track(images, "HOG", console=console, transient=True, disable=not console.is_terminal)
    return np.array([hog(image, **HOG) for image in shown])


def _measure_seed(
    store: Store, finding: str, seed: int, views: Sequence[View], features: dict[int, np.ndarray], split: Split
) -> list[dict[str, Any]]:
    parts = {
        which: [
            _part(store, finding, view, view.split(Membership.simulated(seed, split), which), features)
            for view in views
        ]
        for which in ("train", "val", "test")
    }
    train = _stacked(parts["train"], features)
    labels = np.concatenate([part.labels for part in parts["train"]])

    def scored(held_out: Sequence[Part], c: float) -> list[np.ndarray]:
        scores, unscored = fit_scores(train, labels, _stacked(held_out, features), [finding], linear(c))
        if unscored:
            raise DataError(f"seed {seed}, {finding!r}: {unscored[finding]}")
        return np.split(scores, np.cumsum([len(part.ids) for part in held_out])[:-1])

    c = choose(parts["val"], scored, seed)
    trained = [part.source for part in parts["train"] if len(part.ids)]
    judge = Evaluate()
    rows = []
    for part, values in zip(parts["test"], scored(parts["test"], c), strict=True):
        scores = Scores([store.keys[index] for index in part.ids], part.labels, values, [finding])
        (row,) = result_rows("hog", trained, part.source, scores, judge.bootstrap_samples, judge.confidence, seed)
        del row["arm"]
        rows.append({"seed": seed, **row, "c": c, "trained_images": len(train)})
    return rows


def _stacked(parts: Sequence[Part], features: dict[int, np.ndarray]) -> np.ndarray:
    width = len(next(iter(features.values())))
    return np.array([features[index] for part in parts for index in part.ids.tolist()]).reshape(-1, width)


def _part(store: Store, finding: str, view: View, ids: np.ndarray, features: dict[int, np.ndarray]) -> Part:
    known = [index for index in ids.tolist() if index in features]
    return Part(view.name, np.array(known, np.int64), store.labels(known, [finding]))


def choose(validation: Sequence[Part], scored: Scorer, seed: int) -> float:
    """The penalty with the best mean AUROC over the sources' validation patients; ties: the stronger one.

    A source with under `MIN_JUDGED` validation images of a class has no say: its area is mostly noise.
    """
    judged = [part for part in validation if min((part.labels == 0).sum(), (part.labels == 1).sum()) >= MIN_JUDGED]
    if not judged:
        raise DataError(f"seed {seed}: no source has {MIN_JUDGED} validation images of each class to choose C by")
    means = []
    for c in PENALTIES:
        areas = [auroc(part.labels[:, 0], values[:, 0]) for part, values in zip(judged, scored(judged, c), strict=True)]
        means.append(np.mean(areas))
    return PENALTIES[int(np.argmax(means))]


def _told(row: dict[str, Any]) -> str:
    counts = f"n {row['n']:>4}, positive {row['positives']:>4}"
    where = f"seed {row['seed']}  {row['tested_on']:<24} {counts}  C {row['c']:g}"
    if row["auroc"] is None:
        return f"{where}  AUROC –  {row['reason']}"
    limits = f"[{row['auroc_ci'][0]:.3f}, {row['auroc_ci'][1]:.3f}]" if row["auroc_ci"] else f"({row['reason']})"
    return f"{where}  AUROC {row['auroc']:.3f} {limits}"


if __name__ == "__main__":
    sys.exit(main())
