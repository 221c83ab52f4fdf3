"""What a simulated federation costs over the same work without one, and beside Flower's own engine.

    python benchmarks/simulation.py [--sites 8] [--rounds 2] [--steps 20] [--blocks 3] [--engine ray] [--json]

The work: pretraining by the preset `demo` on noise of its size, `--rounds` rounds of `--steps` steps, 64 images a step
in all.  Centralized, one site takes the steps on all images; federated, each of `--sites` takes them on its share, by
the in-process engine with one worker: as many images in either, in one process.  A block is one of each, in turn.
Seconds are by the clock, from an arm's beginning to its end, weights and journal on the disk included.

`simulation_overhead`: `ours`, federated seconds; `rival`, centralized seconds; `ratio`, rival over ours (1: the
federation costs nothing beside the work).  The federated steps are of smaller batches, of which a processor takes fewer
images a second; what that costs without any federation is `small_batches`: the centralized arm's seconds with the
batches of a site, as many images in all, over those with its own.

With `--engine ray` (needs the package ray) `simulation_engine` follows: `ours`, the in-process engine; `rival`, the
same rounds over the same ClientApp by `flwr.simulation.run_simulation`, whose nodes are Ray actors, one at a time;
`memory` has the largest memory of all processes together, MB, of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host.machine import RUN_PACKAGES, benchmark_line

IMAGES, PX, BATCH = 512, 128, 64
ARMS = ("federated", "centralized", "small_batches")
LOOK_S = 0.1  # between two looks at the memory


def plan_of(folder: Path, sites: int, rounds: int, steps: int) -> Any:
    """The arms of one block: a store of noise, dealt evenly."""
    from chexfound.data.store.index import Image
    from chexfound.data.store.writer import writing
    from chexfound.recipe import load as recipes
    from sim.arms.plan import ArmPlan

    changes = {
        "phases": ["pretrain"],
        "train.rounds": rounds,
        "train.local_steps": steps,
        "train.pooled_batch_size": BATCH,
        "federation.min_sites": sites,
        "health.eval_period_iterations": 0,
        "train.saveckp_freq": 0,
    }
    recipe, store = recipes.load("demo", changes), folder.parent / "store"
    if not store.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, PX, PX), np.uint8)
        with writing(store, PX) as writer:
            for number, image in enumerate(pixels):
                writer.add(Image(source="noise", patient=f"{number:04d}", file=f"{number:04d}.png"), image, {})
    patients = [f"noise/{number:04d}" for number in range(IMAGES)]
    dealt = {f"site-{place}": patients[place::sites] for place in range(sites)}
    plan = ArmPlan(recipe=recipe, store=store, sites=dealt, folder=folder)
    plan.write_shards()
    return plan


def seconds_of(plan: Any, arm: str, steps: int) -> float:
    """One arm, in this process."""
    from chexfound.recipe.curriculum import changed
    from sim.arms.alone import run_alone
    from sim.arms.federated import run_federated
    from sim.engine.pool import Pool

    began = time.monotonic()
    if arm == "federated":
        with Pool(1) as pool:
            run_federated(plan, arm, pool)
    elif arm == "centralized":
        run_alone(plan, arm)
    else:
        sites = len(plan.sites)
        train = replace(plan.recipe.train, pooled_batch_size=BATCH // sites, local_steps=steps * sites)
        small = changed(plan.recipe, train=train, federation=replace(plan.recipe.federation, min_sites=1))
        run_alone(replace(plan, recipe=small, sites={"all": sum(plan.sites.values(), [])}), "centralized")
    return time.monotonic() - began


def by_ray(plan: Any) -> float:
    """The federated arm by Flower's engine: the same rounds, over the same ClientApp."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from chexfound.recipe import load as recipes
    from server.exchange.grid import GridExchange
    from server.rounds.start import run_of
    from sim.arms.federated import node_config

    recipe, folder = plan.arm_recipe("federated"), plan.arm_folder("ray")
    configs = [node_config(plan, "ray", site) for site in plan.sites]
    run_config = {"recipe": recipes.to_json(recipe)}
    server, failed = ServerApp(), list[BaseException]()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run_of(recipe, GridExchange(grid, run_id=context.run_id), folder).run()
        except BaseException as error:
            failed.append(error)
            raise

    class Sited(ClientApp):
        """The ClientApp, told which site it is."""

        def __call__(self, message: Message, context: Context) -> Message:
            from client.app import app

            context.node_config = configs[int(context.node_config["partition-id"])]
            context.run_config = run_config
            return app(message, context)

    began = time.monotonic()
    run_simulation(
        server, Sited(), len(configs), backend_config={"client_resources": {"num_cpus": os.cpu_count() or 1}}
    )
    if failed or not (folder / "model.safetensors").exists():
        raise ChexfoundError(f"Flower's engine did not end its run: {failed or 'no model'}")
    return time.monotonic() - began


