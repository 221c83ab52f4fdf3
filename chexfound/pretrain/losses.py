"""DINO, iBOT and KoLeo, in the form that DINOv2 gives them.

Shapes: N rows (samples or masked patches), K prototypes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from chexfound.parallel import group

STUDENT_TEMP = 0.1


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3, distributed: bool = False) -> Tensor:
    """Teacher logits (N, K) to assignments (N, K): rows sum to 1, prototypes are used about equally.

    Each iteration normalises the prototypes first, then the samples.  Source: Caron et al. 2020
    (SwAV); Ruan et al. 2023 for its use in DINO.

    The first iteration's prototype step is taken in logs: at temperature 0.02 the exponents span
    100, more than float32 holds, and a prototype far from every sample would be left out.  From
    then on no sum is below 1 / (N·K).

    Args:
        logits: (N, K); N may be 0 at a rank that shares the normalisation with others.
        temp: the teacher's temperature.
        iterations: how often both are normalised.
        distributed: over the rows of all ranks together, however many each has.
    """
    n, k = logits.shape
    if distributed:
        n = group.total(n)

    def over_rows(sums: Tensor) -> Tensor:
        return group.summed(sums) if distributed else sums

    scaled = logits.float() / temp
    most = scaled.logsumexp(dim=0, keepdim=True)
    scaled = scaled - (group.gathered(most).logsumexp(dim=0, keepdim=True) if distributed else most)
    q = torch.exp(scaled - scaled.amax(dim=1, keepdim=True))
    q = q / q.sum(dim=1, keepdim=True) / n
    for _ in range(iterations - 1):
        q = q / over_rows(q.sum(dim=0, keepdim=True)).clamp_min(1e-30) / k
        q = q / q.sum(dim=1, keepdim=True).clamp_min(1e-30) / n
    return q * n


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Teacher logits (N, K), centre (1, K) to softmax((logits − centre) / temp) (Caron et al. 2021)."""
    return F.softmax((logits.float() - center) / temp, dim=-1)


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """−Σ_k t·log softmax(s / 0.1) of each row: (N, K), (N, K) to (N,)."""
    return -(targets * F.log_softmax(student_logits.float() / STUDENT_TEMP, dim=-1)).sum(-1)


def dino_loss(student_chunks: Sequence[Tensor], teacher_chunks: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs (student view, teacher view) of the mean cross entropy over their images."""
    total = student_chunks[0].new_zeros(())
    for student in student_chunks:
        for teacher in teacher_chunks:
            total = total + cross_entropy(student, teacher).mean()
    return total


def ibot_loss(student_logits: Tensor, targets: Tensor, masks_weight: Tensor, n_images: int) -> Tensor:
    """Cross entropy of the masked patches (N, K), each weighted by 1 / (masked patches of its image).

    Divided by all `n_images` global crops, the unmasked ones too (Zhou et al. 2022, as in DINOv2).
    """
    return (cross_entropy(student_logits, targets) * masks_weight).sum() / n_images


def koleo_loss(cls: Tensor, distributed: bool = False) -> Tensor:
    """−mean log distance to the nearest neighbour on the sphere: (B, D), B ≥ 2; 0 for a lone image.

    `distributed`: the neighbours are sought among the images of all ranks.
    Source: Sablayrolles et al. 2019, "Spreading vectors for similarity search"; eps as in DINOv2.
    """
    x = F.normalize(cls.float(), dim=-1, eps=1e-8)
    others = group.gathered(x) if distributed else x
    if len(others) < 2:
        return cls.new_zeros(())
    with torch.no_grad():
        dots = x @ others.T
        dots.diagonal(group.rank() * len(x) if distributed else 0).fill_(-1)  # oneself
        nearest = dots.argmax(dim=1)
    distance = F.pairwise_distance(x, others[nearest], p=2, eps=1e-8)
    return -torch.log(distance + 1e-8).mean()
