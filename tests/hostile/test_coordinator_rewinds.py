"""A coordinator that goes back to a run's beginning, to send other weights than it did, or asks a round twice.

Under masks two sums on nearly the same weights, one without a hospital, leave that hospital's own update; in the clear
many questions on the same weights leave the gradient of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from chexfound.contract.request import Reply
from chexfound.model import checkpoint
from chexfound.pretrain.beginning import taken_backbone
from chexfound.pretrain.bounds import UpdateBound
from chexfound.recipe import curriculum
from tests.client.test_hostile_coordinator import pretraining
from tests.hostile.test_coordinator_pixels import hospital as hospital
from tests.hostile.weights_door import Hospital, honest
from tests.secagg.federation import NAMES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
BIAS = "student.backbone.blocks.0.mlp.fc1.bias"


def test_a_run_that_went_on_does_not_begin_again(hospital: Hospital) -> None:
    first = hospital.first()
    weights = honest(hospital.pretrain(first)).tensors
    assert isinstance(hospital.pretrain(first), Reply)  # as it was: the reply may have been lost
    honest(hospital.pretrain(weights, 1))
    assert hospital.pretrain(first) == "weights.box"
    hospital.restart()
    assert hospital.pretrain(first) == "weights.box"


def test_features_are_not_made_of_another_backbone_by_way_of_the_beginning(hospital: Hospital) -> None:
    backbone = hospital.pretrained()
    assert isinstance(hospital.features(backbone), Reply)
    other = backbone | {"cls_token": backbone["cls_token"] + 1e-6}
    assert hospital.features(other) == "weights.backbone"
    assert hospital.pretrain(hospital.first()) == "weights.box"
    assert hospital.features(other) == "weights.backbone"


def heads(hospital: Hospital, rounds: int) -> dict[str, Tensor]:
    """Begin with the features, of a run that has so many rounds of adaptation; the backbone that they are of."""
    adapt = curriculum.changed(hospital.recipe.adapt, rounds=rounds)
    hospital.recipe = curriculum.changed(hospital.recipe, phases=("adapt", "evaluate"), adapt=adapt)
    backbone = taken_backbone(hospital.first())
    honest(hospital.features(backbone))
    return backbone


@pytest.mark.parametrize("since", ["another round", "results"])
def test_a_head_that_went_on_does_not_begin_again(hospital: Hospital, since: str) -> None:
    """From there on it could go another way than before, and of two near heads results are to be had."""
    heads(hospital, 2 if since == "another round" else 1)
    first = hospital.head()
    after = honest(hospital.adapt(first)).tensors
    assert isinstance(hospital.adapt(first), Reply)  # as it was: the reply may have been lost
    honest(hospital.adapt(after, 1) if since == "another round" else hospital.evaluate(after))
    assert hospital.adapt(first) == "weights.box"
    hospital.restart()
    assert hospital.adapt(first) == "weights.box"


def test_a_run_that_begins_with_its_features_takes_one_backbone(hospital: Hospital) -> None:
    """Those that differ in the last place are all what the recipe gives here; a run has one of them."""
    backbone = heads(hospital, 1)
    nudged = backbone | {"cls_token": backbone["cls_token"] + 3e-8}
    assert hospital.features(nudged) == "weights.backbone"
    assert isinstance(hospital.features(backbone), Reply)


@pytest.mark.parametrize(
    "changed", [{"roster_index": 1}, {"roster_index": 999}, {"batch_size": 4}, {"findings": ("Bar",)}], ids=str
)
@pytest.mark.parametrize("number", [0, 1])
def test_of_a_round_s_weights_one_question_is_answered(
    hospital: Hospital, changed: dict[str, Any], number: int
) -> None:
    weights = hospital.rounds(number)
    reply = honest(hospital.pretrain(weights, number))
    assert hospital.pretrain(weights, number, **changed) == "request.beyond"
    again = honest(hospital.pretrain(weights, number))
    assert checkpoint.digest(again.tensors) == checkpoint.digest(reply.tensors)


def first_round(fed: Federation) -> dict[str, Tensor]:
    """Have an honest run of three rounds take its first, at hospitals that check lineage; what it began with."""
    config = fed.recipe
    train, optim = curriculum.changed(config.train, rounds=3), curriculum.changed(config.optim, warmup_epochs=0)
    fed.recipe = curriculum.changed(config, train=train, optim=optim)
    for node in fed.nodes.values():
        node["lineage"] = True
    one = pretraining(fed)
    one.finish()
    return one.request.tensors


def test_under_masks_a_run_that_is_rewound_opens_no_second_sum(fed: Federation) -> None:
    """One bit of the weights changed, and one hospital left out: the difference would be its own update."""
    first = first_round(fed)
    ask: Callable[..., Any] = lambda attempt, weights: pretraining(  # noqa: E731
        fed, attempt, round=1, step=fed.recipe.train.local_steps, tensors=weights
    )
    ask(1, first | {BIAS: first[BIAS] + 2e-6}).finish()
    for reply in pretraining(fed, 2).until("masked").stage("masked").values():
        assert reply == "weights.box"
    few = ("alpha", "beta", "delta")
    second = ask(2, first | {BIAS: first[BIAS] + 3e-6}).until("masked", few)
    assert set(second.stage("masked", few).values()) == {"weights.box"}


def test_under_masks_the_box_is_no_wider_than_what_the_ring_rounds(fed: Federation) -> None:
    """Of 16 bits, and a sum over a hundredth of the images, that is a twentieth; of fewer images it were half."""
    fed.recipe = curriculum.changed(fed.recipe, secagg=curriculum.changed(fed.recipe.secagg, ring=16))
    first, k = first_round(fed), fed.recipe.train.local_steps
    box = UpdateBound.of(fed.recipe, "pretrain", range(k)).box(BIAS, first[BIAS])
    for number, times, taken in ((1, 1.1, False), (2, 1.03, True)):
        moved = first | {BIAS: (first[BIAS] + times * box).float()}
        answers = pretraining(fed, number, round=1, step=k, tensors=moved).until("masked").stage("masked").values()
        assert [isinstance(one, Reply) for one in answers] == [taken] * len(NAMES)
        assert taken or set(answers) == {"weights.box"}


@pytest.mark.parametrize("way", ["another name", "another run", "another name and fewer images told"])
def test_under_masks_a_run_begun_anew_opens_no_second_sum_of_a_step(fed: Federation, way: str) -> None:
    """The difference of the two sums, on weights that differ in one bit, was one hospital's update to .9999996."""
    first = first_round(fed)
    second_round = {"round": 1, "step": fed.recipe.train.local_steps}
    pretraining(fed, tensors=first | {BIAS: first[BIAS] + 2e-6}, **second_round).finish()
    named = {"recipe": curriculum.changed(fed.recipe, name="another")} if "name" in way else {}
    pretraining(fed, run=2, **named).finish()  # on the same first weights, over the same sites: the same sum
    few = ("alpha", "beta", "delta") if "images" not in way else NAMES
    again = pretraining(fed, run=2, tensors=first | {BIAS: first[BIAS] + 3e-6}, **named, **second_round)
    if "images" in way:
        again.settings = replace(again.settings, images=again.settings.images - 1)
    again.until("unmask", few)
    assert {again.ask("unmask", name) for name in few} == {"secagg.differencing"}
