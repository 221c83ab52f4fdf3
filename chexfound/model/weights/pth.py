"""Checkpoint files from elsewhere, read without running anything of them: .safetensors and PyTorch's .pth.

A .pth file is a pickle, and a pickle can hold a call of any function.  It is read with
`weights_only=True`, which refuses every call but those that rebuild tensors and plain containers;
what it gives is then checked as any input is.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from chexfound.errors import CheckpointError
from chexfound.model import checkpoint

CONTAINERS = ("model", "state_dict", "teacher", "student")
HARMLESS = ("torch.", "collections.OrderedDict")  # a tensor's own, where they are not refused with the rest
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class File:
    """What a file holds: tensors by name, plain values beside them, and what is neither."""

    path: Path
    format: str  # safetensors | pth
    tensors: dict[str, Tensor]  # floating point as float32
    dtypes: tuple[str, ...] = ()  # as they are in the file
    values: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # key -> what it is


def read(path: Path) -> File:
    """Read a checkpoint file of either format, told by its first bytes and not by its name.

    Raises: CheckpointError if it is absent, damaged, of another kind, or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then JSON
        tensors = checkpoint.load(path)
        with safe_open(path, "pt") as opened:
            values = dict(opened.metadata() or {})
        return File(path=path, format="safetensors", **_checked(tensors, path), values=values)
    if not start.startswith((b"PK\3\4", b"\x80")):
        raise CheckpointError(
            f"{path}: neither safetensors nor a PyTorch checkpoint; it is truncated at its start or of another kind"
        )
    return _flatten(_unpickle(path), path)


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
                f"{path}: refused, nothing of it was run: beside tensors it would call {', '.join(calls)} when it is "
                "unpickled. Ask whoever made it for a safetensors file, or for one that holds tensors only"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0][:120] or type(error).__name__
        reason = "not written by torch.save" if reason == "Weights only load failed" else reason
        raise CheckpointError(
            f"{path}: not a readable PyTorch checkpoint ({reason}); it is truncated, damaged or of another kind"
        ) from error


def _check_zip(path: Path) -> None:
    """PyTorch never compresses: a compressed entry can be a few kilobytes that unfold to a machine's memory."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # the format of before PyTorch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception as error:  # damaged bytes, as below
        raise CheckpointError(
            f"{path}: not a readable PyTorch checkpoint ({error}); it is truncated or damaged"
        ) from error
    if compressed:
        raise CheckpointError(f"{path}: a compressed archive, not a PyTorch checkpoint; unpack it first")


def _calls(path: Path, error: Exception) -> list[str]:
    """What a refused pickle would call, as far as it can be told; the pickle is parsed, not run."""
    try:
        found = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip, or a damaged one
        found = _globals(path)
    found += re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    return sorted({name[:80] for name in found if not name.startswith(HARMLESS)})[:5]


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
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{path}: holds a {type(given).__name__}, not a state dict")
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for key, value in given.items():
        name = str(key)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, PLAIN):
            values[name] = value
        elif name in CONTAINERS and isinstance(value, Mapping):
            prefix = f"{name}." if name in ("teacher", "student") else ""
            tensors |= {f"{prefix}{inner}": tensor for inner, tensor in value.items()}
        else:
            size = f" of {len(value)} entries" if hasattr(value, "__len__") else ""
            left_out[name] = f"training state, a {type(value).__name__}{size}"
    return File(path=path, format="pth", **_checked(tensors, path), values=values, left_out=left_out)


def _checked(tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Plain dense tensors only, no larger than the bytes that they stand on; half precision becomes float32."""
    result, dtypes = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name[:80]!r} is a {type(tensor).__name__}, not a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name[:80]!r} claims more values than the file has bytes for it")
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        result[name] = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return {"tensors": result, "dtypes": tuple(sorted(dtypes))}
