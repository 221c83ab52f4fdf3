"""A training step that `ssl_step.py` can time, whoever's it is; imports nothing of this project.

The subclass says how a file becomes crops and a batch updated weights; this says what is timed.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


class Engine(ABC):
    """Student, teacher and optimizer over a list of image files.

    Args:
        settings: `config` (sections named as in DINOv2's YAML), `files`, `batch_size`, and
            `schedules`: for each step lr, last_layer_lr, weight_decay, momentum, teacher_temp (the
            last holds for all later steps).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.config = settings, settings["config"]
        self.files = settings["files"]
        self.steps = 0
        self.kept: list[Any] = []
        self._lots = random.Random(0)
        self._order: list[str] = []

    # ---- what a subclass gives

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The student's and the teacher's, named as in the published checkpoints (`student.backbone.…`)."""

    @abstractmethod
    def sample(self, file: str) -> Any:
        """Decode a file and augment it."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> Any:
        """Samples to a batch, with its masks."""

    @abstractmethod
    def crops(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's global crops (2·B, 3, H, W), local crops (L·B, 3, h, w) and masks (2·B, P)."""

    @abstractmethod
    def step(self, batch: Any, values: dict[str, float], precision: str) -> float:
        """One optimizer step and the teacher's EMA; the loss that was back-propagated."""

    # ---- what is asked of it

    def batch(self) -> Any:
        """The next batch, from files."""
        while len(self._order) < self.settings["batch_size"]:
            self._order += self._lots.sample(self.files, len(self.files))
        names = [self._order.pop(0) for _ in range(self.settings["batch_size"])]
        return self.collate([self.sample(name) for name in names])

    def export(self, path: str, batches: int) -> None:
        """Write the present weights and the next batches to a file; `losses` takes the same batches."""
        self.kept = [self.batch() for _ in range(batches)]
        tensors = {name: tensor.detach().clone() for name, tensor in self.weights().items()}
        for number, batch in enumerate(self.kept):
            for name, tensor in zip(("global_crops", "local_crops", "masks"), self.crops(batch), strict=True):
                tensors[f"batch.{number}.{name}"] = tensor
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(path))

    def losses(self) -> list[float]:
        """Train on the exported batches, in float32; the loss of each step."""
        return [self._next(batch, "fp32") for batch in self.kept]

    def seconds(self, what: str, steps: int, precision: str) -> list[float]:
        """Wall and processor seconds of `steps` batches: their making (`data`), a step on one (`alone`), or `whole`."""
        start = clocks()
        for _ in range(steps):
            batch = self.kept[0] if what == "alone" else self.batch()
            if what != "data":
                self._next(batch, precision)
        return [after - before for before, after in zip(start, clocks(), strict=True)]

    def close(self) -> None:
        """Let go of the batches that it keeps."""
        self.kept.clear()

    def _next(self, batch: Any, precision: str) -> float:
        schedules = self.settings["schedules"]
        loss = self.step(batch, schedules[min(self.steps, len(schedules) - 1)], precision)
        self.steps += 1
        return loss


def clocks() -> tuple[float, float]:
    """Wall and this process's processor time, seconds."""
    return time.perf_counter(), time.process_time()


def autocast(precision: str, device: str = "cpu") -> torch.autocast:
    """The device's autocast for a step of that precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
