"""What arrives is hostile until it has passed: only ProtocolError, and nothing is unpickled."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from chexfound.contract.detached import Envelope
from chexfound.contract.request import Reply, Request
from chexfound.errors import CODES, ChexfoundError, ProtocolError, StorageError
from chexfound.identity import signing
from chexfound.parsing import values as wire_values
from chexfound.parsing.names import is_name
from chexfound.wire import arrays as wire_arrays
from chexfound.wire import envelopes, error_replies, signatures

FIELDS = {"phase": "pretrain", "round": 1, "step": 2, "steps": 3, "batch_size": 4, "roster_index": 5, "findings": []}


def array(data: bytes, stype: str = "numpy.ndarray", dtype: str = "float32") -> Array:
    return Array(dtype, (1,), stype, data)


def saved(value: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


def content(fields: Any = None, arrays: dict[str, Array] | None = None, key: str = "request") -> RecordDict:
    text = fields if isinstance(fields, str) else json.dumps(FIELDS | (fields or {}))
    return RecordDict({key: ConfigRecord({"json": text}), "arrays": ArrayRecord(arrays or {})})


# ---- there and back


def test_a_request_comes_back() -> None:
    request = Request(
        phase="adapt",
        round=3,
        step=9,
        steps=3,
        batch_size=4,
        roster_index=1,
        findings=("A", "é|b"),
        tensors={"x": torch.tensor([[1.5, -0.0]]), "y": torch.tensor(2.0).double(), "empty": torch.zeros(0, 3)},
    )
    back = envelopes.unpack_request(envelopes.pack_request(request)).message
    for name in FIELDS:
        assert getattr(back, name) == getattr(request, name)
    assert set(back.tensors) == set(request.tensors)
    for name, tensor in request.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert back.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    )
)
def test_a_reply_comes_back(values: dict[str, Any]) -> None:
    back = envelopes.unpack_reply(envelopes.pack_reply(Reply(values=values))).message
    assert back.values == values
    assert back.tensors == {}


def test_tensors_are_copies_that_may_be_written() -> None:
    before = torch.ones(3)
    back = envelopes.unpack_reply(envelopes.pack_reply(Reply(tensors={"x": before}))).message
    back.tensors["x"] += 1
    assert before.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.bool])
def test_other_dtypes_do_not_leave(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="does not travel"):
        envelopes.pack_reply(Reply(tensors={"x": torch.zeros(2).to(dtype)}))


# ---- what is hostile


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    pickled, objects = pickle.dumps(trap), saved(np.array([trap], object), allow_pickle=True)
    for data in (pickled, objects):
        for stype in ("numpy.ndarray", "pickle", "torch.Tensor", ""):
            with pytest.raises(ProtocolError, match="cannot be read"):
                envelopes.unpack_request(content(arrays={"x": array(data, stype)}))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickled)  # the trap works
    assert (tmp_path / "sprung").exists()


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1e3,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }",
    "{" * 200,
    "(" * 5000,
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_array_header(header: str) -> None:
    text = header.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    with pytest.raises(ProtocolError, match="array 'x'"):
        envelopes.unpack_reply(content("{}", {"x": array(data)}, "reply"))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, ">f4"),
        np.zeros(2, ">f8"),
        np.zeros(2, np.float16),
        np.zeros(2, np.int64),
        np.zeros(2, np.complex64),
        np.array(["text"]),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "M8[s]"),
    ],
    ids=lambda value: str(value.dtype),
)
def test_other_dtypes_are_refused(value: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="its dtype does not travel"):
        envelopes.unpack_request(content(arrays={"x": array(saved(value))}))


def test_an_archive_is_no_array() -> None:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(1))
    for data in (file.getvalue(), file.getvalue()[:40], b"PK\x03\x04" + bytes(40)):
        with pytest.raises(ProtocolError, match="array 'x'"):
            envelopes.unpack_request(content(arrays={"x": array(data)}))


@given(st.binary(max_size=64))
def test_random_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04"):
        with pytest.raises(ProtocolError, match="array 'x'"):
            envelopes.unpack_request(content(arrays={"x": array(prefix + data)}))


@given(st.integers(0, 143), st.integers(1, 255))
def test_a_changed_byte_gives_an_array_or_our_error(place: int, change: int) -> None:
    sent = with_table(["x", "float32", [4]], values=4)
    data = bytearray(sent.array_records["arrays"]["float32"].data)
    data[place] ^= change
    sent["arrays"] = ArrayRecord({"float32": array(bytes(data))})
    try:
        tensors = envelopes.unpack_reply(sent).message.tensors
    except ProtocolError:
        return
    assert (tensors["x"].dtype, tensors["x"].shape) == (torch.float32, (4,))


def with_table(*rows: Any, names: tuple[str, ...] = ("float32",), inline: bool = False, values: int = 6) -> RecordDict:
    """A reply of one flat array of six numbers, beside its record or in it, with a table of one's own."""
    arrays = {name: np.arange(values, dtype=name) for name in names}
    own: dict[str, Any] = {"json": "{}", "tensors": json.dumps({"tensors": list(rows)})}
    if inline:
        return RecordDict({"reply": ConfigRecord(own | {name: data.tobytes() for name, data in arrays.items()})})
    beside = ArrayRecord({name: array(saved(data)) for name, data in arrays.items()})
    return RecordDict({"reply": ConfigRecord(own), "arrays": beside})


