from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from chexfound.pretrain import losses
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.health import measures
from chexfound.pretrain.meta_arch import Batch, SSLMetaArch
from chexfound.recipe.schema import Recipe

TEMP = 0.05
Small = Callable[..., Recipe]


def build(recipe: Recipe) -> SSLMetaArch:
    torch.manual_seed(0)
    model = SSLMetaArch(recipe)
    with torch.no_grad():  # a teacher of its own, so that a mix-up of the two shows
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def row_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    return -(target.double() * torch.log_softmax(student.double() / 0.1, -1)).sum()


def by_hand(model: SSLMetaArch, batch: Batch) -> dict[str, Tensor]:
    """The terms of design section 3, view by view, image by image, patch by patch."""
    student, teacher, b = model.student, model.teacher, batch.size
    n_local = len(batch.local_crops) // b
    with torch.no_grad():
        seen = teacher["backbone"].forward_features(batch.global_crops)
        cls = teacher["dino_head"](seen["x_norm_clstoken"])
        targets = losses.sinkhorn_knopp(cls, TEMP).chunk(2)  # jointly over both views
        patch_targets = losses.sinkhorn_knopp(teacher["ibot_head"](seen["x_norm_patchtokens"][batch.masks]), TEMP)
    masked = student["backbone"].forward_features(batch.global_crops, batch.masks)
    global_cls = masked["x_norm_clstoken"]
    local_cls = student["backbone"].forward_features(batch.local_crops)["x_norm_clstoken"]
    logits = student["dino_head"](torch.cat([global_cls, local_cls]))
    views = logits.split(b)
    # Each student view against the teacher's other views: view 0 against target 1, and so on.
    pairs = [(views[0], targets[1]), (views[1], targets[0])]
    local_pairs = [(views[2 + crop], target) for crop in range(n_local) for target in targets]
    n_pairs = 2 + 2 * n_local
    global_term = 2 * sum(row_cross_entropy(s, t) for s, t in pairs) / (2 * b) / n_pairs
    local_term = sum(row_cross_entropy(s, t) / b for s, t in local_pairs) / n_pairs
    koleo = torch.zeros((), dtype=torch.float64)
    for view in global_cls.double().split(b):
        unit = view / view.norm(dim=1, keepdim=True)
        chords = torch.cdist(unit, unit) + torch.eye(b) * 9
        koleo = koleo - chords.min(1).values.log().mean()
    patch_logits = student["ibot_head"](masked["x_norm_patchtokens"][batch.masks])
    ibot, place = torch.zeros((), dtype=torch.float64), 0
    for mask in batch.masks:
        for _ in range(int(mask.sum())):
            ibot = ibot + row_cross_entropy(patch_logits[place], patch_targets[place]) / int(mask.sum())
            place += 1
    return {"dino": global_term + local_term, "koleo": koleo, "ibot": ibot / (2 * b)}


@pytest.fixture
def batch(small: Small, images: np.ndarray) -> Batch:
    batch = make_batch(small(), images[:4], 0, 0)
    assert 0 < batch.masks.any(1).sum() < len(batch.masks)  # masked and unmasked images
    return batch


@pytest.mark.parametrize("centered", [True, False])
def test_the_total_is_the_formula_of_the_design(small, batch, centered):
    recipe = small(
        dino__loss_weight=0.7,
        ibot__loss_weight=3.0,
        dino__koleo_loss_weight=0.25,
        dino__head_centered=centered,
        ibot__head_centered=centered,
    )
    model = build(recipe)
    total, parts = model(batch, TEMP)
    expected = by_hand(model, batch)
    for name, part in expected.items():
        assert parts[name].item() == pytest.approx(part.item(), rel=1e-5, abs=1e-6), name
    weighted = 0.7 * expected["dino"] + 0.25 * expected["koleo"] + 3 * expected["ibot"]
    assert total.item() == pytest.approx(weighted.item(), rel=1e-5)
    # And the gradient: of the same sum, through the same student.
    total.backward()
    gradients = {n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None}
    model.zero_grad()
    weighted.backward()
    for name, parameter in model.student.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            assert (gradients[name] - parameter.grad).abs().max().item() <= 1e-4 * scale + 1e-6, name


