"""Many tensors in one flat array a dtype: cut out as they were put in, or refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from chexfound.contract.request import Reply
from chexfound.errors import CODES, ProtocolError
from chexfound.wire import arrays as wire_arrays
from chexfound.wire import envelopes, error_replies
from server.exchange.flwr_private import set_identity

kinds_of = st.tuples(st.sampled_from([torch.float32, torch.float64]), st.lists(st.integers(0, 3), max_size=3))


@given(st.dictionaries(st.text(max_size=5), kinds_of, max_size=6))
def test_tensors_come_back(kinds: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {
        name: torch.arange(int(np.prod(shape)), dtype=dtype).reshape(shape) + place
        for place, (name, (dtype, shape)) in enumerate(kinds.items())
    }
    for inline_bytes in (0, wire_arrays.INLINE_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire_arrays, "INLINE_BYTES", inline_bytes)
            packed = envelopes.pack_reply(Reply(tensors=tensors))
        same_tensors(envelopes.unpack_reply(packed).message.tensors, tensors)


def same_tensors(back: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
        assert back[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # its own memory


def content(table: Any, **arrays: np.ndarray) -> RecordDict:
    own = {"json": "{}"} | ({} if table is None else {"tensors": json.dumps(table)})
    beside = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({"reply": ConfigRecord(own), "arrays": beside})


FOUR = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([["x", "float32", [5]]], "not in the arrays"),
        ([["x", "float32", [2**62, 4]]], "not in the arrays"),
        ([["x", "float64", [4]]], "not in the arrays"),
        ([["x", "float32", [2]], ["x", "float32", [2]]], "listed twice"),
        ([["x", "float32", [3]]], "hold more"),
        ([], "hold more"),
        ([["x", "float32", [-4]]], "malformed"),
        ([["x", "float32", [4.0]]], "malformed"),
        ([["x", "float32", [True, 4]]], "malformed"),
        ([["x", "float32", [1] * 17]], "malformed"),
        ([["x", "float32"]], "malformed"),
        ([[1, "float32", [4]]], "malformed"),
        ({"x": [4]}, "malformed"),
        (None, "malformed"),
    ],
)
def test_tables_that_do_not_fit(tensors: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        envelopes.unpack_reply(content({"tensors": tensors}, float32=FOUR))


def test_arrays_without_a_table() -> None:
    with pytest.raises(ProtocolError, match="no readable 'tensors'"):
        envelopes.unpack_reply(content(None, float32=FOUR))


@pytest.mark.parametrize(("name", "array"), [("x", FOUR), ("float64", FOUR), ("float32", FOUR.reshape(2, 2))])
def test_arrays_that_are_not_flat_or_misnamed(name: str, array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="not a flat array"):
        envelopes.unpack_reply(content({"tensors": [["x", name, [4]]]}, **{name: array}))


def error(code: int, reason: str) -> Message:
    set_identity(1)
    request = Message(RecordDict(), dst_node_id=2, message_type="query.enrol")
    return Message(Error(code=code, reason=reason), reply_to=request)


def test_errors_are_told_without_the_senders_text() -> None:
    for name, kind in CODES.items():
        told = error_replies.explain_error(error(kind.exit_code, name))
        hint = f"; {error_replies.HINTS[kind]}" if name in ("state", "version", "code", "roster") else ""
        assert told == f"replied with error {name!r} (exit code {kind.exit_code}){hint}"
    secret = "<class 'OSError'>:<'/ward/7/Jane Doe'>"
    told = [error_replies.explain_error(error(code, secret)) for code in (0, 1, 2, 3, 4, 5, 7, 8, 99)]
    assert told[1:3] == ["could not load the ClientApp", "the ClientApp raised an exception"]
    assert told[-1] == "failed with Flower's error code 99"
    assert not any("Jane" in text for text in told)
