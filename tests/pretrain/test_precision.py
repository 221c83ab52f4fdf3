from __future__ import annotations

import math

import pytest
import torch

from chexfound.data.crops.sampler import EndlessSampler
from chexfound.errors import CheckpointError, ConfigError, DivergedError
from chexfound.host import machine
from chexfound.pretrain import train
from chexfound.pretrain.train import Pretrainer


def trainer(recipe, images):
    return Pretrainer(recipe, lambda places: images[places], len(images), 0)


def rescale(one: Pretrainer, scale: float, growth_interval: int = 2000) -> None:
    values = {"scale": scale, "growth_interval": growth_interval}
    one.scaler.load_state_dict({**one.scaler.state_dict(), **values})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_float32(small, images, dtype):
    gentle = {"optim__lr": 1e-4}  # or a rounding grows to another course within some steps
    exact = trainer(small(**gentle), images).run(0, 6, 4)
    one = trainer(small(compute_precision__param_dtype=dtype, **gentle), images)
    if dtype == "fp16":
        rescale(one, 256.0)
    rows = one.run(0, 6, 4)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in exact], rel=2e-2)
    assert rows != exact


def test_weights_and_moments_stay_float32(small, images):
    one = trainer(small(compute_precision__param_dtype="bf16"), images)
    one.run(0, 2, 4)
    assert {tensor.dtype for tensor in one.state().values()} == {torch.float32}


@pytest.mark.parametrize("at", [1, 3])
def test_a_scaled_run_resumes_to_the_bit(small, images, at):
    recipe = small(compute_precision__param_dtype="fp16")
    whole = trainer(recipe, images)
    rescale(whole, 256.0, 2)
    whole.run(0, 5, 4)
    first = trainer(recipe, images)
    rescale(first, 256.0, 2)
    first.run(0, at, 4)
    second = trainer(recipe, images)
    rescale(second, 256.0, 2)
    second.load_state(first.state())
    second.run(at, 5 - at, 4)
    one, other = whole.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert one["scaler.scale"].tolist() == [1024.0, 1.0]  # doubled after every second step


def test_an_overflow_halves_the_scale_and_leaves_the_student(small, images):
    one = trainer(small(compute_precision__param_dtype="fp16"), images)
    one.run(0, 1, 4)
    rescale(one, 2.0**40)
    before = {name: tensor.clone() for name, tensor in one.model.student.state_dict().items()}
    one.run(1, 1, 4)
    assert one.scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.student.state_dict().items())


def test_an_overflow_at_scale_below_1_is_the_model_s(small, images):
    one = trainer(small(compute_precision__param_dtype="fp16"), images)
    rescale(one, 0.5)
    real = train.SSLMetaArch.forward

    def forward(self, batch, temp):
        total, parts = real(self, batch, temp)
        return total + torch.sqrt(next(self.student.parameters()).flatten()[0] * 0), parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.SSLMetaArch, "forward", forward)
        with pytest.raises(DivergedError, match="the gradient of the backbone has the norm nan"):
            one.run(0, 1, 4)


def test_a_state_with_another_scaler_is_refused(small, images):
    scaled, plain = (trainer(small(compute_precision__param_dtype=dtype), images) for dtype in ("fp16", "fp32"))
    with pytest.raises(CheckpointError, match="loss scale"):
        plain.load_state(scaled.state())
    with pytest.raises(CheckpointError, match="loss scale"):
        scaled.load_state(plain.state())


def test_a_diverged_step_names_its_images(small, images, monkeypatch):
    one = trainer(small(), images)
    monkeypatch.setattr(train.SSLMetaArch, "forward", lambda *_: (torch.tensor(math.nan, requires_grad=True), {}))
    with pytest.raises(DivergedError, match="step 2: the loss is nan") as caught:
        one.run(2, 1, 4)
    sampler = EndlessSampler(len(images), 4, one.recipe.seed, "pretrain", 0)
    assert (caught.value.step, caught.value.places) == (2, sampler.batch(2).tolist())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: you …")],
)
def test_out_of_memory_says_which_knob(small, images, monkeypatch, error):
    def forward(*_):
        raise error

    monkeypatch.setattr(train.SSLMetaArch, "forward", forward)
    with pytest.raises(ConfigError, match=r"step 3: out of memory on cpu with 4 images .* train\.checkpointing=true"):
        trainer(small(), images).run(3, 1, 4)


def test_another_runtime_error_passes(small, images, monkeypatch):
    def forward(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train.SSLMetaArch, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer(small(), images).run(0, 1, 4)


def test_a_processor_without_the_arithmetic_is_told_once(small, images, monkeypatch, caplog):
    train._warn_if_slow.cache_clear()
    monkeypatch.setattr(machine, "slowdown", lambda dtype, device: 55.0)
    for dtype in ("fp32", "bf16", "bf16"):
        trainer(small(compute_precision__param_dtype=dtype), images)
    assert [record.getMessage() for record in caplog.records] == [
        "event=warning what='products in bf16 take 55 times as long as in fp32 on this cpu; "
        "set compute_precision.param_dtype=fp32'"
    ]
    train._warn_if_slow.cache_clear()


@pytest.mark.parametrize("times", [0.5, 1.9])
def test_one_with_it_is_not_warned_of(monkeypatch, times):
    monkeypatch.setattr(machine, "slowdown", lambda dtype, device: times)
    assert train.slow_arithmetic("bf16", "cpu") is None
    assert train.slow_arithmetic("fp32", "cpu") is None
