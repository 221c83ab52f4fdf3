"""A round of training, and the interface of what makes one of several sites' replies: in the clear, or under masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from server.exchange.protocol import Member
from server.rounds.record import Event


@dataclass(frozen=True, kw_only=True)
class Task:
    """A round of training, as it is asked of all sites.

    Args:
        number: of the round in its phase, from 0.
        batch_sizes: images a step of each site of the roster.
        weights: that the sites are sent and train.
        frozen: names of weights that no site may change.
        rows: names of weights whose first axis is the findings.
        stays: what a site derives by itself from round to round, for those that may not have what it takes.
        beside: what is sent to be looked at, and is not trained.
    """

    phase: str
    number: int
    steps: int
    batch_sizes: tuple[int, ...]
    weights: dict[str, Tensor]
    frozen: set[str]
    findings: tuple[str, ...]
    rows: Sequence[str] = ()
    stays: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def taken(self) -> range:
        """The global steps of the round."""
        return range(self.number * self.steps, (self.number + 1) * self.steps)

    @property
    def where(self) -> str:
        """The round, for errors."""
        return f"{self.phase}, round {self.number + 1}"


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """Hold what the sites' replies to a task come to.

    Args:
        weights: their mean.
        sites: the journal's entry of each site; under masks one of all.
        up: bytes of tensors that came.
        down: bytes of tensors that were sent.
        about: what else the journal's record of the round says.
    """

    weights: dict[str, Tensor]
    sites: list[Event]
    up: int
    down: int
    about: Event


class Rounds(Protocol):
    """How the sites of a run are counted, asked for updates, and judged."""

    def check(self) -> None:
        """Raise ConfigError, before any site is contacted, for a recipe that these rounds cannot serve."""

    def count(self, roster: list[Member]) -> list[dict[str, Any]]:
        """Give the training images by finding of each site that enrolled, or of all together.

        Raises: DataError for a site without any, or with fewer patients' than it tells of.
        """

    def about(self) -> Event:
        """Say what the record of the run's start says of these rounds."""

    def train(self, task: Task) -> Reduced:
        """Ask for a round, and reduce what comes."""

    def hand_out(
        self, backbone: dict[str, Tensor], beside: Mapping[str, Tensor], findings: tuple[str, ...], again: bool
    ) -> list[Event]:
        """Have the sites take the backbone and make their features of it, which stay there.

        Args:
            backbone: that the features are of.
            beside: what is sent to be looked at.
            findings: that the head learns.
            again: they did so before, as the journal has it.

        Returns: who did not, with the reason.
        """

    def evaluate(self, model: dict[str, Tensor], findings: tuple[str, ...]) -> tuple[list[Event], list[Event]]:
        """Have the sites judge the model: the rows of results, and who gave none, with the reason."""
