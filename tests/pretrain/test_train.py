from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chexfound.errors import CheckpointError, DataError
from chexfound.model.checkpoint import load_tensors
from chexfound.pretrain import train
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.train import Pretrainer, initial_weights
from chexfound.recipe.schema import Recipe

Small = Callable[..., Recipe]


def trainer(recipe: Recipe, images: np.ndarray, roster_index: int = 0) -> Pretrainer:
    return Pretrainer(recipe, lambda places: images[places], len(images), roster_index)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


VARIANTS = [
    {},
    {"student__drop_path_rate": 0.3},
    {"train__centering": "centering"},
    {"optim__optimizer": "sgd", "optim__lr": 0.1},
    {"crops__local_crops_number": 0, "ibot__loss_weight": 0.0},
]


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("at", [1, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(small, images, overrides, at):
    recipe = small(**overrides)
    whole = trainer(recipe, images)
    rows = whole.run(0, 6, 4)
    first = trainer(recipe, images)
    before = first.run(0, at, 4)
    second = trainer(recipe, images)
    second.load_state(first.state())
    after = second.run(at, 6 - at, 4)
    assert same(second.state(), whole.state())
    assert before + after == rows
    assert not same(first.state(), whole.state())


def test_state_is_a_copy(small, images):
    one = trainer(small(), images)
    one.run(0, 1, 4)
    kept = one.state()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    one.run(1, 2, 4)
    assert same(kept, before)
    other = trainer(small(), images)
    other.load_state(kept)
    other.run(1, 2, 4)
    assert same(kept, before)


def test_sites_draw_other_batches_and_crops(small, images):
    recipe = small()
    one, other = (make_batch(recipe, images[:4], 0, index) for index in (0, 1))
    assert not torch.equal(one.global_crops, other.global_crops)
    assert torch.equal(one.global_crops, make_batch(recipe, images[:4], 0, 0).global_crops)
    assert torch.equal(one.masks, make_batch(recipe, images[:4], 0, 0).masks)
    assert not torch.equal(one.global_crops, make_batch(recipe, images[:4], 1, 0).global_crops)
    assert (one.global_crops.shape, one.local_crops.shape, one.masks.shape) == ((8, 32, 32), (8, 16, 16), (8, 4))


def test_global_state_of_torch_has_no_part(small, images):
    recipe = small(student__drop_path_rate=0.3)
    torch.manual_seed(1)
    one = trainer(recipe, images)
    one.run(0, 2, 4)
    torch.manual_seed(2)
    other = trainer(recipe, images)
    other.run(0, 2, 4)
    assert same(one.state(), other.state())


def test_rows_tell_step_loss_and_log_k(small, images):
    seen: list[tuple[int, int]] = []
    rows = trainer(small(), images).run(5, 3, 4, lambda done, of: seen.append((done, of)))
    assert [row["step"] for row in rows] == [5, 6, 7]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for row in rows:
        assert row["log_k"] == math.log(12)
        assert row["loss"] == pytest.approx(row["dino"] + row["ibot"] + 0.1 * row["koleo"], rel=1e-5)


def test_learning_lowers_the_loss(small, images):
    rows = trainer(small(train__rounds=20, optim__lr=5e-3), images).run(0, 60, 8)
    assert np.mean([row["ibot"] for row in rows[-10:]]) < np.mean([row["ibot"] for row in rows[:10]]) - 0.1


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_names_itself_and_updates_nothing(small, images, monkeypatch, overrides, kind):
    one = trainer(small(**overrides), images)
    one.run(0, 2, 4)
    before = one.state()
    real = train.SSLMetaArch.forward

    def forward(self, batch, temp):
        total, parts = real(self, batch, temp)
        if kind == "loss":
            return total * math.nan, parts
        parameter = next(self.student.parameters())
        return total + torch.sqrt(parameter.flatten()[0] * 0), parts  # finite, with the derivative 0 · ∞ = NaN

    with monkeypatch.context() as patch:
        patch.setattr(train.SSLMetaArch, "forward", forward)
        with pytest.raises(DataError, match=rf"pretraining step 2: the {kind}.* nan; lower optim\.lr"):
            one.run(2, 1, 4)
    assert same(one.state(), before)
    one.run(2, 2, 4)
    whole = trainer(small(**overrides), images)
    whole.run(0, 4, 4)
    assert same(one.state(), whole.state())


def test_clipping_is_per_submodule(small, images):
    one = trainer(small(optim__clip_grad=1e-3, optim__optimizer="sgd", optim__lr=1.0, optim__weight_decay=0.0,
                        optim__weight_decay_end=0.0, optim__warmup_epochs=0), images)  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in one.model.student.named_parameters()}
    one.run(0, 1, 4)
    for part in ("backbone.", "dino_head.", "ibot_head."):
        moved = [p.detach() - before[n] for n, p in one.model.student.named_parameters() if n.startswith(part)]
        assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_site_without_images_is_refused(small, images):
    with pytest.raises(DataError, match="no training image"):
        trainer(small(), images[:0])


# --- what travels


def test_everyone_starts_from_the_same_weights(small, images):
    recipe = small()
    start = initial_weights(recipe)
    assert same(start, initial_weights(recipe))
    assert not same(start, initial_weights(small(seed=1)))
    moments = {name: tensor for name, tensor in start.items() if name.startswith("optimizer.")}
    weights = {name: tensor for name, tensor in start.items() if name not in moments}
    assert same(weights, trainer(recipe, images, roster_index=3).global_tensors(teacher=True))
    for name, tensor in weights.items():
        assert torch.equal(tensor, start[name.replace("student.", "teacher.")])
    assert moments
    assert not any(tensor.any() for tensor in moments.values())


def test_zero_moments_are_a_fresh_optimizer(small, images):
    fresh, given = trainer(small(), images), trainer(small(), images)
    given.load_global(initial_weights(small()))
    fresh.run(0, 2, 4)
    given.run(0, 2, 4)
    assert same(fresh.state(), given.state())


def test_without_teacher_tensors_the_teacher_stays(small, images):
    one = trainer(small(), images)
    one.run(0, 2, 4)
    teacher = {name: tensor.clone() for name, tensor in one.model.teacher.state_dict().items()}
    student_only = {name: tensor + 1 for name, tensor in one.global_tensors(teacher=False).items()}
    assert all(name.startswith("student.") for name in student_only)
    one.load_global(student_only)
    assert same(one.global_tensors(teacher=False), student_only)
    assert same(dict(one.model.teacher.state_dict()), teacher)
    both = {name: tensor + 1 for name, tensor in one.global_tensors(teacher=True).items()}
    one.load_global(both)
    assert same(one.global_tensors(teacher=True), both)
    half = {name: tensor for name, tensor in both.items() if name != "teacher.backbone.cls_token"}
    with pytest.raises(CheckpointError, match=r"1 missing \['teacher\.backbone\.cls_token'\]"):
        one.load_global(half)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.bias"), r"1 missing \['1\.bias'\], 0 unexpected \[\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"0 missing \[\], 1 unexpected \['extra'\]"),
        (
            lambda t: t.update({"1.bias": torch.zeros(2)}),
            r"1\.bias is torch\.float32 \(2,\), not torch\.float32 \(1,\)",
        ),
        (
            lambda t: t.update({"1.bias": torch.zeros(1).double()}),
            r"1\.bias is torch\.float64 \(1,\), not torch\.float32",
        ),
        (lambda t: t.update({"1.bias": torch.tensor([math.nan])}), r"1\.bias holds a value that is not finite"),
        (lambda t: t.update({"1.bias": torch.tensor([-math.inf])}), r"1\.bias holds a value that is not finite"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message):
    target = module()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(target, tensors, list(before))
    assert same(dict(target.state_dict()), before)


def test_weights_that_fit_are_copied():
    target = module()
    tensors = {name: tensor + 1 for name, tensor in target.state_dict().items()}
    load_tensors(target, tensors, list(tensors))
    assert same(dict(target.state_dict()), tensors)
    tensors["0.bias"].zero_()
    assert not same(dict(target.state_dict()), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.student.backbone.cls_token"), "1 missing"),
        (
            lambda t: t.update({"optimizer.backbone.cls_token.exp_avg": torch.zeros(3)}),
            r"exp_avg is of shape \(3,\), not \(1, 1, 24\)",
        ),
        (lambda t: t.update({"optimizer.backbone.cls_token.exp_avg": torch.full((1, 1, 24), math.nan)}), "not finite"),
        (lambda t: t.update({"optimizer.no_such.exp_avg": torch.zeros(3)}), "no_such.* belongs to no parameter"),
        (lambda t: t.pop("optimizer.backbone.cls_token.exp_avg"), "lack a moment that others have"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(small, images, change, message):
    one = trainer(small(), images)
    one.run(0, 1, 4)
    kept = one.state()
    one.run(1, 1, 4)
    before = one.state()
    change(kept)
    with pytest.raises(CheckpointError, match=message):
        one.load_state(kept)
    assert same(one.state(), before)
