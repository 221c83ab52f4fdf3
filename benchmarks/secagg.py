"""Secure aggregation's arithmetic: a site's quantising and masking against Flower's, and the coordinator's unmasking.

    python benchmarks/secagg.py [--only client,vitl,server,round] [--rounds 5] [--json]

client: nanoseconds of processor time a value, one thread, at 4 peers and with the self-mask, in turns in this process.
Ours: `chexfound.secagg.mask.masked`.  Rival: the functions of the installed Flower's legacy SecAgg+, called as its
client mod calls them (weighting, quantising, self-mask, a mask for each peer, modulus), with its defaults for clipping
range, quantization range and modulus, on the same values.  Keys are agreed before on both sides.  `secagg_client` is
over 8 blocks of ViT-L (101 million values), where each of Flower's arrays is memory new from the system, as in a real
payload; `secagg_client_block` over one, where its allocator has some of the last round's left.  `ours_clipping` is ours
where some values in each tensor are out of range.

vitl: ViT-L's student with its heads, by the preset's shapes, at 4 peers; in a process of its own, whose largest
resident memory less what it had before is held against the payload (which `out` alone takes once).  `first` is the
first payload, for which the system has to find that memory; the others write over it.

server: what the coordinator does to unmask a sum in which a tenth of n sites is missing: shares joined, secrets of each
pair with a missing site derived again, keystreams taken off.  Keystreams are measured on a smaller vector and scaled to
ViT-L's values; the rest is measured as it is.

round: a whole round of pretraining in the simulation, four phantom hospitals in this process with the model of the
preset `demo`, under secure aggregation and (the rival) plain FedAvg, in turns.  Seconds by the clock, which has the
disk's, and of the processor, of which `over_plain` is ours over the rival's; `stages` are processor seconds of ours,
each with what the coordinator does as replies come; `rest` is what it does between and after: the sum unmasked,
checked, written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from chexfound.contract.request import Reply, Request
from chexfound.data.intake.ingest import ingest
from chexfound.data.phantom import generate
from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError, ConfigError, SiteError
from chexfound.host.machine import benchmark_line
from chexfound.recipe import load as recipes
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe
from chexfound.secagg import shamir
from chexfound.secagg.fixed import Layout, Section
from chexfound.secagg.mask import Mask, add_masks, masked
from chexfound.secagg.messages import STAGES
from server.exchange.grid import GridExchange
from server.exchange.protocol import Missing
from server.rounds.start import run_of
from sim.arms.federated import node_config
from sim.arms.plan import ArmPlan
from sim.engine.in_process import RUN_ID, InProcessGrid
from sim.engine.keys import give_keys
from sim.engine.pool import Pool
from sim.partition import partition

PEERS = 4
# Matrices and vectors of a block of ViT-L (attention in and out, MLP in and out).
BLOCK = [(3072, 1024), (3072,), (1024, 1024), (1024,), (4096, 1024), (4096,), (1024, 4096), (1024,)]
BLOCKS = 8  # of the line `secagg_client`: so large that its memory is not what the last round gave back
SPREAD, RANGE, WEIGHT = 0.02, 0.5, 0.7  # of the values, a normal distribution; of w·v; of the site
NARROW = 0.04  # a range that four values in a thousand are out of
CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 4_194_304, 4_294_967_296  # SecAggPlusWorkflow's defaults
FULL = 419_700_000  # values of ViT-L with both heads at full width; the preset's are 401.8 million
COHORTS = {8: 6, 32: 22, 128: 86}  # n: t, for c of about n/4: 2t > n + c
SMALL = 2**21  # values of the line `server`
PACKAGES = ("federated-chexfound", "flwr", "numpy", "cryptography")
HOSPITALS, PATIENTS = 4, 12  # of the line `round`
LINES = ("client", "vitl", "server", "round")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(LINES), help=f"some of {', '.join(LINES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        for name, row in measure(options.only.split(","), options.rounds):
            print(benchmark_line(name, PACKAGES, **row) if options.json else f"{name}: {row}", flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(lines: Sequence[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The asked lines, as they are done."""
    if odd := sorted(set(lines) - set(LINES)):
        raise ConfigError(f"--only {odd[0]!r}: there are {', '.join(LINES)}")
    if "client" in lines:
        yield "secagg_client", client(BLOCK * BLOCKS, rounds)
        yield "secagg_client_block", client(BLOCK, 2 * rounds)
    if "vitl" in lines:
        yield "secagg_vitl", vitl(vitl_shapes(), rounds)
    if "server" in lines:
        for n, t in COHORTS.items():
            yield "secagg_server", server(n, t, SMALL, FULL)
    if "round" in lines:
        yield "secagg_round", whole_round(recipes.load("demo"), rounds)


