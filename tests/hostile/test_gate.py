"""A site's own program that would tell more than was asked: the last function that a reply passes lets none of it out.

The replies are those of real phases on a small store; each field of each is then another one.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.detached import Envelope
from chexfound.contract.limits import Tensors
from chexfound.contract.request import PartReply, Reply, Request
from chexfound.errors import PolicyError
from chexfound.model.glori import build_head
from chexfound.phases import dispatch, site_state
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from client.answer.asked import forms
from client.answer.egress import FIGURES, Gate
from client.home.policy import Policy

FINDINGS = ("Bar", "Blob")
NAME = "MUELLER Hans 12.3.1954 HIV"
PHASES = ("enrol", "pretrain", "features", "adapt", "evaluate")


def gate_of(recipe: Any, request: Request, **options: Any) -> Gate:
    return Gate(
        recipe=recipe,
        request=request,
        sent=forms(Envelope(message=request)),
        site="alpha",
        peers=frozenset({"alpha", "beta"}),
        **options,
    )


@pytest.fixture(scope="module")
def replies(tiny_recipe: Any, tiny_store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By phase: what was asked, and the honest reply."""
    from chexfound.data.store.reader import Store
    from chexfound.data.store.split import View

    store = Store.open(tiny_store_path)
    keys = [key for key in dict.fromkeys(store.keys) if key.startswith("alpha/")]
    view = View.of(store, "alpha", keys)
    site = site_state.Site(view=view, home=tmp_path_factory.mktemp("alpha"), limits=Policy().limits(2).as_dict())
    weights = initial_weights(tiny_recipe)
    backbone = {
        name.removeprefix("teacher.backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("teacher.backbone.")
    }
    head = build_head(tiny_recipe, 2)
    state = dict(head.state_dict())
    asked = {
        "enrol": Request(phase="enrol"),
        "pretrain": Request(phase="pretrain", steps=2, batch_size=4, tensors=weights, findings=FINDINGS),
        "features": Request(phase="features", tensors=backbone, findings=FINDINGS),
        "adapt": Request(phase="adapt", steps=3, batch_size=4, tensors=state | zero_moments(head), findings=FINDINGS),
        "evaluate": Request(
            phase="evaluate", tensors={f"head.{name}": tensor for name, tensor in state.items()}, findings=FINDINGS
        ),
    }
    return {phase: (request, dispatch.run(site, tiny_recipe, request)) for phase, request in asked.items()}


@pytest.fixture
def admit(tiny_recipe: Any, replies: Any) -> Callable[..., Reply]:
    """`admit(phase, values=…, tensors=…)`: the honest reply with other values or tensors, at the gate."""

    def admit(phase: str, recipe: Any = tiny_recipe, gate: dict[str, Any] | None = None, **changed: Any) -> Reply:
        request, reply = replies[phase]
        return gate_of(recipe, request, **(gate or {})).admit(phase, replace(reply, **changed))

    return admit


@pytest.mark.parametrize("phase", PHASES)
def test_what_an_honest_phase_says_leaves(admit: Any, replies: Any, phase: str) -> None:
    assert admit(phase) == replies[phase][1]


# -- values

Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The path of every value in a value, containers too."""
    yield path
    if isinstance(value, dict):
        for key, one in value.items():
            yield from places(one, (*path, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from places(one, (*path, number))


def put(value: Any, path: Place, new: Any) -> Any:
    """A copy of a value with another one at a path."""
    if not path:
        return new
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return result


def at(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


ELSE: dict[str, Any] = {
    "a patient's name": NAME,
    "an object": {"PatientID": 4711},
    "a list": [NAME, NAME],
    "bytes": b"pixels",
    "not a number": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "a fraction too many": 0.123456789 + 10**7,
    "yes": True,
    "far too large": 10**30,
}
FREE = {  # places where one of these is what may stand there
    "negative": float,
    "a fraction too many": float,
    "far too large": float,
}


@pytest.mark.parametrize("what", ELSE)
@pytest.mark.parametrize("phase", PHASES)
def test_every_field_of_every_phase_is_refused_if_it_is_something_else(
    admit: Any, replies: Any, phase: str, what: str
) -> None:
    values, new = replies[phase][1].values, ELSE[what]
    tried = 0
    for path in places(values):
        old = at(values, path)
        if what in FREE and isinstance(old, float) and path[-1] in ("loss", "dino", "koleo", "ibot"):
            continue  # a loss is any finite number
        if path[:1] == ("policy",) and isinstance(old, int | float) and not isinstance(new, str | dict | list | bytes):
            continue  # a site may grant any number
        if isinstance(old, bool) and isinstance(new, bool):
            continue  # whether it withholds anything: that is yes or no
        with pytest.raises(PolicyError):
            admit(phase, values=put(values, path, new))
        tried += 1
    assert tried > 0


@pytest.mark.parametrize("phase", PHASES)
def test_one_key_more_is_refused_in_every_object(admit: Any, replies: Any, phase: str) -> None:
    values = replies[phase][1].values
    for path in places(values):
        if isinstance(at(values, path), dict):
            for key in ("PatientID", NAME, ""):
                with pytest.raises(PolicyError):
                    admit(phase, values=put(values, (*path, key), 1))


@pytest.mark.parametrize("phase", PHASES)
def test_one_key_less_is_refused(admit: Any, replies: Any, phase: str) -> None:
    values = replies[phase][1].values
    for key in values.keys() - {"policy"}:
        with pytest.raises(PolicyError):
            admit(phase, values={name: value for name, value in values.items() if name != key})


def test_rows_for_other_steps_or_findings_are_refused(admit: Any, replies: Any) -> None:
    for phase, key in (("pretrain", "history"), ("adapt", "history"), ("evaluate", "results")):
        values = replies[phase][1].values
        rows = values[key]
        for other in (rows[:-1], rows + rows[-1:], rows[::-1], []):
            with pytest.raises(PolicyError):
                admit(phase, values=values | {key: other})


def test_a_count_of_each_finding_that_was_asked_for_and_of_no_other(admit: Any, replies: Any) -> None:
    values = replies["adapt"][1].values
    for labelled in ([3], [3, 3, 3], []):
        with pytest.raises(PolicyError, match="other findings"):
            admit("adapt", values=values | {"labelled": labelled})


@pytest.mark.parametrize("key", ["auroc", "auprc", "auroc_ci", "auprc_ci"])
@pytest.mark.parametrize("number", [1.001, -0.001])
def test_a_figure_of_results_is_from_0_to_1(admit: Any, replies: Any, key: str, number: float) -> None:
    """Beyond that it could say whatever a number can."""
    (row, *rows) = replies["evaluate"][1].values["results"]
    for figure, ok in ((0.5, True), (number, False)):
        values = {"results": [row | {key: [0.5, figure] if key.endswith("_ci") else figure}, *rows]}
        if ok:
            admit("evaluate", values=values)
        else:
            with pytest.raises(PolicyError):
                admit("evaluate", values=values)


def test_a_finding_is_told_by_what_is_a_name(admit: Any, replies: Any) -> None:
    """Though the site's own list has it."""
    values = replies["enrol"][1].values
    for name, ok in (("Bar", True), ("Bar\nevent=refused", False), ("", False)):
        told = {"words": frozenset({name})}
        named = values | {"findings": {name: {"positives": 20, "negatives": 20}}}
        if ok:
            admit("enrol", gate=told, values=named)
        else:
            with pytest.raises(PolicyError):
                admit("enrol", gate=told, values=named)


def test_a_finding_that_was_not_asked_for_or_may_not_be_told_is_refused(admit: Any, replies: Any) -> None:
    values = replies["enrol"][1].values
    told = {"words": frozenset(values["findings"])}
    admit("enrol", gate=told)
    named = values | {"findings": values["findings"] | {NAME: {"positives": 1, "negatives": 20}}}
    with pytest.raises(PolicyError, match="names a finding"):
        admit("enrol", gate=told, values=named)
    rows = replies["evaluate"][1].values["results"]
    for key in ("finding", "tested_on", "reason"):
        with pytest.raises(PolicyError):
            admit("evaluate", values={"results": [row | {key: NAME} for row in rows]})


def test_a_reason_is_one_of_ours_from_its_first_letter_to_its_last(admit: Any, replies: Any) -> None:
    rows = replies["evaluate"][1].values["results"]
    for reason in ("suppressed", "no positive among the 12 held-out images"):
        admit("evaluate", values={"results": [row | {"reason": reason} for row in rows]})
        for more in (f"{reason} {NAME}", f"{NAME} {reason}", f"{reason}\n{NAME}", f"{reason}\n"):
            with pytest.raises(PolicyError):
                admit("evaluate", values={"results": [row | {"reason": more} for row in rows]})


def test_a_figure_is_within_what_it_can_be_on_both_sides(admit: Any, replies: Any) -> None:
    """An interval is no place for a number of seven digits, and neither is a constant of the recipe."""
    rows = replies["evaluate"][1].values["results"]
    for key in ("auroc_ci", "auprc_ci"):
        admit("evaluate", values={"results": [row | {key: [0.25, 1.0]} for row in rows]})
        for other in ([0.25, 4711.5], [-4711.5, 1.0], [0.25], [0.25, 0.5, 0.75]):
            with pytest.raises(PolicyError):
                admit("evaluate", values={"results": [row | {key: other} for row in rows]})
    values = replies["pretrain"][1].values
    for by in (0.01, -0.01, -1.0):  # with an entropy that every constant has room for
        history = [row | {"log_k": row["log_k"] + by, "teacher_entropy": 0.0} for row in values["history"]]
        with pytest.raises(PolicyError, match="log_k"):
            admit("pretrain", values=values | {"history": history})


def test_no_count_and_no_figure_leaves_beside_the_masks(admit: Any, replies: Any, tiny_recipe: Any) -> None:
    """Of a run that aggregates under masks: findings by name at enrolment, and no phase in the clear."""
    masked = replace(tiny_recipe, aggregation="secagg")
    for phase in ("enrol", "pretrain", "adapt", "evaluate"):
        with pytest.raises(PolicyError, match="under masks"):
            admit(phase, recipe=masked)
    assert admit("features", recipe=masked) == Reply()
    values = replies["enrol"][1].values
    told = ("site", "versions", "cells", "withheld", "policy")
    named = {key: values[key] for key in told} | {"findings": list(values["findings"])}
    admit("enrol", recipe=masked, values=named)
    for name in ("images", "store_hmac"):
        with pytest.raises(PolicyError):
            admit("enrol", recipe=masked, values=named | {name: values[name]})


def test_suppressed_stands_where_a_count_or_figure_does(admit: Any, replies: Any) -> None:
    words = "suppressed"
    values = replies["enrol"][1].values
    admit("enrol", values=values | {"images": words, "findings": {"Bar": {"positives": words, "negatives": words}}})
    rows = replies["evaluate"][1].values["results"]
    small = dict.fromkeys(("n", "positives", "auroc", "auroc_ci", "auprc", "auprc_ci", "reason"), words)
    admit("evaluate", values={"results": [row | small for row in rows]})
    admit("adapt", values=replies["adapt"][1].values | {"labelled": [words, 3]})
    for name in ("site", "store_hmac", "versions", "cells", "withheld"):
        with pytest.raises(PolicyError):
            admit("enrol", values=values | {name: words})


# -- tensors


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "name", ["student.images", "patients", "teacher.images", "head.pixels", "optimizer.x.y", "x", ""]
)
def test_a_tensor_that_was_not_sent_does_not_leave(admit: Any, replies: Any, phase: str, name: str) -> None:
    with pytest.raises(PolicyError, match="may not leave"):
        admit(phase, tensors=replies[phase][1].tensors | {name: torch.zeros(4)})