def main() -> int:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sites", type=int, default=8, help="of the federated arm (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of a round (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="default %(default)s")
    parser.add_argument("--engine", choices=["ray"], help="beside it, as the rival of the in-process engine")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if BATCH % given.sites:
        parser.error(f"--sites: {BATCH} images a step are dealt evenly; give a divisor of it")
    if given.child:
        folder, what = Path(given.child[0]), given.child[1]
        plan = plan_of(folder, given.sites, given.rounds, given.steps)
        print(json.dumps(by_ray(plan) if what == "ray" else seconds_of(plan, what, given.steps)))
        return 0
    try:
        for row in measure(given):
            name, values = row
            print(benchmark_line(name, RUN_PACKAGES, **values) if given.json else f"{name}: {json.dumps(values)}")
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(given: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The rows, of blocks in which each kind of run has its turn, in a process of its own."""
    kinds = [*ARMS, *([given.engine] if given.engine else [])]
    took: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for block in range(given.blocks):
            for kind in kinds:
                took[kind].append(_child(Path(scratch) / f"{block}-{kind}", kind, given))
    seconds = {kind: statistics.median(one for one, _ in runs) for kind, runs in took.items()}
    memory = {kind: round(max(most for _, most in runs)) for kind, runs in took.items()}
    ours = seconds["federated"]
    work = {"sites": given.sites, "rounds": given.rounds, "steps": given.steps}

    def row(rival: str, **more: Any) -> dict[str, Any]:
        figures = {"ours": round(ours, 2), "rival": round(seconds[rival], 2), "ratio": round(seconds[rival] / ours, 3)}
        return {**figures, "unit": "s", **work, **more}

    small = round(seconds["small_batches"] / seconds["centralized"], 3)
    rows = [("simulation_overhead", row("centralized", small_batches=small))]
    if given.engine:
        kept = {"ours": memory["federated"], "rival": memory[given.engine]}
        rows.append(("simulation_engine", row(given.engine, memory=kept)))
    return rows


def _child(folder: Path, kind: str, given: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one run, and the most memory, MB, of its process and of those that it started."""
    options = [f"--{name}={getattr(given, name)}" for name in ("sites", "rounds", "steps")]
    command = [sys.executable, __file__, *options, "--child", str(folder), kind]
    folder.mkdir()
    said = folder / "said"
    with open(said, "w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        most = 0.0
        while child.poll() is None:
            most = max(most, _resident(child.pid))
            time.sleep(LOOK_S)
    last = (said.read_text().strip().splitlines() or ["no word"])[-1]
    if child.returncode:
        raise ConfigError(f"{kind}: {last}")
    return float(json.loads(last)), most


def _resident(pid: int) -> float:
    """Megabytes of a process and its descendants; shared pages count for each."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        try:
            tasks = Path(f"/proc/{one}/task").iterdir()
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            todo += [int(word) for task in tasks for word in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return total


if __name__ == "__main__":
    sys.exit(main())