def test_in_the_reference_s_terms(small, batch):
    """total = local + global + 2 · koleo + 2 · 3 · ibot, where koleo and ibot are displayed halved."""
    model = build(small(ibot__loss_weight=3.0, dino__koleo_loss_weight=0.1))
    total, _ = model(batch, TEMP)
    terms = by_hand(model, batch)
    shown_koleo, shown_ibot = 0.1 * terms["koleo"] / 2, terms["ibot"] / 2
    assert total.item() == pytest.approx((terms["dino"] + 2 * shown_koleo + 2 * 3 * shown_ibot).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ({"dino__koleo_loss_weight": 0.0}, {"dino", "ibot"}),
        ({"ibot__loss_weight": 0.0}, {"dino", "koleo"}),
        ({"dino__koleo_loss_weight": 0.0, "ibot__loss_weight": 0.0}, {"dino"}),
    ],
)
def test_a_weight_of_0_leaves_its_part_out(small, batch, overrides, left):
    model = build(small(**overrides))
    total, parts = model(batch, TEMP)
    assert set(parts) == left | set(measures.STEP_FIGURES)
    weights = {"dino": 1.0, "koleo": 0.1, "ibot": 1.0}
    assert total.item() == pytest.approx(sum(weights[name] * parts[name].item() for name in left), rel=1e-5)


def test_without_local_crops_or_masks(small, images):
    model = build(small(crops__local_crops_number=0, ibot__mask_sample_probability=0.0))
    batch = make_batch(model.recipe, images[:4], 0, 0)
    _, parts = model(batch, TEMP)
    assert set(parts) == {"dino", "koleo", *measures.STEP_FIGURES}
    targets = model.teacher_targets(batch, TEMP)[0]
    logits = model.student["dino_head"](
        model.student["backbone"].forward_features(batch.global_crops)["x_norm_clstoken"]
    )
    expected = row_cross_entropy(logits, targets) / len(logits)  # 2 / 2 pairs, mean over 2·B
    assert parts["dino"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_views_are_swapped(small, batch):
    model = build(small(dino__head_centered=False, train__centering="centering")).eval()
    targets, _ = model.teacher_targets(batch, TEMP)
    cls = model.teacher["dino_head"](model.teacher["backbone"].forward_features(batch.global_crops)["x_norm_clstoken"])
    first, second = torch.softmax(cls / TEMP, -1).chunk(2)
    assert torch.allclose(targets, torch.cat([second, first]), atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_teacher_sees_unmasked_images_without_drop_path_and_gets_no_gradient(small, batch):
    model = build(small(student__drop_path_rate=0.5))
    assert not any(module.training for module in model.teacher.modules())
    assert model.student.training
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    first, again = (model.teacher_targets(batch, TEMP) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    unmasked = Batch(batch.global_crops, batch.local_crops, batch.masks.roll(1, 0))
    assert torch.equal(model.teacher_targets(unmasked, TEMP)[0], first[0])
    total, _ = model(batch, TEMP)
    total.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
def test_the_ema_is_an_exact_lerp(small, momentum):
    model = build(small())
    student = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    expected = {
        name: torch.lerp(tensor, student[name], 1 - momentum) for name, tensor in model.teacher.state_dict().items()
    }
    model.update_teacher(momentum)
    for name, tensor in model.teacher.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        if momentum == 0:
            assert torch.equal(tensor, student[name]), name
    assert all(torch.equal(tensor, student[name]) for name, tensor in model.student.state_dict().items())


def test_student_and_teacher_start_equal_but_apart(small):
    model = SSLMetaArch(small())
    for own, other in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()


def test_centres_move_with_the_teacher_and_only_then(small, batch):
    model = build(small(train__centering="centering"))
    seen = model.teacher["backbone"].forward_features(batch.global_crops)
    mean = model.teacher["dino_head"](seen["x_norm_clstoken"]).mean(0, keepdim=True)
    patch_mean = model.teacher["ibot_head"](seen["x_norm_patchtokens"][batch.masks]).mean(0, keepdim=True)
    model(batch, TEMP)
    assert not model.dino_center.any()
    model.update_teacher(1.0)
    assert torch.allclose(model.dino_center, 0.1 * mean, atol=1e-6)
    assert torch.allclose(model.ibot_center, 0.1 * patch_mean, atol=1e-6)
    model.update_teacher(1.0)  # a second time without a step between: nothing new was seen
    assert torch.allclose(model.dino_center, 0.1 * mean, atol=1e-6)
    model.eval()(batch, TEMP)
    model.update_teacher(1.0)
    assert torch.allclose(model.dino_center, 0.1 * mean, atol=1e-6)


def test_a_fresh_model_rests_near_log_k(small, batch):
    model = SSLMetaArch(small(dino__head_centered=False, train__centering="centering"))
    flat = torch.full((8, 12), 1 / 12)
    model.teacher_targets = lambda *_: (flat, torch.empty(0, 10))  # type: ignore[method-assign]
    _, parts = model(batch, TEMP)
    # Twice the global and the local terms over their pairs: 2/6 · log K + 4/6 · log K at least.
    assert parts["dino"].item() >= math.log(12) - 1e-5