@pytest.mark.parametrize("phase", ["pretrain", "adapt"])
def test_a_tensor_of_another_shape_or_dtype_does_not_leave(admit: Any, replies: Any, phase: str) -> None:
    tensors = replies[phase][1].tensors
    name = next(name for name, tensor in tensors.items() if tensor.ndim and tensor.numel() > 1)
    given = tensors[name]
    for other in (
        given.half(), given.to(torch.uint8), given.bool(), torch.cat([given, given]), given[:0], given.reshape(-1)[:-1],
        given * math.nan, NAME, None,
    ):  # fmt: skip
        with pytest.raises(PolicyError):
            admit(phase, tensors=tensors | {name: other})
    with pytest.raises(PolicyError, match="lacks"):
        admit(phase, tensors={key: tensor for key, tensor in tensors.items() if key != name})


def test_teacher_and_moments_stay_where_the_recipe_says_so(admit: Any, replies: Any, tiny_recipe: Any) -> None:
    local = replace(tiny_recipe, teacher=replace(tiny_recipe.teacher, policy="rederive"))
    with pytest.raises(PolicyError, match=r"tensor 'teacher\."):
        admit("pretrain", recipe=local)
    local = replace(tiny_recipe, train=replace(tiny_recipe.train, optimizer_state="local"))
    with pytest.raises(PolicyError, match=r"tensor 'optimizer\."):
        admit("pretrain", recipe=local)
    local = replace(tiny_recipe, adapt=replace(tiny_recipe.adapt, optimizer_state="local"))
    with pytest.raises(PolicyError, match=r"tensor 'optimizer\."):
        admit("adapt", recipe=local)


