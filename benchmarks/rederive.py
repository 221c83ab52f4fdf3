"""How far the teacher that every site derives for itself is from the one that the steps would have made.

    python benchmarks/rederive.py --data DIR [--local-steps 5,50,250] [--json]

One site on the images of DIR, batches of 8, the recipe `laptop` but for the steps of a round.  After each round its own
teacher (the EMA of every step) is compared with the derived one (`teacher.policy: rederive`, which knows only
where the round began and ended) and, as rival, with the new student in the teacher's place.  Values of a line:
`ours` and `rival`, distances over how far the teacher went in the round (norms over all weights), `local_steps`,
`round`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError
from chexfound.host.machine import RUN_PACKAGES, benchmark_line
from chexfound.pretrain import teacher
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import load as recipes

BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder to ingest")
    parser.add_argument("--local-steps", default="5,50,250", help="of a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ingest(options.data, Path(scratch) / "store", recipes.load("laptop").image_px)
            store = Store.open(Path(scratch) / "store")
            for steps in map(int, options.local_steps.split(",")):
                for row in measure(store, steps, options.rounds):
                    print(benchmark_line("rederive", RUN_PACKAGES, **row) if options.json else _line(row), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(store: Store, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each round of so many steps."""
    values = {"train.local_steps": steps, "train.rounds": rounds, "teacher.policy": "rederive"}
    recipe = recipes.load("laptop", values)
    site = Pretrainer(recipe, store.pixels, len(store), 0)
    before = site.global_tensors(teacher=True)
    for number in range(rounds):
        site.run(number * steps, steps, BATCH)
        after = site.global_tensors(teacher=True)
        own, student = _part(after, "teacher."), _part(after, "student.")
        derived = _part(teacher.rederived(recipe, (number + 1) * steps, before, after), "teacher.")
        way = _distance(own, _part(before, "teacher."))
        ours, rival = (_distance(own, other) / way for other in (derived, student))
        yield {
            "ours": round(ours, 4),
            "rival": round(rival, 4),
            "unit": "of the teacher's way",
            "ratio": round(rival / ours, 2),
            "local_steps": steps,
            "round": number,
        }
        before = after


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5


def _line(row: Mapping[str, Any]) -> str:
    where = f"{row['local_steps']:4} steps a round, round {row['round'] + 1}"
    return f"{where}: off by {row['ours']:.3f} of the teacher's way; the student in its place {row['rival']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
