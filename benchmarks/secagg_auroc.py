"""What a run under secure aggregation is worth beside the same run under plain FedAvg, and what chance does to both.

    python benchmarks/secagg_auroc.py [--data DIR] [--recipe demo] [--seeds 0,1,2] [--kinds ours,local,control] [--json]

For each seed the whole recipe (pretrain, adapt, evaluate) of the federated arm, four times: under plain FedAvg
(`rival`), under secure aggregation (`ours`), the same with Adam's moments that stay at the sites (`local`), and under
plain FedAvg on two threads (`control`), whose sums have another order and so other last bits, nothing else.  A line a
seed has the mean AUROC of each over the sites and findings, what the others differ by from `rival` (`…_difference`, of
the means; `…_apart`, the mean of the absolute differences by site and finding, which do not cancel; `…_most_apart`, the
largest of them), and how far the models' weights are apart; the last line has the means over the seeds, the largest of
all (`…_most_apart`) and, of the differences, the 95 % interval (Student's t).  If chance alone moves AUROC as far as
masks do, then the two runs are two draws of one thing, and only the mean over seeds can tell them apart.

--kinds: which of the last three to run beside `rival`, so that a look at masks alone takes two runs a seed.

DIR: images as `chexfound-sim` takes them, of at least four sites that label the same (default: phantoms of 4 hospitals
with 60 patients each, as `make demo` draws them).  A run that is done is kept in --work: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import scipy.stats

from chexfound.data.intake.ingest import ingest
from chexfound.data.phantom import generate
from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host.machine import benchmark_line
from chexfound.model import checkpoint
from chexfound.recipe import load as recipes

KINDS = {
    "rival": ("aggregation=fedavg", "threads=1"),
    "ours": ("aggregation=secagg", "threads=1"),
    "local": (
        "aggregation=secagg", "threads=1", "train.optimizer_state=local", "adapt.optimizer_state=local",
    ),
    "control": ("aggregation=fedavg", "threads=2"),
}  # fmt: skip
OTHERS = tuple(kind for kind in KINDS if kind != "rival")
PACKAGES = ("federated-chexfound", "flwr", "torch", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="images of four or more sites (default: phantoms)")
    parser.add_argument("--recipe", default="demo", help="a preset or a YAML file (default: demo)")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--kinds", default=",".join(OTHERS), help=f"beside rival; default: {','.join(OTHERS)}")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="as of chexfound-sim")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each (default: 2)")
    parser.add_argument("--work", type=Path, help="keep the runs there, and go on with what is there")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        kinds = options.kinds.split(",")
        if odd := set(kinds) - set(OTHERS):
            raise ConfigError(f"--kinds {','.join(sorted(odd))!r}: there are {', '.join(OTHERS)}")
        with tempfile.TemporaryDirectory() as scratch:
            work = options.work or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            for name, row in measure(options.data, options.recipe, options.set, seeds, kinds, options.jobs, work):
                print(benchmark_line(name, PACKAGES, **row) if options.json else f"{name}: {row}", flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(
    data: Path | None,
    recipe: str,
    settings: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str],
    jobs: int,
    work: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line a seed as it is done, then the line of all."""
    store = work / "store"
    if not store.exists():
        if data is None:
            data = work / "phantoms"
            generate(data, sites=4, patients=60)
        ingest(data, store, recipes.load(recipe).image_px)
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        asked = {
            seed: {
                kind: pool.submit(run, store, recipe, (*settings, *KINDS[kind]), seed, work / f"{kind}-{seed}")
                for kind in ("rival", *kinds)
            }
            for seed in seeds
        }
        for seed, runs in asked.items():
            folders = {kind: future.result() for kind, future in runs.items()}
            rows.append(one := compared(folders))
            yield "secagg_auroc_seed", {"seed": seed, "unit": "AUROC", **one}
    yield "secagg_auroc", {"recipe": recipe, "seeds": len(rows), "unit": "AUROC", **over_seeds(rows)}


def run(store: Path, recipe: str, settings: Sequence[str], seed: int, out: Path) -> Path:
    """`chexfound-sim` on one core; nothing where its figures are there already."""
    if (out / "metrics.json").exists():
        return out
    command = [sys.executable, "-m", "sim.cli", "--out", str(out), "--workers", "1"]
    if (out / "simulation.json").exists():  # which has all the rest
        command += ["--resume"]
    else:
        command += ["--data", str(store), "--recipe", recipe, "--arms", "federated", "--seeds", str(seed)]
        command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise ConfigError(f"chexfound-sim ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return out


def compared(folders: dict[str, Path]) -> dict[str, Any]:
    """Mean AUROCs over what all of them could be judged on; differences from the rival's; distance of the weights."""
    figures = {kind: aurocs(json.loads((folder / "metrics.json").read_text())) for kind, folder in folders.items()}
    common = set.intersection(*(set(one) for one in figures.values()))
    means = {kind: statistics.mean(one[key] for key in common) for kind, one in figures.items()}
    models = {
        kind: checkpoint.load(next(folder.glob("work/*/federated/model.safetensors")))
        for kind, folder in folders.items()
    }
    row: dict[str, Any] = {kind: round(mean, 4) for kind, mean in means.items()}
    for kind in (kind for kind in folders if kind != "rival"):
        apart = (models[kind][name].double() - models["rival"][name].double() for name in models["rival"])
        row[f"{kind}_difference"] = round(means[kind] - means["rival"], 4)
        away = [abs(figures[kind][key] - figures["rival"][key]) for key in common]
        row |= {f"{kind}_apart": round(statistics.mean(away), 4), f"{kind}_most_apart": round(max(away), 4)}
        row[f"{kind}_weights_apart"] = max(float(one.abs().max()) for one in apart)
    return row | {"figures": len(common)}


def aurocs(metrics: dict[str, Any]) -> dict[tuple[str, str], float]:
    """AUROC by site and finding of the federated arm."""
    rows = (row for row in metrics["results"] if row["arm"] == "federated" and row["auroc"] is not None)
    return {(row["tested_on"], row["finding"]): row["auroc"] for row in rows}


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, the differences with their intervals, and the ratio of the two mean AUROCs."""
    kinds = [kind for kind in KINDS if kind in rows[0]]
    values: dict[str, Any] = {kind: round(statistics.mean(row[kind] for row in rows), 4) for kind in kinds}
    for kind in kinds[1:]:
        differences = [row[f"{kind}_difference"] for row in rows]
        mean = statistics.mean(differences)
        values[f"{kind}_difference"] = round(mean, 4)
        values[f"{kind}_largest"] = max(differences, key=abs)
        values[f"{kind}_apart"] = round(statistics.mean(row[f"{kind}_apart"] for row in rows), 4)
        values[f"{kind}_most_apart"] = max(row[f"{kind}_most_apart"] for row in rows)
        if len(rows) > 1:
            half = scipy.stats.t.ppf(0.975, len(rows) - 1) * statistics.stdev(differences) / len(rows) ** 0.5
            values[f"{kind}_ci"] = [round(mean - half, 4), round(mean + half, 4)]
    return values | ({"ratio": round(values["ours"] / values["rival"], 4)} if "ours" in values else {})


if __name__ == "__main__":
    sys.exit(main())
