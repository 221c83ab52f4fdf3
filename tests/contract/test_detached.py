"""Arrays as one string of bytes, and messages whose arrays come apart from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chexfound.contract.detached import ByteView, Detached, Envelope
from chexfound.contract.request import PartReply, PartRequest, Reply, Request
from chexfound.errors import ProtocolError
from chexfound.wire import arrays as wire_arrays
from chexfound.wire import envelopes

KINDS = ("float32", "float64", "uint16", "uint32", "uint64")
piles = st.dictionaries(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 4).flatmap(lambda n: arrays.arrays(np.uint8, (n, 8))), max_size=3),
    max_size=3,
).map(lambda pile: {name: [one.view(name) for one in pieces] for name, pieces in pile.items()})


@given(piles, st.integers(0, 200), st.integers(0, 200))
def test_any_part_is_that_of_the_arrays_one_after_the_other(pile: Any, start: int, size: int) -> None:
    laid = ByteView(pile)
    whole = b"".join(
        piece.astype(piece.dtype.newbyteorder("<")).tobytes() for name in sorted(pile) for piece in pile[name]
    )
    assert laid.size == len(whole) == sum(laid.arrays.values())
    assert laid.read(start, size).tobytes() == whole[start : start + size]
    assert b"".join(laid) == whole
    assert laid.sha256() == hashlib.sha256(whole).hexdigest()


def test_arrays_are_not_copied() -> None:
    array = np.arange(10, dtype=np.float32)
    laid = ByteView({"float32": [array]})
    array[3] = 7
    assert laid.read(12, 4).view(np.float32) == [7]


# -- messages


class Kept:
    """On the disk, as a site or a coordinator has them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, laid: ByteView) -> str:
        self.path.write_bytes(b"".join(laid))
        return laid.sha256()


TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(2.5, dtype=torch.float64), "e": torch.zeros(0, 4)}


def test_a_reply_comes_back_as_it_was(tmp_path: Path) -> None:
    reply = Reply(tensors=TENSORS, values={"images": 3})
    content = envelopes.pack_reply(reply, Kept(tmp_path / "kept"))
    assert list(content) == ["reply"]
    came = envelopes.unpack_reply(content)
    assert came.message.values == {"images": 3}
    assert not came.message.tensors
    assert came.detached is not None
    assert came.detached.size == (tmp_path / "kept").stat().st_size == 6 * 4 + 8
    back = wire_arrays.with_arrays(came.message, came.detached, tmp_path / "kept")
    assert list(back.tensors) == list(TENSORS)
    assert all(torch.equal(back.tensors[name], TENSORS[name]) for name in TENSORS)
    back.tensors["b"][0, 0] = 9  # is the reader's own
    assert torch.equal(
        wire_arrays.with_arrays(came.message, came.detached, tmp_path / "kept").tensors["b"], TENSORS["b"]
    )


def test_masked_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    masked = {32: np.arange(5, dtype=np.uint32), 16: np.arange(3, dtype=np.uint16), 64: np.zeros(0, np.uint64)}
    came = envelopes.unpack_reply(envelopes.pack_reply(Reply(masked=masked), Kept(tmp_path / "kept")))
    assert came.detached is not None
    back = wire_arrays.with_arrays(came.message, came.detached, tmp_path / "kept").masked
    assert {ring: array.tolist() for ring, array in back.items()} == {32: [0, 1, 2, 3, 4], 16: [0, 1, 2]}
    assert {ring: array.dtype for ring, array in back.items()} == {32: np.uint32, 16: np.uint16}


def test_a_request_comes_back_as_it_was(tmp_path: Path) -> None:
    arrays, table = wire_arrays.lay(TENSORS)
    sha256 = Kept(tmp_path / "kept")(ByteView(arrays))
    apart = Detached(sha256=sha256, arrays=ByteView(arrays).arrays, table=table)
    sent = Envelope(message=Request(phase="pretrain"), detached=apart, part_bytes=12)
    back = envelopes.unpack_request(envelopes.pack_requests([sent])[0])
    assert back == sent
    whole = wire_arrays.with_arrays(back.message, apart, tmp_path / "kept")
    assert torch.equal(whole.tensors["b"], TENSORS["b"])


