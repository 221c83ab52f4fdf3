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

from collections.abc import Sequence
from typing import Any

import numpy as np

from chexfound.errors import DataError
from chexfound.evaluate.areas import areas
from chexfound.evaluate.bootstrap import bootstrap_weights, bounded, lone_class
from chexfound.evaluate.scores import Scores

Row = dict[str, Any]


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
            point, draws = areas(labels, values, None), areas(labels, values, weights)
            alone = lone_class(scores.patients, labels)
            for name, value, drawn in zip(("auroc", "auprc"), point, draws, strict=True):
                row[name] = float(value[0])
                row[f"{name}_ci"], row["reason"] = bounded(drawn, confidence, alone)
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
    first, _ = areas(labels, pair[0].scores[:, column], weights)
    second, _ = areas(labels, pair[1].scores[:, column], weights)
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
            alone = lone_class(federated.patients, federated.labels[:, column])
            row["ci"], row["reason"] = bounded(_gap(pair, column, weights), confidence, alone)
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
        limits, reason = bounded(np.mean(draws, axis=0), confidence, lone_class(patients, labels))
        reasons += [reason] if reason else []
    mean = f"mean_{'_minus_'.join(names)}"
    return {"seeds": seeds, mean: value, "ci": limits, "reason": "; ".join(reasons) or None}
