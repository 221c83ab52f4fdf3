from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chexfound.errors import ConfigError
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.train import Pretrainer
from chexfound.schema import ARCHS

ROOT = Path(__file__).parents[2]
TINY = ["--arch", "vit_demo", "--px", "32,16", "--local-crops", "2", "--batch", "4", "--prototypes", "32"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module; as a script it finds its neighbours beside itself."""
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ssl_step

    return ssl_step


@pytest.fixture
def tiny(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))
    full = bench.configuration

    def small(options: argparse.Namespace) -> dict[str, Any]:
        config = full(options)
        config["dino"]["head_hidden_dim"] = config["ibot"]["head_hidden_dim"] = 32
        config["student"]["layerscale"] = 0.1  # at 1e-5 so small a model's KoLeo follows the rounding
        return config

    monkeypatch.setattr(bench, "configuration", small)
    return bench._parser().parse_args([*TINY, "--rounds", "1", "--loss-steps", "4"])


@pytest.fixture
def pictures(bench: ModuleType, tmp_path: Path) -> Any:
    """Images of 256 px in place of a store's, and their files."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 256, 256), dtype=np.uint8)
    store = SimpleNamespace(pixels=lambda ids: pixels[ids])
    return bench.Images(store, np.arange(8), bench.write_files(pixels, tmp_path / "files"))


def test_against_the_plain_step(bench, tiny, pictures, monkeypatch):
    monkeypatch.setattr(bench, "open_images", lambda data, scratch: pictures)
    lines = dict(bench.compare(tiny))
    assert lines["ssl_step_loss_fp32"]["largest_relative_difference"] < 1e-5
    assert lines["ssl_step_loss_bf16"]["equal"]
    for name in ("ssl_step", "ssl_step_alone_fp32", "ssl_step_alone_bf16", "ssl_data_path"):
        row = lines[name]
        assert row["ratio"] == pytest.approx(row["ours"] / row["rival"])
        assert row["unit"] == "img/s"
    json.dumps(lines, allow_nan=False)


def test_drop_path_while_timing(bench, tiny, pictures, monkeypatch):
    monkeypatch.setattr(bench, "open_images", lambda data, scratch: pictures)
    tiny.drop_path = 0.4
    lines = dict(bench.compare(tiny))
    assert lines["ssl_step_loss_fp32"]["equal"]  # it is 0 for the losses
    assert lines["ssl_step"]["drop_path"] == 0.4
    assert "gflop_per_step" not in lines["ssl_step"]


def test_flops_are_those_that_pytorch_counts(bench, tiny):
    config = bench.configuration(tiny)
    recipe = bench.our_recipe(config, 4, "fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    trainer = Pretrainer(recipe, lambda places: pixels[places], 4, 0)
    trainer.model.train()
    batch = make_batch(recipe, pixels, 0, 0)
    with FlopCounterMode(display=False) as counter:
        trainer.step(batch, 0)
    counted = counter.get_total_flops()
    # Attention is left out, or its backward pass counted 2.5 times the forward pass, by version and kernel.
    assert bench.step_flops(config, 4, int(batch.masks.sum())) == pytest.approx(counted, rel=0.05)


def test_published_names(bench):
    published = {
        "student.backbone.blocks.0.0.norm1.bias": torch.zeros(0),
        "student.backbone.blocks.1.1.mlp.w12.weight": torch.zeros(1),
        "student.backbone.blocks.1.1.mlp.w3.bias": torch.zeros(2),
        "teacher.dino_head.last_layer.weight_g": torch.zeros(3),
    }
    ours = {name: len(tensor) for name, tensor in bench.our_weights(published).items()}
    assert ours == {
        "student.backbone.blocks.0.norm1.bias": 0,
        "student.backbone.blocks.1.mlp.fc1.weight": 1,
        "student.backbone.blocks.1.mlp.fc2.bias": 2,
        "teacher.dino_head.last_layer.weight_g": 3,
    }


def test_turns_alternate_and_the_first_round_does_not_count(bench):
    calls = []

    def turn(name: str) -> Any:
        def timed() -> list[float]:
            calls.append(name)
            return [100.0, 100.0] if len(calls) <= 2 else [2.0, 1.0]

        return timed

    speeds = bench.interleave({"a": (turn("a"), 1), "b": (turn("b"), 3)}, rounds=2, batch=8)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert speeds == {"a": [(4.0, 8.0)] * 2, "b": [(12.0, 24.0)] * 2}


def test_a_folder_that_is_no_checkout(bench, tmp_path):
    with pytest.raises(ConfigError, match=r"no chexfound/train/ssl_meta_arch\.py there"):
        bench.start(tmp_path, {}, tmp_path / "log")


def test_a_checkout_that_does_not_run(bench, tmp_path):
    (tmp_path / "chexfound" / "train").mkdir(parents=True)
    (tmp_path / "chexfound" / "__init__.py").write_text("raise ImportError('xFormers is required for training')")
    (tmp_path / "chexfound" / "train" / "ssl_meta_arch.py").touch()
    with pytest.raises(ConfigError, match=r"does not run on this machine(.|\n)*xFormers is required for training"):
        bench.start(tmp_path, {}, tmp_path / "log")


def test_without_a_gpu_nothing_is_claimed(bench, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(bench.cuda(tiny)) == [("ssl_step_cuda", {"figure": "not measured: no GPU"})]
