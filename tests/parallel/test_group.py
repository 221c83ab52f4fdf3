"""Two processes that train together (gloo, on the processor) take the steps of one with the joint batch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.errors import ConfigError
from chexfound.model import checkpoint
from chexfound.parallel import group
from chexfound.parallel.launch import Ranks
from chexfound.pretrain import positions as curriculum
from chexfound.pretrain.meta_arch import Batch
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import load as recipes

pytestmark = pytest.mark.e2e
WORKER = Path(__file__).with_name("rank_worker.py")
STEPS, BATCH = 4, 8
ADAMW = {"optim.optimizer": "adamw", "optim.lr": 1e-3}
FULL = {"compute_precision.sharding_strategy": "FULL_SHARD"}
PROBED = {"health.eval_period_iterations": 2}
CLIPPED = {"optim.clip_grad": 0.1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": PROBED,
    "shard": {"compute_precision.sharding_strategy": "SHARD_GRAD_OP", **PROBED},
    "full": {**FULL, **PROBED},
    "clipped": CLIPPED,
    "clipped_full": {**FULL, **CLIPPED},
    "centering": {"train.centering": "centering"},
    "plain_head": {"dino.head_centered": False, "ibot.head_centered": False},
    "one_mask": {"ibot.mask_sample_probability": 0.07},  # of 16 global crops one is masked: a rank has none
    "no_mask": {"ibot.mask_sample_probability": 0.0},
    "full_bf16": {**FULL, "compute_precision.param_dtype": "bf16"},
    "checkpointing": {**FULL, "train.checkpointing": True},
    "adamw": {**ADAMW, "compute_precision.sharding_strategy": "SHARD_GRAD_OP"},
}
COMPILER = shutil.which(os.environ.get("CXX", "g++"))  # torch.compile needs it on a processor
COMPILED = {"student.drop_path_rate": 0.3, "train.compile": True}  # the graphs of test_compile.py, from PyTorch's cache
PLAIN_HEAD = SCENARIOS["plain_head"]  # the mean that a centred one subtracts is always the joint batch's
APART = {
    "koleo_apart": {**PLAIN_HEAD, "dino.koleo_loss_distributed": False},
    "sinkhorn_apart": {**PLAIN_HEAD, "train.sinkhorn_distributed": False},
}
APART["apart"] = APART["koleo_apart"] | APART["sinkhorn_apart"]
DROPPED = {**FULL, **ADAMW, "student.drop_path_rate": 0.3}
STAGED = {
    "train.rounds": 1,
    "train.local_steps": 2,
    "curriculum": [{"rounds": 1, "global_crops_size": 48, "local_crops_size": 32}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def worker() -> Any:
    spec = importlib.util.spec_from_file_location("rank_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe_of(small):
    # SGD, whose steps are the gradients: Adam makes of a gradient that is rounding alone a step as long as any.
    base = {"optim.optimizer": "sgd", "optim.lr": 0.05, "optim.warmup_epochs": 0}
    return lambda changes: small(**{key.replace(".", "__"): value for key, value in {**base, **changes}.items()})


@pytest.fixture
def done(folder: Path, pictures: np.ndarray, recipe_of) -> Path:
    """All scenarios, by two ranks, once for the module."""
    if (folder / "scenarios.json").exists():
        return folder
    np.save(folder / "images.npy", pictures)
    tasks = {
        name: {"recipe": changes, "steps": STEPS, "batch": BATCH} for name, changes in {**SCENARIOS, **APART}.items()
    }
    tasks["first_half"] = {"recipe": SCENARIOS["adamw"], "steps": 2, "batch": BATCH}
    tasks["second_half"] = {**tasks["first_half"], "recipe": ADAMW, "first": 2, "state": "first_half.safetensors"}
    for name, changes in {
        "dropped": DROPPED,
        **{f"staged_{name}": {**STAGED, **SCENARIOS[name]} for name in ("ddp", "full")},
    }.items():
        tasks[f"{name}_1"] = {"recipe": changes, "steps": 2, "batch": BATCH}
        tasks[f"{name}_2"] = {**tasks[f"{name}_1"], "first": 2, "state": f"{name}_1.safetensors"}
    tasks["dropped"] = {"recipe": DROPPED, "steps": STEPS, "batch": BATCH}
    for wanted in (False, True) if COMPILER else ():
        changes = {**COMPILED, "train.compile": wanted}
        tasks[f"compiled_{wanted}"] = {"recipe": changes, "steps": STEPS, "batch": BATCH}
    tasks["odd"] = {"recipe": {}, "steps": 1, "batch": 5}
    tasks["queue"] = {"recipe": {"train.sinkhorn_queue": 2}, "steps": 1, "batch": BATCH}
    for task in tasks.values():
        task["recipe"] = recipes.to_dict(recipe_of(task["recipe"]))
    (folder / "scenarios.json").write_text(json.dumps(tasks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHEXFOUND_DEVICE", "cpu")
        assert Ranks([str(WORKER), str(folder)], 2).run() == [0, 0]
    return folder


@pytest.fixture
def alone(worker, pictures):
    """Steps by one process, with all the rows and the state after them."""

    def run(recipe, first=0, steps=STEPS, state=None) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        one = worker.trainer(recipe, pictures, first, state)
        return one.run(first, steps, BATCH, probe=worker.probe(recipe, pictures)), one.state()

    return run


def found(done: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What the two ranks left of a scenario."""
    return json.loads((done / f"{name}.json").read_text()), checkpoint.load(done / f"{name}.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], whose: str) -> float:
    """The distance of two models' weights as share of the way from the start, but for the keys' biases.

    These have no gradient but rounding.  Positions are left out where a stage has made others of them.
    """
    assert one.keys() == other.keys()
    names = [name for name in one if name.startswith(f"model.{whose}.") and not name.endswith("qkv.bias")]
    names = [name for name in names if one[name].shape == START[name].shape]
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (one, other, START)]
    return ((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm()).item()


START: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def _start(recipe_of, pictures) -> None:
    if not START:
        START.update(Pretrainer(recipe_of({}), lambda places: pictures[places], len(pictures), 0).state())


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_one_process_with_the_joint_batch(done, alone, recipe_of, name):
    rows, state = alone(recipe_of(SCENARIOS[name]))
    told, there = found(done, name)
    bf16 = "bf16" in name
    seen = [row.keys() for row in rows]
    assert [row.keys() for row in told] == seen
    assert ("ibot" in seen[0]) == (name != "no_mask")
    assert ["rankme" in keys for keys in seen] == 2 * [False, "ddp" in name or name in ("shard", "full")]
    for one, other in list(zip(rows, told, strict=True))[: 1 if bf16 else None]:  # later, roundings have grown
        assert other == pytest.approx(one, rel=2e-2 if bf16 else 1e-4)
    near = {"full_bf16": 0.5, "adamw": 0.05}.get(name, 1e-4)
    assert apart(state, there, "student") < near
    assert apart(state, there, "teacher") < near


@pytest.mark.parametrize("name", ["clipped", "clipped_full"])
def test_clipping_takes_hold(done, name):
    _, clipped = found(done, name)
    _, free = found(done, "ddp")
    assert apart(free, clipped, "student") > 0.1


@pytest.mark.parametrize("name", ["ddp", "full"])
def test_the_teacher_moves(done, name):
    """The public code's EMA does nothing without FSDP."""
    _, there = found(done, name)
    student, teacher = (
        torch.cat([(there[f"model.{whose}.{end}"] - START[f"model.{whose}.{end}"]).flatten() for end in ends])
        for whose in ("student", "teacher")
        for ends in [["backbone.blocks.0.mlp.fc1.weight", "dino_head.mlp.0.weight"]]
    )
    assert teacher.norm() > 0.01 * student.norm()
    assert torch.dot(student, teacher) > 0


def halves(batch: Batch) -> list[Batch]:
    """The part of a batch that each of two ranks has."""

    def part(crops: torch.Tensor, half: int) -> torch.Tensor:
        views = crops.unflatten(0, (-1, batch.size))
        return views.chunk(2, dim=1)[half].flatten(0, 1)

    return [Batch(*(part(tensor, half) for tensor in vars(batch).values())) for half in range(2)]


def test_what_is_not_shared_is_the_mean_of_each_rank_s_own(done, worker, pictures, recipe_of, alone):
    one = worker.trainer(recipe_of(APART["apart"]), pictures)

    def joint(batch: Batch, temp: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (loss, parts), (other_loss, other_parts) = (one.model(half, temp) for half in halves(batch))
        return (loss + other_loss) / 2, {key: (parts[key] + other_parts[key]) / 2 for key in parts}

    one.joint = joint
    rows, (told, there) = one.run(0, STEPS, BATCH), found(done, "apart")
    for name in ("loss", "dino", "koleo", "ibot"):
        assert [row[name] for row in told] == pytest.approx([row[name] for row in rows], rel=1e-4)
    assert apart(one.state(), there, "student") < 1e-4
    # Each option is of its own part; in the first step all stand on the same weights.
    shared, _ = alone(recipe_of(PLAIN_HEAD), steps=1)
    for part, changed in (("koleo", "koleo_apart"), ("dino", "sinkhorn_apart")):
        assert abs(rows[0][part] - shared[0][part]) > 1e-3
        for name in ("koleo_apart", "sinkhorn_apart"):
            expected = rows if name == changed else shared
            assert found(done, name)[0][0][part] == pytest.approx(expected[0][part], rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "full"])
def test_a_stage_begins_as_in_one_process(done, alone, recipe_of, name):
    recipe = recipe_of({**STAGED, **SCENARIOS[name]})
    _, before = alone(recipe, steps=2)
    rows, state = alone(recipe, first=2, steps=2, state=before)
    told, there = found(done, f"staged_{name}_2")
    assert there["model.student.backbone.pos_embed"].shape[1] == 1 + 9
    assert [row["loss"] for row in told] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert apart(state, there, "student") < 1e-4
    assert apart(state, there, "teacher") < 1e-4
    positions = "model.student.backbone.pos_embed"
    here, other, begun = (of[positions] for of in (state, there, curriculum.with_grid(before, 3)))
    # As a share of the way that the stage led them: the last bits of the numbers are the machine's.
    assert (here - other).norm() < 1e-3 * (here - begun).norm()


def test_shards_gone_on_with_are_uninterrupted_to_the_bit(done):
    rows, whole = found(done, "dropped")
    first, _ = found(done, "dropped_1")
    then, state = found(done, "dropped_2")
    assert first + then == rows
    assert checkpoint.digest(state) == checkpoint.digest(whole)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler, which torch.compile needs on a processor")
def test_compiled_ranks_take_the_steps_of_plain_ones(done):
    (rows, state), (told, there) = (found(done, f"compiled_{wanted}") for wanted in (False, True))
    assert [row["loss"] for row in told] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert apart(state, there, "student") < 1e-4


def test_a_state_does_not_depend_on_how_many_wrote_it(done, alone, recipe_of):
    """Two steps by two ranks with shards, two more without; and the rest of it by one."""
    _, state = alone(recipe_of(ADAMW))
    first = checkpoint.load(done / "first_half.safetensors")
    assert {name.rpartition(".")[2] for name in first if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert apart(state, checkpoint.load(done / "second_half.safetensors"), "student") < 0.05
    _, rest = alone(recipe_of(ADAMW), first=2, steps=2, state=first)
    assert apart(state, rest, "student") < 0.05


def test_what_cannot_be_shared_out_is_told(done):
    (odd,) = json.loads((done / "odd.json").read_text())
    assert odd["error"].startswith("ConfigError: a batch of 5 images cannot be divided equally among the 2 GPUs")
    (queue,) = json.loads((done / "queue.json").read_text())
    assert queue["error"].startswith("ConfigError: train.sinkhorn_queue")


def test_a_lone_process_is_rank_0_of_1():
    assert (group.rank(), group.size(), group.first(), group.total(3)) == (0, 1, True, 3)
    x = torch.randn(3, 2)
    assert group.gathered(x) is x
    assert group.summed(x) is x
    assert torch.equal(group.mean_row(x), x.mean(0, keepdim=True))
    with pytest.raises(ConfigError, match="cannot be divided equally"):
        group.share(5, 2)
