from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from chexfound.adapt import fit
from chexfound.adapt.features import Features
from chexfound.adapt.fit import HeadTrainer, build_head, masked_bce, predict, trainable_findings
from chexfound.errors import CheckpointError, DataError
from chexfound.model import vit
from chexfound.recipe.schema import Recipe

N = 24


def toy(seed: int = 0, n: int = N) -> tuple[Features, np.ndarray]:
    """Two findings, each a shift of one channel; a third of the labels is unknown."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, (n, 2))
    patches = generator.normal(0, 1, (3, n, 4, 48)).astype(np.float32)
    cls = generator.normal(0, 1, (3, n, 48)).astype(np.float32)
    for finding in range(2):
        patches[..., finding] += (3 * truth[:, finding] - 1.5)[:, None]
        cls[..., finding] += 3 * truth[:, finding] - 1.5
    labels = np.where(generator.uniform(size=truth.shape) < 1 / 3, -1, truth).astype(np.int8)
    labels[0] = -1
    return Features(patches, cls), labels


def trainer(recipe: Recipe, labels: np.ndarray | None = None, roster_index: int = 0) -> HeadTrainer:
    kept, known = toy()
    return HeadTrainer(recipe, kept, known if labels is None else labels, roster_index)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- the loss


LOGITS = torch.tensor([[0.0, math.log(3), 9.0], [-math.log(3), 9.0, 9.0]])
LABELS = torch.tensor([[1, 0, -1], [1, -1, -1]], dtype=torch.int8)
# The known labels' terms: −ln ½ and −ln(1 − ¾) of the first image, −ln ¼ of the second.


def test_masked_bce_by_hand():
    by_image = [(math.log(2) + math.log(4)) / 2, math.log(4)]
    assert masked_bce(LOGITS, LABELS).item() == pytest.approx(sum(by_image) / 2, rel=1e-6)
    assert masked_bce(LOGITS[:1], LABELS[:1]).item() == pytest.approx(by_image[0], rel=1e-6)


def test_smoothing_by_hand():
    """Target 1 becomes 0.95: 0.95 · −ln p + 0.05 · −ln(1 − p) at p = ¾."""
    logits, labels = torch.tensor([[math.log(3)]]), torch.tensor([[1]])
    expected = -0.95 * math.log(0.75) - 0.05 * math.log(0.25)
    assert masked_bce(logits, labels, smoothing=0.1).item() == pytest.approx(expected, rel=1e-6)


def test_unknown_labels_give_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    masked_bce(logits, LABELS).backward()
    assert torch.equal(logits.grad != 0, LABELS >= 0)


def test_no_known_label_is_0_and_finite():
    logits = LOGITS.clone().requires_grad_()
    loss = masked_bce(logits, torch.full_like(LABELS, -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_finding_is_trainable_if_both_classes_are_there():
    labels = np.array([[1, 1, 0, -1, 1], [0, 1, 0, -1, -1], [-1, -1, -1, -1, 0]], np.int8)
    assert trainable_findings(labels).tolist() == [True, False, False, False, True]


# --- the trainer


@pytest.mark.parametrize("head", ["glori", "linear"])
@pytest.mark.parametrize("at", [1, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(small, head, at):
    recipe = small(adapt__head=head, adapt__dropout=0.3)
    whole = trainer(recipe)
    rows = whole.run(0, 12, 8)
    first, second = trainer(recipe), trainer(recipe)
    before = first.run(0, at, 8)
    second.load_global(first.global_tensors())
    second.load_state(first.state())
    after = second.run(at, 12 - at, 8)
    assert before + after == rows
    assert same(second.global_tensors(), whole.global_tensors())
    assert same(second.state(), whole.state())
    without = trainer(recipe)  # the moments count
    without.load_global(first.global_tensors())
    without.run(at, 12 - at, 8)
    assert not same(without.global_tensors(), whole.global_tensors())


def test_learns_a_separable_toy(small):
    kept, labels = toy(n=64)
    one = HeadTrainer(small(adapt__rounds=10, adapt__lr=2e-2), kept, labels, 0)
    rows = one.run(0, 40, 16)
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.6 * np.mean([row["loss"] for row in rows[:5]])
    fresh, truth = toy(seed=1, n=64)
    with torch.no_grad():
        logits = one.head.eval()([torch.from_numpy(fresh.patches[0])], [torch.from_numpy(fresh.cls[0])]).numpy()
    known = truth >= 0
    assert ((logits > 0) == truth)[known].mean() > 0.85


def test_only_labelled_images_are_taken(small, monkeypatch):
    one = trainer(small())
    assert 0 not in one.labelled
    taken: list[int] = []
    rows = Features.rows
    monkeypatch.setattr(Features, "rows", lambda self, v, images: taken.extend(images) or rows(self, v, images))
    one.run(0, 10, 8)
    assert set(taken) == set(one.labelled)


def test_all_views_are_taken(small, monkeypatch):
    taken: list[int] = []
    rows = Features.rows
    monkeypatch.setattr(Features, "rows", lambda self, views, i: taken.extend(views) or rows(self, views, i))
    trainer(small()).run(0, 5, 8)
    assert set(taken) == {0, 1, 2}


def test_a_site_without_labels_is_refused(small):
    with pytest.raises(DataError, match="no labelled training image: this site cannot train a head"):
        trainer(small(), labels=np.full((N, 2), -1, np.int8)).run(0, 1, 8)


def test_a_finding_without_labels_keeps_its_row(small):
    labels = toy()[1]
    labels[:, 1] = -1
    one = trainer(small(adapt__weight_decay=0.0), labels)
    before = one.global_tensors()
    one.run(0, 4, 8)
    after = one.global_tensors()
    assert torch.equal(before["duplicate_pooling"][1], after["duplicate_pooling"][1])
    assert torch.equal(before["duplicate_pooling_bias"][1], after["duplicate_pooling_bias"][1])
    assert not torch.equal(before["duplicate_pooling"][0], after["duplicate_pooling"][0])
    assert torch.equal(before["query_embed.weight"], after["query_embed.weight"])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_names_itself_and_updates_nothing(small, monkeypatch, kind):
    one = trainer(small())
    one.run(0, 2, 8)
    before, state = one.global_tensors(), one.state()
    real = fit.masked_bce

    def broken(logits: Tensor, *rest: object) -> Tensor:
        loss = real(logits, *rest)
        return loss * math.nan if kind == "loss" else loss + torch.sqrt(logits.flatten()[0] * 0)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "masked_bce", broken)
        with pytest.raises(DataError, match=rf"adapt step 2: the {kind}.* nan; lower adapt\.lr"):
            one.run(2, 1, 8)
    assert same(one.global_tensors(), before)
    assert same(one.state(), state)


def test_sites_start_equal_and_draw_apart(small):
    recipe = small()
    one, other = trainer(recipe), trainer(recipe, roster_index=1)
    assert same(one.global_tensors(), other.global_tensors())
    one.run(0, 2, 8)
    other.run(0, 2, 8)
    assert not same(one.global_tensors(), other.global_tensors())
    assert not same(trainer(small(seed=1)).global_tensors(), trainer(recipe).global_tensors())


def test_a_head_that_does_not_fit_is_refused(small):
    one = trainer(small())
    tensors = one.global_tensors()
    tensors["duplicate_pooling_bias"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"duplicate_pooling_bias is torch\.float32 \(3,\), not torch\.float32 \(2,\)"
    ):
        one.load_global(tensors)


def test_norms_biases_and_positions_are_not_decayed(small):
    one = trainer(small())
    decayed, plain = one.optimizer.param_groups
    names = {id(parameter): name for name, parameter in one.head.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        "embed_standart.weight",
        "layers.0.multihead_attn.in_proj_weight",
        "layers.0.multihead_attn.out_proj.weight",
        "layers.0.linear1.weight",
        "layers.0.linear2.weight",
        "duplicate_pooling",
    }
    assert "query_embed.weight" not in {names[id(parameter)] for parameter in plain["params"]}


@pytest.mark.parametrize(
    ("head", "cls", "stats", "positions"),
    [
        ("glori", True, True, True),
        ("glori", False, False, False),
        ("linear", True, True, True),
        ("linear", True, False, True),
    ],
)
def test_predict_gives_probabilities_of_the_recipe_s_head(small, head, cls, stats, positions):
    recipe = small(adapt__head=head, adapt__glori_cls=cls, adapt__glori_stats=stats, adapt__glori_positions=positions)
    torch.manual_seed(0)
    backbone, built = vit.build(recipe.student, recipe.input, 32), build_head(recipe, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    scores = predict(backbone, built, images, 2)
    assert scores.shape == (5, 3)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert np.allclose(predict(backbone, built, images[2:3], 2), scores[2:3], atol=1e-5)
    assert predict(backbone, built, images[:0], 2).size == 0
