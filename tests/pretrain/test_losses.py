from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chexfound.pretrain import losses

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def values(reference: Path) -> dict[str, Tensor]:
    with np.load(reference / "losses.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def off(result: Tensor, expected: Tensor) -> float:
    return (result.detach().double() - expected.double()).abs().max().item()


# --- against the public implementation


@pytest.mark.parametrize(("temp", "iterations"), [("0.04", 3), ("0.07", 3), ("0.04", 1)])
def test_sinkhorn(values, temp, iterations):
    expected = values[f"dino_sk_T{temp}" + ("_iters1" if iterations == 1 else "")]
    assert off(losses.sinkhorn_knopp(values["dino_teacher_logits"], float(temp), iterations), expected) < 1e-6


def test_sinkhorn_of_masked_patches(values):
    assert off(losses.sinkhorn_knopp(values["ibot_teacher_logits"], 0.06), values["ibot_sk_T0.06"]) < 1e-6


def test_softmax_centering_before_and_after_an_update(values):
    center = torch.zeros(1, 64)
    first = losses.softmax_center(values["dino_teacher_logits"], center, 0.04)
    assert off(first, values["dino_smc_step0_T0.04"]) < 1e-6
    center = center.lerp(values["dino_teacher_logits"].mean(0, keepdim=True), 0.1)
    second = losses.softmax_center(values["dino_teacher_logits_step1"], center, 0.04)
    assert off(center, values["dino_center_step1"]) < 1e-6
    assert off(second, values["dino_smc_step1_T0.04"]) < 1e-6


def test_dino_over_all_pairs_and_its_gradient(values):
    student = values["dino_student_logits"].requires_grad_()
    loss = losses.dino_loss(student.chunk(6), values["dino_sk_T0.07"].chunk(2))
    loss.backward()
    assert off(loss, values["dino_forward_6x2"]) < 1e-6 * values["dino_forward_6x2"].item()
    assert off(student.grad, values["dino_forward_6x2_grad"]) < 1e-6


def test_dino_of_one_pair(values):
    loss = losses.dino_loss([values["dino_student_global_logits"]], [values["dino_sk_T0.07"]])
    assert off(loss, values["dino_forward_1x1"]) < 1e-6 * values["dino_forward_1x1"].item()


def test_ibot_over_masked_patches_and_its_gradient(values):
    masks = values["ibot_masks"]
    weights = (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]
    assert torch.equal(weights, values["ibot_masks_weight"])
    student = values["ibot_student_logits_padded"].requires_grad_()  # the reference pads to a fixed number
    loss = losses.ibot_loss(student[: len(weights)], values["ibot_sk_T0.06"], weights, len(masks))
    loss.backward()
    assert off(loss, values["ibot_forward_masked"]) < 2e-6  # two units in the last place of 13.75
    assert off(student.grad, values["ibot_forward_masked_grad"]) < 1e-6


def test_ibot_from_full_maps_is_the_same_sum(values):
    masks = values["ibot_masks"]
    weights = (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]
    student, teacher = values["ibot_full_student_logits"][masks], values["ibot_full_teacher_probs"][masks]
    assert off(losses.ibot_loss(student, teacher, weights, len(masks)), values["ibot_forward_full"]) < 2e-6


def test_koleo_and_its_gradient(values):
    x = values["koleo_x"].requires_grad_()
    loss = losses.koleo_loss(x)
    loss.backward()
    assert off(loss, values["koleo"]) < 1e-6
    assert off(x.grad, values["koleo_grad"]) < 1e-6


def test_koleo_of_a_duplicate_row_is_finite(values):
    x = values["koleo_duplicate_x"].requires_grad_()
    loss = losses.koleo_loss(x)
    loss.backward()
    assert off(loss, values["koleo_duplicate"]) < 1e-6
    assert torch.isfinite(x.grad).all()


# --- by hand


def test_sinkhorn_by_hand():
    """exp(logits / temp) = [[1, 3], [1, 1]].

    Columns to 1: [[1/2, 3/4], [1/2, 1/4]]; rows to 1: [[2/5, 3/5], [2/3, 1/3]].  Again: columns sum
    to 16/15 and 14/15, giving [[3/8, 9/14], [5/8, 5/14]] with row sums 57/56 and 55/56.
    """
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]) * 0.5
    once = losses.sinkhorn_knopp(logits, 0.5, 1)
    assert torch.allclose(once, torch.tensor([[2 / 5, 3 / 5], [2 / 3, 1 / 3]]), atol=1e-6, rtol=0)
    twice = losses.sinkhorn_knopp(logits, 0.5, 2)
    assert torch.allclose(twice, torch.tensor([[21 / 57, 36 / 57], [35 / 55, 20 / 55]]), atol=1e-6, rtol=0)


