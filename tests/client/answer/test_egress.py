"""Whatever goes wrong at a site, a code leaves and nothing else."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from chexfound import errors
from chexfound.contract.request import PartReply, Reply, Request
from chexfound.errors import CODES, PolicyError
from chexfound.evaluate import bootstrap, rows
from chexfound.recipe import load
from chexfound.wire import envelopes
from client.answer import declared, egress
from client.answer.egress import Gate

SECRET = "Jane Doe, born 1950-01-01"


def text_of(message: Any) -> str:
    """All that would travel, as text."""
    parts = [repr(message.metadata), repr(message.error) if message.has_error() else ""]
    if message.has_content():
        parts.append(repr({key: dict(record) for key, record in message.content.items()}))
    return "\n".join(parts)


OURS = [kind(f"{kind.code}: {SECRET}") for kind in CODES.values()]
FOREIGN = [
    OSError(28, f"No space left on device: {SECRET}"),
    FileNotFoundError(SECRET),
    KeyError(SECRET),
    RuntimeError(SECRET),
    ValueError(SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    MemoryError(SECRET),
    RecursionError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
    StopIteration(SECRET),
    Exception(Exception(SECRET)),
]


@pytest.mark.parametrize("error", [*OURS, *FOREIGN], ids=lambda error: type(error).__name__)
def test_no_text_of_an_exception_leaves(error: Exception, make_message: Any, caplog: Any) -> None:
    with caplog.at_level(logging.ERROR, "chexfound.client"):
        reply = egress.release(make_message(RecordDict()), "adapt", error)
    assert reply.has_error()
    expected = (
        error
        if isinstance(error, errors.ChexfoundError)
        else errors.StorageError()
        if isinstance(error, OSError)
        else errors.ChexfoundError()
    )
    assert (reply.error.code, reply.error.reason) == (expected.exit_code, expected.code)
    assert "Jane" not in text_of(reply)
    assert SECRET in caplog.text  # the site's own log tells


def refused_for_its_images() -> errors.RefusedError:
    refused = errors.RefusedError("policy.patients", SECRET)
    refused.__cause__ = errors.EmptyError(SECRET)
    return refused


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.DataError(SECRET), "phase=adapt error=data"),
        (errors.EmptyError(SECRET), "phase=adapt error=data"),
        (refused_for_its_images(), "phase=adapt error=policy.patients"),
        (OSError(SECRET), "phase=adapt error=storage"),
        (ValueError(SECRET), "phase=adapt error=internal ValueError"),
        (errors.RefusedError("policy.runs", "one run too many"), None),
        (errors.ProtocolError("a message of another kind"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_name_patients_is_told_by_its_code(
    error: Exception, told: str | None, make_message: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.ERROR, "chexfound.client"):
        egress.release(make_message(RecordDict()), "adapt", error)
    assert [getattr(record, "told", None) for record in caplog.records] == [told]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


def test_an_exception_that_cannot_be_printed(make_message: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reply = egress.release(make_message(RecordDict()), "adapt", Unprintable())
    assert reply.error.reason == "internal"


SENT = {"student.x": ("float32", (2,))}
RECIPE = load.load("demo")
FIGURES = dict.fromkeys(("teacher_entropy", "prototype_perplexity", "prototype_usage", "feature_std"), 0.5)
ROW = {"step": 0, "loss": 1.5, "dino": 1.5, "log_k": math.log(RECIPE.dino.head_n_prototypes), **FIGURES}
SOUND = Reply(tensors={"student.x": torch.ones(2)}, values={"images": 3, "state": "kept", "history": [ROW]})


def gate(phase: str = "pretrain") -> Gate:
    request = Request(phase="pretrain", steps=1, batch_size=4)
    return Gate(recipe=RECIPE, request=request, sent=SENT, site="NORTH")


def test_what_is_declared_leaves(make_message: Any) -> None:
    reply = egress.release(make_message(RecordDict()), "pretrain", SOUND, gate())
    back = envelopes.unpack_reply(reply.content).message
    assert back.values == SOUND.values
    assert torch.equal(back.tensors["student.x"], SOUND.tensors["student.x"])


def test_nothing_leaves_without_a_gate(make_message: Any) -> None:
    assert egress.release(make_message(RecordDict()), "pretrain", SOUND).error.reason == "policy"


@pytest.mark.parametrize("phase", list(declared.KINDS))
def test_undeclared_values_are_refused(phase: str) -> None:
    for name in ("patients_list", "labels", "scores", "path", ""):
        with pytest.raises(PolicyError, match="may not leave|lacks"):
            gate(phase).admit(phase, Reply(values={name: 1}))


@pytest.mark.parametrize("phase", list(declared.KINDS))
@pytest.mark.parametrize(
    "name", ["x", "student.y", "moments.x", "model.student.x", "x.student.", "tokens", "scores", ""]
)
def test_undeclared_tensors_are_refused(phase: str, name: str) -> None:
    with pytest.raises(PolicyError, match="may not leave"):
        gate(phase).admit(phase, Reply(tensors={name: torch.zeros(1)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_tensor_or_number_that_is_not_finite(value: float) -> None:
    with pytest.raises(PolicyError, match="not finite"):
        gate().admit("pretrain", replace(SOUND, tensors={"student.x": torch.tensor([0.0, value])}))
    for nested in (value, [value], [ROW | {"loss": value}]):
        with pytest.raises(PolicyError, match="may not leave"):
            gate().admit("pretrain", replace(SOUND, values=SOUND.values | {"history": nested}))


@pytest.mark.parametrize(
    "value",
    [np.float32(1), np.int64(1), (1, math.nan), {1}, b"x", object(), torch.ones(1)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_value_does_not_raise(value: Any, make_message: Any) -> None:
    for values in (SOUND.values | {"images": value}, SOUND.values | {"history": [ROW | {"loss": value}]}):
        sent = egress.release(make_message(RecordDict()), "pretrain", replace(SOUND, values=values), gate())
        assert sent.error.reason == "policy"


def test_a_reply_that_cannot_be_packed_is_a_code(make_message: Any) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for reply in (
        replace(SOUND, values=SOUND.values | {"history": deep}),
        replace(SOUND, tensors={"student.x": torch.ones(2, dtype=torch.int64)}),
        replace(SOUND, tensors={"student.x": SECRET}),
        replace(SOUND, values={SECRET: 1}),
        replace(SOUND, values=None),
        replace(SOUND, tensors=None),
    ):
        sent = egress.release(make_message(RecordDict()), "pretrain", reply, gate())
        assert sent.has_error()
        assert "Jane" not in text_of(sent)


def test_a_part_leaves_only_when_it_is_collected() -> None:
    part = PartReply(chunk=np.zeros(4, np.uint8))
    assert gate("collect").admit("collect", part) is part
    for phase in declared.KINDS.keys() - {"collect"}:
        with pytest.raises(PolicyError, match="a part of another"):
            gate(phase).admit(phase, part)


def test_nothing_leaves_in_an_unknown_phase(make_message: Any) -> None:
    assert egress.release(make_message(RecordDict()), "unknown", Reply(), gate()).error.reason == "policy"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": 1.0}, "may not leave"),
        ({"probe_images": 12, "rankme": 3.0}, "probe_images .* of too few images"),
        ({"knn_auroc": 0.7}, "too few images"),
        ({"feature_std": 7.0}, "feature_std .* cannot be"),
        ({"log_k": 7.0}, "log_k"),
    ],
)
def test_a_row_of_the_history_that_may_not_leave(row: dict[str, float], message: str) -> None:
    def reply(row: dict[str, float]) -> Reply:
        return replace(SOUND, values=SOUND.values | {"history": [ROW | row]})

    gate().admit("pretrain", reply({"probe_images": 20, "rankme": 3.0, "knn_auroc": 0.7}))
    with pytest.raises(PolicyError, match=message):
        gate().admit("pretrain", reply(row))


def test_reasons_are_those_that_a_row_of_results_is_given() -> None:
    """Each text of evaluate/rows.py and histograms.py matches, and a name among them does not."""
    for reason in (
        rows._absence(np.array([-1])),
        rows._absence(np.array([0])),
        rows._absence(np.array([1, 1])),
        bootstrap.lone_class(["a", "a", "b"], [1, 1, 0]),
        bootstrap.bounded(np.array([np.nan, np.nan, 0.5]), 0.95, None)[1],
    ):
        assert re.fullmatch("|".join(declared.REASONS), reason)
    assert not re.fullmatch("|".join(declared.REASONS), f"no positive among the 3 held-out images of {SECRET}")
