"""What a site's checks of its weights cost: a round of pretraining without them over one with them.

    python benchmarks/site_checks.py --data DIR [--preset vits16-224] [--steps 250] [--batch 8] [--rounds 3] [--json]

One site on the images of DIR, the preset's model, its rounds in the clear: a round with `lineage` and one without in
turn, from the same weights.  With them the site holds what it is sent against the box of the recipe's steps, keeps it
on its disk, and measures how far its own steps led.  The first round, which derives the recipe's own weights, is told
apart (`first`): a run has one.  Values of a line: `ours` (with) and `rival` (without), medians of processor seconds of
all threads, which a busy machine moves less than the clock's; `ratio`, rival over ours; `checks`, the checks alone in
the median round, and `checks_wall` by the clock, with the disk.  The checks cost the same whatever a round's steps:
with fewer than the preset's (250) the ratio is lower than a run's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from chexfound.contract.request import Reply, Request
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.errors import ChexfoundError
from chexfound.host.machine import RUN_PACKAGES, benchmark_line
from chexfound.phases import dispatch
from chexfound.phases.site_state import Site
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from client.answer import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder to ingest")
    parser.add_argument("--preset", default="vits16-224", help="whose model and schedule (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of a round (default: the preset's)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="beside the first (default %(default)s)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="compute_precision.param_dtype=fp32"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    changes = {"train.saveckp_freq": 0, "health.eval_period_iterations": 0}
    changes |= {"train.local_steps": options.steps} if options.steps else {}
    try:
        recipe = recipes.load(options.preset, changes | recipes.parse_overrides(options.set))
        with tempfile.TemporaryDirectory() as scratch:
            ingest(options.data, Path(scratch) / "store", recipe.image_px)
            row = measure(recipe, Path(scratch), options.batch, options.rounds)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(benchmark_line("site_checks", RUN_PACKAGES, **row) if options.json else _line(row))
    return 0


def measure(recipe: Recipe, scratch: Path, batch: int, rounds: int) -> dict[str, Any]:
    """The figures of a line; `scratch` has the store."""
    store = Store.open(scratch / "store")
    sites = {
        checked: Site(view=View.of(store, "here", None), home=scratch / str(checked), lineage=checked)
        for checked in (True, False)
    }
    times: dict[bool, list[float]] = {True: [], False: []}
    checks: list[tuple[float, float]] = []
    tensors = initial_weights(recipe)
    tensors = {n: t for n, t in tensors.items() if recipe.teacher.policy != "rederive" or n.startswith("student.")}
    for number in range(rounds + 1):
        for checked in (True, False) if number % 2 else (False, True):
            began = time.process_time()
            reply, spent = _round(sites[checked], recipe, tensors, number, batch)
            times[checked].append(time.process_time() - began)
            checks += [spent] if checked else []
        tensors = reply.tensors
    ours, rival = (statistics.median(times[checked][1:]) for checked in (True, False))
    return {
        "ours": round(ours, 4),
        "rival": round(rival, 4),
        "unit": "s",
        "ratio": round(rival / ours, 4),
        "first": [round(times[checked][0], 2) for checked in (True, False)],
        "checks": round(statistics.median(taken for taken, _ in checks[1:]), 4),
        "checks_wall": round(statistics.median(wall for _, wall in checks[1:]), 4),
        "preset": recipe.name,
        "steps": recipe.train.local_steps,
        "batch": batch,
        "dtype": recipe.compute_precision.param_dtype,
    }


def _round(
    site: Site, recipe: Recipe, tensors: dict[str, Tensor], number: int, batch: int
) -> tuple[Reply, tuple[float, float]]:
    """What client/app.py does between a message and its reply; and the seconds of the checks, by both clocks."""
    steps = recipe.train.local_steps
    request = Request(
        phase="pretrain", round=number, step=number * steps, steps=steps, batch_size=batch, tensors=dict(tensors)
    )
    began = _clocks()
    held = provenance.admit(site, recipe, request, run=1)
    between = _clocks()
    reply = dispatch.run(site, recipe, held.request)
    again = _clocks()
    held.keep(reply)
    taken, wall = (b - a + d - c for a, b, c, d in zip(began, between, again, _clocks(), strict=True))
    return reply, (taken, wall)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _line(row: dict[str, Any]) -> str:
    return (
        f"a round of {row['steps']} steps of {row['batch']} images ({row['preset']}): {row['ours']:.2f} s with checks, "
        f"{row['rival']:.2f} s without, ratio {row['ratio']:.4f}; the checks alone {row['checks']:.2f} s "
        f"({row['checks_wall']:.2f} s by the clock); "
        f"the first round {row['first'][0]:.2f} and {row['first'][1]:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