@pytest.mark.parametrize("size", [1, wire_arrays.INLINE_BYTES, wire_arrays.INLINE_BYTES + 1])
def test_a_chunk_comes_back_as_it_was(size: int) -> None:
    chunk = np.arange(size, dtype=np.uint64).astype(np.uint8)
    back = envelopes.unpack_reply(envelopes.pack_reply(PartReply(chunk=chunk))).message
    assert isinstance(back, PartReply)
    assert back.chunk.tobytes() == chunk.tobytes()
    sent = PartRequest(phase="adapt", stage="deliver", chunk=chunk)
    request = envelopes.unpack_request(envelopes.pack_request(sent)).message
    assert isinstance(request, PartRequest)
    assert request.chunk is not None
    assert request.chunk.tobytes() == chunk.tobytes()


def test_nothing_is_kept_of_a_reply_without_arrays() -> None:
    def never(laid: ByteView) -> str:
        raise AssertionError

    assert envelopes.unpack_reply(envelopes.pack_reply(Reply(values={"size": 1}), never)).message == Reply(
        values={"size": 1}
    )


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "apart",
    [
        [],
        {},
        {"sha256": DIGEST, "arrays": {}},
        {"sha256": DIGEST.upper().replace("0", "A"), "arrays": {"float32": 4}},
        {"sha256": "../../x", "arrays": {"float32": 4}},
        {"sha256": DIGEST, "arrays": {"float32": 5}},
        {"sha256": DIGEST, "arrays": {"float32": 0}},
        {"sha256": DIGEST, "arrays": {"float32": -4}},
        {"sha256": DIGEST, "arrays": {"float32": True}},
        {"sha256": DIGEST, "arrays": {"float32": 2**60}},
        {"sha256": DIGEST, "arrays": {"float32": 2**40, "float64": 2**40}},
        {"sha256": DIGEST, "arrays": {"object": 8}},
        {"sha256": DIGEST, "arrays": {"float32": 4}, "more": 1},
    ],
)
def test_arrays_apart_that_cannot_be(apart: Any) -> None:
    with pytest.raises(ProtocolError):
        envelopes.unpack_reply(RecordDict({"reply": ConfigRecord({"json": "{}", "apart": json.dumps(apart)})}))


def test_a_request_has_no_masked_arrays_apart() -> None:
    content = envelopes.pack_request(Request(phase="pretrain"))
    content["request"]["apart"] = json.dumps({"sha256": DIGEST, "arrays": {"uint32": 4}})
    with pytest.raises(ProtocolError):
        envelopes.unpack_request(content)


def test_arrays_are_apart_or_in_the_message() -> None:
    content = envelopes.pack_reply(Reply(tensors={"x": torch.zeros(wire_arrays.INLINE_BYTES)}))
    content["reply"]["apart"] = json.dumps({"sha256": DIGEST, "arrays": {"float32": 4}})
    with pytest.raises(ProtocolError):
        envelopes.unpack_reply(content)


@pytest.mark.parametrize("name", ["float32", "uint32", "chunk"])
def test_arrays_are_apart_or_in_the_messages_own_record(name: str) -> None:
    own = {"json": "{}", "apart": json.dumps({"sha256": DIGEST, "arrays": {"float32": 4}}), name: bytes(4)}
    with pytest.raises(ProtocolError):
        envelopes.unpack_reply(RecordDict({"reply": ConfigRecord(own)}))


@pytest.mark.parametrize(
    "table", [[], [("a", "float32", [2])], [("a", "float32", [1]), ("a", "float32", [0])], [("a", "float64", [1])]]
)
def test_a_table_of_other_tensors_than_there_are(table: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(bytes(4))
    with pytest.raises(ProtocolError):
        wire_arrays.with_arrays(Reply(), Detached(sha256=DIGEST, arrays={"float32": 4}, table=table), tmp_path / "kept")


@pytest.mark.parametrize("arrays", [{"float32": np.zeros(1, np.float32)}, {"uint8": np.zeros((1, 1), np.uint8)}, {}])
def test_a_chunk_that_is_not_one(arrays: Any) -> None:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    with pytest.raises(ProtocolError):
        envelopes.unpack_reply(RecordDict({"reply": ConfigRecord({"json": "{}"}), "chunk": record}))
