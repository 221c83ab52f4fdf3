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
from chexfound.recipe.schema import ARCHS

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
    monkeypatch.setattr(bench, "slowdown", lambda dtype: 0.5)
    lines = dict(bench.compare(tiny))
    assert lines["ssl_step"]["precision"] == "bf16"
    assert lines["ssl_step_loss_fp32"]["largest_relative_difference"] < 1e-5
    assert lines["ssl_step_loss_bf16"]["equal"]
    for name in ("ssl_step", "ssl_step_alone_fp32", "ssl_step_alone_bf16", "ssl_data_path"):
        row = lines[name]
        assert row["ratio"] == pytest.approx(row["ours"] / row["rival"])
        assert row["unit"] == "img/s"
    json.dumps(lines, allow_nan=False)


def test_without_bfloat16_instructions_the_step_is_timed_in_fp32(bench, tiny, pictures, monkeypatch):
    monkeypatch.setattr(bench, "open_images", lambda data, scratch: pictures)
    monkeypatch.setattr(bench, "slowdown", lambda dtype: 50.0)
    lines = dict(bench.compare(tiny))
    assert lines["ssl_step"]["precision"] == "fp32"
    assert lines["ssl_step_bf16"] == {"figure": "not measured: products take 50 times as long as in fp32 here"}
    assert "ssl_step_loss_bf16" not in lines


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


CHECKOUT = {  # what ssl_rival.py uses of the public code, over a backbone of one number a pixel
    "omegaconf.py": """
from types import SimpleNamespace


class OmegaConf:
    @staticmethod
    def create(values):
        return values

    @staticmethod
    def merge(defaults, values):
        def spaced(value):
            return SimpleNamespace(**{k: spaced(v) for k, v in value.items()}) if isinstance(value, dict) else value

        return spaced({**defaults, **values})
""",
    "chexfound/__init__.py": "",
    "chexfound/configs.py": "dinov2_default_config = {}",
    "chexfound/data/__init__.py": """
import torch


class DataAugmentationDINO:
    def __init__(self, *scales, **sizes):
        pass

    def __call__(self, image):
        return torch.tensor(list(image.resize((4, 4)).tobytes()[::3])) / 255


class MaskingGenerator:
    def __init__(self, **sizes):
        pass


def collate_data_and_cast(samples, **options):
    crops = torch.stack([image for image, _ in samples])
    masks = torch.zeros(len(crops), 4, dtype=torch.bool)
    return {"collated_global_crops": crops, "collated_local_crops": crops.clone(), "collated_masks": masks}
""",
    "chexfound/data/datasets/__init__.py": "",
    "chexfound/data/datasets/extended.py": """
import io

from PIL import Image


class ExtendedVisionDataset:
    def __init__(self, root, transform, target_transform):
        self.transform = transform

    def __getitem__(self, index):
        return self.transform(Image.open(io.BytesIO(self.get_image_data(index))).convert("RGB")), self.get_target(index)
""",
    "chexfound/train/__init__.py": "",
    "chexfound/train/ssl_meta_arch.py": """
import torch


class SSLMetaArch(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.student, self.teacher = (
            torch.nn.ModuleDict({"backbone": torch.nn.Linear(16, 1)}) for _ in ("student", "teacher")
        )

    def get_params_groups(self):
        rates = {"is_last_layer": False, "lr_multiplier": 1.0, "wd_multiplier": 1.0}
        return [{"params": list(self.student.parameters()), **rates}]

    def forward_backward(self, batch, teacher_temp):
        loss = self.student["backbone"](batch["collated_global_crops"]).square().mean() / teacher_temp
        loss.backward()
        return {"dino_global_crops_loss": loss.detach()}

    def update_teacher(self, momentum):
        raise RuntimeError("no FSDP module")
""",
}


def test_a_checkout_that_runs(bench, tiny, pictures, tmp_path):
    for name, text in CHECKOUT.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    config = bench.configuration(tiny)
    settings = bench._settings(config, bench.our_recipe(config, 4, "fp32"), pictures, tiny)
    rival = bench.start(tmp_path / "checkout", settings, tmp_path / "log")
    try:
        rival.export(str(tmp_path / "batches.safetensors"), 4)
        weights, batches = bench._exported(tmp_path / "batches.safetensors")
        losses = rival.losses()
        assert [batch.size for batch in batches] == [2] * 4  # the stub's crops are one an image
        assert all(len(rival.seconds(what, 1, "fp32")) == 2 for what in ("whole", "alone", "data"))
    finally:
        rival.close()
    batch = batches[0].global_crops
    by_hand = (batch @ weights["student.backbone.weight"].T + weights["student.backbone.bias"]).square().mean() / 0.04
    assert losses[0] == pytest.approx(float(by_hand), rel=1e-5)
    assert len(losses) == 4
    torch.testing.assert_close(weights["student.backbone.weight"], weights["teacher.backbone.weight"])


def test_without_a_gpu_nothing_is_claimed(bench, tiny, monkeypatch):
    import ssl_step_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(ssl_step_gpu.measure(tiny)) == [("ssl_step_cuda", {"figure": "not measured: no GPU"})]
