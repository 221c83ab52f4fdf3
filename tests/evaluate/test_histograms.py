from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from chexfound.errors import DataError, ProtocolError
from chexfound.evaluate import histograms as module
from chexfound.evaluate.areas import auprc, auroc
from chexfound.evaluate.bootstrap import bootstrap_weights
from chexfound.evaluate.histograms import BINS, bins, delong, edges, histograms, results, rows
from chexfound.evaluate.rows import result_rows
from chexfound.evaluate.scores import Scores

FIGURES = ("auroc", "auroc_ci", "auprc", "auprc_ci")


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-log_odds))).astype(np.float32)


def column(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return histograms(np.asarray(labels)[:, None], np.asarray(scores)[:, None])[0]


def gaussian(n: int, share: float, centre: float, spread: float, shift: float, seed: int) -> tuple:
    """Labels, and scores that are Gaussian in log-odds, `shift` deviations further for the positives."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(n) < share).astype(np.int8)
    labels[:4] = 0, 1, 0, 1
    return labels, sigmoid(centre + spread * (generator.normal(size=n) + shift * labels))


@st.composite
def crowded(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels with two of each class and unknowns; scores around one value, within a bin or some, or at an end."""
    size = draw(st.integers(4, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.integers(-1, 2, size).astype(np.int8)
    labels[:4] = 0, 1, 0, 1
    centre, spread = draw(st.floats(-30, 30)), 10.0 ** draw(st.integers(-6, 1))
    scores = sigmoid(centre + spread * generator.normal(size=size))
    scores[generator.random(size) < 0.1] = draw(st.sampled_from([0, 1, 0.5]))
    return labels, scores


# -- bins


def test_bins_worked_by_hand():
    # odds of 1, 3, 1/3 and 15/17: an octave is 128 bins, and the octave that begins at 1 is the middle
    assert bins(np.array([0.5, 0.75, 0.25, 15 / 32])).tolist() == [
        BINS // 2,
        BINS // 2 + 128 + 64,  # 3 = 2 x 1.5
        BINS // 2 - 2 * 128 + 42,  # 1/3 = 1/4 x 1.3333, and 128 / 3 = 42.7
        BINS // 2 - 128 + 97,  # 15/17 = 1/2 x 1.7647, and 128 x 13/17 = 97.9
    ]
    assert bins(np.array([0, -0.0, 1e-45, 2.0**-26, 1])).tolist() == [0, 0, 0, 0, BINS - 1]
    assert bins(np.float32([1 - 2.0**-24])).tolist() == [BINS - 1 - 128]  # the last before 1: no tie with it
    assert bins(np.float32([[0.5]])).shape == (1, 1)


def test_edges_are_where_bins_begin():
    limits = edges()
    assert limits.shape == (BINS + 1,)
    assert (limits[0], limits[-1]) == (0, 1)
    assert (np.diff(limits) > 0).all()
    assert np.array_equal(bins((limits[1:] + limits[:-1]) / 2), np.arange(BINS))
    log_odds = np.log(limits[1:-1]) - np.log1p(-limits[1:-1])
    assert 0.99 / 256 < np.diff(log_odds).min() < np.diff(log_odds).max() < 1.01 / 128
    assert BINS == 6400


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=50), st.sampled_from([np.float32, np.float64]))
def test_bins_keep_the_order(values, kind):
    found = bins(np.sort(np.array(values, kind)))
    assert (np.diff(found) >= 0).all()
    assert found[0] >= 0
    assert found[-1] < BINS


@pytest.mark.parametrize(
    ("scores", "message"),
    [([0.2, np.nan], "1 of 2 scores are NaN"), ([-0.1, 0.2], "score -0.1: give prob"), ([1.5], "score 1.5")],
)
def test_scores_that_are_no_probabilities_are_refused(scores, message):
    with pytest.raises(DataError, match=message):
        bins(np.array(scores))


# -- counts


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sums_over_sites_are_the_histogram_of_all(n, sites, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(-1, 2, (n, 2)).astype(np.int8)
    scores = sigmoid(generator.normal(size=(n, 2)))
    site = generator.integers(sites, size=n)
    parts = [histograms(labels[site == one], scores[site == one]) for one in range(sites)]
    whole = histograms(labels, scores)
    assert np.array_equal(sum(parts), whole)
    assert (whole.dtype, whole.shape) == (np.uint32, (2, 2, BINS))
    for finding in range(2):
        for value in (0, 1):
            counted = np.flatnonzero(whole[finding, value]).repeat(whole[finding, value][whole[finding, value] > 0])
            assert np.array_equal(counted, np.sort(bins(scores[:, finding])[labels[:, finding] == value]))


def test_labels_that_are_none_are_refused():
    with pytest.raises(DataError, match="label 2: give 1"):
        histograms(np.array([[2]]), np.array([[0.5]]))
    with pytest.raises(DataError, match="of one shape"):
        histograms(np.array([[1]]), np.array([[0.5, 0.5]]))
    with pytest.raises(DataError, match="of one shape"):
        histograms(np.array([1]), np.array([0.5]))


# -- figures


@settings(deadline=None)
@given(crowded())
def test_figures_are_those_of_the_binned_scores(problem):
    labels, scores = problem
    known = labels >= 0
    row = results(column(labels, scores), 5, 0.95, 0)
    assert list(row) == ["n", "positives", *FIGURES, "reason"]
    assert (row["n"], row["positives"]) == (known.sum(), (labels == 1).sum())
    assert row["auroc"] == pytest.approx(roc_auc_score(labels[known], bins(scores)[known]), abs=1e-12)
    assert row["auprc"] == pytest.approx(average_precision_score(labels[known], bins(scores)[known]), abs=1e-12)


@settings(deadline=None)
@given(crowded())
def test_figures_are_no_further_from_the_exact_ones_than_their_ties_allow(problem):
    """Whatever the scores: images of a bin may stand in any order, and only those."""
    labels, scores = problem
    negative, positive = column(labels, scores).astype(float)
    row = results(column(labels, scores), 5, 0.95, 0)
    slack = negative @ positive / (2 * negative.sum() * positive.sum())
    assert abs(row["auroc"] - auroc(labels, scores)) <= slack + 1e-12
    true, false = np.cumsum(positive[::-1])[::-1], np.cumsum(negative[::-1])[::-1]  # at the bin or over it
    held = positive > 0
    most = true[held] / (true + false - negative)[held]
    first = (true - positive)[held] + 1
    least = first / (first + false[held])
    slack = positive[held] @ (most - least) / positive.sum()
    assert abs(row["auprc"] - auprc(labels, scores)) <= slack + 1e-12


@settings(deadline=None, max_examples=40, derandomize=True)  # a bound in practice: 0.0075 at the worst of 3,000
@given(st.floats(-9, 9), st.floats(-1, 0.7), st.floats(0, 2.5), st.integers(0, 2**32 - 1))
def test_figures_are_close_to_the_exact_ones_wherever_scores_crowd(centre, magnitude, shift, seed):
    labels, scores = gaussian(5000, 0.2, centre, 10**magnitude, shift, seed)
    assert abs(auroc(labels, bins(scores)) - auroc(labels, scores)) < 0.001
    assert abs(auprc(labels, bins(scores)) - auprc(labels, scores)) < 0.01


@pytest.mark.parametrize(("spread", "limit", "area"), [(1, 0.001, 0.0001), (0.1, 0.01, 0.001), (0.03, 0.03, 0.003)])
def test_figures_drift_the_more_the_closer_the_scores(spread, limit, area):
    gaps = []
    for seed in range(10):
        labels, scores = gaussian(5000, 0.2, -2, spread, 1, seed)
        assert abs(auroc(labels, bins(scores)) - auroc(labels, scores)) < area
        gaps.append(abs(auprc(labels, bins(scores)) - auprc(labels, scores)))
    assert limit / 20 < max(gaps) < limit  # and not less: the docstring says where the bins end


# -- intervals


def by_pairs(negatives: np.ndarray, positives: np.ndarray, confidence: float) -> list[float]:
    """DeLong et al. 1988 as written, pair by pair, with the interval on the logit scale."""
    order = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    area = order.mean()
    error = math.sqrt(order.mean(1).var(ddof=1) / len(positives) + order.mean(0).var(ddof=1) / len(negatives))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return [1 / (1 + math.exp(-(logit + sign * reach))) for sign in (-1, 1)]


@settings(deadline=None)
@given(crowded(), st.sampled_from([0.8, 0.95, 0.99]))
def test_delong_is_that_of_the_binned_scores(problem, confidence):
    labels, scores = problem
    counts = column(labels, scores)
    counts = counts[:, counts.any(axis=0)]
    low, high = delong(counts, confidence)
    area = auroc(labels, bins(scores))
    assert 0 <= low <= area + 1e-12
    assert area - 1e-12 <= high <= 1
    if 0 < area < 1:
        found = bins(scores)
        assert [low, high] == pytest.approx(by_pairs(found[labels == 0], found[labels == 1], confidence), abs=1e-9)
    turned = delong(counts[:, ::-1], confidence)
    assert turned == pytest.approx([1 - high, 1 - low], abs=1e-9)


def test_classes_that_do_not_overlap_have_a_bound_by_their_size():
    histogram = np.zeros((2, BINS), np.uint32)
    histogram[0, 5], histogram[1, 9] = 50, 4
    row = results(histogram, 50, 0.95, 0)
    assert (row["auroc"], row["auprc"], row["reason"]) == (1, 1, None)
    # an AUROC at which four independent pairs are all in order in 2.5 % of cases
    assert row["auroc_ci"] == [pytest.approx(0.025**0.25), 1]
    assert row["auprc_ci"] == [pytest.approx(0.025**0.25), 1]
    histogram[1, 9] = 80  # now 50 negatives are the smaller class
    row = results(histogram, 50, 0.95, 0)
    assert (row["auroc_ci"][0], row["auprc_ci"][0]) == (pytest.approx(0.025**0.02), pytest.approx(0.025 ** (1 / 80)))
    histogram[1, 9] = 4
    assert results(histogram[:, ::-1], 50, 0.95, 0)["auroc_ci"] == [0, pytest.approx(1 - 0.025**0.25)]


def test_scores_that_are_all_equal_are_chance():
    row = results(column([0, 1] * 5, np.full(10, 0.3)), 50, 0.95, 0)
    assert (row["auroc"], row["auroc_ci"], row["auprc"]) == (0.5, [0.5, 0.5], 0.5)


def test_intervals_are_near_those_of_a_bootstrap_of_the_images():
    labels, scores = gaussian(600, 0.2, -1, 1, 1, 0)
    row = results(column(labels, scores), 2000, 0.95, 0)
    images = Scores([str(i) for i in range(600)], labels[:, None], scores[:, None], ["f"])
    (other,) = result_rows("arm", "all", "A", images, 2000, 0.95, 0)
    for figure in ("auroc_ci", "auprc_ci"):
        assert row[figure] == pytest.approx(other[figure], abs=0.01)


def test_draws_are_of_images():
    """With each image a patient, and its own draws, metrics.py gives the interval."""
    counts = np.array([[3, 0, 2], [1, 1, 2]])
    drawn = module._average_precisions(counts, 4000, 7, "test")
    labels, scores = np.repeat([0, 0, 1, 1, 1], [3, 2, 1, 1, 2]), np.repeat([0, 2, 0, 1, 2], [3, 2, 1, 1, 2])
    theirs = auprc(labels, scores, bootstrap_weights([str(i) for i in range(9)], 4000, 7))
    assert np.nanmean(drawn) == pytest.approx(np.nanmean(theirs), abs=0.02)
    assert np.nanstd(drawn) == pytest.approx(np.nanstd(theirs), abs=0.02)
    assert np.isnan(drawn).mean() == pytest.approx((5 / 9) ** 9 + (4 / 9) ** 9, abs=0.004)


def test_draws_hang_on_the_stream_and_not_on_their_pieces(monkeypatch):
    labels, scores = gaussian(60, 0.3, 0, 1, 1, 0)
    histogram = column(labels, scores)
    first = results(histogram, 50, 0.95, 3, "A")
    assert results(histogram.astype(np.int64), 50, 0.95, 3, "A") == first
    assert results(histogram, 50, 0.95, 4, "A")["auprc_ci"] != first["auprc_ci"]
    monkeypatch.setattr(module, "_CHUNK", 7 * 60)
    assert results(histogram, 50, 0.95, 3, "A") == first


@pytest.mark.parametrize(("n", "share", "shift"), [(200, 0.25, 1.0), (60, 0.2, 2.0), (30, 0.2, 3.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(n, share, shift):
    truth = NormalDist().cdf(shift / math.sqrt(2))
    precision = auprc(*gaussian(1_000_000, share, -1, 1, shift, 0))
    held = np.zeros(2)
    for seed in range(1, 301):
        row = results(column(*gaussian(n, share, -1, 1, shift, seed)), 200, 0.95, seed)
        for place, (figure, value) in enumerate((("auroc_ci", truth), ("auprc_ci", precision))):
            held[place] += row[figure][0] <= value <= row[figure][1]
    # 0.95 of 300 scatters by 0.013; percentiles of a bootstrap of so few positives hold a little less
    assert 0.9 < held[0] / 300 < 0.995
    assert 0.83 < held[1] / 300 < 0.995


# -- rows


def test_rows_are_those_of_metrics_over_all_sites():
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 2, (90, 3)).astype(np.int8)
    scores = sigmoid(labels + generator.normal(size=(90, 3)))
    findings = ["f", "g", "h"]
    summed = sum(histograms(labels[part], scores[part]) for part in (slice(40), slice(40, 55), slice(55, 90)))
    table = rows("federated", "all", "all sites", summed, findings, 100, 0.95, 3)
    pooled = Scores([str(i) for i in range(90)], labels, bins(scores), findings)
    for row, other in zip(table, result_rows("federated", "all", "all sites", pooled, 100, 0.95, 3), strict=True):
        assert list(row) == list(other)
        for key in row:
            if key not in ("auroc_ci", "auprc_ci"):
                assert row[key] == other[key]
        assert row["auroc_ci"][0] < row["auroc"] < row["auroc_ci"][1]
        assert row["auprc_ci"][0] < row["auprc"] < row["auprc_ci"][1]
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    # a finding's draws are its own: what else is asked for does not change them
    assert rows("federated", "all", "all sites", summed[1:2], ["g"], 100, 0.95, 3) == table[1:2]


@pytest.mark.parametrize("labels", [[], [-1], [0], [1], [0, 0, -1], [1, 1], [0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0, 1]])
def test_reasons_are_those_of_metrics(labels):
    column = np.array(labels, np.int8).reshape(-1, 1)
    scores = np.linspace(0.1, 0.9, len(labels), dtype=np.float32).reshape(-1, 1)
    (row,) = rows("federated", "all", "A", histograms(column, scores), ["Nodule"], 200, 0.95, 0)
    images = Scores([str(i) for i in range(len(labels))], column, scores, ["Nodule"])
    (other,) = result_rows("federated", "all", "A", images, 200, 0.95, 0)
    assert (row["reason"], row["n"], row["positives"]) == (other["reason"], other["n"], other["positives"])
    for figure in FIGURES:
        assert (row[figure] is None) == (other[figure] is None)


def test_too_few_draws_with_both_classes_leave_the_figures(monkeypatch):
    monkeypatch.setattr(module, "_average_precisions", lambda *_: np.array([0.5, np.nan, np.nan]))
    row = results(column([0, 0, 1, 1], np.linspace(0.1, 0.9, 4)), 3, 0.95, 0)
    assert [row[figure] for figure in FIGURES] == [1.0, None, 1.0, None]
    assert row["reason"] == "no interval: only 1 of 3 bootstrap draws have both classes"


def test_a_zeroed_finding_says_why_it_has_no_figures():
    summed = histograms(np.array([[0, 0], [1, 0], [0, 0], [1, 0]]), np.full((4, 2), 0.5))
    summed[1] = 0
    full, zeroed = rows("federated", "all", "all sites", summed, ["Edema", "Nodule"], 20, 0.95, 0, ["Nodule"])
    assert full["reason"] is None
    assert zeroed["reason"] == "too few sites label it for a sum that hides each of them"
    assert [zeroed[key] for key in ("n", "positives", *FIGURES)] == [0, 0, None, None, None, None]
    with pytest.raises(ProtocolError, match="4 images are counted for 'Edema'"):
        rows("federated", "all", "all sites", summed, ["Edema", "Nodule"], 20, 0.95, 0, ["Edema"])
    with pytest.raises(DataError, match="zeroed names 'Oedema'"):
        rows("federated", "all", "all sites", summed, ["Edema", "Nodule"], 20, 0.95, 0, ["Oedema"])


def test_what_is_no_histogram_is_refused():
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        results(np.zeros((2, 3), np.uint32), 20, 0.95, 0)
    with pytest.raises(DataError, match="asked for"):
        rows("federated", "all", "A", np.zeros((1, 2, BINS), np.uint32), ["f", "g"], 20, 0.95, 0)
    with pytest.raises(DataError, match="of float64"):
        results(np.zeros((2, BINS)), 20, 0.95, 0)
    wrong = np.zeros((2, BINS), np.int64)
    wrong[0, 0] = -1
    with pytest.raises(DataError, match="a count of -1"):
        results(wrong, 20, 0.95, 0)
    wrong[0, 0] = 2**32 - 1
    with pytest.raises(DataError, match="4294967295 images"):
        results(wrong, 20, 0.95, 0)
