"""A coordinator that sends weights of its own making, to read X-rays out of what comes back.

Each attack goes through the real ClientApp of a deployed site; before the lineage of weights all of them were answered.
Each is refused with a code, the site's state is as it was, and the honest round after it is answered.  What the box
does not stop is in docs/threat-model.md, and in `test_drifting_by_a_box_a_round_is_possible`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chexfound.contract.request import MOMENTS, Reply
from chexfound.model import checkpoint
from chexfound.pretrain import positions
from chexfound.pretrain.beginning import FILE, file_tensor, load_backbone, taken_backbone
from chexfound.pretrain.bounds import UpdateBound
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from client.answer import acceptance
from client.home import approval
from client.operator import status
from tests.hostile.weights_door import NAME, SMALL, Hospital, honest

Weights = dict[str, Tensor]
BLOCK = "student.backbone.blocks.0.mlp.fc1.weight"


@pytest.fixture
def hospital(
    tiny_recipe_file: Path, tiny_store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hospital]:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "chexfound"))
    one = Hospital(recipes.load(tiny_recipe_file, {"train.rounds": 3}), tiny_store_path)
    one.demand(SMALL)
    yield one
    one.restart()


def camera(weights: Weights) -> Weights:
    """Blocks without an effect, and a stem whose channels copy pixels."""
    made = {name: torch.zeros_like(t) if ".blocks." in name else t.clone() for name, t in weights.items()}
    for name, tensor in made.items():
        if name.endswith("patch_embed.proj.weight"):
            tensor.zero_().view(len(tensor), -1)[:, : len(tensor)].fill_diagonal_(1.0)
    return made


# -- the published attacks: a run's first weights


def test_a_backbone_that_copies_pixels_is_refused(hospital: Hospital) -> None:
    """The patch is the image, the blocks are zero, the seed chosen so that one patient is alone in the split."""
    recipe = curriculum.changed(
        hospital.recipe,
        phases=("adapt", "evaluate"),
        seed=1234567,
        student=curriculum.changed(hospital.recipe.student, patch_size=64, stem="linear"),
        crops=curriculum.changed(hospital.recipe.crops, global_crops_size=64, local_crops_size=64),
    )
    backbone = positions.with_grid(taken_backbone(initial_weights(recipe)), 1)
    assert hospital.features(camera(backbone), recipe) == "policy.model"
    hospital.demand(SMALL.replace("min_tokens: 1", "min_tokens: 1, max_patch_px: 64"))
    assert hospital.features(camera(backbone), recipe) == "weights.initial"
    assert not (hospital.home / "features").exists()
    assert not (hospital.home / "backbone.safetensors").exists()


@pytest.mark.parametrize("phase", ["pretrain", "features"])
def test_one_block_that_is_a_gate_is_refused(hospital: Hospital, phase: str) -> None:
    """One MLP lets one image through a sum over all (Fowl et al. 2022, Boenisch et al. 2023)."""
    weights = hospital.first()
    gate = {n: t.clone() for n, t in weights.items()}
    for name in gate:
        if "blocks.1.mlp" in name and name.endswith("bias"):
            gate[name] -= 100.0
    if phase == "pretrain":
        assert hospital.pretrain(gate) == "weights.initial"
        assert isinstance(hospital.pretrain(weights), Reply)
    else:
        recipe = curriculum.changed(hospital.recipe, phases=("adapt", "evaluate"))
        assert hospital.features(taken_backbone(gate), recipe) == "weights.initial"
        assert isinstance(hospital.features(taken_backbone(weights), recipe), Reply)


FIRST: dict[str, Callable[[Weights], Weights]] = {
    "another seed's": lambda w: {
        n: t.roll(1, 0) if t.ndim > 1 and n.startswith("student") else t for n, t in w.items()
    },
    "one weight": lambda w: w | {BLOCK: w[BLOCK] + 2e-6 * torch.eye(*w[BLOCK].shape)},
    "another teacher": lambda w: w | {"teacher.backbone.cls_token": w["teacher.backbone.cls_token"] + 1e-3},
    "moments that are there already": lambda w: {n: t + 1e-3 if n.endswith("exp_avg_sq") else t for n, t in w.items()},
    "no number": lambda w: w | {BLOCK: torch.full_like(w[BLOCK], torch.nan)},
}


@pytest.mark.parametrize("what", FIRST)
def test_first_weights_that_are_not_the_recipes_are_refused(hospital: Hospital, what: str) -> None:
    assert hospital.pretrain(FIRST[what](hospital.first())) == "weights.initial"
    assert not (hospital.home / "weights").exists()


OTHERS: dict[str, Callable[[Weights], Weights]] = {
    "another shape": lambda w: w | {BLOCK: w[BLOCK][:-1].clone()},
    "a tensor too many": lambda w: w | {"student.backbone.gate": torch.ones(3)},
    "a tensor too few": lambda w: {n: t for n, t in w.items() if n != BLOCK},
    "float64": lambda w: w | {BLOCK: w[BLOCK].double()},
    "bytes that are no file": lambda w: w | {BLOCK: torch.zeros(5, dtype=torch.uint8)},
    "no moments": lambda w: {n: t for n, t in w.items() if not n.startswith(MOMENTS)},
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_than_the_recipes_are_refused(hospital: Hospital, what: str, number: int) -> None:
    weights = hospital.rounds(number)
    assert hospital.pretrain(OTHERS[what](weights), number) == "request.tensors"


# -- later rounds


def _without_box(hospital: Hospital, weights: Weights) -> Weights:
    """As far as the box of a round, and a hundredth further, in every weight."""
    steps = range(0, hospital.recipe.train.local_steps)
    bound = UpdateBound.of(hospital.recipe, "pretrain", steps)
    first = hospital.first()
    return weights | {
        n: (first[n] + 1.01 * bound.box(n, first[n])).float()
        for n in weights
        if n.startswith("student.") and not n.endswith("weight_g")
    }


LATER: dict[str, tuple[str, Callable[[Hospital, Weights], Weights]]] = {
    "a jump": ("weights.box", lambda h, w: {n: t + 1.0 if n.startswith("student.back") else t for n, t in w.items()}),
    "noise": (
        "weights.box",
        lambda h, w: {n: t + 0.1 * torch.randn_like(t) if n.startswith("student.back") else t for n, t in w.items()},
    ),
    "a camera": ("weights.box", lambda h, w: camera(w)),
    "a hundredth beyond the box": ("weights.box", _without_box),
    "one weight": ("weights.box", lambda h, w: w | {BLOCK: w[BLOCK] + 0.05 * torch.eye(*w[BLOCK].shape)}),
    "no number": ("weights.box", lambda h, w: w | {BLOCK: torch.full_like(w[BLOCK], torch.nan)}),
    "a gain that is not trained": (
        "weights.frozen",
        lambda h, w: {n: t * 1.001 if n == "student.dino_head.last_layer.weight_g" else t for n, t in w.items()},
    ),
    "a teacher that is no average": (
        "weights.box", lambda h, w: {n: t + 0.05 if n == "teacher.backbone.cls_token" else t for n, t in w.items()},
    ),
    "moments that cannot be": (
        "weights.box", lambda h, w: {n: t + 1.0 if n.endswith("cls_token.exp_avg") else t for n, t in w.items()},
    ),
    "moments of more steps": (
        "weights.box", lambda h, w: {n: t + 1e6 if n.endswith("cls_token.step") else t for n, t in w.items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_weights_that_the_steps_cannot_lead_to_are_refused(hospital: Hospital, what: str) -> None:
    code, change = LATER[what]
    weights = hospital.rounds(1)
    before = sorted(path.read_bytes() for path in hospital.home.glob("weights/*/*"))
    assert hospital.pretrain(change(hospital, weights), 1) == code
    hospital.restart()
    assert sorted(path.read_bytes() for path in hospital.home.glob("weights/*/*")) == before
    assert isinstance(hospital.pretrain(weights, 1), Reply)


def test_a_round_that_is_resumed_with_other_weights_is_refused(hospital: Hospital) -> None:
    weights = hospital.rounds(1)
    honest(hospital.pretrain(weights, 1))
    assert hospital.pretrain(weights | {BLOCK: weights[BLOCK] + 1e-6}, 1) == "weights.box"
    hospital.restart()
    assert isinstance(hospital.pretrain(weights, 1), Reply)
    assert hospital.pretrain(hospital.first(), 1) == "weights.box"


def test_a_round_that_is_behind_is_refused(hospital: Hospital) -> None:
    first, second = hospital.rounds(1), None
    second = honest(hospital.pretrain(first, 1)).tensors
    honest(hospital.pretrain(second, 2))
    assert hospital.pretrain(first, 1) == "weights.box"


def test_after_missed_rounds_the_box_is_as_many_rounds_wide_and_no_more(
    hospital: Hospital, tiny_recipe_file: Path
) -> None:
    hospital.recipe = recipes.load(tiny_recipe_file, {"train.rounds": 8, "train.optimizer_state": "local"})
    k, weights = hospital.recipe.train.local_steps, hospital.first()
    honest(hospital.pretrain(weights))
    for number, allowed in ((2, True), (7, False)):
        bound = UpdateBound.of(hospital.recipe, "pretrain", range(number * k))
        gone = {n: t.clone() for n, t in weights.items()}
        gone[BLOCK] = (weights[BLOCK] + 0.99 * bound.box(BLOCK, weights[BLOCK])).float()
        name = BLOCK.replace("student.", "teacher.")
        gone[name] = bound.momentum * weights[name] + (1 - bound.momentum) * weights[BLOCK]
        for other in gone:
            if other.startswith("teacher.") and other != name:
                gone[other] = weights[other].clone()
        if allowed:
            assert hospital.pretrain(gone | {BLOCK: gone[BLOCK] + 0.02}, number) == "weights.box"
            assert isinstance(hospital.pretrain(gone, number), Reply)
        else:
            assert hospital.pretrain(gone, number) == "weights.missed"


def test_as_many_rounds_may_be_missed_as_the_policy_says_and_not_one_more(
    hospital: Hospital, tiny_recipe_file: Path
) -> None:
    hospital.recipe = recipes.load(tiny_recipe_file, {"train.rounds": 8, "train.optimizer_state": "local"})
    weights = hospital.first()
    honest(hospital.pretrain(weights))
    hospital.demand(SMALL + "max_missed_rounds: 1\n")
    assert hospital.pretrain(weights, 3) == "weights.missed"
    assert isinstance(hospital.pretrain(weights, 2), Reply)


@pytest.mark.parametrize("changed", [{"steps": 4}, {"step": 3}, {"round": 9}, {"round": 1}], ids=str)
def test_steps_that_the_recipe_does_not_have_widen_no_box(hospital: Hospital, changed: dict[str, int]) -> None:
    weights = hospital.rounds(1)
    assert hospital.pretrain(weights, 2, **changed) == "request.beyond"


def test_a_recipe_whose_optimizer_has_no_box_is_refused(hospital: Hospital) -> None:
    optim = curriculum.changed(hospital.recipe.optim, optimizer="sgd", clip_grad=0.0, lr=1.0)
    hospital.recipe = curriculum.changed(hospital.recipe, optim=optim)
    assert hospital.pretrain(hospital.first()) == "policy.rate"


def test_drifting_by_a_box_a_round_is_possible(hospital: Hospital) -> None:
    """Not stopped: in each round all weights go where the coordinator likes, as far as the steps could have led.

    It is a line in `status` (and refused where site.yaml says refuse_change); what can be read so: threat-model.md.
    """
    k, weights = hospital.recipe.train.local_steps, hospital.first()
    after = honest(hospital.pretrain(weights)).tensors
    bound = UpdateBound.of(hospital.recipe, "pretrain", range(k))
    worst = dict(after)
    for name in after:
        if name.startswith("student.") and not name.endswith("weight_g"):
            worst[name] = (weights[name] + 0.99 * bound.box(name, weights[name])).float()
    hospital.demand(SMALL + "weights: {refuse_change: true}\n")
    assert hospital.pretrain(worst, 1) == "weights.change"
    hospital.demand(SMALL)
    assert isinstance(hospital.pretrain(worst, 1), Reply)
    assert "all weights" in acceptance.warnings(hospital.home)[0]
    assert "own steps: round 2: all weights" in "\n".join(status.lines(status.read(NAME, hospital.home)))


def test_how_far_all_weights_go_and_how_far_one_tensor_goes_are_two_lines_of_the_policy(hospital: Hospital) -> None:
    """Of one site alone the global model goes as far as the site's own steps led: once as far, in all and in each."""
    after = honest(hospital.pretrain(hospital.first())).tensors
    for lines in ("max_change: 0.9, max_tensor_change: 9", "max_change: 9, max_tensor_change: 0.9"):
        hospital.demand(SMALL + f"weights: {{refuse_change: true, {lines}}}\n")
        assert hospital.pretrain(after, 1) == "weights.change"
    hospital.demand(SMALL + "weights: {max_change: 9, max_tensor_change: 0.9}\n")
    honest(hospital.pretrain(after, 1))
    said = acceptance.warnings(hospital.home)
    assert said
    assert all("student." in text and "1.00 times" in text for text in said)


