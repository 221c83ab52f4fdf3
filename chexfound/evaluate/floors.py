"""Floors that see no anatomy: what a scanner, a view or chance can buy.

A model that does not clear them has not been shown to see a chest.  Two are fitted here, per finding: the
grey-level histogram (position-free), in four variants of which the best on a site's validation patients is
the floor there, and site and view (no pixel at all), on the pooled training images of all sites.  The third
retrains a head on labels that `permute_by_patient` has shuffled.

Legend: `n` training images, `m` test images, `F` findings; labels 1, 0, -1 for unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chexfound.errors import DataError
from chexfound.evaluate.areas import auroc
from chexfound.evaluate.scores import Scores
from chexfound.rng import derive, numpy_generator

BINS = 64
# A regression and boosted trees, on a site's own training images and on those of all sites.  In this order they
# are preferred where validation does not decide.
OWN, POOLED = ("linear", "boosted"), ("pooled", "pooled-boosted")
VARIANTS = (*OWN, *POOLED)


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


@dataclass(frozen=True, kw_only=True)
class FloorImages:
    """Hold a part of one site's images: patients (n,), features (n, D), labels (n, F)."""

    patients: Sequence[str]
    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class FloorScores(Scores):
    """Hold a floor's scores of one site's test images, and by which variant they are.

    Attributes:
        variants: finding -> variant; absent where none could be fitted.
        validation: finding -> AUROC of that variant on the site's validation patients; absent where it has none.
    """

    variants: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


def histogram_floors(
    train: Mapping[str, FloorImages],
    val: Mapping[str, FloorImages],
    test: Mapping[str, FloorImages],
    findings: Sequence[str],
    seed: int,
) -> dict[str, dict[str, FloorScores]]:
    """Fit the four variants of the grey-level floor, and choose the best of them at each site for each finding.

    The best has the highest AUROC on the site's validation patients; of equals it is the first in `VARIANTS`.  Where
    validation has not both classes, it is the first that could be fitted: the site's own regression, else the pooled.
    Test images are scored and take no part in the fit or the choice.

    Args:
        train: site -> its training images.
        val: site -> its validation images, of the same sites.
        test: site -> its test images, likewise.
        findings: the F names.
        seed: of the boosted trees.

    Returns: "histogram" (the best) and "histogram:VARIANT" for each of `VARIANTS` -> site -> scores.
    Raises: DataError if shapes disagree.
    """
    result: dict[str, dict[str, FloorScores]] = {
        arm: {} for arm in ("histogram", *(f"histogram:{name}" for name in VARIANTS))
    }
    together = list(train.values())
    asked = {site: np.concatenate([val[site].features, test[site].features]) for site in train}
    pooled = _both(together, np.concatenate(list(asked.values())), findings, seed)
    ends = np.cumsum([len(features) for features in asked.values()])
    for end, site in zip(ends, train, strict=True):
        here = slice(end - len(asked[site]), end)
        fitted = _both([train[site]], asked[site], findings, seed) + [
            (scores[here], unscored) for scores, unscored in pooled
        ]
        variants = {
            name: _judged(name, scores, unscored, val[site], test[site], findings)
            for name, (scores, unscored) in zip(VARIANTS, fitted, strict=True)
        }
        result["histogram"][site] = best(list(variants.values()))
        for name, scores in variants.items():
            result[f"histogram:{name}"][site] = scores
    return result


def _both(
    train: Sequence[FloorImages], asked: np.ndarray, findings: Sequence[str], seed: int
) -> list[tuple[np.ndarray, dict[str, str]]]:
    """Fit a regression and boosted trees on the same images; each as `fit_scores` returns it."""
    features, labels = (np.concatenate([getattr(one, name) for one in train]) for name in ("features", "labels"))
    return [fit_scores(features, labels, asked, findings, model) for model in (linear(), boosted(seed))]


def _judged(
    name: str,
    scores: np.ndarray,
    unscored: dict[str, str],
    val: FloorImages,
    test: FloorImages,
    findings: Sequence[str],
) -> FloorScores:
    """Split scores (validation images first) into what judges a variant and what is judged of it."""
    areas = {
        finding: auroc(val.labels[:, column], scores[: len(val.labels), column])
        for column, finding in enumerate(findings)
        if finding not in unscored
    }
    return FloorScores(
        test.patients,
        test.labels,
        scores[len(val.labels) :],
        findings,
        unscored,
        variants={finding: name for finding in areas},
        validation={finding: area for finding, area in areas.items() if not np.isnan(area)},
    )


def best(floors: Sequence[FloorScores]) -> FloorScores:
    """Take of each finding the floor with the highest AUROC on validation; of equals, or without one, the first.

    A finding that no floor could be fitted for has the last one's reason.
    """
    last = floors[-1]
    scores = np.full_like(last.scores, np.nan)
    variants: dict[str, str] = {}
    validation: dict[str, float] = {}
    for column, finding in enumerate(last.findings):
        there = [floor for floor in floors if finding in floor.variants]
        if not there:
            continue
        chosen = max(there, key=lambda floor: floor.validation.get(finding, -1.0))
        scores[:, column] = chosen.scores[:, column]
        variants[finding] = chosen.variants[finding]
        if finding in chosen.validation:
            validation[finding] = chosen.validation[finding]
    unscored = {finding: why for finding, why in last.unscored.items() if finding not in variants}
    return FloorScores(
        last.patients, last.labels, scores, last.findings, unscored, variants=variants, validation=validation
    )


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


def linear(c: float = 1.0) -> Any:
    """Make a logistic regression on standardised features; `c` is the inverse strength of its L2 penalty.

    Classes are not reweighed, so the intercept carries the prior.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))


def boosted(seed: int) -> Any:
    """Make gradient-boosted trees, small enough for a site of a hundred images.

    Source: Friedman 2001, by scikit-learn's histogram-based implementation.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=100,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=derive(seed, "boosted floor") % 2**32,
    )


def fit_scores(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, findings: Sequence[str], model: Any = None
) -> tuple[np.ndarray, dict[str, str]]:
    """Fit a model for each finding on the images with a known label; score the test images.

    One thread, so that the bits do not depend on the machine's load.

    Args:
        train: (n, D) features.
        labels: (n, F) 1, 0, -1.
        test: (m, D) features.
        findings: the F names.
        model: of scikit-learn, fitted anew for each finding; default: `linear()`.

    Returns: log-odds (m, F) float32, and finding -> reason for those with one class in training, whose
        column is NaN; both as `Scores` takes them.
    Raises: DataError if shapes disagree.
    """
    from threadpoolctl import threadpool_limits

    if labels.shape != (len(train), len(findings)) or train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"training features {train.shape!r}, test features {test.shape!r}, labels {labels.shape!r} and "
            f"{len(findings)} findings do not fit one another"
        )
    model = linear() if model is None else model
    scores = np.full((len(test), len(findings)), np.nan, np.float32)
    unscored = {}
    for column, finding in enumerate(findings):
        known = labels[:, column] >= 0
        target = labels[known, column]
        if len(np.unique(target)) < 2:
            unscored[finding] = _one_class(target)
        elif len(test):
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