@pytest.mark.parametrize("inline", [False, True])
def test_the_table_cuts_the_flat_array(inline: bool) -> None:
    rows = [["a", "float32", [2, 2]], ["b", "float32", []], ["c", "float32", [0, 7]], ["d", "float32", [1]]]
    back = envelopes.unpack_reply(with_table(*rows, inline=inline)).message
    assert {name: tensor.tolist() for name, tensor in back.tensors.items()} == {
        "a": [[0, 1], [2, 3]],
        "b": 4,
        "c": [],
        "d": [5],
    }


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [["a", "float32", [5]]],
        [["a", "float32", [7]]],
        [["a", "float32", [3]], ["a", "float32", [3]]],
        [["a", "float64", [6]]],
        [["a", "int64", [6]]],
        [["a", "float32", [-6]]],
        [["a", "float32", [-2, -3]]],
        [["a", "float32", [True]]],
        [["a", "float32", [6.0]]],
        [["a", "float32", ["6"]]],
        [["a", "float32", 6]],
        [["a", "float32", [1] * 17]],
        [["a", "float32", [10**30]]],
        [["a", "float32", [6]], ["b", "float32", [0, 2**63]]],
        [["a", "float32", [6]], ["b", "float32", [0, 10**30]]],
        [["a", "float32", [6]], ["b", "float32", [0] + [2**31] * 15]],
        [["a", "float32"]],
        [["a", "float32", [6], 1]],
        [[None, "float32", [6]]],
        "table",
        {"a": 1},
    ],
    ids=lambda rows: str(rows)[:40],
)
def test_a_table_that_does_not_fit(rows: Any, inline: bool) -> None:
    with pytest.raises(ProtocolError, match="tensor|more than the tensors"):
        envelopes.unpack_reply(with_table(*rows, inline=inline))


@pytest.mark.parametrize("inline", [False, True])
def test_a_table_without_arrays_and_arrays_without_a_table(inline: bool) -> None:
    with pytest.raises(ProtocolError, match="not in the arrays"):
        envelopes.unpack_reply(with_table(["a", "float32", [6]], names=(), inline=inline))
    alone = with_table(["a", "float32", [6]], inline=inline)
    del alone["reply"]["tensors"]
    with pytest.raises(ProtocolError, match="no readable 'tensors'"):
        envelopes.unpack_reply(alone)


def test_arrays_in_the_record_that_are_none_or_stand_beside_it_too() -> None:
    for data in (b"1234567", "12345678", [1, 2], 12345678):
        whole = with_table(["a", "float32", [2]], names=())
        whole["reply"]["float32"] = data
        del whole["arrays"]
        with pytest.raises(ProtocolError, match="array 'float32' cannot be read"):
            envelopes.unpack_reply(whole)
    twice = with_table(["a", "float32", [6]])
    twice["reply"]["float32"] = b"1234"
    with pytest.raises(ProtocolError, match="in two places"):
        envelopes.unpack_reply(twice)