# -- the disk is lost


def test_a_later_round_on_an_empty_disk_needs_the_operators_word(hospital: Hospital, tiny_recipe_file: Path) -> None:
    hospital.recipe = recipes.load(tiny_recipe_file, {"train.rounds": 8})
    weights = hospital.rounds(1)
    moved = {n: t + 0.2 if n == BLOCK else t for n, t in weights.items()}
    for path in hospital.home.glob("weights/*/*"):
        path.unlink()
    assert hospital.pretrain(moved, 1) == "weights.lost"
    digest = checkpoint.digest(moved)
    assert approval.refused_weights(hospital.home) == {digest: "weights.lost"}
    approval.approve_weights(hospital.home, digest)
    assert hospital.pretrain(weights | {BLOCK: moved[BLOCK] + 1e-3}, 1) == "weights.lost"
    assert isinstance(hospital.pretrain(moved, 1), Reply)


def test_a_backbone_or_a_head_on_an_empty_disk_needs_the_operators_word(hospital: Hospital) -> None:
    def lose() -> None:
        for path in hospital.home.glob("weights/*/*"):
            path.unlink()

    far = camera(hospital.pretrained())
    lose()
    assert hospital.features(far) == "weights.lost"
    hospital.recipe = curriculum.changed(hospital.recipe, phases=("adapt", "evaluate"))
    honest(hospital.features(taken_backbone(hospital.first())))
    after = honest(hospital.adapt(hospital.head())).tensors
    lose()
    assert hospital.evaluate(after) == "weights.lost"
    assert hospital.adapt(after, 1) == "weights.lost"
    approval.approve_weights(hospital.home, checkpoint.digest(after))
    assert isinstance(hospital.adapt(after, 1), Reply)