@pytest.mark.parametrize(
    ("phase", "granted"),
    [
        ("pretrain", ("student", "head", "optimizer")),
        ("pretrain", ("student", "teacher", "head")),
        ("pretrain", ()),
        ("adapt", ("student", "teacher", "optimizer")),
        ("adapt", ("head",)),
    ],
)
def test_what_the_operator_keeps_stays(admit: Any, phase: str, granted: Tensors) -> None:
    with pytest.raises(PolicyError, match=r"site\.yaml"):
        admit(phase, gate={"tensors": granted})


@pytest.mark.parametrize("phase", [*PHASES, "advertise", "share", "consistency", "unmask", "deliver", "collect"])
def test_arrays_under_masks_and_parts_leave_in_their_stage_only(tiny_recipe: Any, replies: Any, phase: str) -> None:
    request, honest = replies.get(phase, (Request(phase="pretrain"), Reply()))
    gate = gate_of(tiny_recipe, request)
    with pytest.raises(PolicyError):
        gate.admit(phase, replace(honest, masked={32: np.zeros(4, np.uint32)}))
    if phase != "collect":
        with pytest.raises(PolicyError):
            gate.admit(phase, PartReply(**{**vars(honest), "chunk": np.zeros(4, np.uint8)}))


# -- the stages of secure aggregation