def test_small_arrays_travel_in_the_record_and_large_ones_beside_it() -> None:
    """Each record and each array costs requests of its own."""
    small = {"x": torch.ones(wire_arrays.INLINE_BYTES // 4 - 2), "y": torch.ones(1, dtype=torch.float64)}
    for tensors, beside in ((small, []), (small | {"z": torch.ones(1)}, ["arrays"]), ({}, [])):
        reply, request = envelopes.pack_reply(Reply(tensors=tensors)), Request(phase="pretrain", tensors=tensors)
        assert list(reply) == ["reply", *beside]
        assert list(envelopes.pack_request(request)) == ["request", *beside]
        back = envelopes.unpack_reply(reply).message.tensors
        assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in tensors.items()}


def test_missing_records() -> None:
    for empty in (RecordDict(), RecordDict({"request": ConfigRecord()}), RecordDict({"request": ArrayRecord()})):
        with pytest.raises(ProtocolError, match="no readable 'request'"):
            envelopes.unpack_request(empty)
        with pytest.raises(ProtocolError, match="no readable 'reply'"):
            envelopes.unpack_reply(empty)
    assert envelopes.unpack_reply(RecordDict({"reply": ConfigRecord({"json": "{}"})})).message == Reply()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"x"',
        "1",
        "NaN",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "\x00",
        "{}{}",
    ],
)
def test_text_that_is_no_object_of_plain_values(text: str) -> None:
    with pytest.raises(ProtocolError):
        envelopes.unpack_reply(content(text, key="reply"))
    with pytest.raises(ProtocolError):
        envelopes.unpack_request(content(text))


def test_json_that_is_no_text() -> None:
    for value in (1, 1.5, b"\xff\xfe", True, ["{}"]):
        record = RecordDict({"reply": ConfigRecord({"json": value})})
        with pytest.raises(ProtocolError, match="'reply'"):
            envelopes.unpack_reply(record)


