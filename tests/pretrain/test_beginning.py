"""What a run begins with: of a file student and teacher alike, and of two heads each has a gain of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.pretrain import beginning
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes


@pytest.mark.parametrize("kept", [(True, True), (True, False), (False, True), (False, False)])
def test_the_gains_that_stay_are_those_of_the_heads_that_keep_them(kept: tuple[bool, bool]) -> None:
    recipe = recipes.load("demo", {"dino.head_norm_last_layer": kept[0], "ibot.head_norm_last_layer": kept[1]})
    names = {head: f"student.{head}.last_layer.weight_g" for head in ("dino_head", "ibot_head")}
    weights = dict.fromkeys([*names.values(), "student.dino_head.last_layer.weight_v"], torch.zeros(1))
    found = beginning.frozen_gains(recipe, weights)
    assert found == {name for name, stays in zip(names.values(), kept, strict=True) if stays}


@pytest.mark.parametrize("of", ["a path", "bytes"])
def test_a_file_is_the_beginning_of_student_and_teacher(of: str, tiny_recipe: Any, tmp_path: Path) -> None:
    """At a site both ends load it by one function, so a teacher that was forgotten would be equal at both."""
    weights = initial_weights(curriculum.changed(tiny_recipe, seed=5))
    path = tmp_path / "elsewhere.safetensors"
    checkpoint.save(path, beginning.taken_backbone(weights))
    mine = initial_weights(tiny_recipe)
    heads = {name: tensor.clone() for name, tensor in mine.items() if ".backbone." not in name}
    beginning.load_backbone(mine, path if of == "a path" else path.read_bytes())
    for name, tensor in mine.items():
        assert torch.equal(tensor, heads[name] if name in heads else weights[name]), name


def test_of_both_the_teacher_goes_on() -> None:
    both = {"student.backbone.a": torch.zeros(1), "teacher.backbone.a": torch.ones(1)}
    assert beginning.taken_backbone(both) == {"a": both["teacher.backbone.a"]}
    assert beginning.taken_backbone({"student.backbone.a": both["student.backbone.a"]})["a"] == 0


def test_a_file_larger_than_the_model_makes_one_is_not_read(tmp_path: Path) -> None:
    weights, path = {"student.backbone.a": torch.zeros(1000)}, tmp_path / "large"
    most = 4 * 4000 + 2**20
    path.write_bytes(bytes(most))
    assert beginning.file_tensor(path, weights)[beginning.FILE].nbytes == most
    path.write_bytes(bytes(most + 1))
    with pytest.raises(CheckpointError, match=f"{most + 1} bytes"):
        beginning.file_tensor(path, weights)
