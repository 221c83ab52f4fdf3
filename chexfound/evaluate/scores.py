"""Scores and labels of held-out images, as they are kept beside a run."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chexfound.durable.files import replace_file
from chexfound.errors import CheckpointError, DataError, Problems

# What numpy and zipfile raise over a file that was cut or changed (RuntimeError: "encrypted").
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, SyntaxError)


@dataclass(frozen=True, eq=False)
class Scores:
    """Hold what one model says about one site's held-out images.

    Attributes:
        patients: (n,) names; images of one name are drawn together.
        labels: (n, F) int8; 1, 0, or -1 for unknown.
        scores: (n, F) float32, larger for a likelier finding.
        findings: the F names.
        unscored: finding -> why the model gives no score for it (no row was trained, say).  Its
            column is not looked at and may be NaN; its figures become null with this reason.

    Raises: DataError if shapes disagree, a label is not 1, 0 or -1, or a score is NaN.
    """

    patients: Sequence[str]
    labels: np.ndarray
    scores: np.ndarray
    findings: Sequence[str]
    unscored: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems(DataError, "scores")
        shape = (len(self.patients), len(self.findings))
        for name, values in (("labels", self.labels), ("scores", self.scores)):
            if values.shape != shape:
                problems.add(f"{name} has shape {values.shape!r}; patients and findings ask for {shape!r}")
        if len(set(self.findings)) != len(self.findings):
            problems.add(f"a finding is named twice in {list(self.findings)!r}")
        for name in sorted(set(self.unscored) - set(self.findings)):
            problems.add(f"unscored names {name!r}, which is not among the findings {list(self.findings)!r}")
        problems.check()
        check_labels(self.labels)
        for column, name in enumerate(self.findings):
            bad = int(np.isnan(self.scores[:, column]).sum()) if name not in self.unscored else 0
            if bad:
                problems.add(f"{bad} of {shape[0]} for {name!r} are NaN: the model diverged; lower its learning rate")
        problems.check()


def save_scores(path: Path, scores: Scores) -> None:
    """Keep scores on the disk (npz without pickles); `unscored` is not kept: it belongs to the model."""
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            patients=np.array(scores.patients, dtype=str),
            labels=scores.labels,
            scores=scores.scores,
            findings=np.array(scores.findings, dtype=str),
        )


def load_scores(path: Path, unscored: Mapping[str, str]) -> Scores:
    """The inverse of `save_scores`, with what the model could not train.

    Raises: CheckpointError if the file is absent, truncated or changed; DataError if a score is NaN.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            patients, findings = [str(name) for name in kept["patients"]], [str(name) for name in kept["findings"]]
            labels, scores = kept["labels"], kept["scores"]
    except _UNREADABLE as error:
        raise CheckpointError(f"{path}: not readable scores ({error}); absent, truncated or damaged") from error
    return Scores(patients, labels, scores, findings, unscored)


def check_labels(labels: np.ndarray) -> None:
    """Raise DataError if a label is none of −1, 0 and 1."""
    if not np.isin(labels, (-1, 0, 1)).all():
        other = np.setdiff1d(labels, (-1, 0, 1))[0]
        raise DataError(f"label {other.item()!r}: give 1 (present), 0 (absent) or -1 (unknown)")
