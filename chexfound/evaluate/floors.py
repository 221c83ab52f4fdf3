"""Floors that see no anatomy: what a scanner, a view or chance can buy.

A model that does not clear them has not been shown to see a chest.  Two are fitted here, per finding,
on the pooled training images of all sites: the grey-level histogram (position-free), and site and view
(no pixel at all).  The third retrains a head on labels that `permute_by_patient` has shuffled.

Legend: `n` training images, `m` test images, `F` findings; labels 1, 0, -1 for unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chexfound.errors import DataError
from chexfound.rng import numpy_generator

BINS = 64


def histogram_features(images: np.ndarray) -> np.ndarray:
    """Share of pixels in each of 64 equal bins of the grey scale: (n, h, w) uint8 -> (n, 64) float64."""
    if images.dtype != np.uint8 or images.ndim != 3:
        raise DataError(f"a histogram needs uint8 images (n, h, w), not {images.shape!r} of {images.dtype}")
    bins = (images >> 2).reshape(len(images), images.shape[1] * images.shape[2])
    counts = [np.bincount(row, minlength=BINS) for row in bins]
    return np.array(counts, dtype=np.float64).reshape(len(images), BINS) / bins.shape[1]


def site_view_features(sites: Sequence[str], views: Sequence[str], columns: Sequence[tuple[str, str]]) -> np.ndarray:
    """One-hot site, view, and pair of the two: (n, number of columns) float64.

    The pair lets a view mean one thing at one site and another elsewhere.  `columns` comes from
    `site_view_columns` of the training images; a site or view that was not there has zeros.
    """
    place = {column: index for index, column in enumerate(columns)}
    features = np.zeros((len(sites), len(columns)))
    for row, (site, view) in enumerate(zip(sites, views, strict=True)):
        for column in _traits(site, view):
            if column in place:
                features[row, place[column]] = 1
    return features


def site_view_columns(sites: Sequence[str], views: Sequence[str]) -> list[tuple[str, str]]:
    """The sorted columns that the training images ask for."""
    return sorted({column for site, view in zip(sites, views, strict=True) for column in _traits(site, view)})


def _traits(site: str, view: str) -> tuple[tuple[str, str], ...]:
    return ("site", str(site)), ("view", str(view)), ("site and view", f"{site}\x1f{view}")


def histogram_floor(
    train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray, findings: Sequence[str]
) -> tuple[np.ndarray, dict[str, str]]:
    """Scores by the grey-level histogram alone, of images (n, h, w) uint8; the rest as `fit_scores`."""
    return fit_scores(histogram_features(train_images), train_labels, histogram_features(test_images), findings)


def site_view_floor(
    train_sites: Sequence[str],
    train_views: Sequence[str],
    train_labels: np.ndarray,
    test_sites: Sequence[str],
    test_views: Sequence[str],
    findings: Sequence[str],
) -> tuple[np.ndarray, dict[str, str]]:
    """Scores by site and view alone; returns as `fit_scores`.

    Images of one site and view have equal scores to the bit, so they are ties.
    """
    columns = site_view_columns(train_sites, train_views)
    pairs = sorted(set(zip(map(str, test_sites), map(str, test_views), strict=True)))
    place = {pair: index for index, pair in enumerate(pairs)}
    # each pair is scored once: a matrix product may round equal rows differently, which would break ties
    scores, unscored = fit_scores(
        site_view_features(train_sites, train_views, columns),
        train_labels,
        site_view_features([site for site, _ in pairs], [view for _, view in pairs], columns),
        findings,
    )
    rows = [place[str(site), str(view)] for site, view in zip(test_sites, test_views, strict=True)]
    return scores[np.array(rows, dtype=np.intp)], unscored


def fit_scores(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, findings: Sequence[str], c: float = 1.0
) -> tuple[np.ndarray, dict[str, str]]:
    """Fit a logistic regression for each finding on the images with a known label; score the test images.

    Features are standardised by the training images of the finding.  Classes are not reweighed, so the
    intercept carries the prior.  One thread, so that the bits do not depend on the machine's load.

    Args:
        train: (n, D) features.
        labels: (n, F) 1, 0, -1.
        test: (m, D) features.
        findings: the F names.
        c: inverse strength of the L2 penalty.

    Returns: log-odds (m, F) float32, and finding -> reason for those with one class in training, whose
        column is NaN; both as `metrics.Scores` takes them.
    Raises: DataError if shapes disagree.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if labels.shape != (len(train), len(findings)) or train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"training features {train.shape!r}, test features {test.shape!r}, labels {labels.shape!r} and "
            f"{len(findings)} findings do not fit one another"
        )
    scores = np.full((len(test), len(findings)), np.nan, np.float32)
    unscored = {}
    for column, finding in enumerate(findings):
        known = labels[:, column] >= 0
        target = labels[known, column]
        if len(np.unique(target)) < 2:
            unscored[finding] = _one_class(target)
        elif len(test):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
            with threadpool_limits(1):
                scores[:, column] = model.fit(train[known], target).decision_function(test)
    return scores, unscored


def _one_class(target: np.ndarray) -> str:
    if not len(target):
        return "no labelled training image"
    missing = "negative" if target[0] == 1 else "positive"
    return f"no {missing} among the {len(target)} training image" + ("" if len(target) == 1 else "s")


def permute_by_patient(labels: np.ndarray, patients: Sequence[str], *stream: int | str) -> np.ndarray:
    """Shuffle the labels among the patients of one site.

    Each patient gets the rows of the patient that a random permutation names (its own by chance, as in
    any permutation test), in their order, from the start again if it has more images than that one
    has.  Unknown labels move with the rest.  Call it for each site by itself: what ties a label to an
    image goes, the site's label set stays, and so does its prevalence (exactly where all patients have
    equally many images).

    Args:
        labels: (n, F).
        patients: (n,) names.
        stream: parts of the random stream's name; the result depends on it, on the names and on labels.

    Returns: a new array (n, F) of the same type.
    """
    if len(labels) != len(patients):
        raise DataError(f"{len(labels)} rows of labels for {len(patients)} patients' images")
    names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    rows = [np.flatnonzero(owner == index) for index in range(len(names))]
    donors = numpy_generator(*stream).permutation(len(names))
    result = labels.copy()
    for own, donor in zip(rows, donors, strict=True):
        result[own] = labels[np.resize(rows[donor], len(own))]
    return result
