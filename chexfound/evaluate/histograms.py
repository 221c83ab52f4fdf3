"""AUROC and average precision from counts of held-out images by score and label, which can be summed over sites.

Under secure aggregation no figure of one site leaves it.  A site counts its held-out images by finding, label and
bin of the score; the counts are summed under masks, and all figures come from the sum.  The bins are the same at
every site and in every run, so the sum is the histogram of the pooled images.

What the sum shows, and to whom: whoever opens it sees, for each held-out image of the whole cohort, in which bin its
score is, with its label; not from which site it is, nor of which patient.  Bins blur a score, and do not hide it: of
300 images with scores of deviation 1 in log-odds (`s` below), 7 of 10 negatives and 9 of 10 positives were alone in
their bin; of 2,000, 1 and 7; of 20,000, 0.1 and 1.  So among few images the sum is nearly a list of the scores, and
who holds an image can look whether one with its score and label was tested.  What protects a site is that the sum is
over several; what would protect a patient is noise, and there is none here.

A figure from bins is that of scores rounded to bins: images of one bin are ties.  Bins are of nearly equal width in
log-odds, because that is where a head's scores spread, around whatever prevalence they crowd.  How many of them is a
choice between what the sum shows, its bytes (51 kB a finding and site) and average precision: rounding moves that by
about the width of a bin, AUROC by the square of that, against the spread of the scores.  How far average precision
moved at the most in 30 draws of float32 scores, Gaussian in log-odds in either class with deviation `s`, and in
brackets with 1024 equal bins over -16 to 16:

    s       300 images, 20 % positive    2,000, 10 %        20,000, 10 %
    2       0.0007 (0.0030)              0.0010 (0.0027)    0.0004 (0.0020)
    0.5     0.0034 (0.0088)              0.0020 (0.0087)    0.0014 (0.0075)
    0.1     0.0105 (0.0389)              0.0081 (0.0465)    0.0079 (0.0390)
    0.03    0.0285 (0.1346)              0.0232 (0.1372)    0.0294 (0.1348)

AUROC moved by at most 0.0005 at `s` from 0.5 up, 0.0019 at 0.1 and 0.0042 at 0.03, most at 300 images.  Against the
width of its interval, average precision moved by at most a twentieth, but for scores that crowd (`s` of 0.1 and less),
where it was a fifth, and at 0.03 and 20,000 images three quarters: a head whose scores differ so little has learned
next to nothing, and its figures here are not to be read to the last digit.

Legend: `N` images, `F` findings, `T` occupied bins, `R` bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from chexfound.errors import DataError, Problems, ProtocolError
from chexfound.evaluate.areas import auprc, auroc
from chexfound.evaluate.bootstrap import interval
from chexfound.evaluate.rows import Row
from chexfound.rng import numpy_generator

OCTAVES = 25  # of the odds, on each side of 1: float32's last number before 1 has odds of 2**24, and 1 is apart from it
OCTAVE_BITS = 7
BINS = 2 * OCTAVES << OCTAVE_BITS

LARGEST = 1 << 24  # images a finding: beyond it a site's counts are wrong, and the draws would take all memory

_SHIFT = 52 - OCTAVE_BITS  # of a float64's 52 bits of mantissa
_FIRST = (1023 - OCTAVES) << OCTAVE_BITS  # the leading bits of 2**-OCTAVES: 1023 is float64's bias of the exponent
_CHUNK = 1 << 21  # elements of a temporary (16 MB of int64): draws are taken in pieces of this size


def bins(scores: np.ndarray) -> np.ndarray:
    """The bin of each score: int64 in [0, BINS), in the order of the scores.

    The leading bits of the odds p / (1 - p) as a float64: the exponent (the octave, 0.69 of log-odds) and the first
    7 bits of the mantissa, so a bin is from 0.004 to 0.008 of log-odds wide.  The outermost two take what is
    beyond 2**-25 and 2**25 (log-odds of 17.3), 0 and 1 too.  A logarithm is not used because its last bit is not the
    same on all processors; IEEE 754 leaves no choice in a difference, a quotient and the bits of it.

    Args:
        scores: any shape, probabilities.

    Raises: DataError if one is NaN or outside [0, 1].
    """
    values = np.asarray(scores, np.float64)
    missing = int(np.isnan(values).sum())
    if missing:
        raise DataError(f"{missing} of {values.size} scores are NaN: the model diverged; lower its learning rate")
    if not ((values >= 0) & (values <= 1)).all():
        other = values[(values < 0) | (values > 1)][0]
        raise DataError(f"score {other.item()!r}: give probabilities, from 0 to 1")
    with np.errstate(divide="ignore"):  # 1 has infinite odds, whose bits are above all others
        odds = values / (1 - values)
    found: np.ndarray = np.clip((odds.view(np.int64) >> _SHIFT) - _FIRST, 0, BINS - 1)
    return found


def edges() -> np.ndarray:
    """The probabilities where bins begin and end, (BINS + 1,) float64 from 0 to 1, rounded; `bins` decides."""
    odds = ((np.arange(BINS + 1) + _FIRST) << _SHIFT).view(np.float64)
    probabilities = odds / (1 + odds)
    probabilities[[0, -1]] = 0, 1
    return probabilities


def histograms(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Count one site's images by finding, label and bin; an unknown label is not counted.

    Args:
        labels: (N, F) 1, 0, or -1 for unknown.
        scores: (N, F) probabilities.

    Returns: (F, 2, BINS) uint32, negatives before positives.
    Raises: DataError for shapes that differ, other labels, scores that `bins` refuses.
    """
    if labels.ndim != 2 or labels.shape != scores.shape:
        raise DataError(f"labels {labels.shape!r} and scores {scores.shape!r} must be of one shape (N, F)")
    if not np.isin(labels, (-1, 0, 1)).all():
        other = np.setdiff1d(labels, (-1, 0, 1))[0]
        raise DataError(f"label {other.item()!r}: give 1 (present), 0 (absent) or -1 (unknown)")
    places = bins(scores)
    counts = np.zeros((labels.shape[1], 2, BINS), np.uint32)
    for column, (label, place) in enumerate(zip(labels.T, places.T, strict=True)):
        for value in (0, 1):
            counts[column, value] = np.bincount(place[label == value], minlength=BINS)
    return counts


