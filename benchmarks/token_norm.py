"""Which standardisation of the tokens a head needs, if any: `adapt.token_norm`, each on the same pretrained backbones.

    python benchmarks/token_norm.py --data DIR --work FOLDER [--recipe laptop] [--seeds 0,1,2] [--json]

DIR holds images of several sources with a manifest; each source is a site.  For each seed one backbone is pretrained
by the federation, and on it a federated head is trained and judged once for each kind, through ServerApp, messages and
ClientApps.  A line a kind and site has the mean AUROC of `none` over the seeds (`ours`), that of the other (`rival`),
their difference, and two 95 % intervals of its mean: `ci` over patients, each drawn once for all seeds and both heads,
and `seeds_ci` over seeds (Student's t).  What is done is kept in FOLDER, and the same command goes on from there; the
backbone of a seed is seed-N/average/backbone.safetensors, where benchmarks/federated_ssl.py keeps its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scipy.stats
from federated_ssl import VARIANTS, add_options, pretrained

from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host.machine import RUN_PACKAGES, benchmark_line

KINDS = ("none", "image", "learned")
SAMPLES, CONFIDENCE = 2000, 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--work", type=Path, required=True, help="where stores, backbones and runs are kept")
    options = parser.parse_args()
    logging.disable(logging.INFO)  # of this process, which a caller in it takes back
    try:
        for row in measure(options):
            line = benchmark_line("token_norm", RUN_PACKAGES, **row) if options.json else _line(row)
            print(line, flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind but `none`, and each site that has both classes among its test patients."""
    from chexfound.data.intake.ingest import ingest
    from chexfound.data.store.reader import Store
    from chexfound.recipe.load import load, parse_overrides

    seeds = [int(text) for text in options.seeds.split(",")]
    overrides = parse_overrides(options.set)
    path = options.work / "store"
    ingest(options.data, path, load(options.recipe, overrides).image_px)
    if options.finding not in (known := Store.open(path).findings):
        raise ConfigError(f"--finding {options.finding!r}: there are {', '.join(known)}")
    scores: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
    for seed in seeds:
        folder = options.work / f"seed-{seed}"
        recipe = load(options.recipe, overrides | {"seed": seed})
        backbone = _backbone(recipe, path, folder / "average")
        for kind in KINDS:
            scores[kind][seed] = _scores(recipe, kind, backbone, path, folder / f"token-norm-{kind}")
    yield from _rows(scores, options.finding)


def _backbone(recipe: Any, store: Path, folder: Path) -> Path:
    """A seed's, pretrained by the federation unless it is there."""
    from chexfound.recipe.curriculum import changed

    if not (file := folder / "backbone.safetensors").exists():
        pretrained(VARIANTS["average"], changed(recipe, phases=("pretrain",)), store, folder)
    return file


def _scores(recipe: Any, kind: str, backbone: Path, store_path: Path, folder: Path) -> dict[str, Any]:
    """Scores of each site's test patients by the head of a kind, trained unless it is there."""
    from flwr.app import Context, RecordDict

    from chexfound.data.store.reader import Store
    from chexfound.recipe import load as recipes
    from chexfound.recipe.curriculum import changed
    from server.app import app
    from sim.arms import federated
    from sim.arms import plan as arms
    from sim.engine.in_process import RUN_ID, InProcessGrid
    from sim.engine.pool import Pool
    from sim.partition import partition

    sites = partition(Store.open(store_path), "source", recipe.seed).sites
    recipe = changed(
        recipe,
        phases=("adapt", "evaluate"),
        adapt=changed(recipe.adapt, token_norm=kind),
        federation=changed(recipe.federation, min_sites=len(sites)),
    )
    plan = arms.ArmPlan(recipe=recipe, store=store_path.resolve(), sites=sites, folder=folder.resolve())
    plan.write_shards()
    if not arms.finished(plan, "federated"):
        run_config: dict[str, bool | float | int | str] = {
            "recipe": recipes.to_json(recipe),
            "run-dir": str(plan.arm_folder("federated")),
            "backbone": str(backbone.resolve()),
        }
        nodes = [federated.node_config(plan, "federated", site) for site in sites]
        context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        with Pool(1) as pool:
            app(InProcessGrid(pool, nodes, run_config), context)
        arms.discard(plan, "federated")
    return plan.scores("federated")


def _rows(scores: dict[str, dict[int, Any]], finding: str) -> Iterator[dict[str, Any]]:
    from chexfound.evaluate.areas import auroc
    from chexfound.evaluate.rows import across_seeds

    def area(one: Any, column: int) -> float:
        known = one.labels[:, column] >= 0
        return auroc(one.labels[known, column], one.scores[known, column])

    for kind in KINDS[1:]:
        for site in sorted({site for one in scores["none"].values() for site in one}):
            pairs = [(seed, scores["none"][seed][site], scores[kind][seed][site]) for seed in scores["none"]]
            found = across_seeds(pairs, site, SAMPLES, CONFIDENCE, ("none", kind))
            row = next((row for row in found if row["finding"] == finding), None)
            if row is None or not row["seeds"]:
                continue
            column = pairs[0][1].findings.index(finding)
            areas = [[area(one, column) for one in two] for seed, *two in pairs if seed in row["seeds"]]
            differences = [ours - rival for ours, rival in areas]
            yield {
                "kind": kind,
                "tested_on": site,
                "finding": finding,
                "seeds": row["seeds"],
                "ours": round(statistics.mean(ours for ours, _ in areas), 4),
                "rival": round(statistics.mean(rival for _, rival in areas), 4),
                "unit": "AUROC",
                "by_seed": [[round(value, 4) for value in pair] for pair in areas],
                "difference": round(row[f"mean_none_minus_{kind}"], 4),
                "ci": row["ci"],
                "seeds_ci": _over_seeds(differences),
                "reason": row["reason"],
            }


def _over_seeds(differences: list[float]) -> list[float] | None:
    if len(differences) < 2:
        return None
    mean, n = statistics.mean(differences), len(differences)
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / n**0.5
    return [round(mean - half, 4), round(mean + half, 4)]


def _line(row: dict[str, Any]) -> str:
    def shown(limits: list[float] | None) -> str:
        return f"[{limits[0]:+.3f}, {limits[1]:+.3f}]" if limits else "none"

    return (
        f"{row['tested_on']:<24} none {row['ours']:.3f}  {row['kind']} {row['rival']:.3f}  difference "
        f"{row['difference']:+.3f}, over patients {shown(row['ci'])}, over seeds {shown(row['seeds_ci'])}"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
