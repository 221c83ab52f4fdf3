"""Checkpoint files from elsewhere, read without running anything of them: .safetensors and PyTorch's .pth.

A .pth file is a pickle, and a pickle can hold a call of any function.  It is read with
`weights_only=True`, which refuses every call but those that rebuild tensors and plain containers;
what it gives is then checked as any input is.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.model.weights.published.untrusted import at, named_once
from chexfound.parsing.names import shown

CONTAINERS = ("model", "state_dict", "teacher", "student")
HARMLESS = re.compile(  # what a tensor is rebuilt of, in a pickle that is refused for something else
    r"collections\.OrderedDict|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter|"
    r"(\w+\.)?\w*(Storage|Tensor)|Size|device|(b?float|q?u?int|bool|complex|bits)\w*)"
)
PLAIN = (bool, int, float, str, type(None))
CONVERTED = (torch.float64, torch.float16, torch.bfloat16)  # 8 bits and fewer mean nothing without their scales


@dataclass(frozen=True, kw_only=True)
class File:
    """Hold what a file holds: tensors by name, plain values beside them, and what is neither."""

    path: Path
    format: str  # safetensors | pth
    sha256: str
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)  # names and texts printable and cut, here and below
    left_out: dict[str, str] = field(default_factory=dict)  # key -> what it is


def read(path: Path) -> File:
    """Read a checkpoint file of either format, told by its first bytes and not by its name.

    Raises: CheckpointError if it is absent, damaged, of another kind, or holds more than tensors and plain values.
    """
    path = Path(path)
    with at(path):
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then JSON
            tensors = _checked(checkpoint.load(path).items())
            with safe_open(path, "pt") as opened:
                values = {shown(key, 80): shown(value) for key, value in (opened.metadata() or {}).items()}
            return File(path=path, format="safetensors", sha256=sha256(path), tensors=tensors, values=values)
        if not start.startswith((b"PK\3\4", b"\x80")):
            raise CheckpointError(
                "neither safetensors nor a PyTorch checkpoint; it is truncated at its start or of another kind"
            )
        return _flatten(_unpickle(path), path)


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with floating point of 16 and 64 bits as float32, which the modules have."""
    return {name: tensor.float() if tensor.dtype in CONVERTED else tensor for name, tensor in tensors.items()}


def _unpickle(path: Path) -> Any:
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storage classes; nothing that the user can mend
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes end in whatever they lead to: KeyError, IndexError, RuntimeError, …
        calls = _calls(path, error)
        if calls:
            raise CheckpointError(
                f"refused, nothing of it was run: beside tensors it would call {', '.join(calls)} when it is "
                "unpickled. Ask whoever made it for a safetensors file, or for one that holds tensors only"
            ) from error
        reason = shown(str(error).partition("\n")[0].partition(". ")[0], 120) or type(error).__name__
        reason = "not written by torch.save" if reason == "Weights only load failed" else reason
        raise CheckpointError(
            f"not a readable PyTorch checkpoint ({reason}); it is truncated, damaged or of another kind"
        ) from error


def _check_zip(path: Path) -> None:
    """Compare every entry with its checksum, which PyTorch does not; and refuse what it never writes.

    A compressed entry, or several on the same bytes, can be a few kilobytes that unfold to a machine's memory.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # the format of before PyTorch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError("a compressed archive, not a PyTorch checkpoint; unpack it first")
            if len({entry.filename for entry in entries}) < len(entries):
                raise CheckpointError("two entries of the archive have one name: not written by torch.save")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError("its entries claim more bytes than the file has; damaged, or made so")
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes, as above
        raise CheckpointError(
            f"not a readable PyTorch checkpoint ({shown(error, 120)}); it is truncated or damaged"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{shown(damaged, 80)} in it does not have its checksum: damaged; fetch it anew")


def _calls(path: Path, error: Exception) -> list[str]:
    """Give what a refused pickle would call, as far as it can be told; the pickle is parsed, not run."""
    try:
        found = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip, or a damaged one
        found = _globals(path)
    found += re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    return sorted({shown(name, 80) for name in found if not HARMLESS.fullmatch(name)})[:5]


def _globals(path: Path) -> list[str]:
    """Names that a bare pickle looks up."""
    found, strings = [], [""]
    with contextlib.suppress(Exception), open(path, "rb") as file:  # damaged: what was read until there
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found


def _flatten(given: Any, path: Path) -> File:
    """One level of names from `{"teacher": {…}}`, `{"model": {…}, "iteration": 3}`, or a flat state dict."""
    if not isinstance(given, dict):
        raise CheckpointError(f"holds a {type(given).__name__}, not a state dict")
    tensors: list[tuple[str, Any]] = []
    values: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for key, value in _items(given):
        if isinstance(value, Tensor):
            tensors.append((key, value))
        elif isinstance(value, PLAIN):
            values[shown(key, 80)] = _plain_value(value)
        elif key in CONTAINERS and isinstance(value, dict):
            prefix = f"{key}." if key in ("teacher", "student") else ""
            tensors += [(f"{prefix}{inner}", tensor) for inner, tensor in _items(value)]
        else:
            size = f" of {len(value)} entries" if hasattr(value, "__len__") else ""
            left_out[shown(key, 80)] = f"training state, a {type(value).__name__}{size}"
    return File(
        path=path, format="pth", sha256=sha256(path), tensors=_checked(tensors), values=values, left_out=left_out
    )


def _items(given: dict[Any, Any]) -> Iterable[tuple[str, Any]]:
    """A dictionary's own items, whatever a pickle has put in the place of its methods.

    Raises: CheckpointError if a key is no text.
    """
    for key, value in dict.items(given):
        if not isinstance(key, str):
            raise CheckpointError(f"holds a key that is a {type(key).__name__}, not a name")
        yield key, value


def _plain_value(value: Any) -> Any:
    """Give what JSON and a table can have: text printable and cut, a number in 64 bits and finite or else as text."""
    if isinstance(value, int):
        return value if value.bit_length() < 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None else shown(value)


def _checked(tensors: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """Plain dense tensors under printable names, which claim no more than twice the bytes that they stand on.

    Twice, since some may be tied: one tensor under two names.
    """
    result = named_once((shown(name), _plain_tensor(shown(name, 80), tensor)) for name, tensor in tensors)
    claimed = sum(tensor.nbytes for tensor in result.values())
    storages = [tensor.untyped_storage() for tensor in result.values()]
    if claimed > 2 * sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()):
        raise CheckpointError("its tensors together claim more than twice the values that the file has bytes for")
    return result


def _plain_tensor(name: str, tensor: Any) -> Tensor:
    """Without what a pickle can have set on it.

    Raises: CheckpointError if it is no plain tensor, or larger than the bytes that it stands on.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_nested or tensor.is_quantized:
        raise CheckpointError(f"{name!r} is a {type(tensor).__name__}, not a plain tensor")
    result = Tensor.detach(tensor)
    if result.nbytes > result.untyped_storage().nbytes():
        raise CheckpointError(f"{name!r} claims more values than the file has bytes for it")
    return result
