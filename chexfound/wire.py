"""Requests and replies <-> Flower messages; the only module of the library that knows Flower.

Everything that arrives is hostile until it has passed here: JSON into checked values, arrays into
tensors of a known dtype.  Codec `none`: full float32 or float64, nothing else.

With a request go the coordinator's terms (its release, who is in the federation), which a site reads before
anything else; with a reply, where sites have keys, the site's signature.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

import chexfound
from chexfound import parts, signing, strict_json
from chexfound import roster as rosters
from chexfound.errors import (
    CODES,
    REFUSALS,
    ChexfoundError,
    CodeError,
    ConfigError,
    ProtocolError,
    RefusedError,
    RosterError,
    StateError,
    VersionError,
)
from chexfound.names import word as word  # the rule for every name that arrives
from chexfound.parts import Apart, Laid
from chexfound.phases import Reply, Request
from chexfound.roster import Roster
from chexfound.secagg import messages

MESSAGE_TYPES = {
    "enrol": "query.enrol",
    "pretrain": "train.pretrain",
    "features": "query.features",
    "adapt": "train.adapt",
    "evaluate": "evaluate",
    # The stages of secure aggregation, whatever the phase.
    "advertise": "query.advertise",
    "share": "query.share",
    "masked": "train.masked",
    "consistency": "query.consistency",
    "unmask": "query.unmask",
    # Arrays apart from their message, whatever the phase.
    "deliver": "query.deliver",
    "collect": "query.collect",
}
RINGS = (16, 32, 64)  # bits of the unsigned integers that masked arrays are of
LARGEST, LARGEST_BATCH = 2**31 - 1, 2**20  # of a request's numbers; step times batch stays below 2**63
FINDINGS_MAX = 4096  # of a request; a site holds labels for each
# What Flower itself reports, by its error codes: from the site's node, or in its stead.  Our own
# replies use the same field, and are told apart by their reason, which is always one of our words.
FLOWER_ERRORS = {
    1: "could not load the ClientApp",
    2: "the ClientApp raised an exception",
    3: "the message is gone or incomplete at the coordinator",
    4: "the reply is gone or incomplete at the coordinator",
    5: "is no longer connected",
    7: "refused the app that the coordinator sent",
    8: "the ClientApp's process died",
}
HINTS: dict[type[ChexfoundError], str] = {  # what to do about an error that a site replied with
    StateError: "resume the run, which sends it the teacher",
    VersionError: "install the same release at both ends",
    CodeError: "its operator has not approved this run's code there: chexfound-client approve",
    RosterError: "its operator has not approved the federation's present sites: give it the present "
    "NAME.federation.json, for chexfound-client join",
}
INLINE_BYTES = 128 * 1024  # of a message's arrays together, up to which they travel in its own record
TABLE_MAX, ROWS_MAX = 2**22, 2**14  # characters and rows of a list of tensors: five times those of the largest model
JSON_MAX = 2**27  # characters of whatever else comes as JSON; it takes some ten times as much once it is read
DTYPES = {"float32": torch.float32, "float64": torch.float64, "uint8": torch.uint8}  # uint8: a file, to sites only
STAGES = (*messages.STAGES, *parts.STAGES)
Keep = Callable[[Laid], str | None]  # keeps arrays apart, for who asks, by SHA-256; or does not
_Message = TypeVar("_Message", Request, Reply)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))
class _RequestFields:
    phase: str
    round: int
    step: int
    steps: int
    batch_size: int
    roster_index: int
    findings: tuple[str, ...]
    stage: str = ""
    part_bytes: Annotated[int, Field(ge=0, le=parts.PART_MAX)] = 0


@dataclass(frozen=True, kw_only=True, config=messages.STRICT)
class _ApartFields:
    sha256: messages.Digest
    arrays: dict[str, Annotated[int, Field(gt=0, le=parts.WHOLE_MAX)]]


_request_adapter = TypeAdapter(_RequestFields)
_Side = Annotated[int, Field(ge=0, strict=True)]
Table = list[tuple[str, str, Annotated[list[_Side], Field(max_length=16)]]]  # name, dtype, shape
_table_adapter = TypeAdapter(Table)


def lay(tensors: Mapping[str, Tensor]) -> tuple[dict[str, list[np.ndarray]], Table]:
    """The values of tensors by dtype, where they are; and the table by which they are cut out again."""
    flat: dict[str, list[np.ndarray]] = {}
    table: Table = []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().numpy()
        if data.dtype.name not in DTYPES:
            raise ProtocolError(f"tensor {name!r}: dtype {data.dtype.name} does not travel")
        flat.setdefault(data.dtype.name, []).append(data.reshape(-1))
        table.append((name, data.dtype.name, list(data.shape)))
    return flat, table


def _pack_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, str | bytes], dict[str, ArrayRecord]]:
    """Tensors as one flat array a dtype, and the table by which they are cut out again.

    Flower moves every record and every array by requests of its own at each of six hops: the 184 tensors of the
    demo's student and teacher, sent one by one, cost more than their training.  So the table, and arrays of
    `INLINE_BYTES` together or less, go into the message's own record.

    Returns: what goes there (`tensors`: the table; `float32`, `float64`: raw values), and the message's other records.
    """
    if not tensors:
        return {}, {}
    flat, table = lay(tensors)
    own: dict[str, str | bytes] = {"tensors": json.dumps({"tensors": table})}
    arrays = {dtype: np.concatenate(pieces) for dtype, pieces in flat.items()}
    if sum(array.nbytes for array in arrays.values()) <= INLINE_BYTES:
        return own | {
            dtype: array.astype(array.dtype.newbyteorder("<")).tobytes() for dtype, array in arrays.items()
        }, {}
    return own, {"arrays": ArrayRecord({dtype: Array(array) for dtype, array in arrays.items()})}


def _pack_apart(apart: Apart) -> dict[str, str | bytes]:
    own: dict[str, str | bytes] = {"apart": json.dumps({"sha256": apart.sha256, "arrays": dict(apart.arrays)})}
    return own | ({"tensors": json.dumps({"tensors": apart.table})} if apart.table else {})


def _pack_chunk(chunk: np.ndarray) -> tuple[dict[str, str | bytes], dict[str, ArrayRecord]]:
    if chunk.nbytes <= INLINE_BYTES:
        return {"chunk": chunk.tobytes()}, {}
    return {}, {"chunk": ArrayRecord({"uint8": Array(chunk)})}


def _chunk(content: RecordDict, key: str) -> np.ndarray | None:
    if "chunk" in content.array_records:
        arrays = content.array_records["chunk"]
        if list(arrays) != ["uint8"]:
            raise ProtocolError("the message's chunk is not one of bytes")
        return _flat_array("uint8", arrays["uint8"], ("uint8",))
    own = content.config_records[key]
    return _inline("uint8", own["chunk"]) if "chunk" in own else None


def _apart(content: RecordDict, key: str, names: Collection[str]) -> Apart | None:
    """What is to be had apart from a message, in arrays of these dtypes."""
    if "apart" not in content.config_records[key]:
        return None
    fields = messages.parse(_ApartFields, _json(content, key, "apart"), "what comes apart")
    inline = {"chunk", *DTYPES, *(f"uint{ring}" for ring in RINGS)} & set(content.config_records[key])
    if not fields.arrays or not set(fields.arrays) <= set(names) or inline or content.array_records:
        raise ProtocolError("the message's arrays are to be apart from it, and are of no known kind or in it as well")
    table = _table(content, key) if "tensors" in content.config_records[key] else []
    apart = Apart(sha256=fields.sha256, arrays=fields.arrays, table=table)
    if apart.size > parts.WHOLE_MAX or any(nbytes % np.dtype(name).itemsize for name, nbytes in apart.arrays.items()):
        raise ProtocolError("the message's arrays, apart from it, are too large or not of whole numbers")
    return apart


def with_arrays(message: _Message, path: Path) -> _Message:
    """A message with what came apart from it, read where it is: in that file, which has all of it and nothing else.

    Raises: ProtocolError.
    """
    apart, start = message.apart, 0
    assert apart is not None
    arrays: dict[str, np.ndarray] = {}
    for name, nbytes in sorted(apart.arrays.items()):
        dtype = _little(name)
        mapped = np.memmap(path, dtype, "c", offset=start, shape=(nbytes // dtype.itemsize,))
        arrays[name] = mapped.astype(name, copy=False).view(np.ndarray)
        start += nbytes
    for empty in {kind for _, kind, _ in apart.table} & DTYPES.keys() - arrays.keys():
        arrays[empty] = np.zeros(0, empty)  # of tensors without a value
    rings = {int(name.removeprefix("uint")): arrays.pop(name) for name in list(arrays) if name not in DTYPES}
    given: dict[str, Any] = {"tensors": _cut(apart.table, arrays)} | ({"masked": rings} if rings else {})
    return replace(message, apart=None, **given)


def _flat_arrays(content: RecordDict, own: ConfigRecord) -> dict[str, np.ndarray]:
    """The arrays of a message by dtype, from its own record or from one beside it."""
    inline = [name for name in DTYPES if name in own]
    if "arrays" in content.array_records:
        if inline:
            raise ProtocolError("the message holds arrays in two places")
        return {name: _flat_array(name, array) for name, array in content.array_records["arrays"].items()}
    return {name: _inline(name, own[name]) for name in inline}


def _flat_array(name: str, array: Array, dtypes: Collection[str] = DTYPES) -> np.ndarray:
    try:
        data = array.numpy()  # never unpickles
    except Exception as error:  # bytes from outside: NumPy's parser raises a dozen kinds
        raise ProtocolError(f"array {name!r} cannot be read") from error
    if not isinstance(data, np.ndarray) or data.dtype.name not in dtypes or not data.dtype.isnative:
        raise ProtocolError(f"array {name!r}: its dtype does not travel")
    if data.ndim != 1 or data.dtype.name != name:
        raise ProtocolError(f"array {name!r}: not a flat array of {' or '.join(dtypes)}, named by its dtype")
    return data


def _inline(name: str, data: object) -> np.ndarray:
    """An array of a message's own record."""
    dtype = _little(name)
    if not isinstance(data, bytes) or len(data) % dtype.itemsize:
        raise ProtocolError(f"array {name!r} cannot be read")
    return np.frombuffer(data, dtype).astype(name)


