"""AUROC and average precision, of one score vector or of many weightings at once."""

from __future__ import annotations

from typing import overload

import numpy as np

from chexfound.errors import DataError
from chexfound.evaluate.scores import check_labels

_CHUNK = 1 << 21  # elements of a temporary (16 MB of float64): draws are taken in pieces of this size


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
    check_labels(labels)
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: they have no order")
    if weights is None:
        return float(areas(labels, scores, None)[which][0])
    weights = np.asarray(weights)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(labels):
        raise DataError(f"weights {weights.shape!r} must be ({len(labels)},) or (draws, {len(labels)})")
    if not (weights >= 0).all():
        raise DataError("a weight is negative or NaN")
    return areas(labels, scores, np.atleast_2d(weights))[which].reshape(weights.shape[:-1])


def areas(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
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
