"""Training a head on a frozen backbone's features: masked BCE over the findings that a site labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound import rng
from chexfound.adapt.features import Features, tokens
from chexfound.contract.request import MOMENTS
from chexfound.data.crops.sampler import EndlessSampler
from chexfound.errors import DataError
from chexfound.model.checkpoint import load_tensors
from chexfound.model.glori import build_head
from chexfound.model.vit import VisionTransformer
from chexfound.pretrain import optimizer
from chexfound.pretrain.schedules import cosine
from chexfound.pretrain.train import Progress
from chexfound.recipe.schema import Recipe


def masked_bce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross entropy over the known labels: logits (B, F), labels (B, F) in {1, 0, −1 = unknown}.

    The mean over an image's known labels, then over all B images; one without any counts as 0.  So every
    image weighs the same, however many findings its source labels, and the losses of shards, weighted by
    their images, add up to that of the whole (the mean over all known labels of a batch would not:
    its divisor differs from shard to shard).
    """
    known = labels >= 0
    targets = labels.clamp_min(0).float() * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known
    return (loss.sum(1) / known.sum(1).clamp_min(1)).mean()


def trainable_findings(labels: np.ndarray) -> np.ndarray:
    """Which findings (F) have both classes among the labels (N, F); the others train no row."""
    both: np.ndarray = (labels == 1).any(0) & (labels == 0).any(0)
    return both


class HeadTrainer:
    """A head and its optimizer at one site.

    Args:
        labels: int8 (N, F) of the images of `features`; columns that the site cannot train are −1.
    """

    def __init__(self, recipe: Recipe, features: Features, labels: np.ndarray, roster_index: int) -> None:
        self.recipe, self.features, self.roster_index = recipe, features, roster_index
        self.labels = torch.from_numpy(labels)
        self.labelled = np.flatnonzero((labels >= 0).any(1))
        self.head: nn.Module = build_head(recipe, labels.shape[1])
        decayed = [p for n, p in self.head.named_parameters() if p.requires_grad and optimizer.is_decayed(n)]
        plain = [p for n, p in self.head.named_parameters() if p.requires_grad and not optimizer.is_decayed(n)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.adapt.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=0.0,
            fused=True,
        )

    def load_global(self, tensors: dict[str, Tensor]) -> None:
        """Start a round from the coordinator's head; moments that it does not send stay.

        Raises: CheckpointError.
        """
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith(MOMENTS)}
        weights = {name: tensor for name, tensor in tensors.items() if name not in moments}
        states = optimizer.checked_moments(self.head, moments)
        load_tensors(self.head, weights, list(self.head.state_dict()))
        if moments:
            optimizer.set_moments(self.optimizer, states)

    def global_tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors that travel."""
        return {name: tensor.clone() for name, tensor in self.head.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Give what the next round stands on: the optimizer's moments."""
        return optimizer.moments(self.optimizer, self.head)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises: CheckpointError.
        """
        optimizer.set_moments(self.optimizer, optimizer.checked_moments(self.head, tensors))

    def run(
        self, first_step: int, steps: int, batch_size: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Take global steps first_step … first_step + steps − 1; one row (step, images it was taken on, loss) a step.

        Raises: DataError if no image is labelled, or loss or gradient is not finite (nothing was updated by it).
        """
        if not len(self.labelled):
            raise DataError("no labelled training image: this site cannot train a head")
        recipe, config = self.recipe, self.recipe.adapt
        sampler = EndlessSampler(len(self.labelled), batch_size, recipe.seed, "adapt", self.roster_index)
        n_views = len(self.features.patches)
        self.head.train()
        rows = []
        for step in range(first_step, first_step + steps):
            images = self.labelled[sampler.batch(step)]
            views = rng.numpy_generator(recipe.seed, "adapt", step, self.roster_index, "view").integers(
                n_views, size=len(images)
            )
            lr = cosine(step, config.lr, 0.0, config.total_steps, warmup=min(config.warmup_steps, config.total_steps))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with rng.torch_stream(recipe.seed, "adapt", step, self.roster_index, "torch"):
                logits = self.head(*self.features.rows(views, images))
            loss = masked_bce(logits, self.labels[images], config.label_smoothing)
            if not torch.isfinite(loss):
                raise DataError(f"adapt step {step}: the loss is {loss.item()}; lower adapt.lr")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), config.clip_grad or math.inf)
            if not torch.isfinite(norm):
                raise DataError(f"adapt step {step}: the gradient has the norm {norm.item()}; lower adapt.lr")
            self.optimizer.step()
            rows.append({"step": step, "images": len(logits), "loss": loss.item()})
            if progress is not None:
                progress(step - first_step + 1, steps)
        return rows


@torch.inference_mode()
def predict(backbone: VisionTransformer, head: nn.Module, images: np.ndarray, n_blocks: int) -> np.ndarray:
    """Probabilities (N, F) of uint8 images (N, H, W)."""
    head.eval()
    scores = []
    for start in range(0, len(images), 256):
        patches, cls = tokens(backbone, images[start : start + 256], n_blocks)
        scores.append(torch.sigmoid(head([torch.from_numpy(patches)], [torch.from_numpy(cls)])).numpy())
    return np.concatenate(scores) if scores else np.empty((0, 0), np.float32)
