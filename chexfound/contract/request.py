"""What the coordinator asks of a site in a phase, and what the site answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from chexfound.contract.detached import Detached

MOMENTS = "optimizer."  # begins the names of the optimizer's moments among the tensors of a message
COUNTS = ("images", "patients", "train", "val", "test")
ARM, TRAINED_ON = "federated", "all sites, federated"  # of the rows of results


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the coordinator asks of a site.  The recipe is not in it: it is the run's."""

    phase: str  # enrol | counts | pretrain | features | adapt | evaluate
    round: int = 0
    step: int = 0  # global step of the first local step
    steps: int = 0
    batch_size: int = 0
    roster_index: int = 0
    findings: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    apart: Detached | None = None  # the tensors, where they come apart from it
    # Of secure aggregation: advertise | share | masked | consistency | unmask; of arrays apart: deliver | collect.
    stage: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # what the coordinator says in that stage, as JSON
    chunk: np.ndarray | None = None  # uint8: what it delivers
    part_bytes: int = 0  # of a reply's arrays, from which on they are to be kept apart from it; 0: never
    fresh: bool = False  # start without state of earlier rounds; a site's own decision, which no message carries
    left_out: tuple[str, ...] = ()  # of what `parted` names: the site has no part in it; its own decision too

    def shared(self) -> dict[str, Any]:
        """The fields that all sites are told alike."""
        fields = {name: getattr(self, name) for name in ("phase", "round", "step", "steps", "batch_size")}
        return fields | {"findings": list(self.findings)}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a site answers: tensors and plain JSON values, by name; or arrays under masks, by bits of their ring."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    masked: dict[int, np.ndarray] = field(default_factory=dict)
    apart: Detached | None = None  # the tensors or masked arrays, where they are still to be collected
    chunk: np.ndarray | None = None  # uint8: what was collected of them
