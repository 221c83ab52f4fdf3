from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chexfound.adapt.fit import build_head, predict
from chexfound.errors import CheckpointError
from chexfound.model import checkpoint, vit
from chexfound.model.weights.release import run_model
from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe

FINDINGS = ("Effusion", "Mass")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    torch.set_num_threads(1)
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))
    return recipes.load(
        "demo",
        {
            "image_px": 32,
            "crops.global_crops_size": 32,
            "crops.local_crops_size": 16,
            "input.normalization": "mean_std",
            "adapt.glori_dim": 8,
            "adapt.glori_heads": 2,
        },
    )


def tensors(recipe: Recipe, head: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(1)
    backbone = vit.build(recipe.student, recipe.input, recipe.crops.global_crops_size)
    result = checkpoint.add_prefix(backbone.state_dict(), "backbone.")
    if head:
        result |= checkpoint.add_prefix(build_head(recipe, len(FINDINGS)).state_dict(), "head.")
    return result


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> Path:
    run_model.save(tmp_path / "model", recipe, FINDINGS, tensors(recipe), "# A card\n")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["glori", "linear"])
def test_a_model_comes_back_as_it_was(recipe, tmp_path, kind):
    recipe = check.validate({**recipes.to_dict(recipe), "adapt": {"head": kind, "n_last_blocks": 1}}, "test")
    torch.manual_seed(1)
    backbone = vit.build(recipe.student, recipe.input, 32)
    head = build_head(recipe, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    parts = {"backbone.": backbone.state_dict(), "head.": head.state_dict()}
    weights = {prefix + name: tensor for prefix, state in parts.items() for name, tensor in state.items()}
    run_model.save(tmp_path / "model", recipe, FINDINGS, weights, "# A card\n")
    read, findings, read_backbone, read_head = run_model.load(tmp_path / "model")
    assert (read, findings) == (recipe, FINDINGS)
    assert read_backbone.normalize.config.normalization == "mean_std"
    assert not read_backbone.training
    assert not read_head.training
    assert np.array_equal(predict(read_backbone, read_head, IMAGES, 1), predict(backbone, head, IMAGES, 1))
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["weights_sha256"] == checkpoint.digest(weights)


def test_a_model_without_a_head(recipe, tmp_path):
    run_model.save(tmp_path / "model", recipe, (), tensors(recipe, head=False), "")
    assert run_model.load(tmp_path / "model")[3] is None


def edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "not a model directory"),
        (lambda f: (f / "config.json").write_text("{"), "not a model directory"),
        (lambda f: (f / "config.json").write_text("[1]"), "not a model directory"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "not a model directory"),
        (lambda f: edit(f, recipe=None), "not a model directory"),
        (lambda f: edit(f, findings=3), "not a model directory"),
        (lambda f: edit(f, recipe=[1]), "not a model directory"),
        (lambda f: edit(f, weights_sha256=None), "not a model directory"),
        (lambda f: edit(f, recipe={"seeed": 1}), r"unknown key 'seeed'; did you mean 'seed'\?"),
        (lambda f: edit(f, format=99), "of format 99; this release reads 1"),
        (lambda f: edit(f, findings=["Effusion"]), r"weights do not fit: .* is torch\.float32"),
        (lambda f: edit(f, recipe={"image_px": 32}), "weights do not fit"),
        (lambda f: (f / "model.safetensors").unlink(), "not a readable safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" * 100), "not a readable safetensors file"),
    ],
)
def test_a_damaged_part_is_a_checkpoint_error(folder, damage, message):
    run_model.load(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        run_model.load(folder)


def test_a_single_flipped_bit_is_found(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that config\.json was written for"):
        run_model.load(folder)


def test_weights_of_another_model_are_found(folder, recipe):
    other = {name: tensor + 1 for name, tensor in tensors(recipe).items()}
    checkpoint.save(folder / "model.safetensors", other)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        run_model.load(folder)


def test_a_part_that_is_missing_is_named(recipe, tmp_path):
    weights = tensors(recipe)
    weights.pop("backbone.cls_token")
    run_model.save(tmp_path / "model", recipe, FINDINGS, weights, "")
    with pytest.raises(CheckpointError, match=r"1 missing \['cls_token'\]"):
        run_model.load(tmp_path / "model")


def test_an_absent_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a model directory"):
        run_model.load(tmp_path / "none")
