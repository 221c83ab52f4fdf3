"""Bootstrap intervals by patient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from chexfound.rng import numpy_generator


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


def lone_class(patients: Iterable[str], labels: Iterable[int]) -> str | None:
    """Say which class is of one patient, if one is: its scatter is not seen, an interval would be too narrow."""
    pairs = {(str(patient), int(label)) for patient, label in zip(patients, labels, strict=True)}
    for value, name in ((1, "positives"), (0, "negatives")):
        if sum(label == value for _, label in pairs) < 2:
            return f"no interval: all {name} are of one patient"
    return None


def bounded(values: np.ndarray, confidence: float, lone: str | None) -> tuple[list[float] | None, str | None]:
    """The interval, or None with the reason why there is none."""
    limits = None if lone else interval(values, confidence)
    if limits is not None or lone:
        return limits, lone
    usable = int((~np.isnan(values)).sum())
    return None, f"no interval: only {usable} of {len(values)} bootstrap draws have both classes"
