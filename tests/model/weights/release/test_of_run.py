"""The model/ that a run left before it was a release, as 1592267 wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import chexfound
from chexfound.durable.files import write_json
from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.recipe import load as recipes


@pytest.fixture
def old(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of that layout, with the run's weights."""
    arm = make_run(model=False) / "work" / "seed-0" / "federated"
    model, tensors = tmp_path / "old" / "model", checkpoint.load(arm / "model.safetensors")
    checkpoint.save(model / "model.safetensors", tensors)
    values = {
        "format": 1,
        "image_px": 32,
        "findings": ["Effusion", "Mass"],
        "weights_sha256": checkpoint.digest(tensors),
    }
    write_json(model / "config.json", {**values, "recipe": recipes.to_dict(recipes.load(str(arm / "recipe.yaml")))})
    return model


@pytest.mark.parametrize("where", ["model", "its-run"])
def test_it_is_read(old: Path, where: str) -> None:
    path = old if where == "model" else old.parent
    tensors = checkpoint.load(old / "model.safetensors")
    assert checkpoint.digest(chexfound.load_backbone(path).state_dict()) == checkpoint.digest(
        checkpoint.with_prefix(tensors, "backbone.")
    )
    assert chexfound.load_head(path).findings == ("Effusion", "Mass")


def test_weights_that_are_not_its_own_are_refused(old: Path) -> None:
    tensors = checkpoint.load(old / "model.safetensors")
    checkpoint.save(old / "model.safetensors", tensors | {"backbone.cls_token": tensors["backbone.cls_token"] + 1})
    with pytest.raises(CheckpointError, match="is not the file that its config.json tells of"):
        chexfound.load_backbone(old)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 2), ("recipe", 3), ("recipe", {"seed": "x"}), ("recipe", None)],
    ids=["another-format", "recipe-a-number", "recipe-with-a-wrong-seed", "no-recipe"],
)
def test_another_config_is_refused(old: Path, key: str, value: object) -> None:
    write_json(old / "config.json", json.loads((old / "config.json").read_text()) | {key: value})
    with pytest.raises(CheckpointError, match=re.escape(str(old)) + ".*of no release that this one reads"):
        chexfound.load_backbone(old)
