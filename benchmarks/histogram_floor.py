"""The grey-level floors of a data set: what its scanners can buy at each site, without any pretraining.

    python benchmarks/histogram_floor.py --data DIR [--by source] [--finding Pneumonia] [--seeds 0,1,2] [--json]

DIR is a store, or a folder of images, which is then read into a temporary store.  The patients are dealt to sites
and split as `chexfound-sim` does with the same seeds; a line a seed and site tells the AUROC of the four variants
on the site's test patients, and which of them its validation patients chose: the arm `histogram` of such a run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store, is_store
from chexfound.data.store.split import Membership, View
from chexfound.errors import ChexfoundError, ConfigError
from chexfound.evaluate.floors import VARIANTS
from chexfound.evaluate.rows import result_rows
from chexfound.host.machine import benchmark_line
from chexfound.recipe import load as recipes
from chexfound.recipe.curriculum import changed
from sim.arms.compare import histogram_scores
from sim.partition import partition

PACKAGES = ("numpy", "scikit-learn")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a store, or a folder of images to ingest")
    parser.add_argument("--by", default="source", help="sites, as chexfound-sim deals them (default source)")
    parser.add_argument("--finding", default="Pneumonia", help="default %(default)s")
    parser.add_argument("--seeds", type=whole_numbers, default="0,1,2", help="of the split by patient (default 0,1,2)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = options.data
            if not is_store(path):
                path = Path(scratch) / "store"
                ingest(options.data, path, recipes.load("laptop").image_px)
            for row in measure(Store.open(path), options.by, options.finding, options.seeds):
                print(benchmark_line("histogram_floor", PACKAGES, **row) if options.json else _told(row), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(store: Store, by: str, finding: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Fit the floors of each seed; a row for each site whose test patients have the finding and have it not."""
    if finding not in store.findings:
        raise ConfigError(f"--finding {finding!r}: no image has a label for it; there are {', '.join(store.findings)}")
    views = {site: View.of(store, site, patients) for site, patients in partition(store, by, seeds[0]).sites.items()}
    for seed in seeds:
        recipe = recipes.load("laptop", {"seed": seed})
        recipe = changed(recipe, adapt=changed(recipe.adapt, findings=(finding,)))
        judge = recipe.evaluate
        by_arm = histogram_scores(recipe, store, views, Membership.of(recipe))
        for site, chosen in by_arm["histogram"].items():
            (row,) = result_rows("histogram", "", site, chosen, judge.bootstrap_samples, judge.confidence, seed)
            if row["auroc"] is None:
                continue
            areas = {
                name: result_rows(name, "", site, by_arm[f"histogram:{name}"][site], 1, judge.confidence, seed)[0]
                for name in VARIANTS
            }
            yield {
                "seed": seed,
                **{key: row[key] for key in ("tested_on", "finding", "n", "positives", "auroc", "auroc_ci")},
                "variant": chosen.variants[finding],
                "validation_auroc": chosen.validation.get(finding),
                "variants": {name: one["auroc"] for name, one in areas.items()},
                "unit": "AUROC",
            }


def _told(row: dict[str, Any]) -> str:
    areas = "  ".join(f"{name} {'–' if area is None else f'{area:.3f}'}" for name, area in row["variants"].items())
    limits = f" [{row['auroc_ci'][0]:.3f}, {row['auroc_ci'][1]:.3f}]" if row["auroc_ci"] else ""
    where = f"seed {row['seed']}  {row['tested_on']:<20} n {row['n']:>3}, positive {row['positives']:>3}"
    return f"{where}  {areas}  chosen: {row['variant']} {row['auroc']:.3f}{limits}"


if __name__ == "__main__":
    sys.exit(main())