def results(histogram: np.ndarray, samples: int, confidence: float, *stream: int | str) -> Row:
    """The figures of one finding: `n`, `positives`, `auroc`, `auroc_ci`, `auprc`, `auprc_ci` and `reason` of a row.

    AUROC and average precision are those of chexfound.evaluate.rows, with the bin as the score; AUROC's interval
    is by DeLong's variance (`delong`), average precision's the percentile interval of `samples` bootstrap draws.
    Both take images as independent, which metrics.py does not: it resamples patients.  Where patients have several
    images each, these intervals are too narrow.  There is none if a class is of one image (metrics.py: of one
    patient).  At an average precision of 1 the draws have no scatter; its interval is then that of a share of as many
    trials as there are positives, all of which succeeded (after Boyd et al. 2013, who take it for a binomial's).

    Of 1,000 simulated sets each, nominal 95 %: DeLong's held the truth in 93 to 98 %, from 6 to 100 positives; the
    percentiles in 93 % at 50 and 100 positives, in 88 % at about ten.

    Args:
        histogram: (2, BINS) whole numbers, negatives before positives.
        samples: bootstrap draws, R.
        confidence: of the intervals.
        stream: parts of the name of the draws' random stream (chexfound.rng).

    Raises: DataError if the histogram is not one.
    """
    _check(histogram, (2, BINS))
    counts = histogram[:, histogram.any(axis=0)].astype(np.int64)  # (2, T), lowest score first
    negatives, positives = (int(count) for count in counts.sum(axis=1))
    if negatives + positives > LARGEST:
        raise DataError(f"a histogram of {negatives + positives} images, over {LARGEST}: a site did not send counts")
    row: Row = {"n": negatives + positives, "positives": positives}
    row |= {"auroc": None, "auroc_ci": None, "auprc": None, "auprc_ci": None}
    row["reason"] = _absence(negatives, positives)
    if row["reason"] is not None:
        return row
    labels, ranks = _cells(counts)
    row["auroc"] = float(auroc(labels, ranks, counts.ravel()))
    row["auprc"] = float(auprc(labels, ranks, counts.ravel()))
    for count, name in ((positives, "positives"), (negatives, "negatives")):
        if count == 1:
            return row | {"reason": f"no interval: all {name} are of one patient"}
    draws = _average_precisions(counts, samples, *stream)
    row["auprc_ci"] = interval(draws, confidence)
    if row["auprc_ci"] is None:
        usable = int((~np.isnan(draws)).sum())
        return row | {"reason": f"no interval: only {usable} of {samples} bootstrap draws have both classes"}
    if row["auprc"] == 1:
        row["auprc_ci"] = [_all_held(positives, confidence), 1.0]
    return row | {"auroc_ci": delong(counts, confidence)}


