"""Where a federated step is a centralized step, and where it cannot be.

1. A head: K disjoint shards that each take one SGD step, averaged with weights = images, are one
   centralized SGD step, to 1e-6, since the loss is a mean over images.  The mean over all known labels
   of a batch is not: how far off is printed.
2. DINO + iBOT: the same, to 1e-6, with softmax centering at a fixed centre, KoLeo 0, crops and masks fixed
   per image, no batch-centred head, no dropout, drop path or clipping.
3. Sinkhorn-Knopp, KoLeo and the batch-centred bottleneck couple the images of a batch: the averaged step
   is another one.  By how much is printed; run with -s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound.adapt.train import masked_bce
from chexfound.model.glori import GLoRI
from chexfound.pretrain.meta_arch import Batch, SSLMetaArch
from chexfound.pretrain.train import make_batch
from chexfound.recipe import Recipe, validate
from strategies.aggregate import Fold

HEAD_RATE, SSL_RATE = 0.1, 0.001  # fresh CLS tokens have gradients of 20 and more
SHARDS = ([0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11])


def sgd_step(module: nn.Module, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """The module's parameters after one step of plain SGD; the module stays as it was."""
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: (parameter if gradient is None else parameter - rate * gradient).detach()
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


def averaged(updates: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    fold = Fold()
    for update, images in updates:
        fold.add(update, images)
    return fold.result(updates[0][0])


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two steps from the same start lie apart, relative to the second."""
    gap = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    return float(gap / torch.cat([(other[name] - start[name]).flatten() for name in one]).norm())


# ---- 1. heads


def head_and_images() -> tuple[GLoRI, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = GLoRI(3, 8, 2, embed_dim=16, heads=2, ffn_dim=12, dropout=0.0, cls=True, stats=True).train()
    labels = torch.randint(-1, 2, (12, 3))
    labels[::3, 1:] = -1  # some images with one label, some with three
    labels[:, 0] = torch.arange(12) % 2
    return head, torch.randn(12, 9, 16), torch.randn(12, 16), labels


def all_labels_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all known labels of a batch, whose divisor differs from shard to shard."""
    known = labels >= 0
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none") * known
    return loss.sum() / known.sum()


def head_steps(criterion: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    head, patches, cls, labels = head_and_images()

    def step(places: list[int]) -> dict[str, Tensor]:
        return sgd_step(head, criterion(head([patches[places]], [cls[places]]), labels[places]), HEAD_RATE)

    federated = averaged([(step(shard), len(shard)) for shard in SHARDS])
    start = {name: parameter.detach() for name, parameter in head.named_parameters() if parameter.requires_grad}
    return federated, step(list(range(12))), start


def test_1_heads_average_to_the_centralized_step() -> None:
    federated, centralized, start = head_steps(masked_bce)
    assert furthest(federated, centralized) < 1e-6
    assert apart(federated, centralized, start) < 1e-3  # float32 rounding of a small step


def test_1_a_mean_over_all_labels_does_not() -> None:
    off = apart(*head_steps(all_labels_mean))
    print(f"\nmean over all labels of a batch: the averaged step differs by {off:.1%}")
    assert off > 0.01


# ---- 2. and 3. the self-supervised step


def small(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "image_px": 32,
        "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2},
        "dino": {"head_n_prototypes": 16, "head_bottleneck_dim": 8, "head_hidden_dim": 16, "head_nlayers": 2},
        "ibot": {"head_n_prototypes": 16, "head_bottleneck_dim": 8, "head_hidden_dim": 16, "head_nlayers": 2},
        "train": {"centering": "centering"},
    }
    values["dino"] |= {"head_centered": False, "koleo_loss_weight": 0.0} | changes.pop("dino", {})
    values["ibot"] |= {"head_centered": False} | changes.pop("ibot", {})
    values["train"] |= changes.pop("train", {})
    return validate(values, "test")


def ssl_steps(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The averaged step of the shards, the step of all images, and the start."""
    torch.manual_seed(0)
    model = SSLMetaArch(recipe)
    with torch.no_grad():  # a teacher of its own, a centre that is not 0
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.dino_center.normal_(std=0.1)
        model.ibot_center.normal_(std=0.1)
    model.eval()  # the centre stays; nothing else depends on it here
    images = torch.randint(0, 256, (12, 32, 32), dtype=torch.uint8).numpy()
    whole = make_batch(recipe, images, 0, 0)
    views = (
        whole.global_crops.unflatten(0, (2, 12)),
        whole.local_crops.unflatten(0, (2, 12)),
        whole.masks.unflatten(0, (2, 12)),
    )

    def step(places: list[int]) -> dict[str, Tensor]:
        loss, _ = model(Batch(*(part[:, places].flatten(0, 1) for part in views)), teacher_temp=0.07)
        return sgd_step(model.student, loss, SSL_RATE)

    federated = averaged([(step(shard), len(shard)) for shard in SHARDS])
    start = {name: p.detach() for name, p in model.student.named_parameters() if p.requires_grad}
    return federated, step(list(range(12))), start


def test_2_dino_and_ibot_average_to_the_centralized_step() -> None:
    federated, centralized, start = ssl_steps(small())
    assert furthest(federated, centralized) < 1e-6
    assert apart(federated, centralized, start) < 1e-3  # float32 rounding of a small step


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("Sinkhorn-Knopp", {"train": {"centering": "sinkhorn_knopp"}}),
        ("KoLeo", {"dino": {"koleo_loss_weight": 1.0}}),
        ("batch-centred bottleneck", {"dino": {"head_centered": True}, "ibot": {"head_centered": True}}),
    ],
)
def test_3_what_couples_the_batch(what: str, changes: dict[str, Any]) -> None:
    off = apart(*ssl_steps(small(**changes)))
    print(f"\n{what}: the averaged step differs from the centralized one by {off:.0%}")
    assert off > 0.01
