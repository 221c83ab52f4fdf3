"""A request is held against its recipe: what an honest coordinator sends fits, for every kind of recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chexfound.contract.detached import ByteView, Detached, Envelope
from chexfound.contract.request import Request
from chexfound.errors import ProtocolError, RefusedError
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.pretrain import positions
from chexfound.pretrain.beginning import BESIDE, FILE, TIMES
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from chexfound.wire.arrays import lay
from client.answer import asked
from client.home.policy import Policy
from tests.staged import staged

LIMITS = Policy().limits(2)
KINDS: dict[str, dict[str, Any]] = {
    "averaged": {},
    "moments stay": {"train.optimizer_state": "local", "adapt.optimizer_state": "local"},
    "teacher stays": {"teacher.policy": "local"},
    "teacher derived": {"teacher.policy": "rederive"},
    "sgd": {"optim.optimizer": "sgd"},
    "linear head": {"adapt.head": "linear"},
    "curriculum": {"curriculum": [{"rounds": 1, "global_crops_size": 64, "local_crops_size": 32}]},
}


def check(recipe: Any, request: Request | Envelope[Request], limits: Any, n_sites: int | None) -> None:
    """As `asked.check`, of a request that has its arrays with it, or as it came."""
    came = request if isinstance(request, Envelope) else Envelope(message=request)
    return asked.check(recipe, came, limits, n_sites)


def requests(recipe: Any) -> dict[str, Request]:
    """Those of each phase of a run, in its last round."""
    number = recipe.pretrain_rounds - 1
    step = number * recipe.train.local_steps
    weights = positions.enter(initial_weights(recipe), recipe, step)
    backbone = checkpoint.with_prefix(weights, "student.backbone.")
    head = build_head(recipe, 2)
    state = dict(head.state_dict())
    moments = zero_moments(head) if recipe.adapt.optimizer_state == "average" else {}
    work = {"steps": recipe.train.local_steps, "batch_size": 6, "round": number, "step": step}
    named = {"findings": ("Bar", "Blob")}
    return {
        "enrol": Request(phase="enrol"),
        "pretrain": Request(phase="pretrain", tensors=weights, **work, **named),
        "features": Request(phase="features", tensors=backbone, **named),
        "adapt": Request(phase="adapt", tensors=state | moments, steps=3, batch_size=6, **named),
        "evaluate": Request(phase="evaluate", tensors=checkpoint.add_prefix(state, "head."), **named),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_request_fits_its_recipe(tiny_recipe_file: Any, kind: str) -> None:
    recipe = recipes.load(tiny_recipe_file, KINDS[kind])
    for request in requests(recipe).values():
        check(recipe, request, LIMITS, 2)
        if request.tensors:
            name = next(iter(request.tensors))
            odd = {key: tensor for key, tensor in request.tensors.items() if key != name}
            with pytest.raises(RefusedError, match="lack"):
                check(recipe, replace(request, tensors=odd), LIMITS, 2)


def test_a_teacher_that_is_derived_may_come_and_not_in_part(tiny_recipe_file: Any) -> None:
    recipe = recipes.load(tiny_recipe_file, KINDS["teacher derived"])
    request = requests(recipe)["pretrain"]
    students = {name: tensor for name, tensor in request.tensors.items() if not name.startswith("teacher.")}
    check(recipe, replace(request, tensors=students), LIMITS, 2)
    part = students | {"teacher.backbone.cls_token": request.tensors["teacher.backbone.cls_token"]}
    with pytest.raises(RefusedError):
        check(recipe, replace(request, tensors=part), LIMITS, 2)


def test_a_list_of_what_comes_apart_is_judged_before_it_is_here(tiny_recipe: Any) -> None:
    request = requests(tiny_recipe)["pretrain"]
    arrays, table = lay(request.tensors)
    laid = ByteView(arrays)
    apart = Detached(sha256="0" * 64, arrays=laid.arrays, table=table)
    whole = Envelope(message=replace(request, tensors={}), detached=apart)
    check(tiny_recipe, whole, LIMITS, 2)
    wide = [(name, dtype, [10**9] if name.endswith("cls_token") else shape) for name, dtype, shape in table]
    for other in (
        replace(apart, table=wide),
        replace(apart, table=[*table, table[0]]),
        replace(apart, arrays={"float32": laid.arrays["float32"] + 4}),
        replace(apart, arrays={"float64": laid.arrays["float32"]}),
    ):
        with pytest.raises(RefusedError):
            check(tiny_recipe, replace(whole, detached=other), LIMITS, 2)


@pytest.mark.parametrize(("batch", "n_sites"), [(6, 2), (6, 3), (4, 3), (6, None), (4, None)])
def test_a_share_of_the_pooled_batch(tiny_recipe: Any, batch: int, n_sites: int | None) -> None:
    request = replace(requests(tiny_recipe)["pretrain"], batch_size=batch)
    assert check(tiny_recipe, request, LIMITS, n_sites) is None


@pytest.mark.parametrize(("batch", "n_sites"), [(12, 2), (4, 2), (24, 2), (12, None), (5, None), (8, None)])
def test_no_share_of_it(tiny_recipe: Any, batch: int, n_sites: int | None) -> None:
    request = replace(requests(tiny_recipe)["pretrain"], batch_size=batch)
    with pytest.raises(RefusedError) as refused:
        check(tiny_recipe, request, LIMITS, n_sites)
    assert refused.value.code == "request.beyond"


@pytest.mark.parametrize(
    ("batch", "code"),
    [(4, None), (5, None), (12, None), (3, "policy.work"), (0, "request.beyond"), (13, "request.beyond")],
)
def test_a_share_by_size_is_within_the_pooled_batch_and_the_policy(tiny_recipe: Any, batch: int, code: str) -> None:
    recipe = replace(tiny_recipe, train=replace(tiny_recipe.train, deal="by_size"))
    request = replace(requests(recipe)["pretrain"], batch_size=batch)
    if code is None:
        check(recipe, request, replace(LIMITS, min_batch=4), 2)
    else:
        with pytest.raises(RefusedError) as refused:
            check(recipe, request, replace(LIMITS, min_batch=4), 2)
        assert refused.value.code == code


@pytest.mark.parametrize(("key", "number"), [("min_batch", 7), ("max_batch", 5)])
def test_a_share_is_within_the_policy_whoever_the_others_are(tiny_recipe: Any, key: str, number: int) -> None:
    """Of three sites the recipe is judged by a third of the pooled batch, and half of it may be asked of two."""
    request = replace(requests(tiny_recipe)["pretrain"], batch_size=6)
    check(tiny_recipe, request, replace(LIMITS, **{key: 6}), 3)
    with pytest.raises(RefusedError, match=f"{key}: {number}") as refused:
        check(tiny_recipe, request, replace(LIMITS, **{key: number}), 3)
    assert refused.value.code == "policy.work"


def test_a_share_is_of_the_batch_of_its_own_stage(tiny_recipe_file: Any) -> None:
    """A curriculum may have other batches in a later stage: the first one's are no share of them."""
    stage = {"rounds": 1, "global_crops_size": 64, "local_crops_size": 32, "pooled_batch_size": 16}
    recipe = recipes.load(tiny_recipe_file, {"curriculum": [stage]})
    request = requests(recipe)["pretrain"]
    check(recipe, replace(request, batch_size=8), LIMITS, 2)
    with pytest.raises(RefusedError) as refused:
        check(recipe, replace(request, batch_size=6), LIMITS, 2)
    assert refused.value.code == "request.beyond"


