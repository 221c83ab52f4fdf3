"""Sinkhorn-Knopp over the last batches' rows as well as the present one's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chexfound.errors import CheckpointError, ConfigError
from chexfound.pretrain import losses, positions
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.train import QUEUE, Pretrainer
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe


def trainer(recipe: Recipe, images: np.ndarray) -> Pretrainer:
    return Pretrainer(recipe, lambda places: images[places], len(images), 0)


def test_it_fills_and_then_drops_the_oldest(small, images):
    """Four images a batch are eight rows; a queue of two batches holds sixteen of bottleneck 8."""
    one, sizes, queues = trainer(small(train__sinkhorn_queue=2), images), [], []
    for step in range(4):
        one.run(step, 1, 4)
        queues.append(one.state()[QUEUE])
        sizes.append(tuple(queues[-1].shape))
    assert sizes == [(8, 8), (16, 8), (16, 8), (16, 8)]
    assert torch.equal(queues[1][:8], queues[0])
    assert torch.equal(queues[2][:8], queues[1][8:])
    assert torch.equal(queues[3][:8], queues[2][8:])
    torch.testing.assert_close(queues[3].norm(dim=1), torch.ones(16))


def test_targets_are_the_batchs_rows_of_sinkhorn_over_all_with_the_present_prototypes(small, images):
    recipe = small(train__sinkhorn_queue=3)
    one = trainer(recipe, images)
    one.run(0, 2, 4)
    batch = make_batch(recipe, images[:4], 2, 0)
    queue = one.state()[QUEUE]
    with torch.no_grad():
        head = one.model.teacher["dino_head"]
        first, second = one.model.teacher["backbone"].forward_features(batch.global_crops)["x_norm_clstoken"].chunk(2)
        rows = torch.cat([queue, head.bottleneck(torch.cat([second, first]))])
        prototypes = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
        expected = losses.sinkhorn_knopp(rows @ prototypes.T, 0.04)[16:]
        targets, _ = one.model.teacher_targets(batch, 0.04)
    assert targets.shape == (8, 12)
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    alone = losses.sinkhorn_knopp(rows[16:] @ prototypes.T, 0.04)
    assert not torch.allclose(targets, alone, atol=1e-2)


def test_a_lone_batch_spreads_over_all_prototypes_and_a_queue_lets_it_not() -> None:
    """Two clusters on two prototypes, a batch all of one: alone it must use both, beside the other it need not."""
    ours, others = torch.tensor([[1.0, 0.2]]).repeat(4, 1), torch.tensor([[0.2, 1.0]]).repeat(4, 1)
    alone = losses.sinkhorn_knopp(ours, 0.1)
    beside = losses.sinkhorn_knopp(torch.cat([others, ours]), 0.1)[4:]
    torch.testing.assert_close(alone, torch.full((4, 2), 0.5))
    assert beside[:, 0].min() > 0.99


@pytest.mark.parametrize("at", [1, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(small, images, at):
    recipe = small(train__sinkhorn_queue=2)
    whole, first, second = (trainer(recipe, images) for _ in range(3))
    rows = whole.run(0, 6, 4)
    before = first.run(0, at, 4)
    second.load_state(first.state())
    assert before + second.run(at, 6 - at, 4) == rows
    kept, expected = second.state(), whole.state()
    assert set(kept) == set(expected)
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    emptied = trainer(recipe, images)
    emptied.load_state({name: tensor for name, tensor in first.state().items() if name != QUEUE})
    assert emptied.run(at, 6 - at, 4) != rows[at:]  # the queue matters


def test_none_is_kept_without_one(small, images):
    one = trainer(small(), images)
    one.run(0, 2, 4)
    assert QUEUE not in one.state()


def test_a_stage_begins_with_an_empty_one(small, images):
    recipe = small(
        train__sinkhorn_queue=2, curriculum=({"rounds": 2, "global_crops_size": 32, "local_crops_size": 16},)
    )
    one = trainer(recipe, images)
    one.run(9, 3, 4)
    state = one.state()
    assert QUEUE in positions.enter(state, recipe, 11)
    assert QUEUE in positions.enter(state, recipe, 15)
    assert set(state) - set(positions.enter(state, recipe, 12)) == {QUEUE}


@pytest.mark.parametrize("wrong", [torch.zeros(4, 7), torch.zeros(4), torch.full((4, 8), float("nan"))])
def test_one_that_does_not_fit_changes_nothing(small, images, wrong):
    one = trainer(small(train__sinkhorn_queue=2), images)
    one.run(0, 1, 4)
    before = one.state()
    with pytest.raises(CheckpointError, match=r"its queue\.dino is not rows of 8 numbers"):
        one.load_state(before | {QUEUE: wrong})
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state().items())


def test_a_step_that_fails_leaves_it(small, images, monkeypatch):
    one = trainer(small(train__sinkhorn_queue=2), images)
    one.run(0, 1, 4)
    before = one.state()[QUEUE]
    real = type(one.model).forward

    def forward(self, batch, temp):
        total, parts = real(self, batch, temp)
        return total * float("nan"), parts

    monkeypatch.setattr(type(one.model), "forward", forward)
    with pytest.raises(Exception, match="the loss is nan"):
        one.run(1, 1, 4)
    assert torch.equal(one.state()[QUEUE], before)


def test_there_is_none_for_softmax_centering():
    values = {"train.sinkhorn_queue": 4, "train.centering": "centering"}
    with pytest.raises(ConfigError, match=r"train\.sinkhorn_queue: there is a queue for .* sinkhorn_knopp only"):
        recipes.load("demo", values)
