"""Small models of random numbers, and their weights as others name them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chexfound.durable.files import write_json, write_text
from chexfound.durable.journal import Journal
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.model.weights import export
from chexfound.model.weights.architecture import Backbone, Projection
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Input

torch.set_num_threads(1)


def filled(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A module's state in random numbers: nothing is left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in module.state_dict().items()}


@pytest.fixture
def make_backbone() -> Callable[..., tuple[Backbone, dict[str, Tensor]]]:
    """`make_backbone(ffn="mlp", registers=0, …)`: a small backbone's config, and its tensors under our names."""

    def make(**values: Any) -> tuple[Backbone, dict[str, Tensor]]:
        config = Backbone(
            **{
                **dict(dim=64, depth=4, heads=4, patch_size=8, in_chans=3, registers=4, ffn="swiglu", layerscale=True),
                **dict(grid=4),
                **values,
            }
        )
        return config, filled(config.build(Input()))

    return make


@pytest.fixture
def make_projection() -> Callable[..., tuple[Projection, dict[str, Tensor]]]:
    """`make_projection(nlayers=2)`: a small DINO head."""

    def make(**values: Any) -> tuple[Projection, dict[str, Tensor]]:
        given = {**dict(dim=64, n_prototypes=20, hidden_dim=12, bottleneck_dim=6, nlayers=3), **values}
        config = Projection(**given)
        return config, filled(config.build(), seed=1)

    return make


@pytest.fixture
def as_published() -> Callable[..., dict[str, Tensor]]:
    """`as_published(tensors, chunks=2, ls="weight")`: a backbone as the reference's code names it."""

    def rename(tensors: dict[str, Tensor], chunks: int = 0, ls: str = "gamma") -> dict[str, Tensor]:
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        swiglu = tensors["blocks.0.mlp.fc1.weight"].shape[0] != tensors["blocks.0.mlp.fc2.weight"].shape[1]
        result = {}
        for name, tensor in tensors.items():
            if name.startswith("blocks.") and chunks:
                index = int(name.split(".")[1])
                name = f"blocks.{index // (depth // chunks)}.{name.removeprefix('blocks.')}"
            if swiglu:
                name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            if tensor.numel():  # without registers the reference has none, not an empty one
                result[name.replace(".gamma", f".{ls}")] = tensor
        return result

    return rename


SMALL = {
    "image_px": 32,
    "student.in_chans": 3,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "dino.head_n_prototypes": 16,
    "dino.head_hidden_dim": 12,
    "dino.head_bottleneck_dim": 8,
    "ibot.head_n_prototypes": 20,
    "ibot.head_hidden_dim": 12,
    "ibot.head_bottleneck_dim": 8,
    "adapt.glori_dim": 8,
    "adapt.glori_heads": 2,
    "adapt.glori_ffn_dim": 12,
    "adapt.findings": ["Effusion", "Mass"],
}


@pytest.fixture
def make_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`make_run(LINEAR, policy=…)`: a simulation's folder as a run leaves it, with one arm's weights and journal."""
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))

    def make(overrides: dict[str, Any] | None = None, model: bool = True) -> Path:
        recipe = recipes.load("demo", {**SMALL, **(overrides or {})})
        out = tmp_path / "out"
        arm = out / "work" / "seed-0" / "federated"
        weights = initial_weights(recipe)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("optimizer.")}
        generator = torch.Generator().manual_seed(3)
        for name, tensor in weights.items():
            weights[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        checkpoint.save(arm / "rounds" / "pretrain-000001.safetensors", weights)
        whose = "teacher" if "teacher.backbone.cls_token" in weights else "student"
        tensors = checkpoint.add_prefix(checkpoint.with_prefix(weights, f"{whose}.backbone."), "backbone.")
        tensors |= checkpoint.add_prefix(filled(build_head(recipe, 2)), "head.")
        checkpoint.save(arm / "model.safetensors", tensors)
        write_text(arm / "recipe.yaml", recipes.to_yaml(recipe))
        site = {"site": "north", "images": 9, "patients": 5, "train": 6, "val": 1, "test": 2}
        history = {"site": "north", "history": [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.5}]}
        done = {"seconds": 1.5, "bytes": {"down": 10, "up": 20}, "sites": [history]}
        rounds = dict(event="round", phase="pretrain", round=1, file="pretrain-000001.safetensors", **done)
        sha256 = checkpoint.digest(tensors)
        with Journal(arm / "journal.jsonl") as journal:
            journal.append({"event": "start", "roster": [site], "findings": ["Effusion", "Mass"]})
            journal.append({**rounds, "sha256": checkpoint.digest(weights)})
            journal.append({"event": "done", "model_sha256": sha256})
        row = dict(arm="federated", tested_on="north", finding="Mass", n=9, positives=3, auroc=0.75, auroc_ci=None)
        figures = {"model_sha256": {"federated": sha256}, "results": [{**row, "reason": None}], "replicates": []}
        write_json(out / "metrics.json", {**figures, "date": "2026-01-01", "machine": {}, "versions": {}})
        if model:
            export.of_finished(arm, out / "model", json.loads((out / "metrics.json").read_text()))
        return out

    return make