def rows(
    arm: str,
    trained_on: Any,
    tested_on: str,
    summed: np.ndarray,
    findings: Sequence[str],
    samples: int,
    confidence: float,
    seed: int,
    zeroed: Collection[str] = (),
) -> list[Row]:
    """One row of `results` in metrics.json for each finding, as metrics.result_rows gives them for one site.

    Args:
        arm: as there; so are trained_on, samples, confidence and seed.
        trained_on: the sites that the model learned from.
        tested_on: what the sum is over, "all sites".
        summed: (F, 2, BINS), the sites' `histograms` added up.
        findings: the F names.
        samples: bootstrap draws.
        confidence: of the intervals.
        seed: of the draws, which depend on it, `tested_on` and the finding alone.
        zeroed: findings that too few sites label, so that each site sent zeros for them.

    Raises: DataError if the sum is not a histogram of these findings; ProtocolError if a zeroed finding has counts.
    """
    _check(summed, (len(findings), 2, BINS))
    problems = Problems(DataError, "histograms")
    for name in sorted(set(zeroed) - set(findings)):
        problems.add(f"zeroed names {name!r}, which is not among the findings {list(findings)!r}")
    problems.check()
    table = []
    for finding, histogram in zip(findings, summed, strict=True):
        row: Row = {"arm": arm, "trained_on": trained_on, "tested_on": tested_on, "finding": finding}
        row |= results(histogram, samples, confidence, seed, "histogram bootstrap", tested_on, finding)
        if finding in zeroed:
            if row["n"]:
                raise ProtocolError(
                    f"{row['n']} images are counted for {finding!r}, which every site was to send as zero"
                )
            row["reason"] = "too few sites label it for a sum that hides each of them"
        table.append(row)
    return table


def delong(counts: np.ndarray, confidence: float) -> list[float]:
    """An interval [low, high] of the AUROC, for classes of two images or more: counts (2, T), lowest score first.

    DeLong's variance, with the placement values of the bins (exact for these ties), on the logit scale, which keeps
    it within 0 and 1.  Where the classes do not overlap the variance is 0 and says nothing.  As many disjoint pairs
    of a positive and a negative as the smaller class has images are independent, and the chance that all are in
    order is at most AUROC to that power: the values that are left by a two-sided test of it are the interval.

    Source: DeLong et al. 1988; the logit scale: Pepe 2003, Qin and Hotilovac 2008.
    """
    negative, positive = counts.astype(np.float64)
    sizes = negative.sum(), positive.sum()
    beaten = (np.cumsum(negative) - negative / 2) / sizes[0]  # the share of negatives that a positive of the bin beats
    beating = (sizes[1] - np.cumsum(positive) + positive / 2) / sizes[1]
    area = float(positive @ beaten / sizes[1])
    if area in (0, 1):
        least = _all_held(min(sizes), confidence)
        return [least, 1.0] if area else [0.0, 1 - least]
    variance = sum(
        weight @ (placement - area) ** 2 / (size - 1) / size
        for weight, placement, size in zip((negative, positive), (beating, beaten), sizes, strict=True)
    )
    middle = math.log(area / (1 - area))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance) / (area * (1 - area))
    return [1 / (1 + math.exp(reach - middle)), 1 / (1 + math.exp(-reach - middle))]


def _all_held(trials: float, confidence: float) -> float:
    """The least chance that a two-sided test leaves after so many trials of which all succeeded."""
    return float(((1 - confidence) / 2) ** (1 / trials))


def _average_precisions(counts: np.ndarray, samples: int, *stream: int | str) -> np.ndarray:
    """Average precision (R,) of draws of as many images as there are, with replacement; NaN where a class is empty."""
    generator = numpy_generator(*stream)
    labels, ranks = _cells(counts)
    cell = np.repeat(np.arange(counts.size), counts.ravel())  # of each image
    values = np.empty(samples)
    size = max(1, _CHUNK // len(cell))
    for start in range(0, samples, size):
        part = values[start : start + size]
        drawn = cell[generator.integers(len(cell), size=(len(part), len(cell)))]
        drawn += counts.size * np.arange(len(part))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=len(part) * counts.size).reshape(len(part), counts.size)
        part[:] = auprc(labels, ranks, weights)
    return values


def _cells(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label and rank of each count of `counts.ravel()`."""
    labels, ranks = np.indices(counts.shape)
    return labels.ravel(), ranks.ravel()


def _absence(negatives: int, positives: int) -> str | None:
    """Why these counts give no figure, or None if both classes are there."""
    count = negatives + positives
    if count == 0:
        return "no labelled held-out image"
    if negatives and positives:
        return None
    missing = "negative" if positives else "positive"
    return f"no {missing} among the {count} held-out image" + ("" if count == 1 else "s")


def _check(counts: np.ndarray, shape: tuple[int, ...]) -> None:
    if counts.shape != shape:
        raise DataError(f"a histogram of shape {counts.shape!r} where {shape!r} is asked for")
    if counts.dtype.kind not in "iu":
        raise DataError(f"a histogram of {counts.dtype}: give whole numbers")
    if (counts < 0).any():
        raise DataError(f"a count of {counts.min()}: counts are from 0 up")