HEX = {"context": "ab" * 32, "payload": "ab" * 32, "signature": "ab" * 64}
STAGES: dict[str, Any] = {
    "advertise": {
        "advert": dict.fromkeys(("cipher", "mask", "commitment", "state"), "ab" * 32)
        | {"site": "alpha", "findings": [], "minimum": 3, "signature": "ab" * 64}
    },
    "share": {
        "context": "ab" * 32,
        "packets": [
            dict.fromkeys(("mask_hash", "seed_hash"), "ab" * 32)
            | {"dealer": "alpha", "holder": "beta", "sealed": "ab" * 40, "signature": "ab" * 64}
        ],
    },
    "masked": HEX,
    "consistency": {"signature": "ab" * 64},
    "unmask": {"shares": {"alpha": {"kind": "mask", "share": "ab" * 33, "salt": "ab" * 32}}},
    "deliver": {"size": 3},
    "collect": {},
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_every_stage_is_refused_if_it_is_something_else(tiny_recipe: Any, stage: str) -> None:
    from chexfound.secagg.shamir import SHARE_BYTES

    values = json.loads(json.dumps(STAGES[stage]).replace("ab" * 33, "ab" * SHARE_BYTES))
    gate = gate_of(tiny_recipe, Request(phase="pretrain", steps=2))
    gate.admit(stage, Reply(values=values))
    for path in places(values):
        for new in ELSE.values():
            if path or not isinstance(new, dict):
                with pytest.raises(PolicyError):
                    gate.admit(stage, Reply(values=put(values, path, new)))
        if isinstance(at(values, path), dict):
            with pytest.raises(PolicyError):
                gate.admit(stage, Reply(values=put(values, (*path, NAME), 1)))


@pytest.mark.parametrize(
    "array", [np.zeros(4, np.float32), np.zeros(4, np.uint16), np.zeros((2, 2), np.uint32), np.zeros(10**6, np.uint32)]
)
def test_an_array_that_is_no_sum_s_does_not_leave_under_masks(tiny_recipe: Any, array: np.ndarray) -> None:
    gate = gate_of(tiny_recipe, Request(phase="pretrain", steps=2))
    gate.admit("masked", Reply(values=HEX, masked={32: np.zeros(4, np.uint32)}))
    with pytest.raises(PolicyError):
        gate.admit("masked", Reply(values=HEX, masked={32: array}))


def test_under_masks_no_more_numbers_leave_than_the_sum_of_the_phase_has(tiny_recipe: Any) -> None:
    """Of each tensor its values and how many were clipped, of each step and finding a few figures."""
    given = {"x": torch.zeros(5)}
    gate = gate_of(tiny_recipe, Request(phase="pretrain", steps=2, tensors=given))
    most = 6 + FIGURES * 3
    gate.admit("masked", Reply(values=HEX, masked={32: np.zeros(most, np.uint32)}))
    with pytest.raises(PolicyError, match=f"{most + 1} numbers"):
        gate.admit("masked", Reply(values=HEX, masked={32: np.zeros(most, np.uint32), 16: np.zeros(1, np.uint16)}))


def test_shares_are_of_this_site_for_sites_of_the_federation(tiny_recipe: Any) -> None:
    packet = {
        "dealer": "alpha", "holder": "alpha", "sealed": "ab" * 33, "mask_hash": "ab" * 32,
        "seed_hash": "ab" * 32, "signature": "ab" * 64,
    }  # fmt: skip
    gate = gate_of(tiny_recipe, Request(phase="pretrain"))
    gate.admit("share", Reply(values={"context": "ab" * 32, "packets": [packet] * 128}))
    for packets in ([packet] * 129, [packet, packet | {"holder": "omega"}], [packet, packet | {"dealer": "omega"}]):
        with pytest.raises(PolicyError):
            gate.admit("share", Reply(values={"context": "ab" * 32, "packets": packets}))


def test_a_site_deals_its_own_shares_and_advertises_for_itself(tiny_recipe: Any) -> None:
    """Not in the name of another of its federation."""
    for stage in ("advertise", "share"):
        gate = gate_of(tiny_recipe, Request(phase="pretrain", steps=2))
        for path in places(STAGES[stage]):
            if path[-1:] in (("site",), ("dealer",)):
                with pytest.raises(PolicyError, match="another site's name"):
                    gate.admit(stage, Reply(values=put(STAGES[stage], path, "beta")))


def test_blame_names_sites_of_the_federation_by_a_word_of_ours(tiny_recipe: Any) -> None:
    gate = gate_of(tiny_recipe, Request(phase="pretrain"))
    gate.admit("unmask", Reply(values={"refused": "secagg.shares", "dealers": ["alpha"]}))
    for values in ({"refused": NAME, "dealers": ["alpha"]}, {"refused": "secagg.shares", "dealers": [NAME]}):
        with pytest.raises(PolicyError):
            gate.admit("unmask", Reply(values=values))