# -- features, heads, results


def test_features_are_of_the_one_backbone_that_pretraining_led_to(hospital: Hospital) -> None:
    backbone = hospital.pretrained()
    name = "blocks.0.mlp.fc1.weight"
    for other in (camera(backbone), backbone | {name: backbone[name] + 0.05}, taken_backbone(hospital.first())):
        assert hospital.features(other) in ("weights.box", "request.tensors")
    honest(hospital.features(backbone))
    nudged = backbone | {name: backbone[name] + 1e-7}
    assert hospital.features(nudged) == "weights.backbone"
    hospital.restart()
    assert hospital.features(nudged) == "weights.backbone"
    assert hospital.pretrain(hospital.first(), 2) == "weights.backbone"
    assert isinstance(hospital.features(backbone), Reply)


def test_another_backbone_on_the_disk_is_no_way_round(hospital: Hospital) -> None:
    backbone = hospital.pretrained()
    assert hospital.adapt(hospital.head()) == "weights.backbone"
    honest(hospital.features(backbone))
    path = hospital.home / "backbone.safetensors"
    kept = path.read_bytes()
    checkpoint.save(path, camera(backbone))
    assert hospital.adapt(hospital.head()) == "weights.backbone"
    assert hospital.evaluate(hospital.head()) == "weights.backbone"
    path.write_bytes(kept)
    assert isinstance(hospital.adapt(hospital.head()), Reply)


