"""AUROC and average precision with intervals by patient, and the rows of metrics.json.

Legend: `n` images, `F` findings, `R` bootstrap draws.  Labels are 1, 0 or -1 (unknown); an unknown
label takes no part anywhere.  A score may be on any increasing scale (logit or probability): only
the order counts, and equal scores are ties.

The bootstrap draws patients, not images, because images of a patient are not independent
(cluster bootstrap: Field and Welsh 2007).  A draw is a vector of whole-number image weights.  It
depends on the seed, the site and the site's patients alone, so every arm is judged on the same
draws, and the difference of two arms is paired.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from chexfound.errors import CheckpointError, DataError, Problems
from chexfound.journal import replace_file
from chexfound.rng import numpy_generator

Row = dict[str, Any]

# What numpy and zipfile raise over a file that was cut or changed (RuntimeError: "encrypted").
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, SyntaxError)
_CHUNK = 1 << 21  # elements of a temporary (16 MB of float64): draws are taken in pieces of this size


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model says about one site's held-out images.

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
        _check_labels(self.labels)
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


@overload
def auroc(labels: np.ndarray, scores: np.ndarray, weights: None = None) -> float: ...
@overload
def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray: ...
def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        labels: (n,) 1, 0, or -1 for an image that takes no part.
        scores: (n,) without NaN.
        weights: None, (n,) or (R, n), not negative; a row for each bootstrap draw.

    Returns: a float, or an array of shape `weights.shape[:-1]`; NaN where a class has no weight.
    Raises: DataError for other shapes, labels, NaN scores, negative weights.
    Source: Hanley and McNeil 1982; equal to scikit-learn's `roc_auc_score`.
    """
    return _area(0, labels, scores, weights)


