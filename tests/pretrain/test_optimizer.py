from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chexfound.pretrain import optimizer
from chexfound.pretrain.meta_arch import build_student
from chexfound.pretrain.schedules import Schedule
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Optim

SMALL = {"crops.global_crops_size": 32, "crops.local_crops_size": 16, "image_px": 32}
PAPER = "yaml (layerwise_decay 1.0, patch_embed_lr_mult 0.2)"
DECAYED = "backbone with layerwise_decay 0.9"


def student(**values: Any) -> torch.nn.Module:
    return build_student(recipes.load("demo", {**SMALL, **values}))


def ours(module: str, name: str) -> str:
    """A name of the reference as we write it."""
    if name.startswith("blocks."):
        _, _chunk, index, rest = name.split(".", 3)
        name = f"blocks.{index}.{rest.replace('mlp.w12.', 'mlp.fc1.').replace('mlp.w3.', 'mlp.fc2.')}"
    name = name.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
    return f"{module}.{name.replace('last_layer.parametrizations.weight.original1', 'last_layer.weight_v')}"


@pytest.mark.parametrize("setting", [PAPER, DECAYED])
def test_multipliers_are_those_of_the_public_implementation(reference: Path, setting):
    """The linear stem; the conv stem has no counterpart there."""
    groups = json.loads((reference / "param_groups.json").read_text())[setting]
    model = student(**{"student.stem": "linear"})
    parameters = dict(model.named_parameters())
    config = Optim(patch_embed_lr_mult=0.2, layerwise_decay=1.0 if setting == PAPER else 0.9)
    matched = set()
    for group in groups:
        name = ours(group.get("module", "backbone"), group["name"])
        matched.add(name)
        lr, decay, last = optimizer.multipliers(name, parameters[name].ndim, 4, config)
        if setting == PAPER:  # the other lists rates only
            assert (decay, last) == (group["wd_multiplier"], group["is_last_layer"]), name
        assert lr == pytest.approx(group["lr_multiplier"], rel=1e-12), name
    expected = {name for name in parameters if setting == PAPER or name.startswith("backbone.")}
    assert matched == expected


def test_norm_gains_of_the_conv_stem_are_not_decayed():
    model = student()
    gains = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
        for name, _ in module.named_parameters()
    ]
    assert sum("patch_embed" in name for name in gains) == 8
    parameters = dict(model.named_parameters())
    for name in gains:
        assert optimizer.multipliers(name, parameters[name].ndim, 4, Optim())[1] == 0.0


@pytest.mark.parametrize(("kind", "cls"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_every_trainable_parameter_is_in_one_group(kind, cls):
    model = student()
    built = optimizer.build(model, 4, Optim(optimizer=kind, patch_embed_lr_mult=0.2, layerwise_decay=0.9))
    assert isinstance(built, cls)
    held = [id(parameter) for group in built.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(wanted)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"dino_head.last_layer.weight_g", "ibot_head.last_layer.weight_g"}


def test_a_step_s_rates_reach_the_groups():
    model = student()
    built = optimizer.build(model, 4, Optim(patch_embed_lr_mult=0.2))
    optimizer.apply_schedule(
        built, Schedule(lr=0.5, last_layer_lr=0.0, weight_decay=0.25, momentum=0.9, teacher_temp=0.04)
    )
    rates = {
        name: (group["lr"], group["weight_decay"])
        for group in built.param_groups
        for parameter in group["params"]
        for name, other in model.named_parameters()
        if other is parameter
    }
    assert rates["backbone.pos_embed"] == (0.5, 0.25)
    assert rates["backbone.patch_embed.proj.weight"] == (0.1, 0.25)
    assert rates["backbone.patch_embed.proj.bias"] == (0.1, 0.0)
    assert rates["backbone.blocks.0.ls1.gamma"] == (0.5, 0.0)
    assert rates["dino_head.last_layer.weight_v"] == (0.0, 0.25)
    assert rates["ibot_head.mlp.0.bias"] == (0.5, 0.0)
