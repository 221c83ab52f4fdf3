from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Makes recipes of a backbone of width 24 at 32 px, and of a head to match."""
    torch.set_num_threads(1)
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))
    values: dict[str, Any] = {
        "image_px": 32,
        "crops.global_crops_size": 32,
        "crops.local_crops_size": 16,
        "adapt.rounds": 5,
        "adapt.local_steps": 4,
        "adapt.warmup_steps": 2,
        "adapt.views": 2,
        "adapt.glori_dim": 8,
        "adapt.glori_heads": 2,
        "adapt.glori_ffn_dim": 12,
    }
    return lambda **overrides: recipes.load(
        "demo", {**values, **{k.replace("__", "."): v for k, v in overrides.items()}}
    )
