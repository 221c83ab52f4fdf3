"""What each rank does in test_ranks.py: every scenario of a folder in turn, so that torch is imported once.

Run by `chexfound.pretrain.launch.Ranks` with the folder as its argument.  `scenarios.json` lists them; the
first rank leaves NAME.safetensors (the state) and NAME.json (the rows) of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chexfound import recipe as recipes
from chexfound.errors import ChexfoundError
from chexfound.model import checkpoint
from chexfound.pretrain import ranks
from chexfound.pretrain.train import Pretrainer
from chexfound.schema import ARCHS


def do(folder: Path, name: str, scenario: dict[str, Any]) -> None:
    recipe = recipes.validate(scenario["recipe"], name)
    images = np.load(folder / "images.npy")
    rows: list[dict[str, Any]] = []
    state: dict[str, torch.Tensor] = {}
    try:
        one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
        if scenario.get("state"):
            one.load_state(checkpoint.load(folder / scenario["state"]))
        rows = one.run(scenario.get("first", 0), scenario["steps"], scenario["batch"])
        state = one.state()
    except ChexfoundError as error:
        rows = [{"error": f"{type(error).__name__}: {error}"}]
    if ranks.first():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        checkpoint.save(folder / f"{name}.safetensors", state)
    else:
        assert not state


def main() -> None:
    torch.set_num_threads(1)
    ARCHS["vit_demo"] = (24, 2, 2)  # as in conftest.py
    folder = Path(sys.argv[1])
    with ranks.together():
        for name, scenario in json.loads((folder / "scenarios.json").read_text()).items():
            do(folder, name, scenario)


if __name__ == "__main__":
    main()
