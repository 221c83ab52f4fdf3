"""Whatever goes wrong at a site, a code leaves and nothing else."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from chexfound import errors, wire
from chexfound.errors import CODES, PolicyError
from chexfound.phases import Reply
from client import egress

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


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


def test_an_exception_that_cannot_be_printed(make_message: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reply = egress.release(make_message(RecordDict()), "adapt", Unprintable())
    assert reply.error.reason == "internal"


def test_what_is_declared_leaves(make_message: Any) -> None:
    sent = Reply(
        tensors={"student.x": torch.ones(2)},
        values={"images": 3, "state": "kept", "history": [{"step": 0, "loss": 1.5}]},
    )
    reply = egress.release(make_message(RecordDict()), "pretrain", sent)
    back = wire.unpack_reply(reply.content)
    assert back.values == sent.values
    assert torch.equal(back.tensors["student.x"], sent.tensors["student.x"])


@pytest.mark.parametrize("phase", list(egress.VALUES))
def test_undeclared_values_are_refused(phase: str) -> None:
    for name in ("patients_list", "labels", "scores", "path", ""):
        with pytest.raises(PolicyError, match="may not leave"):
            egress.admit(phase, Reply(values={name: 1}))


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("enrol", "x"),
        ("enrol", "student.x"),
        ("pretrain", "moments.x"),
        ("pretrain", "model.student.x"),
        ("pretrain", "x.student."),
        ("features", "tokens"),
        ("features", "patches.sum"),
        ("features", "cls.squares"),
        ("features", "student.x"),
        ("evaluate", "scores"),
        ("evaluate", ""),
    ],
)
def test_undeclared_tensors_are_refused(phase: str, name: str) -> None:
    with pytest.raises(PolicyError, match="may not leave"):
        egress.admit(phase, Reply(tensors={name: torch.zeros(1)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_tensor_or_number_that_is_not_finite(value: float) -> None:
    with pytest.raises(PolicyError, match="not finite"):
        egress.admit("pretrain", Reply(tensors={"student.x": torch.tensor([0.0, value])}))
    for nested in (value, [value], [{"a": [1, value]}]):
        with pytest.raises(PolicyError, match="not finite"):
            egress.admit("pretrain", Reply(values={"history": nested}))


@pytest.mark.parametrize(
    "value",
    [np.float32(1), np.int64(1), (1, math.nan), {1}, b"x", object(), torch.ones(1)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_value_does_not_raise(value: Any, make_message: Any) -> None:
    with pytest.raises(PolicyError, match="not a plain value"):
        egress.admit("pretrain", Reply(values={"history": [value]}))
    assert (
        egress.release(make_message(RecordDict()), "pretrain", Reply(values={"history": [value]})).error.reason
        == "policy"
    )


def test_a_reply_that_cannot_be_packed_is_a_code(make_message: Any) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for reply in (
        Reply(values={"history": deep}),
        Reply(tensors={"student.x": torch.ones(2, dtype=torch.int64)}),
        Reply(tensors={"student.x": SECRET}),  # type: ignore[dict-item]
        Reply(values={SECRET: 1}),
    ):
        sent = egress.release(make_message(RecordDict()), "pretrain", reply)
        assert sent.has_error()
        assert "Jane" not in text_of(sent)


def test_a_part_leaves_only_when_it_is_collected() -> None:
    part = Reply(chunk=np.zeros(4, np.uint8))
    assert egress.admit("collect", part) is part
    for phase in egress.VALUES.keys() - {"collect"}:
        with pytest.raises(PolicyError, match="a part of another"):
            egress.admit(phase, part)


def test_nothing_leaves_in_an_unknown_phase(make_message: Any) -> None:
    assert egress.release(make_message(RecordDict()), "unknown", Reply()).error.reason == "policy"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": 1.0}, r"holds \['file'\], which may not leave"),
        ({"probe_images": 12, "rankme": 3.0}, "probe_images .* of too few images"),
        ({"knn_auroc": 0.7}, "too few images"),
        ({"feature_std": 7.0}, "feature_std .* cannot be"),
    ],
)
def test_a_row_of_the_history_that_may_not_leave(row: dict[str, float], message: str) -> None:
    sound = {"step": 0, "loss": 1.0, "log_k": 5.0, "probe_images": 20, "rankme": 3.0, "knn_auroc": 0.7}
    values = {"images": 1, "state": "travels"}
    egress.admit("pretrain", Reply(values=values | {"history": [sound]}))
    with pytest.raises(PolicyError, match=message):
        egress.admit("pretrain", Reply(values=values | {"history": [{"step": 0, "loss": 1.0, "log_k": 5.0} | row]}))
