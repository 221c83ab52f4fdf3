from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import DataError
from chexfound.evaluate import floors
from chexfound.evaluate.areas import auroc
from chexfound.evaluate.rows import result_rows
from chexfound.evaluate.scores import Scores


def pictures(levels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noise of 16 x 16 pixels around a grey level each."""
    noise = np.random.default_rng(seed).normal(0, 20, (len(levels), 16, 16))
    return np.clip(levels[:, None, None] + noise, 0, 255).astype(np.uint8)


def test_histogram_counts_four_grey_levels_a_bin():
    image = np.array([[[0, 3], [4, 255]]], np.uint8)
    features = floors.histogram_features(image)
    assert features.shape == (1, 64)
    assert features[0, [0, 1, 63]].tolist() == [0.5, 0.25, 0.25]
    assert features.sum() == 1
    assert floors.histogram_features(np.zeros((0, 4, 4), np.uint8)).shape == (0, 64)


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4)), np.zeros((4, 4), np.uint8)])
def test_histogram_takes_grey_bytes_only(images):
    with pytest.raises(DataError, match="uint8"):
        floors.histogram_features(images)


def test_histogram_floor_finds_brightness_and_no_place():
    labels = np.arange(80)[:, None] % 2
    train, test = pictures(110 + 30 * labels[:, 0]), pictures(110 + 30 * labels[:, 0], seed=1)
    scores, unscored = floors.histogram_floor(train, labels, test, ["Edema"])
    assert unscored == {}
    assert scores.dtype == np.float32
    assert auroc(labels[:, 0], scores[:, 0]) > 0.95
    moved = np.random.default_rng(0).permuted(test.reshape(80, -1), axis=1).reshape(test.shape)
    assert np.array_equal(scores, floors.histogram_floor(train, labels, moved, ["Edema"])[0])
    # anatomy alone, here which half is bright, is invisible to it
    sides = np.where((np.arange(16) < 8) == labels[:, :, None], 160, 90).repeat(16, axis=1).astype(np.uint8)
    blind, _ = floors.histogram_floor(sides, labels, sides, ["Edema"])
    assert auroc(labels[:, 0], blind[:, 0]) == pytest.approx(0.5, abs=1e-6)


def test_site_and_view_give_the_log_odds_of_each_pair():
    # A: PA 90 %, AP 10 %; B the other way round: neither site nor view alone would tell
    sites, views, labels = [], [], []
    for site, view, positives in (("A", "PA", 90), ("A", "AP", 10), ("B", "PA", 10), ("B", "AP", 90)):
        sites += [site] * 100
        views += [view] * 100
        labels += [1] * positives + [0] * (100 - positives)
    scores, unscored = floors.site_view_floor(
        sites,
        views,
        np.array(labels)[:, None],
        ["A", "A", "B", "B", "A"],
        ["PA", "AP", "PA", "AP", "PA"],
        ["Edema"],
    )
    assert unscored == {}
    assert scores[:, 0] == pytest.approx(np.log(9) * np.array([1, -1, -1, 1, 1]), rel=0.05)


def test_a_site_or_view_unseen_in_training_gets_a_score():
    scores, _ = floors.site_view_floor(
        ["A"] * 4,
        ["PA", "PA", "AP", "AP"],
        np.array([[1], [1], [0], [0]]),
        ["C", "C"],
        ["PA", "lateral"],
        ["Edema"],
    )
    assert np.isfinite(scores).all()
    assert scores[0, 0] > scores[1, 0]


def test_one_site_and_view_are_ties_to_the_bit():
    generator = np.random.default_rng(0)
    sites, views = generator.choice(["A", "B", "C"], 500), generator.choice(["PA", "AP", ""], 500)
    labels = generator.integers(0, 2, (500, 1))
    scores, _ = floors.site_view_floor(list(sites), list(views), labels, list(sites), list(views), ["Edema"])
    assert len(np.unique(scores)) <= 9
    one = (sites == "A") & (views == "PA")
    assert auroc(labels[one, 0], scores[one, 0]) == 0.5


def test_unknown_labels_take_no_part():
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(60, 5)), generator.normal(size=(20, 5))
    labels = generator.integers(-1, 2, (60, 2))
    scores, _ = floors.fit_scores(train, labels, test, ["f", "g"])
    train[labels[:, 0] < 0] = 1e6
    again, _ = floors.fit_scores(train, labels, test, ["f", "g"])
    assert np.array_equal(scores[:, 0], again[:, 0])
    assert not np.array_equal(scores[:, 1], again[:, 1])


def test_a_finding_with_one_class_is_null_with_its_reason():
    labels = np.array([[1, 0, -1, 1], [1, -1, -1, 0]])
    names = ["f", "g", "h", "i"]
    scores, unscored = floors.fit_scores(np.array([[0.0], [1.0]]), labels, np.array([[0.0], [1.0], [2.0]]), names)
    assert unscored == {
        "f": "no negative among the 2 training images",
        "g": "no positive among the 1 training image",
        "h": "no labelled training image",
    }
    assert np.isnan(scores[:, :3]).all()
    assert scores[0, 3] > scores[1, 3] > scores[2, 3]
    held_out = np.array([[1] * 4, [0] * 4, [1] * 4])
    rows = result_rows("histogram", "all", "A", Scores(["a", "b", "c"], held_out, scores, names, unscored), 20, 0.95, 0)
    assert [row["reason"] for row in rows[:3]] == list(unscored.values())
    assert rows[3]["auroc"] == 0.5


def test_no_test_image_is_no_fault():
    scores, unscored = floors.fit_scores(np.eye(2), np.array([[1], [0]]), np.zeros((0, 2)), ["f"])
    assert (scores.shape, unscored) == ((0, 1), {})
    scores, _ = floors.site_view_floor(["A", "B"], ["PA", "PA"], np.array([[1], [0]]), [], [], ["f"])
    assert scores.shape == (0, 1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit one another"):
        floors.fit_scores(np.eye(2), np.zeros((2, 3)), np.eye(2), ["f"])
    with pytest.raises(DataError, match="3 rows of labels for 2"):
        floors.permute_by_patient(np.zeros((3, 1)), ["a", "b"], 0)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[np.ndarray, list[str]]:
    patients = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=25))
    labels = draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=2 * len(patients), max_size=2 * len(patients)))
    return np.array(labels, np.int8).reshape(-1, 2), patients


@settings(deadline=None)
@given(cohorts(), st.integers(0, 1000))
def test_each_patient_gets_one_patients_rows_in_their_order(cohort, seed):
    _, patients = cohort
    # number the rows, so that where each came from can be read off
    moved = floors.permute_by_patient(np.arange(len(patients))[:, None], patients, seed, "shuffled")[:, 0]
    donors = []
    for name in sorted(set(patients)):
        own = [row for row, other in enumerate(patients) if other == name]
        (donor,) = {patients[row] for row in moved[own]}
        block = [row for row, other in enumerate(patients) if other == donor]
        assert moved[own].tolist() == [block[index % len(block)] for index in range(len(own))]
        donors.append(donor)
    assert sorted(donors) == sorted(set(patients))


@settings(deadline=None)
@given(cohorts(), st.integers(0, 1000))
def test_shuffling_is_deterministic_and_leaves_its_input(cohort, seed):
    labels, patients = cohort
    before = labels.copy()
    moved = floors.permute_by_patient(labels, patients, seed, "shuffled")
    assert np.array_equal(labels, before)
    assert (moved.shape, moved.dtype) == (labels.shape, labels.dtype)
    assert np.array_equal(moved, floors.permute_by_patient(labels, patients, seed, "shuffled"))


def test_shuffling_keeps_prevalence_and_breaks_the_tie_to_the_image():
    patients = [f"p{index // 2}" for index in range(400)]
    labels = np.repeat(np.random.default_rng(0).integers(-1, 2, 200), 2)[:, None].astype(np.int8)
    moved = floors.permute_by_patient(labels, patients, 0, "shuffled", "A")
    assert Counter(moved[:, 0].tolist()) == Counter(labels[:, 0].tolist())
    known = (labels[:, 0] >= 0) & (moved[:, 0] >= 0)
    assert auroc(labels[known, 0], moved[known, 0].astype(float)) == pytest.approx(0.5, abs=0.12)
    assert not np.array_equal(moved, floors.permute_by_patient(labels, patients, 1, "shuffled", "A"))
