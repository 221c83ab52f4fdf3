"""Which remedy helps federated self-supervised pretraining: one variant after another, the same probe for all.

    python benchmarks/federated_ssl.py --data DIR --work FOLDER [--variants average,rederive] [--seeds 0,1,2] [--json]

DIR holds images of several sources with a manifest; each source is a site.  A variant is the recipe with a
few keys changed, pretrained through the federation's own code (ServerApp, messages, ClientApps; for the
pooled variants, the centralized arm's).  Then: the frozen backbone's AUROC by the probe of
`backbone_probe.py` (patients that are not test patients, cross-validated), each site's DINO loss over the
last 20 steps less log K (0: it learned nothing), seconds of pretraining, bytes that all sites sent.  What is
done is kept in FOLDER; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host.machine import RUN_PACKAGES, benchmark_line

LAST_STEPS = 20  # over which the losses are averaged


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The recipe with these keys changed, in an arm of the simulation, the patients dealt by a rule."""

    change: dict[str, Any] = field(default_factory=dict)
    arm: str = "federated"
    by: str = "source"


LOOK = {"crops.tone_curve": 1.0, "crops.detail": 0.7, "crops.noise": 0.03}  # docs/decisions/0007
VARIANTS = {
    "random": Variant(arm="random"),  # not pretrained at all
    "average": Variant(),  # the preset: teacher and moments averaged
    "rederive": Variant(change={"teacher.policy": "rederive"}),
    "local": Variant(change={"teacher.policy": "local"}),
    "queue-4": Variant(change={"train.sinkhorn_queue": 4}),
    "queue-16": Variant(change={"train.sinkhorn_queue": 16}),
    "batch-x2": Variant(change={"train.pooled_batch_size": 64}),
    "batch-x4": Variant(change={"train.pooled_batch_size": 128}),  # each site's batch is the centralized arm's
    "ibot-0.5": Variant(change={"ibot.loss_weight": 0.5}),
    "ibot-3": Variant(change={"ibot.loss_weight": 3.0}),
    "ibot-only": Variant(change={"dino.loss_weight": 0.0}),
    "jitter-0.3": Variant(change={"crops.jitter": 0.3}),
    "tones": Variant(change={"crops.tone_curve": 1.0}),
    "look": Variant(change=LOOK),
    "look-image": Variant(change=LOOK | {"crops.look_per_image": True}),
    "koleo-0": Variant(change={"dino.koleo_loss_weight": 0.0}),
    "koleo-0.3": Variant(change={"dino.koleo_loss_weight": 0.3}),
    "steps-1": Variant(change={"train.local_steps": 1, "train.rounds": 300}),  # a round a step
    "by-size": Variant(change={"train.deal": "by_size"}),  # the batch dealt by the sites' images
    "iid": Variant(by="iid:4"),  # control: the same federation, patients dealt by lot
    "centralized": Variant(arm="centralized"),
    "one-share": Variant(change={"train.pooled_batch_size": 8}, arm="centralized"),  # pooled images, one site's batch
    "alone": Variant(arm="local"),  # the first site alone, with the work of all
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, seeds="0")
    parser.add_argument("--work", type=Path, required=True, help="where stores, runs and results are kept")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which, in this order")
    options = parser.parse_args()
    logging.disable(logging.INFO)  # of this process, which a caller in it takes back
    rows: list[dict[str, Any]] = []
    try:
        for seed in (int(text) for text in options.seeds.split(",")):
            for name in options.variants.split(","):
                rows.append(measure(name, seed, options))
                if options.json:
                    print(benchmark_line("federated_ssl", RUN_PACKAGES, **rows[-1]), flush=True)
                else:
                    print(_line(rows[-1]), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not options.json:
        print(_table(rows))
    return 0


def add_options(parser: argparse.ArgumentParser, seeds: str = "0,1,2") -> None:
    """Those of each benchmark that pretrains by a recipe, seed by seed, and judges one finding."""
    parser.add_argument("--data", type=Path, required=True, help="a folder with manifests")
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, in all it does")
    parser.add_argument("--seeds", default=seeds)
    parser.add_argument("--finding", default="Pneumonia")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A variant's row: from its folder if it is done, else by pretraining (on) and probing it."""
    from chexfound.data.intake.ingest import ingest
    from chexfound.data.store.reader import Store
    from chexfound.durable.files import write_json
    from chexfound.recipe import load as recipes

    if name not in VARIANTS:
        raise ConfigError(f"--variants {name!r}: there are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    common = {"seed": seed, "phases": ["pretrain"]} | recipes.parse_overrides(options.set)
    recipe = recipes.load(options.recipe, common | variant.change)
    path = options.work / "store"
    ingest(options.data, path, recipe.image_px)
    store = Store.open(path)
    if options.finding not in store.findings:
        raise ConfigError(f"--finding {options.finding!r}: there are {', '.join(store.findings)}")
    kept = options.work / f"seed-{seed}" / name / "row.json"
    of = {"recipe_sha256": recipes.digest(recipe), "store_sha256": store.digest(), "finding": options.finding}
    if kept.is_file():
        row: dict[str, Any] = json.loads(kept.read_text())
        if {key: row.pop(key) for key in of} == of:
            return row | {"finding": options.finding}
    row = {"variant": name, "seed": seed, **pretrained(variant, recipe, path, kept.parent)}
    row |= {"auroc": {}, "auroc_plain": {}, "n": {}}
    for site, values in _probed(recipe, kept.parent, store, options.finding).items():
        for key, value in values.items():
            row[key][site] = value
    write_json(kept, row | of)
    return row | {"finding": options.finding}


def pretrained(variant: Variant, recipe: Any, store_path: Path, folder: Path) -> dict[str, Any]:
    """Pretrain, or go on; leaves backbone.safetensors in the folder."""
    from chexfound.data.store.reader import Store
    from chexfound.model import checkpoint
    from chexfound.pretrain.train import initial_weights
    from chexfound.recipe.curriculum import changed
    from server.rounds.result import costs, history
    from sim.arms import alone, federated
    from sim.arms import plan as arms
    from sim.engine.pool import Pool
    from sim.partition import partition

    if variant.arm == "random":
        checkpoint.save(
            folder / "backbone.safetensors", checkpoint.with_prefix(initial_weights(recipe), "student.backbone.")
        )
        return {"seconds": 0.0, "bytes_up": 0, "dino_less_log_k": {}}
    sites = partition(Store.open(store_path), variant.by, recipe.seed).sites
    recipe = changed(recipe, federation=changed(recipe.federation, min_sites=len(sites)))
    plan = arms.ArmPlan(recipe=recipe, store=store_path.resolve(), sites=sites, folder=(folder / "run").resolve())
    plan.write_shards()
    arm = f"local:{next(iter(sites))}" if variant.arm == "local" else variant.arm
    if not arms.finished(plan, arm):
        with Pool(1) as pool:
            if arm == "federated":
                federated.run_federated(plan, arm, pool)
            else:
                alone.run_alone(plan, arm)
        arms.discard(plan, arm)
    out = plan.arm_folder(arm)
    model = checkpoint.load(out / "model.safetensors")
    checkpoint.save(folder / "backbone.safetensors", checkpoint.with_prefix(model, "backbone."))
    seconds, moved = costs(out)
    last: dict[str, list[float]] = {}
    for row in history(out)["pretrain"]:
        last.setdefault(row["site"], []).append(row["dino"] - row["log_k"])
    return {
        "seconds": seconds["pretrain"],
        "bytes_up": moved["pretrain"]["up"] if arm == "federated" else 0,
        "dino_less_log_k": {site: round(float(np.mean(values[-LAST_STEPS:])), 3) for site, values in last.items()},
    }


def _probed(recipe: Any, folder: Path, store: Any, finding: str) -> dict[str, dict[str, Any]]:
    """By source that has both classes: AUROC with the grid and without, and on how many images."""
    from backbone_probe import not_tested, probe

    from chexfound.data.store.split import View
    from chexfound.model import checkpoint
    from sim.partition import partition

    views = [View.of(store, name, keys) for name, keys in partition(store, "source", recipe.seed).sites.items()]
    held = [not_tested(view, recipe, finding) for view in views]
    held = [(name, ids) for name, ids in held if len(np.unique(store.labels(ids, [finding]))) == 2]
    backbone = checkpoint.load(folder / "backbone.safetensors")
    plain, grid = probe(recipe, backbone, store, [ids for _, ids in held], finding)
    return {
        name: {"auroc": with_grid, "auroc_plain": without, "n": len(ids)}
        for (name, ids), without, with_grid in zip(held, plain, grid, strict=True)
    }


def _line(row: dict[str, Any]) -> str:
    areas = "  ".join(f"{site[:14]} {row['auroc'][site]:.3f} ({row['auroc_plain'][site]:.3f})" for site in row["auroc"])
    losses = " ".join(f"{value:+.2f}" for value in row["dino_less_log_k"].values())
    return (
        f"seed {row['seed']}  {row['variant']:<12} {areas}  DINO − log K {losses or 'none'}  "
        f"{row['seconds']:.0f} s  {row['bytes_up'] / 1e6:.0f} MB up"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a variant a line; AUROC with the grid (without), the mean of its seeds."""
    sites = list(dict.fromkeys(site for row in rows for site in row["auroc"]))
    lines = ["", "| variant | seeds | " + " | ".join(sites) + " | DINO − log K | s | MB up |"]
    lines.append("|---" * (5 + len(sites)) + "|")
    for name in dict.fromkeys(row["variant"] for row in rows):
        those = [row for row in rows if row["variant"] == name]

        def mean(key: str, site: str, those: list[dict[str, Any]] = those) -> float:
            return float(np.mean([row[key][site] for row in those]))

        losses = [np.mean(list(row["dino_less_log_k"].values())) for row in those if row["dino_less_log_k"]]
        lines.append(
            f"| {name} | {' '.join(str(row['seed']) for row in those)} | "
            + " | ".join(f"{mean('auroc', site):.3f} ({mean('auroc_plain', site):.3f})" for site in sites)
            + f" | {f'{np.mean(losses):+.2f}' if losses else ''} | {np.mean([row['seconds'] for row in those]):.0f} "
            f"| {np.mean([row['bytes_up'] for row in those]) / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
