"""The beginning of a run, and which of it is trained: fresh weights, or a file's backbone among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.model.weights.published import tensor_names
from chexfound.pretrain import positions
from chexfound.recipe.schema import Recipe

FILE = "backbone.safetensors"  # among a request's tensors: the bytes of the file that its weights are from
TIMES, BESIDE = 4, 2**20  # of the weights' bytes, and beside them, that such a file has at most


def frozen_gains(recipe: Recipe, weights: Mapping[str, Tensor]) -> set[str]:
    """The prototypes' gains that are not trained, see model/heads.py."""
    fixed = {"dino_head": recipe.dino.head_norm_last_layer, "ibot_head": recipe.ibot.head_norm_last_layer}
    ends = tuple(f"{head}.last_layer.weight_g" for head, kept in fixed.items() if kept)
    return {name for name in weights if name.endswith(ends)} if ends else set()


def file_tensor(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A weights file as it travels beside the weights that are from it, for sites that approve it by its SHA-256.

    Raises: CheckpointError if it is absent, or larger than the recipe's model makes one.
    """
    try:
        check_size(path.stat().st_size, weights)
        return {FILE: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def check_size(size: int, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a file of so many bytes that no backbone of these weights' size fills."""
    most = TIMES * sum(tensor.nbytes for tensor in weights.values()) + BESIDE
    if size > most:
        raise CheckpointError(
            f"a weights file of {size} bytes, and the recipe's model takes {most} at most: give one with this model's "
            "backbone, and nothing else (chexfound weights FILE --out DIR)"
        )


def load_backbone(weights: dict[str, Tensor], file: Path | bytes) -> None:
    """Put a saved backbone (in our names, or DINOv2's) into both student and teacher, its positions interpolated.

    Raises: CheckpointError if it is no safetensors, or its names or shapes are not the recipe's.
    """
    where = file if isinstance(file, Path) else "the weights file"
    given = checkpoint.load(file) if isinstance(file, Path) else _parse(file)
    given = tensor_names.backbone_names(checkpoint.with_prefix(given, "backbone.") or given)
    expected = checkpoint.with_prefix(weights, "student.backbone.")
    if "pos_embed" in given:
        given = positions.with_grid(given, math.isqrt(expected["pos_embed"].shape[1] - 1))
    odd = sorted(
        name
        for name in set(given) | set(expected)
        if name not in given or name not in expected or given[name].shape != expected[name].shape
    )
    if odd:
        raise CheckpointError(
            f"{where}: is not the recipe's backbone: {len(odd)} tensors differ, {[name[:80] for name in odd[:3]]}; "
            "give weights of the architecture that `student` names, or change `student` in the recipe"
        )
    for name in weights:
        for whose in ("student.backbone.", "teacher.backbone."):
            if name.startswith(whose):
                weights[name] = given[name.removeprefix(whose)].clone()


def _parse(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the weights file is not readable safetensors ({error})") from error


def taken_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone that goes on: the teacher where there is one for all, else the student (DINOv2: the teacher)."""
    whose = "teacher" if any(name.startswith("teacher.") for name in weights) else "student"
    return checkpoint.with_prefix(weights, f"{whose}.backbone.")
