"""Self-supervised pretraining teaches the backbone something: a frozen probe on it against the same on random weights.

    python benchmarks/ssl_learns.py --data DIR [--seeds 0,1,2] [--json]

DIR holds images of several sources with a manifest.  For each seed, which sets the split by patient, the
initial weights and all else: the pooled training images' pretraining without labels (no federation), and
the very weights that it began with.  Both see the same input (per-image z-score) through the same blocks;
what is pooled of their frozen tokens (`backbone_probe.py`: CLS and patch statistics; the grid of means
beside it), the logistic regression and its penalty are the same.  It is fitted on the training and
validation patients of all sources that have both classes, and judged on each one's test patients.
The claim: the mean over seeds of the paired difference in AUROC has an interval (95 %, patients drawn
once for all seeds) above 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from backbone_probe import PENALTIES, pooled
from federated_ssl import add_options

from chexfound.errors import ChexfoundError, ConfigError
from chexfound.evaluate.areas import auroc
from chexfound.evaluate.rows import across_seeds
from chexfound.evaluate.scores import Scores
from chexfound.host.machine import RUN_PACKAGES, benchmark_line

SAMPLES, CONFIDENCE = 2000, 0.95
STEPS = {"train.rounds": 120}  # of 5: twice the preset's, whose loss is still falling; within 30 CPU-minutes
ARMS = ("pretrained", "random")
Judged = dict[str, Scores]  # by source


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    options = parser.parse_args()
    try:
        for row in measure(options):
            print(benchmark_line("ssl_learns", RUN_PACKAGES, **row) if options.json else _line(row), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each source and kind of pooling: the means over the seeds, and whether the claim holds."""
    from chexfound.data.intake.ingest import ingest
    from chexfound.data.store.reader import Store
    from chexfound.recipe import load as recipes

    overrides = STEPS | recipes.parse_overrides(options.set)
    seeds = [int(text) for text in options.seeds.split(",")]
    recipe = recipes.load(options.recipe, overrides | {"seed": seeds[0]})
    with tempfile.TemporaryDirectory() as folder:
        ingest(options.data, Path(folder) / "store", recipe.image_px)
        store = Store.open(Path(folder) / "store")
        if options.finding not in store.findings:
            raise ConfigError(f"--finding {options.finding!r}: there are {', '.join(store.findings)}")
        judged = []
        for seed in seeds:
            judged.append(_judged(recipes.load(options.recipe, overrides | {"seed": seed}), store, options.finding))
    for pooling in PENALTIES:
        for source in sorted({source for one in judged for source in one[pooling, "random"]}):
            triples = [
                (seed, *(one[pooling, arm][source] for arm in ARMS))
                for seed, one in zip(seeds, judged, strict=True)
                if source in one[pooling, "random"]  # a rare class may have no patient in a part of a seed's split
            ]
            (row,) = across_seeds(triples, source, SAMPLES, CONFIDENCE, ARMS)
            areas = [[auroc(arm.labels[:, 0], arm.scores[:, 0]) for arm in pair] for _, *pair in triples]
            yield {
                "pooling": pooling,
                "tested_on": source,
                "finding": options.finding,
                "seeds": row["seeds"],
                "ours": _mean([ours for ours, _ in areas]),
                "rival": _mean([rival for _, rival in areas]),
                "unit": "AUROC",
                "by_seed": [[None if math.isnan(area) else round(area, 4) for area in pair] for pair in areas],
                "difference": row["mean_pretrained_minus_random"],
                "ci": row["ci"],
                "reason": row["reason"],
                "holds": row["ci"] is not None and row["ci"][0] > 0,
                "steps": recipe.pretrain_steps,
                "cpu_s": round(time.process_time(), 1),
            }


def _mean(areas: list[float]) -> float | None:
    known = [area for area in areas if not math.isnan(area)]
    return float(np.mean(known)) if known else None


def _judged(recipe: Any, store: Any, finding: str) -> dict[tuple[str, str], Judged]:
    """By (pooling, arm), each source's test patients with their scores."""
    import torch

    from chexfound.data.store.split import Membership, View
    from chexfound.model import checkpoint
    from chexfound.pretrain.train import initial_weights
    from sim.partition import partition

    torch.set_num_threads(recipe.threads)
    views = [View.of(store, name, keys) for name, keys in partition(store, "source", recipe.seed).sites.items()]
    backbones = {
        "pretrained": _pretrained(recipe, store),
        "random": checkpoint.with_prefix(initial_weights(recipe), "student.backbone."),
    }
    fit, test = [], {}
    for view in views:
        parts = {part: view.split(Membership.of(recipe), part) for part in ("train", "val", "test")}
        known = {part: ids[store.labels(ids, [finding])[:, 0] >= 0] for part, ids in parts.items()}
        if all(len(np.unique(store.labels(ids, [finding]))) == 2 for ids in (known["train"], known["test"])):
            fit.append(np.concatenate([known["train"], known["val"]]))
            test[view.name] = known["test"]
    if not test:
        raise ConfigError(f"no source has both classes of {finding!r} among its training and its test patients")
    judged: dict[tuple[str, str], Judged] = {}
    for arm, weights in backbones.items():
        learnt = pooled(recipe, weights, store, np.concatenate(fit))
        asked = pooled(recipe, weights, store, np.concatenate(list(test.values())))
        for pooling, c in PENALTIES.items():
            model = _fitted(learnt[pooling], store.labels(np.concatenate(fit), [finding])[:, 0], c)
            scores = np.split(
                model.decision_function(asked[pooling]), np.cumsum([len(ids) for ids in test.values()])[:-1]
            )
            judged[pooling, arm] = {
                name: Scores(
                    [store.keys[place] for place in ids], store.labels(ids, [finding]), part[:, None], [finding]
                )
                for (name, ids), part in zip(test.items(), scores, strict=True)
            }
    return judged


def _pretrained(recipe: Any, store: Any) -> dict[str, Any]:
    """The teacher's backbone after all steps on the pooled training images, in one go."""
    from chexfound.data.store.split import Membership, View
    from chexfound.model import checkpoint
    from chexfound.pretrain.train import Pretrainer

    ids = View(store, store.ids, "all").split(Membership.of(recipe), "train")
    trainer = Pretrainer(recipe, lambda places: store.pixels(ids[places]), len(ids), 0)
    trainer.run(0, recipe.pretrain_steps, recipe.train.pooled_batch_size)
    return checkpoint.with_prefix(trainer.global_tensors(teacher=True), "teacher.backbone.")


def _fitted(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000)).fit(features, labels)


def _line(row: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}"

    interval = f"[{row['ci'][0]:+.3f}, {row['ci'][1]:+.3f}]" if row["ci"] else f"no interval ({row['reason']})"
    difference = "none" if row["difference"] is None else f"{row['difference']:+.3f}"
    return (
        f"{row['tested_on']:<24} {row['pooling']:<6} pretrained {shown(row['ours'])}  random {shown(row['rival'])}  "
        f"difference {difference} {interval}  {'holds' if row['holds'] else 'does not hold'}  {row['cpu_s']:.0f} CPU s"
    )


if __name__ == "__main__":
    sys.exit(main())
