"""How far a coordinator can lead each weight of a run by drifting one box a round: the reach of the presets.

    python benchmarks/weights_reach.py [PRESET …]

A row a preset, as docs/threat-model.md has it: how far all steps of pretraining may move a weight of the last
block of the backbone (the box of chexfound/pretrain/bounds.py, without decay), and those of the round in the middle.
"""

from __future__ import annotations

import sys

from chexfound.pretrain import schedules
from chexfound.pretrain.bounds import UpdateBound, corrections
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe

HEADER = ("| preset | steps | reach of the run | of its middle round |", "|---|---|---|---|")
LOOKED_AT = 5000  # steps of a run: its schedules are smooth


def row(name: str) -> str:
    """A line of the table."""
    recipe = recipes.load(name)
    steps, middle = recipe.train.local_steps, recipe.pretrain_rounds // 2
    bound = UpdateBound.of(recipe, "pretrain", range(middle * steps, (middle + 1) * steps))
    share = bound.parameter(f"backbone.blocks.{ARCHS[recipe.student.arch][1] - 1}.mlp.fc2.weight", 2)[0]
    return f"| `{name}` | {recipe.pretrain_steps:,} | {share * reach(recipe):.3g} | {share * bound.travel[0]:.2g} |"


def reach(recipe: Recipe) -> float:
    """Of all steps, by every so many of them."""
    apart = max(1, recipe.pretrain_steps // LOOKED_AT)
    most = corrections(recipe.optim.adamw_beta1, recipe.optim.adamw_beta2, recipe.pretrain_steps)
    return sum(schedules.at(recipe, step).lr * apart * float(most[step]) for step in range(0, len(most), apart))


def main() -> int:
    print("\n".join([*HEADER, *(row(name) for name in sys.argv[1:] or recipes.presets())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
