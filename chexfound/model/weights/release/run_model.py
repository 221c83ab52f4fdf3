"""A model directory: weights, the config that they need (input normalisation included), and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from chexfound.durable.files import write_json, write_text
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint, vit
from chexfound.model.checkpoint import load_tensors
from chexfound.model.glori import build_head
from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe

FORMAT = 1


def save(folder: Path, recipe: Recipe, findings: Sequence[str], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write model.safetensors (`backbone.…`, `head.…`), config.json and README.md."""
    config: dict[str, Any] = {
        "format": FORMAT,
        "image_px": recipe.image_px,
        "findings": list(findings),
        "recipe": recipes.to_dict(recipe),
        "weights_sha256": checkpoint.digest(tensors),
    }
    checkpoint.save(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", card)


def load(folder: Path) -> tuple[Recipe, tuple[str, ...], vit.VisionTransformer, nn.Module | None]:
    """Recipe, findings, backbone and head (None if there is none) of a model directory.

    Raises: CheckpointError if a part is absent, damaged, or does not fit the others.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: a model directory of format {config['format']!r}; this release reads {FORMAT}"
            )
        recipe = check.validate(config["recipe"], f"{folder}/config.json")
        findings = tuple(str(name) for name in config["findings"])
        stated = config["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: not a model directory: {error}") from error
    tensors = checkpoint.load(folder / "model.safetensors")
    if checkpoint.digest(tensors) != stated:
        raise CheckpointError(
            f"{folder}: model.safetensors is not the file that config.json was written for: changed or damaged"
        )
    backbone = vit.build(recipe.student, recipe.input, recipe.position_px)
    load_tensors(backbone, checkpoint.with_prefix(tensors, "backbone."), list(backbone.state_dict()))
    head_tensors = checkpoint.with_prefix(tensors, "head.")
    if not head_tensors:
        return recipe, findings, backbone.eval(), None
    head = build_head(recipe, len(findings))
    load_tensors(head, head_tensors, list(head.state_dict()))
    return recipe, findings, backbone.eval(), head.eval()
