"""What each rank does in test_ranks.py: every scenario of a folder in turn, so that torch is imported once.

Run by `chexfound.parallel.launch.Ranks` with the folder as its argument.  `scenarios.json` lists them; the
first rank leaves NAME.safetensors (the state) and NAME.json (the rows) of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chexfound.errors import ChexfoundError
from chexfound.model import checkpoint
from chexfound.parallel import group
from chexfound.pretrain import positions
from chexfound.pretrain.health.probe import Probe
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import check
from chexfound.recipe.schema import ARCHS, Recipe


def trainer(recipe: Recipe, images: np.ndarray, first: int = 0, state: dict[str, torch.Tensor] | None = None) -> Any:
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0, step=first)
    if state:
        one.load_state(positions.enter(state, recipe, first))
    return one


def probe(recipe: Recipe, images: np.ndarray) -> Probe | None:
    """Of images that are bright or dark, two a patient, labelled by it."""
    labels = (images.mean((1, 2)) > np.median(images.mean((1, 2)))).astype(np.int8)[:, None]
    patients = [str(number // 2) for number in range(len(images))]
    every = recipe.health.eval_period_iterations
    look = Probe(
        lambda places: images[places], labels, patients, every=every, limit=len(images), seed=0, roster_index=0
    )
    return look if every else None


def do(folder: Path, name: str, scenario: dict[str, Any]) -> None:
    recipe = check.validate(scenario["recipe"], name)
    images = np.load(folder / "images.npy")
    rows: list[dict[str, Any]] = []
    state: dict[str, torch.Tensor] = {}
    first = scenario.get("first", 0)
    group.barrier()  # the state of another scenario is written
    try:
        before = checkpoint.load(folder / scenario["state"]) if scenario.get("state") else None
        one = trainer(recipe, images, first, before)
        rows = one.run(first, scenario["steps"], scenario["batch"], probe=probe(recipe, images))
        state = one.state()
    except ChexfoundError as error:
        rows = [{"error": f"{type(error).__name__}: {error}"}]
    if group.first():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        checkpoint.save(folder / f"{name}.safetensors", state)
    else:
        assert not state


def main() -> None:
    torch.set_num_threads(1)
    ARCHS["vit_demo"] = (24, 2, 2)  # as in conftest.py
    folder = Path(sys.argv[1])
    with group.process_group():
        for name, scenario in json.loads((folder / "scenarios.json").read_text()).items():
            do(folder, name, scenario)


if __name__ == "__main__":
    main()