NUMBERS = ("round", "step", "steps", "batch_size", "roster_index")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 2**31, 10**30, 1.5, None, [], {}, "many"])
def test_numbers_that_are_not(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed|negative or too large"):
        envelopes.unpack_request(content({name: value}))


@pytest.mark.parametrize(
    "fields", [{"findings": "Blob"}, {"findings": [1]}, {"phase": None}, {"extra": 1}, {"tensors": {}}]
)
def test_fields_of_another_kind(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        envelopes.unpack_request(content(fields))


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_missing_field(name: str) -> None:
    text = json.dumps({key: value for key, value in FIELDS.items() if key != name})
    with pytest.raises(ProtocolError, match="malformed"):
        envelopes.unpack_request(content(text))


# ---- errors


@pytest.mark.parametrize("kind", list(CODES.values()))
def test_an_error_is_its_code_alone(kind: type[ChexfoundError], make_message: Any) -> None:
    reply = error_replies.pack_error(kind("patient Jane Doe"), make_message(RecordDict()))
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (kind.exit_code, kind.code)
    assert error_replies.unpack_error(reply) is kind


def test_an_unknown_code_is_internal(make_message: Any) -> None:
    from flwr.app import Error, Message

    for reason in (None, "", "__class__", "no such", "storage "):
        reply = Message(Error(code=99, reason=reason), reply_to=make_message(RecordDict()))
        assert error_replies.unpack_error(reply) is ChexfoundError
    assert (
        error_replies.unpack_error(Message(Error(code=99, reason="storage"), reply_to=make_message(RecordDict())))
        is StorageError
    )


def test_finite_count_and_word() -> None:
    assert [wire_values.finite(v) for v in (0, -1.5, 10**300)] == [True] * 3
    assert not any(wire_values.finite(v) for v in (True, None, "1", float("nan"), float("inf"), 10**400, [1]))
    assert [wire_values.count(v) for v in (0, 7, 2**40 - 1)] == [True] * 3
    assert not any(wire_values.count(v) for v in (-1, 2**40, True, 1.0, "1", None))
    assert [is_name(v) for v in ("a", "é 1", "x" * 64)] == [True] * 3
    assert not any(is_name(v) for v in ("", "x" * 65, "a\nb", "\ud800", 1, None))


# ---- requests that share what is heavy


def test_requests_that_share_their_tensors_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = wire_arrays.pack_tensors
    monkeypatch.setattr(envelopes, "pack_tensors", lambda tensors: packed.append(tensors) or pack(tensors))
    monkeypatch.setattr(wire_arrays, "INLINE_BYTES", 0)
    shared, own = {"x": torch.arange(3.0)}, {"x": torch.zeros(2)}
    requests = [Request(phase="pretrain", round=n, tensors=own if n == 1 else shared) for n in range(3)]
    contents = envelopes.pack_requests([Envelope(message=request) for request in requests])
    assert len(packed) == 2
    first, other, last = (content.array_records["arrays"] for content in contents)
    assert first["float32"] is last["float32"]
    assert first["float32"] is not other["float32"]
    for request, content in zip(requests, contents, strict=True):
        back = envelopes.unpack_request(content).message
        assert (back.round, back.tensors["x"].tolist()) == (request.round, request.tensors["x"].tolist())
    assert envelopes.pack_requests([]) == []


def test_equal_tensors_of_another_request_are_its_own() -> None:
    one, other = envelopes.pack_requests(
        [Envelope(message=Request(phase="pretrain", tensors={"x": torch.zeros(n)})) for n in (1, 2)]
    )
    assert envelopes.unpack_request(one).message.tensors["x"].shape == (1,)
    assert envelopes.unpack_request(other).message.tensors["x"].shape == (2,)


# ---- signatures

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ASKED = {"run_id": 7, "round_number": 2, "message_id": "m1"}


def signed() -> RecordDict:
    result = envelopes.pack_reply(Reply(values={"images": 3, "loss": 0.5}, tensors={"x": torch.arange(4.0)}))
    signatures.sign_reply(result, KEY, **ASKED)
    return result


def test_a_signed_reply() -> None:
    reply = signed()
    signatures.verify_reply(reply, KEY.public_key(), **ASKED)
    assert envelopes.unpack_reply(reply).message.values == {"images": 3, "loss": 0.5}


@pytest.mark.parametrize(
    "change",
    [{"run_id": 8}, {"round_number": 3}, {"message_id": "m2"}, {"message_id": ""}, {"run_id": 72, "round_number": 0}],
    ids=str,
)
def test_a_signature_is_for_one_message_of_one_round_of_one_run(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="signature"):
        signatures.verify_reply(signed(), KEY.public_key(), **ASKED | change)


def test_a_signature_of_another_key_or_for_another_purpose() -> None:
    reply = signed()
    with pytest.raises(ProtocolError, match="signature"):
        signatures.verify_reply(reply, Ed25519PrivateKey.generate().public_key(), **ASKED)
    fields = signatures._signed_fields(reply, **ASKED)
    reply["reply"]["ed25519"] = signing.sign(KEY, signing.ROSTER, fields)
    with pytest.raises(ProtocolError, match="signature"):
        signatures.verify_reply(reply, KEY.public_key(), **ASKED)


@pytest.mark.parametrize("signature", [None, "text", b"", 3, [1, 2]], ids=str)
def test_what_is_no_signature(signature: Any) -> None:
    reply = signed()
    del reply["reply"]["ed25519"]
    if signature is not None:
        reply["reply"]["ed25519"] = signature
    with pytest.raises(ProtocolError, match="sign"):
        signatures.verify_reply(reply, KEY.public_key(), **ASKED)


@pytest.mark.parametrize("inline_bytes", [0, wire_arrays.INLINE_BYTES])
@given(st.data())
def test_any_changed_bit_of_what_was_signed_shows(inline_bytes: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_arrays, "INLINE_BYTES", inline_bytes)
        reply = signed()
    own = reply.config_records["reply"]
    parts: dict[str, bytes] = {k: v if isinstance(v, bytes) else str(v).encode() for k, v in own.items()}
    if not inline_bytes:
        parts["arrays"] = reply.array_records["arrays"]["float32"].data
    name = data.draw(st.sampled_from(sorted(parts)))
    whole = bytearray(parts[name])
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 6))  # 7 bits: text stays text
    if name == "arrays":
        old = reply.array_records["arrays"]["float32"]
        reply["arrays"] = ArrayRecord({"float32": Array(old.dtype, old.shape, old.stype, bytes(whole))})
    else:
        own[name] = bytes(whole) if isinstance(own[name], bytes) else whole.decode()
    with pytest.raises(ProtocolError, match="signature"):
        signatures.verify_reply(reply, KEY.public_key(), **ASKED)


