"""Where federated training equals centralized training, and where it does not.

K sites hold disjoint shards of one batch.  Each takes one step of SGD from the same weights; FedAvg
(`strategies.aggregate.RunningMean`) averages them with the numbers of images as weights.  A second model
takes one step with the whole batch.

1. Heads, whose loss is a mean over images: equal to 1e-6, for both heads and shards of unequal size.
   The mean over all known labels, whose divisor differs from shard to shard, does not add up.  Nor do
   a finding's rows when they are averaged by its labelled images, as FedAvg does so that a site without
   the finding cannot dilute it; where every image has every label the two weights are the same.
2. The SSL step, with softmax centering at one centre, KoLeo 0, no batch-centred bottleneck, no drop
   path, no clipping, crops and masks fixed per image: equal to 1e-6, for one loss alone and for both.
   The EMA teacher is linear in the student, so the mean of the sites' teachers is equal too.
3. Sinkhorn-Knopp, KoLeo and the batch-centred bottleneck tie the images of a batch together: put
   back one at a time, each makes the step another one, and so does clipping (by how much is printed).

A step's difference is ‖federated − centralized‖ / ‖centralized‖ over all trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound.adapt.fit import build_head, masked_bce
from chexfound.contract.request import Reply
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.meta_arch import Batch
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe
from strategies.aggregate import RunningMean
from strategies.fedavg import FedAvg

SHARDS = ([0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11])  # of 12 images: 4, 2 and 6
TOLERANCE = 1e-6  # of any weight
ROUNDING = 1e-5  # of a step as a whole, relative: some hundred float32 roundings
SMALL: dict[str, Any] = {
    "image_px": 32,
    "student.num_register_tokens": 2,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "adapt.glori_dim": 8,
    "adapt.glori_heads": 2,
    "adapt.glori_ffn_dim": 12,
    "adapt.dropout": 0.0,
    "adapt.label_smoothing": 0.0,
}
SSL: dict[str, Any] = {
    "dino.head_n_prototypes": 16,
    "dino.head_hidden_dim": 16,
    "dino.head_bottleneck_dim": 8,
    "dino.head_centered": False,
    "dino.koleo_loss_weight": 0.0,
    "ibot.head_n_prototypes": 16,
    "ibot.head_hidden_dim": 16,
    "ibot.head_bottleneck_dim": 8,
    "ibot.head_centered": False,
    "ibot.mask_sample_probability": 0.75,
    "ibot.mask_ratio_min_max": (0.3, 0.9),
    "train.centering": "centering",
    "teacher.momentum_teacher": 0.9,
    "optim.optimizer": "sgd",
    "optim.lr": 0.02,
    "optim.warmup_epochs": 0,
    "optim.clip_grad": 0.0,
    "student.drop_path_rate": 0.0,
}

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))


def fedavg(updates: Sequence[Tensors], start: Tensors) -> Tensors:
    fold = RunningMean(start)
    for update, shard in zip(updates, SHARDS, strict=True):
        fold.add(update, len(shard))
    return fold.result()


def largest(one: Tensors, other: Tensors) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def step_difference(federated: Tensors, centralized: Tensors, start: Tensors) -> float:
    apart = torch.cat([(federated[name] - centralized[name]).flatten() for name in start]).norm()
    return (apart / torch.cat([(centralized[name] - start[name]).flatten() for name in start]).norm()).item()


# --- 1: heads


def mean_over_all_labels(logits: Tensor, labels: Tensor) -> Tensor:
    known = labels >= 0
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none")
    return (loss * known).sum() / known.sum()


Loss = Callable[[Tensor, Tensor], Tensor]


def head_labels(*, complete: bool = False) -> Tensor:
    labels = torch.from_numpy(np.random.default_rng(1).integers(0 if complete else -1, 2, (12, 3)))
    if not complete:
        labels[::3, 1:] = -1  # some images with one label, some with three
        labels[:, 0] = torch.arange(12) % 2
    return labels


def head_step(recipe: Recipe, rows: Sequence[int], criterion: Loss, labels: Tensor) -> tuple[Tensors, Tensors]:
    """Weights before and after one SGD step on the given images."""
    generator = np.random.default_rng(0)
    patches = torch.from_numpy(generator.normal(size=(12, 4, 48)).astype(np.float32))
    cls = torch.from_numpy(generator.normal(size=(12, 48)).astype(np.float32))
    head: nn.Module = build_head(recipe, 3)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.5)
    criterion(head([patches[rows]], [cls[rows]]), labels[rows]).backward()
    optimizer.step()
    return before, {name: tensor.clone() for name, tensor in head.state_dict().items()}


def both_head_steps(kind: str, criterion: Loss) -> tuple[Tensors, Tensors, Tensors]:
    recipe, labels = recipes.load("demo", {**SMALL, "adapt.head": kind}), head_labels()
    start, centralized = head_step(recipe, range(12), criterion, labels)
    federated = fedavg([head_step(recipe, shard, criterion, labels)[1] for shard in SHARDS], start)
    return start, federated, centralized


@pytest.mark.parametrize("kind", ["linear", "glori"])
def test_1_heads_are_equal(kind):
    start, federated, centralized = both_head_steps(kind, masked_bce)
    assert largest(centralized, start) > 1e-2
    assert largest(federated, centralized) < TOLERANCE
    assert step_difference(federated, centralized, start) < ROUNDING


@pytest.mark.parametrize("kind", ["linear", "glori"])
def test_1_means_over_all_labels_do_not_add_up(kind, capsys):
    start, federated, centralized = both_head_steps(kind, mean_over_all_labels)
    difference = step_difference(federated, centralized, start)
    with capsys.disabled():
        print(f"\n  mean over all labels of a batch, {kind} head: the step differs by {100 * difference:.1f} %")
    assert difference > 0.01


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("kind", ["linear", "glori"])
def test_1_rows_averaged_by_their_finding_s_labels(kind, complete, capsys):
    recipe, labels = recipes.load("demo", {**SMALL, "adapt.head": kind}), head_labels(complete=complete)
    start, centralized = head_step(recipe, range(12), masked_bce, labels)
    average = FedAvg("adapt", start, 3, build_head(recipe, 3).row_parameters)
    for shard in SHARDS:
        labelled = (labels[shard] >= 0).sum(0).tolist()
        tensors = head_step(recipe, shard, masked_bce, labels)[1]
        average.add(Reply(tensors=tensors, values={"images": len(shard), "labelled": labelled}))
    difference = step_difference(average.result(), centralized, start)
    if complete:
        assert difference < ROUNDING
        return
    with capsys.disabled():
        print(f"\n  rows averaged by their finding's labels, {kind} head: the step differs by {100 * difference:.1f} %")
    assert difference > 0.01


# --- 2 and 3: the SSL step


def images(n: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32), dtype=np.uint8)


def of(batch: Batch, rows: Sequence[int]) -> Batch:
    """The part of a batch that some of its images make, crops and masks as they are."""

    def views(tensor: Tensor) -> Tensor:
        return torch.cat([view[list(rows)] for view in tensor.split(batch.size)])

    return Batch(views(batch.global_crops), views(batch.local_crops), views(batch.masks))


def pretrain_step(recipe: Recipe, batch: Batch) -> tuple[Tensors, Tensors]:
    """Weights of student and teacher before and after one step, from a start off the symmetric one."""
    trainer = Pretrainer(recipe, lambda places: images()[places], 12, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.model.teacher.load_state_dict(trainer.model.student.state_dict())
        for parameter in trainer.model.teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.model.dino_center.normal_(std=0.1, generator=generator)
        trainer.model.ibot_center.normal_(std=0.1, generator=generator)
    before = trainer.global_tensors(teacher=True)
    trainer.model.train()
    trainer.step(batch, 0)
    return before, trainer.global_tensors(teacher=True)


def both_pretrain_steps(overrides: dict[str, Any]) -> tuple[Tensors, Tensors, Tensors]:
    recipe = recipes.load("demo", {**SMALL, **SSL, **overrides})
    whole = make_batch(recipe, images(), 0, 0)
    masked = whole.masks.sum(1)
    assert len(set(masked.tolist())) > 2  # images are masked unequally, some not at all
    start, centralized = pretrain_step(recipe, whole)
    federated = fedavg([pretrain_step(recipe, of(whole, shard))[1] for shard in SHARDS], start)
    return start, federated, centralized


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize(
    ("dino", "ibot"), [(1.0, 0.0), (0.0, 1.0), (1.0, 3.0)], ids=["DINO alone", "iBOT alone", "both"]
)
def test_2_losses_that_are_sums_over_images_are_equal(stem, dino, ibot):
    overrides = {"student.stem": stem, "dino.loss_weight": dino, "ibot.loss_weight": ibot}
    start, federated, centralized = both_pretrain_steps(overrides)
    assert largest(centralized, start) > 1e-3
    assert largest(federated, centralized) < TOLERANCE
    assert step_difference(federated, centralized, start) < ROUNDING
    teachers = [name for name in start if name.startswith("teacher.")]
    assert any(not torch.equal(start[name], centralized[name]) for name in teachers)


@pytest.mark.parametrize(
    ("what", "overrides"),
    [
        ("Sinkhorn-Knopp", {"train.centering": "sinkhorn_knopp"}),
        ("KoLeo alone", {"dino.koleo_loss_weight": 1.0, "dino.loss_weight": 0.0, "ibot.loss_weight": 0.0}),
        ("KoLeo at a weight of 1 beside DINO and iBOT", {"dino.koleo_loss_weight": 1.0}),
        ("the centred bottleneck of DINO", {"dino.head_centered": True}),
        ("the centred bottleneck of iBOT", {"ibot.head_centered": True}),
        (
            "all four, as in the demo",
            {
                "train.centering": "sinkhorn_knopp",
                "dino.koleo_loss_weight": 0.1,
                "dino.head_centered": True,
                "ibot.head_centered": True,
            },
        ),
        ("clipping to a norm of 0.1", {"optim.clip_grad": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_3_what_ties_the_images_of_a_batch_together(what, overrides, capsys):
    start, federated, centralized = both_pretrain_steps(overrides)
    student = {name: tensor for name, tensor in start.items() if name.startswith("student.")}
    difference = step_difference(federated, centralized, student)
    with capsys.disabled():
        print(f"\n  {what}: the step differs by {100 * difference:.1f} %")
    assert difference > 0.01
