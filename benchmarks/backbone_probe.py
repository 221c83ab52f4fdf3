"""How much a frozen backbone knows: a logistic probe, cross-validated over the patients that are not test patients.

    python benchmarks/backbone_probe.py --run OUT [--finding Pneumonia] [--json]

OUT is a simulation's folder.  For each seed and arm, and for the random weights that all arms start
from: what the head pools (the last blocks' CLS tokens, patch statistics, a grid of patch means; once
without the grid), standardised, a logistic regression (C 0.001; 0.003 without the grid) trained on all
sites that have both classes, five folds by patient, the mean of three partitions; AUROC by site.  The
test patients are not looked at, so settings of pretraining may be chosen by it, and it has several
times the images that the validation patients have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from chexfound import rng
from chexfound.errors import ChexfoundError, ConfigError
from chexfound.evaluate.areas import auroc
from chexfound.host.machine import RUN_PACKAGES, benchmark_line

PARTITIONS, FOLDS = 3, 5
PENALTIES = {"plain": 0.003, "grid": 0.001}  # scikit-learn's C


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="a simulation's folder")
    parser.add_argument("--finding", default="Pneumonia")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        for row in measure(options.run, options.finding):
            if options.json:
                print(benchmark_line("backbone_probe", RUN_PACKAGES, **row), flush=True)
            else:
                print(
                    f"seed {row['seed']}  {row['arm']:<28} {row['tested_on']:<24} AUROC {row['auroc']:.3f}, "
                    f"without the grid {row['auroc_plain']:.3f}",
                    flush=True,
                )
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(out: Path, finding: str) -> Any:
    """Yield a row for each seed, arm and site."""
    import torch

    from chexfound.data.store.reader import Store
    from chexfound.data.store.split import View
    from chexfound.model import checkpoint
    from chexfound.pretrain.train import initial_weights
    from chexfound.recipe.check import validate
    from chexfound.recipe.curriculum import changed
    from sim.options import Options
    from sim.partition import partition

    options = Options.read(out)
    recipe = validate(options.recipe, str(out))
    torch.set_num_threads(recipe.threads)
    store = Store.open(out / "store" if (out / "store").is_dir() else Path(options.data))
    if finding not in store.findings:
        raise ConfigError(f"--finding {finding!r}: no image has a label for it; there are {', '.join(store.findings)}")
    views = [View.of(store, name, keys) for name, keys in partition(store, options.by, options.seeds[0]).sites.items()]
    for seed in options.seeds:
        seeded = changed(recipe, seed=seed)
        arms = {"random weights": checkpoint.with_prefix(initial_weights(seeded), "student.backbone.")}
        for path in sorted((out / "work" / f"seed-{seed}").glob("*/model.safetensors")):
            if path.parent.name not in ("random", "shuffled"):  # the same backbones again
                arms[path.parent.name] = checkpoint.with_prefix(checkpoint.load(path), "backbone.")
        held = [not_tested(view, seeded, finding) for view in views]
        held = [(name, ids) for name, ids in held if len(np.unique(store.labels(ids, [finding]))) == 2]
        for arm, tensors in arms.items():
            groups = [ids for _, ids in held]
            for (name, ids), plain, grid in zip(held, *probe(seeded, tensors, store, groups, finding), strict=True):
                row = {"seed": seed, "arm": arm, "tested_on": name, "finding": finding, "n": len(ids)}
                yield row | {"auroc": grid, "auroc_plain": plain}


def not_tested(view: Any, recipe: Any, finding: str) -> tuple[str, np.ndarray]:
    """A site's name, and its images that have a label and are not of test patients."""
    from chexfound.data.store.split import Membership

    test = set(view.split(Membership.of(recipe), "test").tolist())
    ids = np.array([place for place in view.ids.tolist() if place not in test], np.int64)
    return view.name, ids[view.store.labels(ids, [finding])[:, 0] >= 0]


def pooled(recipe: Any, tensors: dict[str, Any], store: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a frozen backbone's tokens are pooled to, float32 (n, channels): "plain", and "grid" with the grid too."""
    import torch

    from chexfound.adapt.features import tokens
    from chexfound.model import vit
    from chexfound.model.checkpoint import load_tensors
    from chexfound.model.heads import grid_means, token_statistics

    backbone = vit.build(recipe.student, recipe.input, recipe.position_px)
    load_tensors(backbone, tensors, list(backbone.state_dict()))
    patches, cls = tokens(backbone, store.pixels(ids), recipe.adapt.n_last_blocks)
    all_tokens = torch.from_numpy(patches)
    plain = np.concatenate([cls, token_statistics(all_tokens).numpy()], axis=1)
    grid = np.concatenate([plain, grid_means(all_tokens, recipe.adapt.glori_grid or 1).numpy()], axis=1)
    return {"plain": plain, "grid": grid}


def probe(
    recipe: Any, tensors: dict[str, Any], store: Any, groups: list[np.ndarray], finding: str
) -> tuple[list[float], list[float]]:
    """AUROC of each group's out-of-fold scores, without the grid and with it."""
    ids = np.concatenate(groups)
    labels = store.labels(ids, [finding])[:, 0]
    keys = [store.keys[place] for place in ids]
    scored = [
        out_of_fold(features, labels, keys, recipe.seed, PENALTIES[name])
        for name, features in pooled(recipe, tensors, store, ids).items()
    ]
    bounds = np.cumsum([0, *(len(group) for group in groups)])
    areas = [
        [float(auroc(labels[a:b], scores[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)] for scores in scored
    ]
    return areas[0], areas[1]


def out_of_fold(features: np.ndarray, labels: np.ndarray, keys: list[str], seed: int, c: float) -> np.ndarray:
    """Each image's score by models that did not see its patient."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scores = np.zeros(len(labels))
    for turn in range(PARTITIONS):
        fold = np.array([int(FOLDS * rng.unit_interval(seed, "probe", turn, key)) for key in keys])
        for number in range(FOLDS):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000))
            with threadpool_limits(1):
                model.fit(features[fold != number], labels[fold != number])
                scores[fold == number] += model.decision_function(features[fold == number])
    return scores


if __name__ == "__main__":
    sys.exit(main())