# Few names and values, so that parts of one content are often parts of another; 1, 1.0 and True are equal in Python.
scalars = st.sampled_from([0, 1, 1.0, True, "", "1", b"", b"1"]) | st.lists(st.sampled_from([1, 2]), max_size=2)
words = st.sampled_from(["a", "b", "ab", "arrays", "config"])
configs = st.dictionaries(words, scalars, max_size=2).map(ConfigRecord)
flat = st.builds(
    lambda data, stype, dtype: Array(dtype, (len(data),), stype, data), st.binary(max_size=2), words, words
)
contents = st.dictionaries(words, configs | st.dictionaries(words, flat, max_size=2).map(ArrayRecord), max_size=2)


def held(records: dict[str, Any]) -> Any:
    """What a content holds, to be compared, with the kind of every value."""
    return {
        name: (type(record).__name__, {key: (type(value).__name__, repr(value)) for key, value in record.items()})
        for name, record in records.items()
    }


@given(contents, contents)
def test_different_contents_have_different_hashes(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = held(one) == held(other)
    assert (signatures.payload_sha256(RecordDict(one)) == signatures.payload_sha256(RecordDict(other))) == same


def test_an_array_is_not_taken_for_a_record() -> None:
    """Names are the sender's: one that reads as an array's header, and data that reads as a record's kind."""
    header = json.dumps(["y", "float32", [6], ""])

    def array(data: bytes) -> Array:
        return Array("float32", (len(data),), "", data)

    one = {"A": ArrayRecord({"x": array(b"1"), "y": array(b"arrays"), "z": array(b"3")})}
    other = {"A": ArrayRecord({"x": array(b"1")}), header: ArrayRecord({"z": array(b"3")})}
    assert signatures.payload_sha256(RecordDict(one)) != signatures.payload_sha256(RecordDict(other))


@given(contents, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter_nor_the_signature(records: dict[str, Any], lots: Any) -> None:
    names = list(records)
    lots.shuffle(names)
    again = RecordDict()
    for name in names:
        record, keys = records[name], list(records[name])
        lots.shuffle(keys)
        again[name] = type(record)({key: record[key] for key in keys})
    before = signatures.payload_sha256(RecordDict(records))
    assert signatures.payload_sha256(again) == before
    again["reply"] = ConfigRecord({"json": "{}"})
    before = signatures.payload_sha256(again)
    again["reply"]["ed25519"] = b"x"
    assert signatures.payload_sha256(again) == before


def test_a_record_that_we_do_not_send_is_not_hashed_over() -> None:
    with pytest.raises(ProtocolError, match="holds a MetricRecord"):
        signatures.payload_sha256(RecordDict({"x": MetricRecord({"y": 1})}))


@pytest.mark.parametrize(
    "findings", [["a", "a"], [""], ["a\n"], ["\x1b[2J"], ["a" * 201], [str(number) for number in range(5000)]]
)
def test_findings_that_no_recipe_has(findings: list[str]) -> None:
    """They go into logs, results and the size of what a site makes."""
    with pytest.raises(ProtocolError, match="findings are too many, named twice, or no names"):
        envelopes.unpack_request(envelopes.pack_request(Request(phase="adapt", findings=tuple(findings))))
