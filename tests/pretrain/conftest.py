from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Makes recipes of a model that takes a few milliseconds a step."""
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))
    values: dict[str, Any] = {
        "image_px": 32,
        "student.num_register_tokens": 2,
        "crops.global_crops_size": 32,
        "crops.local_crops_size": 16,
        "dino.head_n_prototypes": 12,
        "dino.head_hidden_dim": 16,
        "dino.head_bottleneck_dim": 8,
        "ibot.head_n_prototypes": 10,
        "ibot.head_hidden_dim": 16,
        "ibot.head_bottleneck_dim": 8,
        "ibot.mask_ratio_min_max": (0.3, 0.8),
        "train.rounds": 4,
        "train.local_steps": 3,
        "train.OFFICIAL_EPOCH_LENGTH": 4,
    }
    return lambda **overrides: recipes.load(
        "demo", {**values, **{k.replace("__", "."): v for k, v in overrides.items()}}
    )


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 32, 32), dtype=np.uint8)