@overload
def auprc(labels: np.ndarray, scores: np.ndarray, weights: None = None) -> float: ...
@overload
def auprc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray: ...
def auprc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Average precision: precision at each distinct score, weighed by the recall gained there.

    Arguments, shapes and errors as `auroc`.  Equal to scikit-learn's `average_precision_score`, except
    that it is NaN, not 0 or 1, where a class has no weight.
    """
    return _area(1, labels, scores, weights)


def _area(which: int, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> float | np.ndarray:
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise DataError(f"labels {labels.shape!r} and scores {scores.shape!r} must be vectors of one length")
    _check_labels(labels)
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: they have no order")
    if weights is None:
        return float(_areas(labels, scores, None)[which][0])
    weights = np.asarray(weights)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(labels):
        raise DataError(f"weights {weights.shape!r} must be ({len(labels)},) or (draws, {len(labels)})")
    if not (weights >= 0).all():
        raise DataError("a weight is negative or NaN")
    return _areas(labels, scores, np.atleast_2d(weights))[which].reshape(weights.shape[:-1])


def _check_labels(labels: np.ndarray) -> None:
    if not np.isin(labels, (-1, 0, 1)).all():
        other = np.setdiff1d(labels, (-1, 0, 1))[0]
        raise DataError(f"label {other.item()!r}: give 1 (present), 0 (absent) or -1 (unknown)")


def _areas(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (R,) and average precision (R,) of one finding; weights (R, n), or None for (1, n) ones.

    One sort serves all draws.  With whole-number weights every sum of the AUROC is exact.
    """
    known = np.flatnonzero(labels >= 0)
    order = known[np.argsort(scores[known], kind="stable")[::-1]]
    draws = 1 if weights is None else len(weights)
    roc, precision = np.full(draws, np.nan), np.full(draws, np.nan)
    if not len(order):
        return roc, precision
    ranked = scores[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last image of each run of ties
    positive = labels[order] == 1
    size = max(1, _CHUNK // len(order))
    for start in range(0, draws, size):
        part = slice(start, start + size)
        weight = np.ones((1, len(order))) if weights is None else weights[part][:, order].astype(np.float64)
        roc[part], precision[part] = _step_areas(
            np.cumsum(weight * positive, axis=1)[:, ends], np.cumsum(weight * ~positive, axis=1)[:, ends]
        )
    return roc, precision


def _step_areas(above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two areas from the weight of positives and of negatives at or over each threshold, (R, T) each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gained = np.diff(above, axis=1, prepend=0)
        lost = np.diff(below, axis=1, prepend=0)
        roc = np.einsum("rt,rt->r", lost, above - gained / 2) / (above[:, -1] * below[:, -1])
        precision = np.where(gained > 0, above / (above + below), 0)
        average = np.einsum("rt,rt->r", gained, precision) / above[:, -1]
    both = (above[:, -1] > 0) & (below[:, -1] > 0)
    return np.where(both, roc, np.nan), np.where(both, average, np.nan)


def bootstrap_weights(patients: Sequence[str], samples: int, *stream: int | str) -> np.ndarray:
    """How often each image is in each bootstrap draw of the patients: (samples, n) int32.

    As many patients are drawn as there are, with replacement; all images of a patient have its count.
    Depends on the sorted distinct names and on `stream` (parts of a name, see chexfound.rng) only.
    """
    names, column = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if not len(names):
        return np.zeros((samples, 0), np.int32)
    drawn = numpy_generator(*stream).integers(len(names), size=(samples, len(names)))
    drawn += len(names) * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * len(names)).reshape(samples, len(names))
    return counts.astype(np.int32)[:, column]


def interval(values: np.ndarray, confidence: float) -> list[float] | None:
    """The percentile interval of the draws (R,), [low, high].

    NaN marks a draw in which a class is empty: it is ignored.  None if under half of the draws are left.
    """
    usable = values[~np.isnan(values)]
    if not len(usable) or 2 * len(usable) < len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(usable, (tail, 1 - tail))
    return [float(low), float(high)]


def _images(count: int) -> str:
    return f"{count} held-out image" + ("" if count == 1 else "s")


def _absence(labels: np.ndarray) -> str | None:
    """Why labels (n,) give no figure, or None if both classes are there."""
    count = int((labels >= 0).sum())
    if count == 0:
        return "no labelled held-out image"
    for value, name in ((1, "positive"), (0, "negative")):
        if not (labels == value).any():
            return f"no {name} among the {_images(count)}"
    return None


def _lone(patients: Iterable[str], labels: Iterable[int]) -> str | None:
    """Which class is one patient's, if one is: its scatter is not seen, an interval would be too narrow."""
    pairs = {(str(patient), int(label)) for patient, label in zip(patients, labels, strict=True)}
    for value, name in ((1, "positives"), (0, "negatives")):
        if sum(label == value for _, label in pairs) < 2:
            return f"no interval: all {name} are of one patient"
    return None


def _bounded(values: np.ndarray, confidence: float, lone: str | None) -> tuple[list[float] | None, str | None]:
    """The interval, or None with the reason why there is none."""
    limits = None if lone else interval(values, confidence)
    if limits is not None or lone:
        return limits, lone
    usable = int((~np.isnan(values)).sum())
    return None, f"no interval: only {usable} of {len(values)} bootstrap draws have both classes"


def result_rows(
    arm: str, trained_on: Any, tested_on: str, scores: Scores, samples: int, confidence: float, seed: int
) -> list[Row]:
    """One row of `results` in metrics.json for each finding: what `arm` reaches at the site `tested_on`.

    `n` and `positives` count images with a known label.  A figure that cannot be given is None, and
    `reason` says why; where only the interval cannot be given, the figure stays.  There is none where a
    class is of one patient, or under half of the draws have both classes.
    """
    weights = bootstrap_weights(scores.patients, samples, seed, "bootstrap", tested_on)
    rows = []
    for column, finding in enumerate(scores.findings):
        labels, values = scores.labels[:, column], scores.scores[:, column]
        row: Row = {"arm": arm, "trained_on": trained_on, "tested_on": tested_on, "finding": finding}
        row |= {"n": int((labels >= 0).sum()), "positives": int((labels == 1).sum())}
        row |= {"auroc": None, "auroc_ci": None, "auprc": None, "auprc_ci": None}
        row["reason"] = _absence(labels) or scores.unscored.get(finding)
        if row["reason"] is None:
            point, draws = _areas(labels, values, None), _areas(labels, values, weights)
            lone = _lone(scores.patients, labels)
            for name, value, drawn in zip(("auroc", "auprc"), point, draws, strict=True):
                row[name] = float(value[0])
                row[f"{name}_ci"], row["reason"] = _bounded(drawn, confidence, lone)
        rows.append(row)
    return rows


def _check_paired(first: Scores, second: Scores, where: str) -> None:
    _check_findings(first, second, where)
    if list(first.patients) != list(second.patients) or not np.array_equal(first.labels, second.labels):
        raise DataError(f"{where}: a paired difference needs both models' scores on the same images in one order")


def _check_findings(first: Scores, second: Scores, where: str) -> None:
    if list(first.findings) != list(second.findings):
        raise DataError(
            f"{where}: findings {list(first.findings)!r} on one side, {list(second.findings)!r} on the other"
        )


def _unpaired(pair: tuple[Scores, Scores], column: int, names: tuple[str, str]) -> str | None:
    """Why a finding has no difference, or None; a reason of one model is preceded by its name."""
    finding = pair[0].findings[column]
    told = [
        f"{name}: {one.unscored[finding]}" for name, one in zip(names, pair, strict=True) if finding in one.unscored
    ]
    return _absence(pair[0].labels[:, column]) or "; ".join(told) or None


def _gap(pair: tuple[Scores, Scores], column: int, weights: np.ndarray | None) -> np.ndarray:
    """Difference in AUROC (R,), first less second."""
    labels = pair[0].labels[:, column]
    first, _ = _areas(labels, pair[0].scores[:, column], weights)
    second, _ = _areas(labels, pair[1].scores[:, column], weights)
    gap: np.ndarray = first - second
    return gap


def difference_rows(
    federated: Scores,
    centralized: Scores,
    tested_on: str,
    samples: int,
    confidence: float,
    seed: int,
    names: tuple[str, str] = ("federated", "centralized"),
) -> list[Row]:
    """One row of `differences` for each finding: AUROC of the first model less that of the second.

    Paired: both models see the same images in the same bootstrap draw, the one of `result_rows`.  The
    key of the difference is `FIRST_minus_SECOND` by `names`, so other pairs of arms can be asked for.

    Raises: DataError if the two were not scored on the same images.
    """
    pair = (federated, centralized)
    _check_paired(*pair, f"difference at {tested_on!r}, seed {seed}")
    weights = bootstrap_weights(federated.patients, samples, seed, "bootstrap", tested_on)
    key = "_minus_".join(names)
    rows = []
    for column, finding in enumerate(federated.findings):
        row: Row = {"finding": finding, "tested_on": tested_on, key: None, "ci": None}
        row["reason"] = _unpaired(pair, column, names)
        if row["reason"] is None:
            row[key] = float(_gap(pair, column, None)[0])
            lone = _lone(federated.patients, federated.labels[:, column])
            row["ci"], row["reason"] = _bounded(_gap(pair, column, weights), confidence, lone)
        rows.append(row)
    return rows


def across_seeds(
    replicates: Sequence[tuple[int, Scores, Scores]],
    tested_on: str,
    samples: int,
    confidence: float,
    names: tuple[str, str] = ("federated", "centralized"),
) -> list[Row]:
    """One row of `across_seeds` for each finding: the mean over seeds of the paired difference in AUROC.

    Args:
        replicates: (seed, first model's scores, second model's scores), one for each seed.  Test sets
            of two seeds may share patients.
        tested_on: the site.
        samples: bootstrap draws.
        confidence: of the interval.
        names: of the two models, for the key `mean_FIRST_minus_SECOND`.

    A patient is drawn once for all seeds, from all patients who are in some test set, so one who
    recurs is not counted as several independent ones.  The interval is over patients; it does not
    hold the scatter between further seeds.  Seeds in which the finding has no difference are left
    out: `seeds` lists those that are in, `reason` names those that are not.  With one seed the row
    says what `difference_rows` says.

    Raises: DataError if there is no replicate, a seed comes twice, findings differ between seeds, or
        a pair was not scored on the same images.
    """
    ordered = sorted(replicates, key=lambda replicate: replicate[0])
    seeds = [seed for seed, _, _ in ordered]
    where = f"differences over seeds at {tested_on!r}"
    if not ordered or len(set(seeds)) != len(seeds):
        raise DataError(f"{where} need each seed once, and one at least; got {seeds!r}")
    for seed, first, second in ordered:
        _check_paired(first, second, f"difference at {tested_on!r}, seed {seed}")
        _check_findings(ordered[0][1], first, where)
    pool = sorted({str(name) for _, first, _ in ordered for name in first.patients})
    counts = bootstrap_weights(pool, samples, *seeds, "bootstrap", tested_on)
    place = {name: index for index, name in enumerate(pool)}
    weights = [counts[:, [place[str(name)] for name in first.patients]] for _, first, _ in ordered]
    rows = []
    for column, finding in enumerate(ordered[0][1].findings):
        row: Row = {"finding": finding, "tested_on": tested_on}
        rows.append(row | _mean_row(ordered, weights, column, confidence, names))
    return rows


def _mean_row(
    replicates: Sequence[tuple[int, Scores, Scores]],
    weights: Sequence[np.ndarray],
    column: int,
    confidence: float,
    names: tuple[str, str],
) -> Row:
    points, draws, seeds, reasons = [], [], [], []
    patients: list[str] = []
    labels: list[int] = []
    for (seed, *two), weight in zip(replicates, weights, strict=True):
        pair = (two[0], two[1])
        absent = _unpaired(pair, column, names)
        if absent is not None:
            reasons.append(f"seed {seed} is left out: {absent}")
            continue
        seeds.append(seed)
        points.append(_gap(pair, column, None)[0])
        draws.append(_gap(pair, column, weight))
        patients += two[0].patients
        labels += two[0].labels[:, column].tolist()
    value, limits = None, None
    if seeds:
        value = float(np.mean(points))
        limits, reason = _bounded(np.mean(draws, axis=0), confidence, _lone(patients, labels))
        reasons += [reason] if reason else []
    mean = f"mean_{'_minus_'.join(names)}"
    return {"seeds": seeds, mean: value, "ci": limits, "reason": "; ".join(reasons) or None}