# -- a site, against Flower


def client(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Nanoseconds a value of both, in turns; and of ours where values have to be clipped."""
    values = normal(shapes)
    seeds = [os.urandom(32) for _ in range(PEERS + 1)]
    sides = {
        "ours": Ours(values, RANGE),
        "ours_clipping": Ours(values, NARROW),
        "rival": lambda: theirs(values, seeds),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    count = sum(math.prod(shape) for shape in shapes)
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            seconds = processor_seconds(side)
            if round_:  # the first one warms up
                took[name].append(seconds / count * 1e9)
    ours, clipping, rival = (statistics.median(took[name]) for name in ("ours", "ours_clipping", "rival"))
    ratios = [theirs_ / ours_ for ours_, theirs_ in zip(took["ours"], took["rival"], strict=True)]
    return {
        "ours": round(ours, 2), "rival": round(rival, 2), "unit": "ns of processor time a value",
        "ratio": round(rival / ours, 2), "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "ours_clipping": round(clipping, 2), "peers": PEERS, "values": count, "rounds": rounds,
    }  # fmt: skip


class Ours:
    """A site's masked payload: `masked` into arrays that are there."""

    def __init__(self, values: Sequence[np.ndarray], bound: float) -> None:
        sections = tuple(Section(str(place), one.shape, 32, bound) for place, one in enumerate(values))
        self.layout = Layout(sections, PEERS + 1)
        self.values = {section.name: one for section, one in zip(sections, values, strict=True)}
        self.weights: dict[str, float | np.ndarray] = dict.fromkeys(self.values, WEIGHT)
        self.out = self.layout.zeros()

    def __call__(self) -> None:
        """With fresh masks: a seed masks one payload only."""
        masked(self.layout, self.values, self.weights, fresh_masks(PEERS + 1), self.out)


def fresh_masks(count: int) -> list[Mask]:
    """Of both signs, as a site among its peers has them."""
    return [(1 if number % 2 else -1, os.urandom(32)) for number in range(count)]


def theirs(values: Sequence[np.ndarray], seeds: Sequence[bytes]) -> list[np.ndarray]:
    """As `_collect_masked_vectors` of Flower's secaggplus_mod, from the weights on; the last seed: the self-mask's."""
    q_ratio = round(WEIGHT * TARGET_RANGE)
    quantized = quantize(parameters_multiply(list(values), q_ratio / TARGET_RANGE), CLIPPING_RANGE, TARGET_RANGE)
    quantized = factor_combine(q_ratio, quantized)
    dimensions = [one.shape for one in quantized]
    quantized = parameters_addition(quantized, pseudo_rand_gen(seeds[-1], MOD_RANGE, dimensions))
    for number, seed in enumerate(seeds[:-1]):
        combine = parameters_addition if number % 2 else parameters_subtraction
        quantized = combine(quantized, pseudo_rand_gen(seed, MOD_RANGE, dimensions))
    masked_: list[np.ndarray] = parameters_mod(quantized, MOD_RANGE)
    return masked_


def normal(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Values as an update's."""
    noise = np.random.default_rng(0)
    return [noise.standard_normal(shape, np.float32) * np.float32(SPREAD) for shape in shapes]


def processor_seconds(work: Callable[[], object]) -> float:
    """Of this process: others on the machine do not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


# -- ViT-L


def vitl_shapes() -> list[tuple[int, ...]]:
    """The tensors of the preset's student and heads, and a vector that makes FULL of them."""
    import torch

    from chexfound.pretrain.meta_arch import build_student

    with torch.device("meta"):
        student = build_student(recipes.load("vitl16-cxr1m"))
    shapes = [tuple(one.shape) for one in student.parameters()]
    return [*shapes, (FULL - sum(map(math.prod, shapes)),)]


def vitl(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Seconds and memory of a site's masked payload of these tensors, in a process of its own."""
    command = [sys.executable, __file__, "--alone", str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    ran = subprocess.run(command, input=json.dumps(shapes), capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise SiteError(f"the process of its own failed:\n{ran.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(ran.stdout)
    return row


def alone(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """In that process: the arrays first, then memory is looked at, then `out` is made and filled."""
    values = normal_in_place(shapes)
    small = Ours(normal([(1000,)]), RANGE)
    small()  # what a first call loads is no part of a payload
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")
    ours = Ours(values, RANGE)
    first, *took = [processor_seconds(ours) for _ in range(rounds + 1)]
    extra = memory_bytes("VmHWM") - before
    count = sum(math.prod(shape) for shape in shapes)
    return {
        "ours": round(statistics.median(took), 2), "unit": "s of processor time",
        "spread": [round(min(took), 2), round(max(took), 2)], "first": round(first, 2), "rounds": rounds,
        "values": count, "peers": PEERS,
        "payload_bytes": ours.layout.payload_bytes,
        "extra_memory": round(extra / ours.layout.payload_bytes, 3),
    }  # fmt: skip


def normal_in_place(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """As `normal`, without an array more, that would raise the peak."""
    noise, values = np.random.default_rng(0), [np.empty(shape, np.float32) for shape in shapes]
    for one in values:
        noise.standard_normal(out=one, dtype=np.float32)
        one *= np.float32(SPREAD)
    return values


def memory_bytes(name: str) -> int:
    """A line of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# -- the coordinator


def server(n: int, t: int, values: int, full: int) -> dict[str, Any]:
    """Seconds to unmask a sum of n sites of which a tenth is missing; keystreams scaled from `values` to `full`."""
    missing = max(1, round(n / 10))
    there = n - missing
    keys = [X25519PrivateKey.generate() for _ in range(n)]
    publics = [key.public_key() for key in keys]
    points = range(1, n + 1)
    secrets = [os.urandom(32) for _ in range(there)] + [key.private_bytes_raw() for key in keys[there:]]
    dealt = [shamir.split(secret, points, t) for secret in secrets]
    held = [{point: shares[point] for point in points[:t]} for shares in dealt]
    shamir.lagrange.cache_clear()
    joined: list[bytes] = []
    join_s = processor_seconds(lambda: joined.extend(shamir.join(shares, t) for shares in held))
    if joined != secrets:
        raise SiteError("the shares did not give the secrets")
    masks: list[Mask] = [(-1, seed) for seed in joined[:there]]

    def derive() -> None:
        for place in range(there, n):
            lost = X25519PrivateKey.from_private_bytes(joined[place])
            for peer in publics[:there]:
                seed = HKDF(SHA256(), 32, None, b"benchmark").derive(lost.exchange(peer))
                masks.append((1, seed))

    derive_s = processor_seconds(derive)
    layout = Layout((Section("a", (values,), 32),), n)
    sums = layout.zeros()
    keystream_s = processor_seconds(lambda: add_masks(sums, layout, masks)) * full / values
    return {
        "n": n, "t": t, "missing": missing, "masks": len(masks), "unit": "s of processor time",
        "ours": round(join_s + derive_s + keystream_s, 2), "shares_s": round(join_s, 4), "keys_s": round(derive_s, 4),
        "keystream_s": round(keystream_s, 2), "values": full, "measured_values": values,
    }  # fmt: skip


# -- a whole round


def whole_round(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Seconds of a round of pretraining under secure aggregation and in the clear; the first of each does not count."""
    train = changed(recipe.train, rounds=rounds + 1, optimizer_state="local")
    recipe = changed(recipe, phases=("pretrain",), train=train)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        generate(scratch / "phantoms", sites=HOSPITALS, patients=PATIENTS, seed=0)
        ingest(scratch / "phantoms", scratch / "store", recipe.image_px)
        sides = {kind: Side(changed(recipe, aggregation=kind), scratch) for kind in ("secagg", "fedavg")}
        took: dict[str, list[Took]] = {kind: [] for kind in sides}
        for round_ in range(rounds + 1):
            for kind, side in sides.items():
                one = side.round()
                if round_:
                    took[kind].append(one)
    ours, rival = (statistics.median(one.seconds for one in took[kind]) for kind in sides)
    busy, plain = (statistics.median(one.processor for one in took[kind]) for kind in sides)
    stages = {
        stage: round(statistics.median(one.stages[stage] for one in took["secagg"]), 3) for stage in (*STAGES, "rest")
    }
    return {
        "ours": round(ours, 3), "rival": round(rival, 3), "unit": "s a round", "ratio": round(rival / ours, 2),
        "ours_processor": round(busy, 3), "rival_processor": round(plain, 3), "over_plain": round(busy / plain, 3),
        "stages": stages,
        "sites": HOSPITALS, "local_steps": recipe.train.local_steps, "rounds": rounds,
        "payload_bytes": sides["secagg"].payload_bytes,
    }  # fmt: skip


@dataclass(frozen=True)
class Took:
    """Of a round: seconds by the clock, of the processor, and of the processor by stage."""

    seconds: float
    processor: float
    stages: dict[str, float]


class _RoundDoneError(Exception):
    pass


class Side:
    """A simulated federation that does a round at a time, each time going on with its run."""

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self.recipe, self.folder = recipe, scratch / recipe.aggregation
        self.payload_bytes = 0  # of one site's reply
        dealt = partition(Store.open(scratch / "store"), "source", recipe.seed).sites
        plan = ArmPlan(recipe=recipe, store=scratch / "store", sites=dealt, folder=self.folder)
        plan.write_shards()
        homes = {site: plan.site_home("federated", site) for site in plan.sites}
        sites = give_keys(homes, self.folder / "authority") if recipe.aggregation == "secagg" else None
        nodes = [node_config(plan, "federated", site) | ({"secured": True} if sites else {}) for site in plan.sites]
        grid = InProcessGrid(Pool(1), nodes, {"recipe": recipes.to_json(recipe)}, sites)
        self.exchange = TimedExchange(grid, sites=sites, run_id=RUN_ID)

    def round(self) -> Took:
        """Enrolment and what else comes before the round is not counted."""
        self.exchange.began = None
        try:
            run_of(self.recipe, self.exchange, self.folder / "run", on_event=self._heard).run()
        except _RoundDoneError:
            return self.took
        raise SiteError("the run ended without another round")

    def _heard(self, event: dict[str, Any]) -> None:
        if event["event"] != "round":
            return
        assert self.exchange.began is not None
        seconds, processor = (now - then for now, then in zip(clocks(), self.exchange.began, strict=True))
        stages = self.exchange.stages
        self.took = Took(seconds, processor, {**stages, "rest": processor - sum(stages.values())})
        self.payload_bytes = event["bytes"]["up"] // HOSPITALS
        raise _RoundDoneError


class TimedExchange(GridExchange):
    """Notes when a round's first request went out, and the processor's seconds by stage until all replies are taken."""

    began: tuple[float, float] | None
    stages: dict[str, float]

    def ask(
        self, requests: Sequence[Request | None], timeout_s: float | None = None
    ) -> Iterator[Reply | Missing | None]:
        """As `GridExchange.ask`."""
        first = next(request for request in requests if request is not None)
        start = clocks()
        if first.phase == "pretrain" and self.began is None:
            self.began, self.stages = start, {}
        yield from super().ask(requests, timeout_s)
        if first.phase == "pretrain":
            self.stages[first.kind] = clocks()[1] - start[1]


def clocks() -> tuple[float, float]:
    """Of the wall, and of this process."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(alone([tuple(shape) for shape in json.load(sys.stdin)], int(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