@pytest.mark.parametrize("stage", ["advertise", "share", "consistency", "unmask"])
def test_a_stage_that_takes_no_tensors_gets_none(tiny_recipe: Any, stage: str) -> None:
    """Nor the promise of some that come apart: no memory is taken for them."""
    honest = requests(tiny_recipe)["pretrain"]
    bare = staged(honest, stage)
    check(tiny_recipe, bare, LIMITS, 2)
    for request in (staged(honest, stage, tensors=honest.tensors), replace(apart(honest), message=bare)):
        with pytest.raises(RefusedError) as refused:
            check(tiny_recipe, request, LIMITS, 2)
        assert refused.value.code == "request.tensors"


def test_a_phase_that_there_is_not(tiny_recipe: Any) -> None:
    with pytest.raises(ProtocolError):
        check(tiny_recipe, Request(phase="pixels"), LIMITS, 2)


# -- a file of weights


def with_file(request: Request, size: int, dtype: torch.dtype = torch.uint8) -> Request:
    return replace(request, tensors=request.tensors | {FILE: torch.zeros(size, dtype=dtype)})


def apart(request: Request) -> Envelope[Request]:
    """The same, where its arrays come in parts."""
    arrays, table = lay(request.tensors)
    detached = Detached(sha256="0" * 64, arrays=ByteView(arrays).arrays, table=table)
    return Envelope(message=replace(request, tensors={}), detached=detached)


def most(recipe: Any, request: Request) -> int:
    return TIMES * asked.nbytes(asked.expected(recipe, request)[0]) + BESIDE


def first(recipe: Any) -> Request:
    return replace(requests(recipe)["pretrain"], round=0, step=0, tensors=initial_weights(recipe))


@pytest.mark.parametrize("come", [lambda request: request, apart], ids=["whole", "in parts"])
def test_a_file_comes_with_a_runs_first_weights_and_is_no_larger_than_they_make_one(
    tiny_recipe: Any, come: Any
) -> None:
    heads = curriculum.changed(tiny_recipe, phases=("adapt", "evaluate"))
    for recipe, request in ((tiny_recipe, first(tiny_recipe)), (heads, requests(heads)["features"])):
        large = most(recipe, request)
        check(recipe, come(with_file(request, large)), LIMITS, 2)
        for size, dtype in ((large + 1, torch.uint8), (10, torch.float32)):
            with pytest.raises(RefusedError, match="a weights file") as refused:
                check(recipe, come(with_file(request, size, dtype)), LIMITS, 2)
            assert refused.value.code == "request.tensors"


@pytest.mark.parametrize("phase", ["pretrain", "features", "adapt", "evaluate"])
def test_a_file_comes_with_nothing_else(tiny_recipe: Any, phase: str) -> None:
    """Not in a later round; not with the features of what was pretrained, nor with a head."""
    with pytest.raises(RefusedError, match="a weights file"):
        check(tiny_recipe, with_file(requests(tiny_recipe)[phase], 1), LIMITS, 2)


@pytest.mark.parametrize("phase", ["enrol", "counts"])
def test_a_file_is_not_taken_where_no_weights_are(tiny_recipe: Any, phase: str) -> None:
    with pytest.raises(RefusedError):
        check(tiny_recipe, with_file(Request(phase=phase), 1), LIMITS, 2)


def test_a_delivery_has_room_for_a_file_where_one_may_come(tiny_recipe: Any) -> None:
    later = requests(tiny_recipe)["pretrain"]
    for request, room in ((first(tiny_recipe), most(tiny_recipe, later)), (later, 0)):
        size = asked.nbytes(asked.expected(tiny_recipe, request)[0]) + room
        deliver = staged(request, "deliver", {"size": size})
        check(tiny_recipe, deliver, LIMITS, 2)
        with pytest.raises(RefusedError, match="are to be delivered"):
            check(tiny_recipe, replace(deliver, params={"size": size + 1}), LIMITS, 2)
