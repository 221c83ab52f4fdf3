"""Tensors and masked integers <-> arrays of a Flower message, inline, beside it, or detached."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from chexfound.contract import detached
from chexfound.contract.detached import Detached
from chexfound.contract.request import Reply, Request
from chexfound.errors import (
    ProtocolError,
)
from chexfound.parsing import strict_json
from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives
from chexfound.secagg import messages

RINGS = (16, 32, 64)  # bits of the unsigned integers that masked arrays are of
INLINE_BYTES = 128 * 1024  # of a message's arrays together, up to which they travel in its own record
TABLE_MAX, ROWS_MAX = 2**22, 2**14  # characters and rows of a list of tensors: five times those of the largest model
JSON_MAX = 2**27  # characters of whatever else comes as JSON; it takes some ten times as much once it is read
DTYPES = {"float32": torch.float32, "float64": torch.float64, "uint8": torch.uint8}  # uint8: a file, to sites only
_Message = TypeVar("_Message", Request, Reply)


@dataclass(frozen=True, kw_only=True, config=messages.STRICT)
class _ApartFields:
    sha256: messages.Digest
    arrays: dict[str, Annotated[int, Field(gt=0, le=detached.WHOLE_MAX)]]


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


def pack_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, str | bytes], dict[str, ArrayRecord]]:
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


def pack_detached(apart: Detached) -> dict[str, str | bytes]:
    """Write what names detached arrays into a message's own record."""
    own: dict[str, str | bytes] = {"apart": json.dumps({"sha256": apart.sha256, "arrays": dict(apart.arrays)})}
    return own | ({"tensors": json.dumps({"tensors": apart.table})} if apart.table else {})


def pack_chunk(chunk: np.ndarray) -> tuple[dict[str, str | bytes], dict[str, ArrayRecord]]:
    """Pack bytes uint8 (N,) inline up to `INLINE_BYTES`, else as a record of their own."""
    if chunk.nbytes <= INLINE_BYTES:
        return {"chunk": chunk.tobytes()}, {}
    return {}, {"chunk": ArrayRecord({"uint8": Array(chunk)})}


def chunk_of(content: RecordDict, key: str) -> np.ndarray | None:
    """Read the bytes uint8 (N,) that a message carries, if any."""
    if "chunk" in content.array_records:
        arrays = content.array_records["chunk"]
        if list(arrays) != ["uint8"]:
            raise ProtocolError("the message's chunk is not one of bytes")
        return _flat_array("uint8", arrays["uint8"], ("uint8",))
    own = content.config_records[key]
    return _inline("uint8", own["chunk"]) if "chunk" in own else None


def detached_of(content: RecordDict, key: str, names: Collection[str]) -> Detached | None:
    """Give what is to be had apart from a message, in arrays of these dtypes."""
    if "apart" not in content.config_records[key]:
        return None
    fields = messages.parse(_ApartFields, object_of(content, key, "apart"), "what comes apart")
    inline = {"chunk", *DTYPES, *(f"uint{ring}" for ring in RINGS)} & set(content.config_records[key])
    if not fields.arrays or not set(fields.arrays) <= set(names) or inline or content.array_records:
        raise ProtocolError("the message's arrays are to be apart from it, and are of no known kind or in it as well")
    table = _table(content, key) if "tensors" in content.config_records[key] else []
    apart = Detached(sha256=fields.sha256, arrays=fields.arrays, table=table)
    if apart.size > detached.WHOLE_MAX or any(
        nbytes % np.dtype(name).itemsize for name, nbytes in apart.arrays.items()
    ):
        raise ProtocolError("the message's arrays, apart from it, are too large or not of whole numbers")
    return apart


def with_arrays(message: _Message, apart: Detached, path: Path) -> _Message:
    """A message with what came apart from it, read where it is: in that file, which has all of it and nothing else.

    Raises: ProtocolError.
    """
    start = 0
    arrays: dict[str, np.ndarray] = {}
    for name, nbytes in sorted(apart.arrays.items()):
        dtype = little_endian(name)
        mapped = np.memmap(path, dtype, "c", offset=start, shape=(nbytes // dtype.itemsize,))
        arrays[name] = mapped.astype(name, copy=False).view(np.ndarray)
        start += nbytes
    for empty in {kind for _, kind, _ in apart.table} & DTYPES.keys() - arrays.keys():
        arrays[empty] = np.zeros(0, empty)  # of tensors without a value
    rings = {int(name.removeprefix("uint")): arrays.pop(name) for name in list(arrays) if name not in DTYPES}
    given: dict[str, Any] = {"tensors": _cut(apart.table, arrays)} | ({"masked": rings} if rings else {})
    return replace(message, **given)


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
    dtype = little_endian(name)
    if not isinstance(data, bytes) or len(data) % dtype.itemsize:
        raise ProtocolError(f"array {name!r} cannot be read")
    return np.frombuffer(data, dtype).astype(name)


def little_endian(name: str) -> np.dtype[Any]:
    """Give the dtype of a name as it travels."""
    return np.dtype(name).newbyteorder("<")


def masked_of(content: RecordDict) -> dict[int, np.ndarray]:
    """The arrays of a reply that are under masks, by bits of their ring."""
    names = {f"uint{ring}": ring for ring in RINGS}
    own = content.config_records["reply"]
    if "masked" not in content.array_records:
        return {ring: _inline(name, own[name]) for name, ring in names.items() if name in own}
    arrays = content.array_records["masked"]
    if odd := [name for name in arrays if name not in names]:
        raise ProtocolError(f"array {odd[0]!r}: not of a ring")
    return {names[name]: _flat_array(name, array, names) for name, array in arrays.items()}


def tensors_of(content: RecordDict, key: str) -> dict[str, Tensor]:
    """Read the tensors that a message carries, by name."""
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
        rows = object_of(content, key, "tensors", TABLE_MAX).get("tensors")
        if isinstance(rows, list) and len(rows) > ROWS_MAX:
            raise ProtocolError(f"the message lists {len(rows)} tensors, and {ROWS_MAX} are the most of any model")
        return _table_adapter.validate_python(rows)
    except ValidationError as error:
        raise ProtocolError("the message's list of tensors is malformed") from error


def object_of(content: RecordDict, key: str, part: str = "json", most: int = JSON_MAX) -> dict[str, Any]:
    """Read one JSON object of a message's own record, of finite numbers and without a key given twice."""
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


def payload_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors themselves, without framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