def test_a_head_of_the_coordinators_making_is_refused(hospital: Hospital) -> None:
    honest(hospital.features(hospital.pretrained()))
    head = hospital.head()
    name = next(n for n in head if n.endswith("linear1.weight"))
    assert hospital.adapt(head | {name: head[name] + 1e-3}) == "weights.initial"
    after = honest(hospital.adapt(head)).tensors
    assert hospital.adapt(after | {name: after[name] + 0.1}, 1) == "weights.box"
    query = "query_embed.weight"
    assert hospital.adapt(after | {query: after[query] * 2}, 1) == "weights.frozen"
    assert hospital.evaluate(after | {name: after[name] + 0.1}) == "weights.box"
    last = honest(hospital.adapt(after, 1)).tensors
    assert hospital.evaluate(last | {name: last[name] + 0.1}) == "weights.box"
    assert isinstance(hospital.evaluate(last), Reply)
    hospital.restart()
    assert (
        hospital.evaluate(last | {name: last[name] + 1e-7}) == "weights.box"
    )  # of one head, or their difference tells
    assert isinstance(hospital.evaluate(last), Reply)


# -- a file


@pytest.fixture
def file(hospital: Hospital, tmp_path: Path) -> Path:
    """A backbone that somebody trained elsewhere."""
    weights = initial_weights(curriculum.changed(hospital.recipe, seed=5))
    path = tmp_path / "elsewhere.safetensors"
    checkpoint.save(path, taken_backbone(weights))
    return path