def _little(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _masked(content: RecordDict) -> dict[int, np.ndarray]:
    """The arrays of a reply that are under masks, by bits of their ring."""
    names = {f"uint{ring}": ring for ring in RINGS}
    own = content.config_records["reply"]
    if "masked" not in content.array_records:
        return {ring: _inline(name, own[name]) for name, ring in names.items() if name in own}
    arrays = content.array_records["masked"]
    if odd := [name for name in arrays if name not in names]:
        raise ProtocolError(f"array {odd[0]!r}: not of a ring")
    return {names[name]: _flat_array(name, array, names) for name, array in arrays.items()}


def _tensors(content: RecordDict, key: str) -> dict[str, Tensor]:
    flat = _flat_arrays(content, content.config_records[key])
    if not flat and "tensors" not in content.config_records[key]:
        return {}
    return _cut(_table(content, key), flat)


def _cut(table: Sequence[tuple[str, str, Sequence[int]]], flat: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors out of the flat array of their dtype, without a copy."""
    left, result = dict(flat), {}
    for name, dtype, shape in table:
        size = math.prod(shape)
        if name in result or dtype not in left or size > left[dtype].size:
            raise ProtocolError(f"tensor {name!r}: listed twice, or not in the arrays that came with it")
        try:
            result[name] = torch.from_numpy(left[dtype][:size].reshape(shape))
        except (ValueError, OverflowError) as error:  # empty, with other sides beyond what an array can have
            raise ProtocolError(f"tensor {name!r}: its shape cannot be") from error
        left[dtype] = left[dtype][size:]
    if any(rest.size for rest in left.values()):
        raise ProtocolError("the arrays hold more than the tensors that are listed")
    return result


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _table(content: RecordDict, key: str) -> Table:
    try:
        rows = _json(content, key, "tensors", TABLE_MAX).get("tensors")
        if isinstance(rows, list) and len(rows) > ROWS_MAX:
            raise ProtocolError(f"the message lists {len(rows)} tensors, and {ROWS_MAX} are the most of any model")
        return _table_adapter.validate_python(rows)
    except ValidationError as error:
        raise ProtocolError("the message's list of tensors is malformed") from error


def _json(content: RecordDict, key: str, part: str = "json", most: int = JSON_MAX) -> dict[str, Any]:
    try:
        text = content.config_records[key][part]
        if len(text) > most:  # type: ignore[arg-type]
            raise ValueError(f"longer than {most} characters")
        values = strict_json.loads(text, parse_constant=_number, parse_float=_number)  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"the message holds no readable {(key if part == 'json' else part)!r}") from error
    if not isinstance(values, dict):
        raise ProtocolError(f"the message's {(key if part == 'json' else part)!r} is not an object")
    return values


def pack_request(request: Request, sites: Roster | None = None) -> RecordDict:
    """A request as a message's content; `sites` are those of the federation, where they have keys."""
    return pack_requests([request], sites)[0]


def pack_requests(requests: Sequence[Request], sites: Roster | None = None) -> list[RecordDict]:
    """As `pack_request`; tensors that several requests share are packed, and held in memory, once."""
    terms = json.dumps({"version": chexfound.__version__, "roster": sites and sites.as_dict()})
    packed: dict[int, tuple[dict[str, str | bytes], dict[str, ArrayRecord]]] = {}
    contents = []
    for request in requests:
        large = request.tensors if request.chunk is None else request.chunk
        if id(large) not in packed:
            packed[id(large)] = _pack_chunk(large) if isinstance(large, np.ndarray) else _pack_tensors(large)
        fields = {name: getattr(request, name) for name in _RequestFields.__dataclass_fields__}
        own, others = packed[id(large)]
        if request.apart is not None:
            own = own | _pack_apart(request.apart)
        if request.stage:
            own = own | {"told": json.dumps(request.told, allow_nan=False)}
        of_request = ConfigRecord({"terms": terms, "json": json.dumps(fields), **own})
        contents.append(RecordDict({"request": of_request, **others}))
    return contents


def unpack_terms(content: RecordDict) -> Roster | None:
    """The sites that the coordinator says are in the federation; None if it names none.

    Raises: VersionError if the coordinator is of another release; ProtocolError.
    """
    terms = _json(content, "request", "terms")
    version = terms.get("version")
    if version != chexfound.__version__:
        shown = repr(version) if isinstance(version, str) and word(version) else "another one"
        raise VersionError(
            f"the coordinator runs federated CheXFound {shown}, this site {chexfound.__version__}; "
            "install the same release at both ends"
        )
    if terms.get("roster") is None:
        return None
    try:
        return rosters.parse(terms["roster"], "the coordinator's roster")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def unpack_request(content: RecordDict) -> Request:
    """The inverse of `pack_request`, for content from outside.

    Raises: ProtocolError.
    """
    try:
        fields = _request_adapter.validate_python(_json(content, "request"))
    except ValidationError as error:
        raise ProtocolError(f"the request is malformed: {error.error_count()} fields") from error
    numbers = (fields.round, fields.step, fields.steps, fields.batch_size, fields.roster_index)
    if min(numbers) < 0 or max(numbers) > LARGEST or fields.batch_size > LARGEST_BATCH:
        raise ProtocolError("the request holds a number that is negative or too large")
    findings = fields.findings
    if (
        len(findings) > FINDINGS_MAX
        or len(set(findings)) < len(findings)
        or not all(0 < len(name) <= 200 and name.isprintable() for name in findings)
    ):
        raise ProtocolError("the request's findings are too many, named twice, or no names")
    if not word(fields.phase) or (fields.stage and fields.stage not in STAGES):
        raise ProtocolError("the request is of a phase or stage that there is not")
    values = {name: getattr(fields, name) for name in _RequestFields.__dataclass_fields__}
    told = _json(content, "request", "told") if fields.stage else {}
    if (apart := _apart(content, "request", DTYPES)) is not None:
        return Request(apart=apart, told=told, **values)
    return Request(tensors=_tensors(content, "request"), told=told, chunk=_chunk(content, "request"), **values)


def pack_reply(reply: Reply, keep: Keep | None = None) -> RecordDict:
    """A reply as a message's content (what leaves must have passed `client.egress`).

    Args:
        reply: to be packed.
        keep: its arrays apart from it, if it will, and if there are any.
    """
    if any(tensor.dtype == torch.uint8 for tensor in reply.tensors.values()):
        raise ProtocolError("a reply's tensor: dtype uint8 does not travel this way")
    text = json.dumps(reply.values, allow_nan=False)
    if keep is not None and (reply.tensors or reply.masked):
        flat, table = lay(reply.tensors)
        laid = Laid(flat | {f"uint{ring}": [array] for ring, array in reply.masked.items()})
        if (sha256 := keep(laid)) is not None:
            apart = _pack_apart(Apart(sha256=sha256, arrays=laid.arrays, table=table))
            return RecordDict({"reply": ConfigRecord({"json": text, **apart})})
    own, others = _pack_tensors(reply.tensors) if reply.chunk is None else _pack_chunk(reply.chunk)
    masked = {f"uint{ring}": array for ring, array in sorted(reply.masked.items())}
    if masked and sum(array.nbytes for array in masked.values()) <= INLINE_BYTES:
        own = own | {name: array.astype(_little(name)).tobytes() for name, array in masked.items()}
    elif masked:
        others = others | {"masked": ArrayRecord({name: Array(array) for name, array in masked.items()})}
    return RecordDict({"reply": ConfigRecord({"json": text, **own}), **others})


def unpack_reply(content: RecordDict) -> Reply:
    """The inverse of `pack_reply`, for content from outside.

    Raises: ProtocolError.
    """
    values = _json(content, "reply")
    if (apart := _apart(content, "reply", (*DTYPES, *(f"uint{ring}" for ring in RINGS)))) is not None:
        return Reply(apart=apart, values=values)
    return Reply(
        tensors=_tensors(content, "reply"), values=values, masked=_masked(content), chunk=_chunk(content, "reply")
    )


def payload_sha256(content: RecordDict) -> bytes:
    """SHA-256 of all that a message's content holds but the signature of a reply; every part after its length."""
    whole = hashlib.sha256()

    def add(part: bytes) -> None:
        whole.update(len(part).to_bytes(8, "big"))
        whole.update(part)

    for name in sorted(content):
        record = content[name]
        add(name.encode())
        if isinstance(record, ConfigRecord):
            add(b"config")
            signed = {key: repr(value) for key, value in record.items() if (name, key) != ("reply", "ed25519")}
            add(json.dumps(signed, sort_keys=True).encode())
        elif isinstance(record, ArrayRecord):
            add(b"arrays")
            add(str(len(record)).encode())  # or an array could be read as the next record
            for key, array in sorted(record.items()):
                add(json.dumps([key, array.dtype, list(array.shape), array.stype]).encode())
                add(array.data)
        else:
            raise ProtocolError(f"the message holds a {type(record).__name__}")
    return whole.digest()


def _signed_fields(content: RecordDict, run_id: int, round_number: int, message_id: str) -> list[bytes]:
    return [str(run_id).encode(), str(round_number).encode(), message_id.encode(), payload_sha256(content)]


def sign_reply(content: RecordDict, key: Ed25519PrivateKey, run_id: int, round_number: int, message_id: str) -> None:
    """Put a site's signature into a reply: over run, round, the request's message id and the payload's hash."""
    signature = signing.sign(key, signing.REPLY, _signed_fields(content, run_id, round_number, message_id))
    content.config_records["reply"]["ed25519"] = signature


def verify_reply(content: RecordDict, key: Ed25519PublicKey, run_id: int, round_number: int, message_id: str) -> None:
    """Check that a reply is the one which that site's key signed, to that request.

    Raises: ProtocolError.
    """
    try:
        signature = content.config_records["reply"]["ed25519"]
    except KeyError as error:
        raise ProtocolError("the reply is not signed") from error
    if not isinstance(signature, bytes):
        raise ProtocolError("the reply's signature is not one")
    signing.verify(key, signature, signing.REPLY, _signed_fields(content, run_id, round_number, message_id))


def pack_error(error: ChexfoundError, request: Message) -> Message:
    """An error reply: the exit code and its one word, never the exception's text."""
    return Message(Error(code=error.exit_code, reason=error.code), reply_to=request)


def unpack_error(message: Message) -> type[ChexfoundError]:
    """The kind of error that a site reports; ChexfoundError for a code that is not ours."""
    reason = str(message.error.reason)
    return RefusedError if reason in REFUSALS else CODES.get(reason, ChexfoundError)


def error_code(message: Message) -> str:
    """The one word that a site reports; that of ChexfoundError for a word that is not ours."""
    reason = str(message.error.reason)
    return reason if reason in REFUSALS else unpack_error(message).code


def explain_error(message: Message) -> str:
    """What an error message says, in our own words: the sender's text is never repeated."""
    kind, code = unpack_error(message), error_code(message)
    if (message.error.code, message.error.reason) == (RefusedError.exit_code, code) and code in REFUSALS:
        return f"refused ({code}): {REFUSALS[code]}"
    if (message.error.code, message.error.reason) == (kind.exit_code, kind.code):
        hint = f"; {HINTS[kind]}" if kind in HINTS else ""
        return f"replied with error {kind.code!r} (exit code {kind.exit_code}){hint}"
    return FLOWER_ERRORS.get(message.error.code, f"failed with Flower's error code {message.error.code:d}")


def payload_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors themselves, without framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def finite(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def count(value: object) -> bool:
    """Whether a JSON value is a number of things: an integer in 0 … 2**40."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


# -- how Flower receives, by its private API


def inflate_once() -> None:
    """Have arrays that arrive put together in one copy beside their chunks; Flower takes three, of a whole model."""
    Array.inflate = classmethod(_inflate)  # type: ignore[assignment, method-assign]


def _inflate(cls: type[Array], object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
    """As Flower's `Array.inflate`.

    Raises: what Flower's raises, over content that is no array's or other chunks than it names.
    """
    children = children or {}
    about = json.loads(get_object_body(object_content, cls).decode())
    named = get_object_children_ids_from_object_content(object_content)
    ids = [named[place] for place in about["arraychunk_ids"]]
    if set(ids) != set(children):
        raise ValueError("an array without its chunks, or with others")
    data = b"".join(cast(bytes, children[one].data) for one in ids)  # type: ignore[attr-defined]
    return cls(dtype=about["dtype"], shape=tuple(about["shape"]), stype=about["stype"], data=data)
