"""A site as the phases see it: its images, its disk, and what it lets out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.contract import cells
from chexfound.contract.cells import Told
from chexfound.data.store.index import UNKNOWN
from chexfound.data.store.split import SIMULATED, Membership, Part, View
from chexfound.recipe.schema import Recipe, Split

Progress = Callable[[str, int, int], None]  # phase, done, of how many


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Hold what a site decides itself about a request; no message can carry it.

    Args:
        reset_state: it starts without state of earlier rounds.
        excluded: of what `parted` names, that in which it has no part.
    """

    reset_state: bool = False
    excluded: tuple[str, ...] = ()


UNDECIDED = Decision()


@dataclass
class Site:
    """One hospital, or the process that plays it: its images and its disk.

    Args:
        shuffle_labels: permute the training labels by patient (the floor that tells how much of a
            score comes from no anatomy at all); only the simulation sets it.
        gpus: how many of the machine's GPUs it pretrains on, or "all"; empty: as $CHEXFOUND_GPUS says.
        cells: patients below which a count, a figure or a row does not leave; 0 (a simulation): all leave.
        words: names of findings that may leave; None (a simulation): all.
        split_key: by which its patients fall into parts; None (a simulation): by the recipe's seed.
        fractions: of its patients; None (a simulation): the recipe's.
        digest_key: under which the digest of its store leaves.
        limits: what its site.yaml grants, as it is told at enrolment; None (a simulation): whatever is asked.
        least: patients and images with a label below which it trains no head; 0 (a simulation): any.
        tally: whether it notes how many images its steps were taken on (`phases/tally.py`); a simulation's does.
        stop: asked after each step of pretraining whether to save, and take no further one; None: none asks.
        lineage: whether weights are held against where they may come from (client/answer/provenance.py); not in a
            simulation, whose coordinator is oneself.
    """

    view: View
    home: Path
    shuffle_labels: bool = False
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None
    gpus: str = ""
    cells: int = 0
    words: frozenset[str] | None = None
    split_key: bytes | None = field(default=None, repr=False)
    fractions: Split | None = None
    digest_key: bytes = field(default=SIMULATED, repr=False)
    limits: dict[str, Any] | None = None
    least: tuple[int, int] = (0, 0)
    tally: bool = False
    lineage: bool = False
    remembered: dict[str, Any] = field(default_factory=dict)  # digests of files, by what they were taken of

    @property
    def name(self) -> str:
        """The site's name."""
        return self.view.name

    def split(self, recipe: Recipe, which: Part) -> np.ndarray:
        """Ids of the images of a part, in canonical order."""
        return self.view.split(Membership.of(recipe, self.split_key, self.fractions), which)

    def training_ids(self, recipe: Recipe) -> np.ndarray:
        """Ids of the training images, in canonical order."""
        return self.split(recipe, "train")

    def patients(self, ids: np.ndarray) -> list[str]:
        """Key of the patient of each image."""
        return [self.view.store.keys[place] for place in ids]

    def told(self, ids: np.ndarray) -> Told:
        """Count these images; suppressed if they are of fewer than `cells` patients."""
        return cells.told(len(ids), len(set(self.patients(ids))), self.cells)

    def findings(self) -> list[str]:
        """Names that the store knows and that may leave, sorted."""
        return [name for name in self.view.store.findings if self.words is None or name in self.words]

    def labels(self, ids: np.ndarray, findings: Sequence[str]) -> np.ndarray:
        """Labels int8 (N, F) of images, for work of which anything leaves.

        −1 in all of a finding that the store does not know, whose name may not leave, or that too few of these
        patients have or have not: of the three a coordinator cannot say which it is.
        """
        labels = self.view.store.labels(ids, findings)
        open_ = cells.large(labels, self.patients(ids), self.cells)
        if self.words is not None:
            open_ &= np.array([finding in self.words for finding in findings], bool)
        labels[:, ~open_] = UNKNOWN
        return labels

    def training_labels(self, recipe: Recipe, findings: Sequence[str]) -> np.ndarray:
        """Labels int8 (N, F) of the training images, as `labels` gives them."""
        ids = self.training_ids(recipe)
        labels = self.labels(ids, findings)
        if self.shuffle_labels:
            from chexfound.evaluate.floors import permute_by_patient

            labels = permute_by_patient(labels, self.patients(ids), recipe.seed, "shuffled", self.name)
        return labels

    def report(self, phase: str, before: int = 0, of: int | None = None) -> Callable[[int, int], None] | None:
        """The progress callback of a phase, of which `before` steps (of `of`) were done in earlier rounds."""
        if self.progress is None:
            return None
        progress = self.progress
        return lambda done, total: progress(phase, before + done, of or total)