def in_float64(logits: np.ndarray, temp: float, iterations: int) -> np.ndarray:
    q = np.exp(logits / temp)  # e^(± 50) is far inside float64
    for _ in range(iterations):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    return q * len(q)


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.02, 0.04, 0.07]))


@given(SHAPES)
def test_sinkhorn_equals_float64_over_the_whole_range_of_logits(shape):
    n, k, seed, temp = shape
    generator = np.random.default_rng(seed)
    logits = (generator.uniform(-1, 1, (n, k)) * generator.uniform(0, 1, (1, k))).astype(np.float32)
    logits[:, 0] = -1  # a prototype that points away from every sample: nothing may be lost
    logits[0, -1] = 1
    result = losses.sinkhorn_knopp(torch.from_numpy(logits), temp).numpy()
    assert np.abs(result - in_float64(logits.astype(np.float64), temp, 3)).max() < 1e-4
    assert np.abs(result.sum(1) - 1).max() < 1e-5


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**32))
def test_sinkhorn_rows_sum_to_1_and_prototypes_are_used_about_equally(n, k, seed):
    logits = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, k)).astype(np.float32)) * 0.1
    result = losses.sinkhorn_knopp(logits, 0.07)
    assert (result.sum(1) - 1).abs().max() < 1e-5
    assert (result.sum(0) / (n / k) - 1).abs().max() < 0.1
    more = losses.sinkhorn_knopp(logits, 0.07, 60)
    assert (more.sum(0) / (n / k) - 1).abs().max() < 1e-3


def test_sinkhorn_forgets_a_shift_of_all_logits_and_takes_no_gradient():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    result = losses.sinkhorn_knopp(logits, 0.5)
    assert not result.requires_grad
    assert torch.allclose(result, losses.sinkhorn_knopp(logits + 30, 0.5), atol=1e-5)


def test_softmax_centering_by_hand():
    """(logits − centre) / temp = [0, ln 3]: softmax [1/4, 3/4]."""
    result = losses.softmax_center(torch.tensor([[1.0, 1 + 0.2 * math.log(3)]]), torch.tensor([[1.0, 1.0]]), 0.2)
    assert torch.allclose(result, torch.tensor([[0.25, 0.75]]))


def test_cross_entropy_by_hand():
    """Student softmax at 0.1 is [1/5, 4/5]; targets [1/2, 1/2]: −(ln(1/5) + ln(4/5)) / 2."""
    student = torch.tensor([[0.0, 0.1 * math.log(4)]])
    result = losses.cross_entropy(student, torch.tensor([[0.5, 0.5]]))
    assert result.item() == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2, abs=1e-6)


def test_dino_sums_over_pairs_and_averages_over_images():
    flat = torch.zeros(3, 4)
    target = torch.full((3, 4), 0.25)
    assert losses.dino_loss([flat] * 5, [target] * 2).item() == pytest.approx(10 * math.log(4), rel=1e-6)


def test_ibot_by_hand():
    """Three masked patches of two images (2 and 1) among four images: (½ + ½ + 1) · ln 4 / 4."""
    loss = losses.ibot_loss(torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.tensor([0.5, 0.5, 1.0]), 4)
    assert loss.item() == pytest.approx(2 * math.log(4) / 4, rel=1e-6)


def test_koleo_by_hand():
    """Directions 0°, 60°, 180°: nearest 60°, 60°, 120°; chords 1, 1 and √3.  Lengths do not matter."""
    x = torch.tensor([[2.0, 0.0], [0.5, 0.5 * math.sqrt(3)], [-3.0, 0.0]])
    assert losses.koleo_loss(x).item() == pytest.approx(-math.log(math.sqrt(3)) / 3, abs=1e-6)


def test_koleo_of_a_lone_image_is_0():
    assert losses.koleo_loss(torch.ones(1, 4)).item() == 0
