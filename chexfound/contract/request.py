"""Requests of the coordinator to a site in a phase, and the site's replies."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

MOMENTS = "optimizer."  # begins the names of the optimizer's moments among the tensors of a message
COUNTS = ("images", "patients", "train", "val", "test")
ARM, TRAINED_ON = "federated", "all sites, federated"  # of the rows of results


@dataclass(frozen=True, kw_only=True)
class Request:
    """Hold what the coordinator asks of a site.  The recipe is not in it: it is the run's."""

    phase: str  # enrol | counts | pretrain | features | adapt | evaluate
    round: int = 0
    step: int = 0  # global step of the first local step
    steps: int = 0
    batch_size: int = 0
    roster_index: int = 0
    findings: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Give what is asked for: the phase, or the stage of it."""
        return self.phase

    def place(self) -> dict[str, Any]:
        """All fields of any request but the tensors."""
        return {one.name: getattr(self, one.name) for one in fields(Request) if one.name != "tensors"}

    def shared(self) -> dict[str, Any]:
        """The fields that all sites are told alike."""
        alike = {name: getattr(self, name) for name in ("phase", "round", "step", "steps", "batch_size")}
        return alike | {"findings": list(self.findings)}


@dataclass(frozen=True, kw_only=True)
class StageRequest(Request):
    """One stage of a phase that takes several messages.

    Args:
        stage: its name.
        params: what the coordinator says in it, as JSON.
    """

    stage: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The stage."""
        return self.stage


@dataclass(frozen=True, kw_only=True)
class MaskedRequest(StageRequest):
    """A stage of secure aggregation: advertise | share | masked | consistency | unmask."""


@dataclass(frozen=True, kw_only=True)
class PartRequest(StageRequest):
    """A part of a message's arrays: deliver | collect.  `chunk`: the bytes uint8 (N,) that are delivered."""

    chunk: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Hold a site's answer: tensors and plain JSON values by name; or arrays under masks, by bits of their ring."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    masked: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartReply(Reply):
    """The bytes uint8 (N,) that were collected of an earlier reply's arrays."""

    chunk: np.ndarray
