"""Is pretraining alive?  Figures of every step, and of a set of images looked at now and then.

The cheap ones come from tensors that a step has already; the dear ones are `probe.py`'s.  What they
tell, and from which value on they are a symptom, is in `symptoms.py`; docs/health.md says it to the reader.

Shapes: N rows (views of images), K prototypes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEP_FIGURES = ("teacher_entropy", "prototype_perplexity", "prototype_usage", "feature_std")
PROBE_FIGURES = ("probe_images", "rankme", "knn_auroc")
PROBED = PROBE_FIGURES[1:]
# Below these a probe tells nothing, so that no figure that leaves is about a few patients.  Five are the fewest of a
# class that the report judges by, too, and a vote among fewer is noise.
FEWEST_IMAGES = 20
FEWEST_PATIENTS = 5  # in all; and with a finding, and without it
NEIGHBOURS = 20  # of the kNN probe, and below its temperature: as Caron et al. 2021 (DINO)
KNN_TEMP = 0.07
RANKME_EPS = 1e-7
DIGITS = 4  # of a figure that is told: finer ones are noise, and each is a function of a few images' features
EXACT = ("step", "log_k", "probe_images")  # of a row: what is of no image
DRAWN = "images"  # of a row: how many images its step was taken on


@torch.no_grad()
def figures(targets: Tensor, cls: Tensor) -> dict[str, Tensor]:
    """The figures of a step, as scalars on the tensors' device: nothing here waits for it.

    Args:
        targets: the teacher's assignments of the CLS tokens, float32 (N, K), rows that sum to 1.
        cls: the student's CLS tokens of the same views before the head, (N, D).
    """
    return {
        "teacher_entropy": mean_entropy(targets),
        "prototype_perplexity": perplexity_share(targets),
        "prototype_usage": usage(targets),
        "feature_std": feature_std(cls),
    }


def mean_entropy(targets: Tensor) -> Tensor:
    """Mean entropy in nats of assignments (N, K): between 0 (each sure of one prototype) and log K.

    As share of log K it is comparable between models: 1 is a teacher that says nothing.  Sinkhorn-Knopp deals
    every prototype out over the N rows, so there it cannot fall under log(K / N) where K > N.
    The cross entropy with them, the DINO loss, is this plus the student's divergence from the teacher.
    """
    entropy: Tensor = torch.special.entr(targets).sum(-1).mean()
    return entropy


def perplexity_share(targets: Tensor) -> Tensor:
    """The share of prototypes in even use: exp of the entropy of the mean assignment, over K; from 1/K to 1.

    1/K is the collapse onto one prototype.  Sinkhorn-Knopp holds it near 1 by its construction (a collapse
    shows in the entropy there: equal rows become uniform ones), softmax centering does not.
    Source: as the codebook's perplexity in VQ-VAE and wav2vec 2.0 (Baevski et al. 2020, eq. 4).
    """
    share: Tensor = torch.special.entr(targets.mean(0)).sum().exp() / targets.shape[1]
    return share


def usage(targets: Tensor) -> Tensor:
    """How many prototypes are some row's first choice, of the min(N, K) that could be: in (0, 1].

    Of a batch: "any mass at all" would always be 1 and "a fair share of the mass" at most N/K, which with
    131,072 prototypes says nothing.  This does not depend on K, on the temperature or on the centering.
    """
    n, k = targets.shape
    chosen = torch.zeros(k, device=targets.device).scatter_(0, targets.argmax(dim=1), 1.0)
    return chosen.sum() / min(n, k)


def feature_std(features: Tensor) -> Tensor:
    """Mean over channels of the deviation of L2-normalised features (N, D), times √D: in [0, 1].

    1: spread over the whole sphere; 0: all the same.  Source: Chen and He 2021 (SimSiam), figure 2.
    """
    unit = F.normalize(features.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])


def rankme(features: Tensor) -> float:
    """Effective rank of features (N, D): exp of the entropy of their singular values over their sum.

    Between 1 and min(N, D); not centred, as in the source.  In float64 on the CPU.
    Source: Garrido et al. 2023, "RankMe", eq. 1.
    """
    values = torch.linalg.svdvals(features.detach().cpu().double())
    total = float(values.sum())
    if not total:
        return 1.0
    shares = values / total + RANKME_EPS
    return float(torch.exp(-(shares * shares.log()).sum()).clamp(1.0, float(min(features.shape))))


def knn_scores(
    features: Tensor, labels: Tensor, patients: Sequence[str], k: int = NEIGHBOURS, temp: float = KNN_TEMP
) -> np.ndarray:
    """How positive each image's nearest neighbours are, in [0, 1], float32 (N,); none of them is of its own patient.

    The k neighbours of highest cosine vote, each with exp(cosine / temp).  Only images with a known label vote.  k is
    a tenth of them at most: an image has no vote on itself, so if nearly all others vote, positives score lower.

    Args:
        features: (N, D).
        labels: (N,), 1, 0 or −1 (unknown; it is scored, but does not vote).
        patients: of each image.
        k: neighbours.
        temp: of the votes.

    Source: Wu et al. 2018 and Caron et al. 2021, 4.2, with the class's share of the votes as score.
    """
    unit = F.normalize(features.float(), dim=-1)
    names = {name: number for number, name in enumerate(dict.fromkeys(patients))}
    owner = torch.tensor([names[name] for name in patients], device=unit.device)
    voters = torch.nonzero(labels >= 0).flatten().to(unit.device)
    positive = (labels.to(unit.device)[voters] == 1).float()
    scores = []
    for rows, own in zip(torch.split(unit, 1024), torch.split(owner, 1024), strict=True):
        cosines = rows @ unit[voters].T  # (rows, voters)
        cosines = cosines.masked_fill(own[:, None] == owner[voters][None], -math.inf)
        nearest, places = cosines.topk(min(k, math.ceil(len(voters) / 10)), dim=1)
        weights = torch.exp((nearest - nearest[:, :1]) / temp).nan_to_num(0.0)  # no neighbour at all: −∞ − −∞
        scores.append((weights * positive[places]).sum(1) / weights.sum(1).clamp_min(1e-12))
    return torch.cat(scores).cpu().numpy()


def dino_gap(row: Mapping[str, float]) -> float:
    """The DINO loss of a row less log K, in nats: 0 for a student that tells nothing, however sure the teacher is.

    The displayed loss is a sum over the 2 + 2·L pairs of different views, divided by 2 + 2·L (design, section 3), and
    so the mean cross entropy of a pair; that of a uniform student is log K with any target.
    """
    return row["dino"] - row["log_k"]


def told(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The rows of a learning curve as they leave a site: to so many digits as whoever steers training can use.

    Exact figures of a batch could be a read-out of one image of it for whoever chose the weights, 53 bits at a time.
    How many images a step took stays: the coordinator asked for it.
    """
    return [
        {name: value if name in EXACT else float(f"{value:.{DIGITS}g}") for name, value in row.items() if name != DRAWN}
        for row in rows
    ]


def problem(row: Mapping[str, float], dim: float = math.inf) -> str | None:
    """Which figure of a row of finite numbers cannot be, or may not leave; None if all can.

    Args:
        row: with log_k.
        dim: D, if it is known.
    """
    images = row.get("probe_images", 0)
    limits = {
        "teacher_entropy": (0.0, row.get("log_k", 0.0)),
        "prototype_perplexity": (0.0, 1.0),
        "prototype_usage": (0.0, 1.0),
        "feature_std": (0.0, 1.0),
        "probe_images": (FEWEST_IMAGES, math.inf),
        "rankme": (1.0, min(dim, images)),
        "knn_auroc": (0.0, 1.0),
    }
    for name in (*STEP_FIGURES, *PROBE_FIGURES):
        if name in row:
            low, high = limits[name]
            slack = 1e-3 * max(1.0, abs(row[name]))  # float32, and bf16 where the loss's own logits are
            if not low - slack * (name != "probe_images") <= row[name] <= high + slack:
                return name
            if name in PROBE_FIGURES and images < FEWEST_IMAGES:
                return "probe_images"
    return None
