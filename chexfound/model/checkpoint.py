"""Tensors on disk and their digests: safetensors, replaced atomically, never a pickle."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from chexfound.durable.files import replace_file
from chexfound.errors import CheckpointError
from chexfound.parallel import group


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes), each length-prefixed."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        for part in (name, str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))):
            result.update(len(part.encode()).to_bytes(4, "big") + part.encode())
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        result.update(data.nbytes.to_bytes(8, "big"))
        result.update(data.data)
    return result.hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically and durably; those that share memory each on their own.

    Raises: StorageError.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(data, key=lambda name: data[name].data_ptr()):
        if data[name].data_ptr() < end:  # tied to the one before: safetensors refuses what shares memory
            data[name] = data[name].clone()
        else:
            end = data[name].data_ptr() + data[name].nbytes
    with replace_file(path) as temporary:
        try:
            safetensors.torch.save_file(data, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # hides the operating system's error in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises: CheckpointError if it is absent, truncated or not safetensors.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it is absent, truncated or of another kind"
        ) from error


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def add_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], expected: list[str]) -> None:
    """Check that tensors can be copied into a module's state (which may be on the meta device).

    Raises: CheckpointError naming what is missing, unexpected, of another shape or not finite.
    """
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"weights do not fit: {len(missing)} missing {[name[:80] for name in missing[:3]]}, "
            f"{len(unexpected)} unexpected {[name[:80] for name in unexpected[:3]]}"
        )
    for name in expected:
        if tensors[name].shape != state[name].shape or tensors[name].dtype != state[name].dtype:
            raise CheckpointError(
                f"weights do not fit: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, "
                f"not {state[name].dtype} {tuple(state[name].shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"weights do not fit: {name} holds a value that is not finite")


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], expected: list[str]) -> None:
    """Copy tensors into a module's state, all or none.

    Raises: CheckpointError naming what is missing, unexpected, of another shape or not finite.
    """
    state = module.state_dict()
    check_fit(state, tensors, expected)
    with torch.no_grad():
        for name in expected:
            state[name].copy_(group.placed(tensors[name], state[name]))