def begun(hospital: Hospital, file: Path) -> Weights:
    weights = hospital.first()
    load_backbone(weights, file)
    return weights | file_tensor(file, weights)


def test_a_file_that_no_operator_approved_is_refused(hospital: Hospital, file: Path) -> None:
    weights = begun(hospital, file)
    assert hospital.pretrain({n: t for n, t in weights.items() if n != FILE}) == "weights.initial"
    assert hospital.pretrain(weights) == "weights.file"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert approval.refused_weights(hospital.home) == {digest: "weights.file"}
    approval.approve_weights(hospital.home, digest)
    assert hospital.pretrain(weights | {BLOCK: weights[BLOCK] + 1e-3}) == "weights.initial"
    after = honest(hospital.pretrain(weights)).tensors
    assert hospital.pretrain(after | {FILE: weights[FILE]}, 1) == "request.tensors"
    assert isinstance(hospital.pretrain(after, 1), Reply)
    approval.withdraw_weights(hospital.home, digest)
    assert hospital.pretrain(weights) == "weights.file"


def test_a_file_of_another_architecture_or_too_large_is_refused_in_words(
    hospital: Hospital, file: Path, tmp_path: Path, caplog: Any
) -> None:
    weights = hospital.first()
    checkpoint.save(tmp_path / "other.safetensors", {"gate": torch.ones(3)})
    for content, said in (
        ((tmp_path / "other.safetensors").read_bytes(), "is not the recipe's backbone"),
        (b"no safetensors", "not readable safetensors"),
    ):
        approval.approve_weights(hospital.home, hashlib.sha256(content).hexdigest())
        sent = weights | {FILE: torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        assert hospital.pretrain(sent) == "checkpoint"
        assert said in caplog.text
    large = sum(tensor.nbytes for tensor in weights.values()) * 5 + 2**20
    assert hospital.pretrain(weights | {FILE: torch.zeros(large, dtype=torch.uint8)}) == "request.tensors"
    assert "where none of it can be" in caplog.text


def test_a_run_that_begins_with_its_features_begins_with_an_approved_file(hospital: Hospital, file: Path) -> None:
    recipe = curriculum.changed(hospital.recipe, phases=("adapt", "evaluate"))
    given = positions.with_grid(begun(hospital, file), recipe.position_px // recipe.student.patch_size)
    backbone = taken_backbone({n: t for n, t in given.items() if n != FILE})
    assert hospital.features(backbone, recipe) == "weights.initial"
    assert hospital.features(backbone | {FILE: given[FILE]}, recipe) == "weights.file"
    approval.approve_weights(hospital.home, hashlib.sha256(file.read_bytes()).hexdigest())
    assert isinstance(hospital.features(backbone | {FILE: given[FILE]}, recipe), Reply)
