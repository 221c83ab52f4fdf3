"""Two processes that train together (gloo, on the processor) take the steps of one with the joint batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound import recipe as recipes
from chexfound.errors import ConfigError
from chexfound.model import checkpoint
from chexfound.pretrain import ranks
from chexfound.pretrain.launch import Ranks
from chexfound.pretrain.train import Pretrainer

pytestmark = pytest.mark.e2e
STEPS, BATCH = 4, 8
ADAMW = {"optim.optimizer": "adamw", "optim.lr": 1e-3}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "shard": {"compute_precision.sharding_strategy": "SHARD_GRAD_OP"},
    "full": {"compute_precision.sharding_strategy": "FULL_SHARD"},
    "centering": {"train.centering": "centering"},
    "plain_head": {"dino.head_centered": False, "ibot.head_centered": False},
    "one_mask": {"ibot.mask_sample_probability": 0.07},  # of 16 global crops one is masked: a rank has none
    "no_mask": {"ibot.mask_sample_probability": 0.0},
    "full_bf16": {"compute_precision.sharding_strategy": "FULL_SHARD", "compute_precision.param_dtype": "bf16"},
    "checkpointing": {"compute_precision.sharding_strategy": "FULL_SHARD", "train.checkpointing": True},
    "adamw": {**ADAMW, "compute_precision.sharding_strategy": "SHARD_GRAD_OP"},
}
APART = {
    "koleo_apart": {"dino.koleo_loss_distributed": False},
    "sinkhorn_apart": {"train.sinkhorn_distributed": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8)


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
    tasks["odd"] = {"recipe": {}, "steps": 1, "batch": 5}
    tasks["queue"] = {"recipe": {"train.sinkhorn_queue": 2}, "steps": 1, "batch": BATCH}
    for task in tasks.values():
        task["recipe"] = recipes.to_dict(recipe_of(task["recipe"]))
    (folder / "scenarios.json").write_text(json.dumps(tasks))
    worker = Path(__file__).with_name("rank_worker.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHEXFOUND_DEVICE", "cpu")
        assert Ranks([str(worker), str(folder)], 2).run() == [0, 0]
    return folder


def alone(recipe, pictures) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    one = Pretrainer(recipe, lambda places: pictures[places], len(pictures), 0)
    return one.run(0, STEPS, BATCH), one.state()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], whose: str) -> float:
    """The distance of two models' weights as share of the way from the start, but for the keys' biases.

    These have no gradient but rounding.
    """
    assert one.keys() == other.keys()
    names = [name for name in one if name.startswith(f"model.{whose}.") and not name.endswith("qkv.bias")]
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (one, other, START)]
    return ((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm()).item()


START: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def _start(recipe_of, pictures) -> None:
    if not START:
        START.update(Pretrainer(recipe_of({}), lambda places: pictures[places], len(pictures), 0).state())


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_one_process_with_the_joint_batch(done, pictures, recipe_of, name):
    recipe = recipe_of(SCENARIOS[name])
    rows, state = alone(recipe, pictures)
    told = json.loads((done / f"{name}.json").read_text())
    found = checkpoint.load(done / f"{name}.safetensors")
    rel = 2e-2 if "bf16" in name else 2e-5
    for one, other in list(zip(rows, told, strict=True))[
        : 1 if "bf16" in name else None
    ]:  # later, roundings have grown
        assert other["loss"] == pytest.approx(one["loss"], rel=rel)
        assert other["dino"] == pytest.approx(one["dino"], rel=rel)
        assert ("ibot" in one) == ("ibot" in other) == (name != "no_mask")
    near = {"full_bf16": 0.5, "adamw": 0.05}.get(name, 1e-4)
    assert apart(state, found, "student") < near
    assert apart(state, found, "teacher") < near


@pytest.mark.parametrize("name", ["ddp", "full"])
def test_the_teacher_moves(done, recipe_of, pictures, name):
    """The public code's EMA does nothing without FSDP."""
    start = Pretrainer(recipe_of(SCENARIOS[name]), lambda places: pictures[places], len(pictures), 0).state()
    found = checkpoint.load(done / f"{name}.safetensors")
    student, teacher = (
        torch.cat([(found[f"model.{whose}.{end}"] - start[f"model.{whose}.{end}"]).flatten() for end in ends])
        for whose in ("student", "teacher")
        for ends in [["backbone.blocks.0.mlp.fc1.weight", "dino_head.mlp.0.weight"]]
    )
    assert teacher.norm() > 0.01 * student.norm()
    assert torch.dot(student, teacher) > 0


@pytest.mark.parametrize("name", APART)
def test_what_is_not_shared_is_another_loss(done, pictures, recipe_of, name):
    part = "koleo" if name == "koleo_apart" else "dino"
    rows, _ = alone(recipe_of(APART[name]), pictures)
    told = json.loads((done / f"{name}.json").read_text())
    assert abs(told[0][part] - rows[0][part]) > 1e-3


def test_a_state_does_not_depend_on_how_many_wrote_it(done, pictures, recipe_of):
    """Two steps by two ranks with shards, two more without; and the rest of it by one."""
    _, state = alone(recipe_of(ADAMW), pictures)
    first = checkpoint.load(done / "first_half.safetensors")
    assert {name.rpartition(".")[2] for name in first if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert apart(state, checkpoint.load(done / "second_half.safetensors"), "student") < 0.05
    one = Pretrainer(recipe_of(ADAMW), lambda places: pictures[places], len(pictures), 0)
    one.load_state(first)
    one.run(2, 2, BATCH)
    assert apart(state, one.state(), "student") < 0.05


def test_what_cannot_be_shared_out_is_told(done):
    (odd,) = json.loads((done / "odd.json").read_text())
    assert odd["error"].startswith("ConfigError: a batch of 5 images cannot be divided equally among the 2 GPUs")
    (queue,) = json.loads((done / "queue.json").read_text())
    assert queue["error"].startswith("ConfigError: train.sinkhorn_queue")


def test_a_lone_process_is_rank_0_of_1():
    assert (ranks.rank(), ranks.size(), ranks.first(), ranks.total(3)) == (0, 1, True, 3)
    x = torch.randn(3, 2)
    assert ranks.gathered(x) is x
    assert ranks.summed(x) is x
    assert torch.equal(ranks.mean_row(x), x.mean(0, keepdim=True))
    with pytest.raises(ConfigError, match="cannot be divided equally"):
        ranks.share(5, 2)
