from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from chexfound.errors import DataError
from chexfound.evaluate import areas, rows
from chexfound.evaluate.areas import auprc, auroc
from chexfound.evaluate.bootstrap import bootstrap_weights, interval
from chexfound.evaluate.rows import across_seeds, difference_rows, result_rows
from chexfound.evaluate.scores import Scores

ROW = [
    "arm",
    "trained_on",
    "tested_on",
    "finding",
    "n",
    "positives",
    "auroc",
    "auroc_ci",
    "auprc",
    "auprc_ci",
    "reason",
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels with both classes and unknowns, scores with many ties."""
    size = draw(st.integers(0, 30))
    labels = [1, 0, *draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=size, max_size=size))]
    levels = draw(st.sampled_from([1, 3, 1000]))
    scores = draw(st.lists(st.integers(0, levels), min_size=size + 2, max_size=size + 2))
    return np.array(labels, np.int8), np.array(scores, np.float32) / 7


def cohort(n: int = 60, findings: int = 3, seed: int = 0, per_patient: int = 2) -> Scores:
    generator = np.random.default_rng(seed)
    labels = generator.integers(-1, 2, (n, findings)).astype(np.int8)
    scores = (labels + generator.normal(size=(n, findings))).astype(np.float32)
    return Scores(
        [f"p{index // per_patient}" for index in range(n)], labels, scores, [f"f{i}" for i in range(findings)]
    )


def noisier(scores: Scores, seed: int = 1) -> Scores:
    noise = np.random.default_rng(seed).normal(size=scores.scores.shape).astype(np.float32)
    return Scores(scores.patients, scores.labels, scores.scores + noise, scores.findings)


def test_values_worked_by_hand():
    # positives .9 .4, negatives .6 .1: three of four pairs in order; precision 1 at recall 1/2, 2/3 at 1
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.6, 0.4, 0.1])
    assert auroc(labels, scores) == 0.75
    assert auprc(labels, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # the tie at .5 counts half: (1 + 1 + .5 + 1) / 4; thresholds .9 (1/1), .5 (2/3)
    tied = np.array([0.9, 0.5, 0.5, 0.1])
    assert auroc(labels, tied) == 0.875
    assert auprc(labels, tied) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # all tied: chance, and the prevalence
    assert auroc(labels, np.zeros(4)) == 0.5
    assert auprc(np.array([1, 0, 0, 0]), np.zeros(4)) == 0.25
    # the second positive twice, the last negative not at all: 1 of 3 pairs
    assert auroc(labels, scores, np.array([1, 1, 2, 0])) == pytest.approx(1 / 3)
    # an unknown label takes no part, whatever its score
    assert auroc(np.array([1, 0, 1, 0, -1]), np.array([0.9, 0.6, 0.4, 0.1, 0.5])) == 0.75


@settings(deadline=None)
@given(problems())
def test_equal_to_sklearn(problem):
    labels, scores = problem
    known = labels >= 0
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=1e-12)
    assert auprc(labels, scores) == pytest.approx(average_precision_score(labels[known], scores[known]), abs=1e-12)


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32 - 1), st.booleans())
def test_weighted_rows_equal_to_sklearn(problem, seed, whole):
    labels, scores = problem
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, 4, (5, len(labels))) if whole else generator.random((5, len(labels)))
    weights[:, :2] += 1  # one of each class is always in
    known = labels >= 0
    rows = (auroc(labels, scores, weights), auprc(labels, scores, weights))
    assert rows[0].shape == rows[1].shape == (5,)
    for draw, weight in enumerate(weights):
        for ours, theirs in zip(rows, (roc_auc_score, average_precision_score), strict=True):
            assert ours[draw] == pytest.approx(
                theirs(labels[known], scores[known], sample_weight=weight[known]), abs=1e-9
            )


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_weight_is_a_repetition(problem, seed):
    labels, scores = problem
    counts = np.random.default_rng(seed).integers(0, 3, len(labels))
    counts[:2] += 1
    repeated = np.repeat(np.arange(len(labels)), counts)
    assert float(auroc(labels, scores, counts)) == auroc(labels[repeated], scores[repeated])
    assert float(auprc(labels, scores, counts)) == pytest.approx(auprc(labels[repeated], scores[repeated]), abs=1e-12)


@settings(deadline=None)
@given(problems())
def test_only_the_order_counts(problem):
    labels, scores = problem
    assert auroc(labels, np.exp(scores.astype(float) / 1000)) == auroc(labels, scores)
    assert auroc(labels, -scores) == pytest.approx(1 - auroc(labels, scores), abs=1e-12)
    assert auprc(labels[::-1], scores[::-1]) == auprc(labels, scores)


def test_draws_taken_in_pieces_are_the_same(monkeypatch):
    data = cohort()
    weights = bootstrap_weights(data.patients, 50, 0, "test")
    whole = auprc(data.labels[:, 0], data.scores[:, 0], weights)
    monkeypatch.setattr(areas, "_CHUNK", 100)
    assert np.array_equal(whole, auprc(data.labels[:, 0], data.scores[:, 0], weights), equal_nan=True)


@pytest.mark.parametrize("area", [auroc, auprc])
def test_an_empty_class_is_nan(area):
    assert np.isnan(area(np.array([1, 1, -1]), np.arange(3.0)))
    assert np.isnan(area(np.array([0, 0]), np.arange(2.0)))
    assert np.isnan(area(np.array([], int), np.array([])))
    both = area(np.array([1, 0]), np.array([1.0, 0.0]), np.array([[1, 1], [0, 2], [2, 0], [0, 0]]))
    assert both[0] == 1
    assert np.isnan(both[1:]).all()


@pytest.mark.parametrize(
    ("labels", "scores", "weights", "message"),
    [
        ([1, 0], [0.1, np.nan], None, "1 of 2 scores are NaN"),
        ([1, 2], [0.1, 0.2], None, "label 2: give 1"),
        ([1, 0, 0], [0.1, 0.2], None, "vectors of one length"),
        ([1, 0], [0.1, 0.2], [1, 1, 1], r"weights \(3,\) must be \(2,\)"),
        ([1, 0], [0.1, 0.2], [1, -1], "negative"),
    ],
)
def test_what_has_no_area_is_refused(labels, scores, weights, message):
    with pytest.raises(DataError, match=message):
        auroc(np.array(labels), np.array(scores), weights if weights is None else np.array(weights))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(0, 1000), st.randoms())
def test_a_draw_is_of_whole_patients(patients, seed, random):
    weights = bootstrap_weights(patients, 20, seed, "bootstrap", "A")
    names = sorted(set(patients))
    first = [patients.index(name) for name in names]
    assert weights.shape == (20, len(patients))
    assert (weights[:, first].sum(axis=1) == len(names)).all()
    assert np.array_equal(weights, weights[:, [patients.index(name) for name in patients]])
    # neither the order nor the number of a patient's images changes what is drawn
    shuffled = patients * 2
    random.shuffle(shuffled)
    again = bootstrap_weights(shuffled, 20, seed, "bootstrap", "A")
    assert np.array_equal(weights[:, first], again[:, [shuffled.index(name) for name in names]])


def test_a_draw_hangs_on_the_stream():
    patients = [f"p{index}" for index in range(30)]
    drawn = bootstrap_weights(patients, 400, 0, "bootstrap", "A")
    assert np.array_equal(drawn, bootstrap_weights(patients, 400, 0, "bootstrap", "A"))
    assert not np.array_equal(drawn, bootstrap_weights(patients, 400, 1, "bootstrap", "A"))
    assert not np.array_equal(drawn, bootstrap_weights(patients, 400, 0, "bootstrap", "B"))
    # with replacement: each count is binomial(30, 1/30), mean 1 and variance 29/30
    assert drawn.var() == pytest.approx(29 / 30, abs=0.05)
    assert bootstrap_weights([], 7, 0).shape == (7, 0)


def test_interval_is_of_percentiles_of_the_usable_draws():
    assert interval(np.arange(101.0), 0.9) == pytest.approx([5, 95])
    assert interval(np.array([np.nan, 0.5, 0.5, np.nan]), 0.95) == [0.5, 0.5]  # half are left: enough
    assert interval(np.array([np.nan, 0.5, np.nan]), 0.95) is None
    assert interval(np.array([]), 0.95) is None


def test_rows_have_the_schema_and_survive_json():
    data = cohort()
    rows = result_rows("local:A", "A", "B", data, 200, 0.95, 3)
    assert [row["finding"] for row in rows] == data.findings
    for column, row in enumerate(rows):
        assert list(row) == ROW
        assert (row["arm"], row["trained_on"], row["tested_on"], row["reason"]) == ("local:A", "A", "B", None)
        labels, scores = data.labels[:, column], data.scores[:, column]
        assert (row["n"], row["positives"]) == ((labels >= 0).sum(), (labels == 1).sum())
        assert row["auroc"] == auroc(labels, scores)
        assert row["auprc"] == auprc(labels, scores)
        weights = bootstrap_weights(data.patients, 200, 3, "bootstrap", "B")
        assert row["auroc_ci"] == interval(auroc(labels, scores, weights), 0.95)
        assert row["auprc_ci"] == interval(auprc(labels, scores, weights), 0.95)
        assert row["auroc_ci"][0] < row["auroc"] < row["auroc_ci"][1]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def one_finding(labels: list[int], patients: list[str] | None = None, **more) -> Scores:
    names = patients or [f"p{index}" for index in range(len(labels))]
    scores = np.linspace(0, 1, len(labels), dtype=np.float32)[:, None]
    return Scores(names, np.array(labels, np.int8).reshape(-1, 1), scores, ["Nodule"], **more)


@pytest.mark.parametrize(
    ("scores", "n", "reason"),
    [
        (one_finding([0] * 12 + [-1]), 12, "no positive among the 12 held-out images"),
        (one_finding([1]), 1, "no negative among the 1 held-out image"),
        (one_finding([-1, -1]), 0, "no labelled held-out image"),
        (one_finding([]), 0, "no labelled held-out image"),
        (one_finding([0, 1], unscored={"Nodule": "no row was trained"}), 2, "no row was trained"),
    ],
)
def test_a_figure_that_cannot_be_given_is_null_with_its_reason(scores, n, reason):
    (row,) = result_rows("federated", "all", "A", scores, 100, 0.95, 0)
    assert row["n"] == n
    assert [row[key] for key in ("auroc", "auroc_ci", "auprc", "auprc_ci")] == [None] * 4
    assert row["reason"] == reason


@pytest.mark.parametrize(
    ("labels", "patients", "lone"),
    [
        ([0, 0, 0, 1], "abcd", "positives"),
        ([0, 0, 1, 1], "aabc", "negatives"),
        ([0, 0, 1, 1], "aaaa", "positives"),
    ],
)
def test_a_class_of_one_patient_has_a_figure_but_no_interval(labels, patients, lone):
    scores = one_finding(labels, list(patients))
    (row,) = result_rows("federated", "all", "A", scores, 200, 0.95, 0)
    assert [row[key] for key in ("auroc", "auroc_ci", "auprc", "auprc_ci")] == [1.0, None, 1.0, None]
    assert row["reason"] == f"no interval: all {lone} are of one patient"
    (row,) = difference_rows(scores, one_like(scores), "A", 200, 0.95, 0)
    assert (row["federated_minus_centralized"], row["ci"]) == (0.5, None)
    assert row["reason"] == f"no interval: all {lone} are of one patient"
    (row,) = across_seeds([(0, scores, one_like(scores)), (1, scores, one_like(scores))], "A", 200, 0.95)
    assert (row["mean_federated_minus_centralized"], row["ci"]) == (0.5, None)
    assert row["reason"] == f"no interval: all {lone} are of one patient"


def test_too_few_draws_with_both_classes_leave_the_figure(monkeypatch):
    def one_in_three(patients, samples, *_):
        weights = np.ones((samples, len(patients)), np.int32)
        weights[samples // 3 :, 2:] = 0
        return weights

    monkeypatch.setattr(rows, "bootstrap_weights", one_in_three)
    (row,) = result_rows("federated", "all", "A", one_finding([0, 0, 1, 1]), 300, 0.95, 0)
    assert [row[key] for key in ("auroc", "auroc_ci", "auprc", "auprc_ci")] == [1.0, None, 1.0, None]
    assert row["reason"] == "no interval: only 100 of 300 bootstrap draws have both classes"


@pytest.mark.parametrize(
    ("labels", "scores", "more", "message"),
    [
        ([[1], [0]], [[0.1], [np.nan]], {}, "1 of 2 for 'Edema' are NaN"),
        ([[1], [3]], [[0.1], [0.2]], {}, "label 3"),
        ([[1]], [[0.1], [0.2]], {}, r"labels has shape \(1, 1\)"),
        ([[1], [0]], [[0.1, 1], [0.2, 1]], {}, r"scores has shape \(2, 2\)"),
        ([[1], [0]], [[0.1], [0.2]], {"unscored": {"Oedema": "?"}}, "'Oedema', which is not among"),
    ],
)
def test_scores_that_do_not_fit_are_refused(labels, scores, more, message):
    with pytest.raises(DataError, match=message):
        Scores(["a", "b"], np.array(labels, np.int8), np.array(scores, np.float32), ["Edema"], **more)


def test_a_column_that_is_unscored_may_be_nan():
    scores = Scores(["a", "b"], np.array([[1], [0]]), np.full((2, 1), np.nan), ["Edema"], {"Edema": "one class"})
    assert difference_rows(scores, one_like(scores), "A", 10, 0.95, 0) == [
        {
            "finding": "Edema",
            "tested_on": "A",
            "federated_minus_centralized": None,
            "ci": None,
            "reason": "federated: one class",
        }
    ]


def one_like(scores: Scores) -> Scores:
    return Scores(scores.patients, scores.labels, np.zeros(scores.labels.shape, np.float32), scores.findings)


def test_differences_are_paired():
    first = cohort()
    second = noisier(first)
    rows = difference_rows(first, second, "A", 300, 0.95, 0)
    weights = bootstrap_weights(first.patients, 300, 0, "bootstrap", "A")
    for column, row in enumerate(rows):
        one, two = (result_rows("arm", "all", "A", scores, 300, 0.95, 0)[column]["auroc"] for scores in (first, second))
        assert list(row) == ["finding", "tested_on", "federated_minus_centralized", "ci", "reason"]
        assert row["federated_minus_centralized"] == one - two
        labels = first.labels[:, column]
        drawn = auroc(labels, first.scores[:, column], weights) - auroc(labels, second.scores[:, column], weights)
        assert row["ci"] == interval(drawn, 0.95)
    # a model against itself has no difference in any draw; unpaired draws would scatter
    for row in difference_rows(first, first, "A", 300, 0.95, 0, names=("federated", "random")):
        assert (row["federated_minus_random"], row["ci"]) == (0, [0, 0])
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_other_images_cannot_be_paired():
    first, second = cohort(seed=0), cohort(seed=2)
    with pytest.raises(DataError, match="same images"):
        difference_rows(first, second, "A", 10, 0.95, 0)
    with pytest.raises(DataError, match="findings"):
        difference_rows(first, Scores(first.patients, first.labels, first.scores, ["x", "y", "z"]), "A", 10, 0.95, 0)


def test_one_seed_is_the_difference_of_that_seed():
    first = cohort()
    second = noisier(first)
    rows = across_seeds([(4, first, second)], "A", 200, 0.95)
    for row, single in zip(rows, difference_rows(first, second, "A", 200, 0.95, 4), strict=True):
        assert list(row) == [
            "finding",
            "tested_on",
            "seeds",
            "mean_federated_minus_centralized",
            "ci",
            "reason",
        ]
        assert row["seeds"] == [4]
        assert row["mean_federated_minus_centralized"] == single["federated_minus_centralized"]
        assert row["ci"] == single["ci"]


def test_a_patient_who_recurs_is_drawn_once_for_all_seeds():
    first = cohort(n=80, per_patient=1)
    second = noisier(first)
    same = across_seeds([(0, first, second), (1, first, second)], "A", 2000, 0.95)
    apart = across_seeds([(0, first, second), (1, renamed(first), renamed(second))], "A", 2000, 0.95)
    alone = across_seeds([(0, first, second)], "A", 2000, 0.95)
    for twice, independent, once in zip(same, apart, alone, strict=True):
        assert twice["seeds"] == [0, 1]
        assert twice["mean_federated_minus_centralized"] == pytest.approx(once["mean_federated_minus_centralized"])
        # the same patients again tell nothing new; as many others narrow the interval by the root of two
        assert width(twice) / width(once) == pytest.approx(1, abs=0.12)
        assert width(independent) / width(once) == pytest.approx(0.5**0.5, abs=0.12)


def renamed(scores: Scores) -> Scores:
    return Scores([f"other-{name}" for name in scores.patients], scores.labels, scores.scores, scores.findings)


def width(row: dict) -> float:
    return row["ci"][1] - row["ci"][0]


def test_the_order_of_the_seeds_is_no_matter():
    first, other = cohort(seed=0), cohort(seed=5)
    replicates = [(0, first, noisier(first)), (2, other, noisier(other))]
    assert across_seeds(replicates, "A", 100, 0.95) == across_seeds(replicates[::-1], "A", 100, 0.95)


def test_a_seed_without_a_difference_is_left_out_and_named():
    full = one_finding([0, 1, 0, 1])
    empty = one_finding([0, 0, 0, 0])
    (row,) = across_seeds([(0, full, one_like(full)), (1, empty, one_like(empty))], "A", 100, 0.95)
    assert (row["seeds"], row["mean_federated_minus_centralized"]) == ([0], 0.25)
    assert row["reason"] == "seed 1 is left out: no positive among the 4 held-out images"
    (row,) = across_seeds([(1, empty, one_like(empty))], "A", 100, 0.95)
    assert (row["seeds"], row["mean_federated_minus_centralized"], row["ci"]) == ([], None, None)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_come_once_each(seeds):
    data = cohort()
    with pytest.raises(DataError, match="each seed once"):
        across_seeds([(seed, data, data) for seed in seeds], "A", 10, 0.95)


def test_findings_are_those_of_every_seed():
    data = cohort()
    other = Scores(data.patients, data.labels, data.scores, ["x", "y", "z"])
    with pytest.raises(DataError, match="findings"):
        across_seeds([(0, data, data), (1, other, other)], "A", 10, 0.95)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_rows_are_plain_values_for_any_labels(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(0, 8))
    labels = generator.integers(-1, 2, (size, 2)).astype(np.int8)
    data = Scores(
        [str(name) for name in generator.integers(0, 4, size)],
        labels,
        generator.normal(size=(size, 2)),
        ["f", "g"],
    )
    rows = [
        *result_rows("random", None, "A", data, 20, 0.9, 0),
        *difference_rows(data, data, "A", 20, 0.9, 0),
    ]
    rows += across_seeds([(0, data, data)], "A", 20, 0.9)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert (row["reason"] is None) == all(
            value is not None for key, value in row.items() if key not in ("reason", "trained_on")
        )


def test_a_thousand_draws_are_cheap():
    data = cohort(n=200, findings=10)
    start = time.process_time()
    result_rows("federated", "all", "A", data, 1000, 0.95, 0)
    assert time.process_time() - start < 1  # about 0.06 s
