"""A probe of a site's own images through the teacher, every so many steps: effective rank and kNN.

Images and labels stay; what is told is one figure of each, and only over enough images of enough
patients (`health.FEWEST_IMAGES`, and at least `FEWEST_PATIENTS` or as the site's policy has it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound import rng
from chexfound.evaluate.areas import auroc
from chexfound.model.vit import VisionTransformer
from chexfound.pretrain.health import measures

CHUNK = 64  # images a forward pass
DECIMALS = 3  # of the AUROC: finer digits are noise on hundreds of images, and tell of single ones


class Probe:
    """Looks at the same images each time, chosen once: labelled ones first, as many as the limit allows.

    Args:
        pixels: gives uint8 (n, H, W) for positions 0 … N − 1 of the site's training images.
        labels: int8 (N, F) of them, 1, 0 or −1.
        patients: of each of them.
        every: steps between two looks.
        limit: images at most.
        seed: with the roster index it names the stream that the images are chosen by, one of its own.
        dtype: of the arithmetic, as in training.
        fewest: patients below which nothing is told: in all, and of a finding with it and without it.
        left_out: figures that are not told.
    """

    def __init__(
        self,
        pixels: Callable[[np.ndarray], np.ndarray],
        labels: np.ndarray,
        patients: Sequence[str],
        *,
        every: int,
        limit: int,
        seed: int,
        roster_index: int,
        dtype: torch.dtype = torch.float32,
        fewest: int = measures.FEWEST_PATIENTS,
        left_out: Collection[str] = (),
    ) -> None:
        order = rng.numpy_generator(seed, "health", "probe", roster_index).permutation(len(labels))
        labelled = (labels[order] >= 0).any(1)
        self.places = np.sort(np.concatenate([order[labelled], order[~labelled]])[:limit])
        self.pixels, self.every, self.dtype = pixels, every, dtype
        self.fewest, self.left_out = fewest, left_out
        self.labels, self.patients = labels[self.places], [patients[place] for place in self.places]

    def __call__(self, backbone: nn.Module, step: int) -> dict[str, float]:
        """The figures after a step, or none if it is not one to look after.

        `rankme` of the CLS tokens; `knn_auroc`, the mean over the findings that can be judged, if there is one;
        `probe_images`, how many were looked at.
        """
        if (step + 1) % self.every or not self._enough():
            return {}
        cls, both = self.features(backbone)
        told = {"probe_images": len(self.places), "rankme": measures.rankme(cls)}
        scores = [self._auroc(both, column) for column in range(self.labels.shape[1]) if self._judged(column)]
        if scores:
            told["knn_auroc"] = round(float(np.mean(scores)), DECIMALS)
        return {name: figure for name, figure in told.items() if name not in self.left_out}

    def figures(self) -> list[str]:
        """Name the figures that the probe gives, of `measures.PROBED`."""
        if not self._enough():
            return []
        judged = any(self._judged(column) for column in range(self.labels.shape[1]))
        return [name for name in measures.PROBED if name != "knn_auroc" or judged]

    def _enough(self) -> bool:
        return len(self.places) >= measures.FEWEST_IMAGES and len(set(self.patients)) >= self.fewest

    @torch.no_grad()
    def features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """CLS tokens (n, D), and CLS beside mean patch token (n, 2·D), each of length 1, of the chosen images."""
        was, device = backbone.training, next(backbone.parameters()).device
        backbone.eval()
        cls, patches = [], []
        try:
            for start in range(0, len(self.places), CHUNK):
                images = torch.from_numpy(self.pixels(self.places[start : start + CHUNK])).to(device)
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    seen = cast(VisionTransformer, backbone).forward_features(images)
                cls.append(seen["x_norm_clstoken"].float())
                patches.append(seen["x_norm_patchtokens"].float().mean(1))
        finally:
            backbone.train(was)
        tokens = torch.cat(cls)
        return tokens, torch.cat([F.normalize(tokens, dim=-1), F.normalize(torch.cat(patches), dim=-1)], dim=-1)

    def _judged(self, column: int) -> bool:
        labels = self.labels[:, column]
        return all(
            len({patient for patient, label in zip(self.patients, labels, strict=True) if label == value})
            >= self.fewest
            for value in (0, 1)
        )

    def _auroc(self, features: Tensor, column: int) -> float:
        labels = self.labels[:, column]
        return auroc(labels, measures.knn_scores(features, torch.from_numpy(labels), self.patients))
