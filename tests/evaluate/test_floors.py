from __future__ import annotations

from collections import Counter
from dataclasses import replace

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


def images(levels: np.ndarray, labels: np.ndarray, seed: int = 0, site: str = "A") -> floors.FloorImages:
    """Images (n) around a grey level each, of a patient each; labels (n,)."""
    return floors.FloorImages(
        patients=[f"{site}/{seed}-{row}" for row in range(len(levels))],
        features=floors.histogram_features(pictures(levels, seed)),
        labels=labels[:, None],
    )


def reached(scores: Scores) -> float:
    return auroc(scores.labels[:, 0], scores.scores[:, 0])


HALF = np.arange(80) % 2


def brighter(by: int, seed: int, site: str = "A") -> floors.FloorImages:
    """80 images of which the positives are brighter by so many grey levels."""
    return images(110 + by * HALF, HALF, seed, site)


def darker(seed: int, site: str = "A") -> floors.FloorImages:
    """As `brighter(30, …)`, the labels turned round."""
    one = brighter(30, seed, site)
    return replace(one, labels=1 - one.labels)


def test_histogram_floor_finds_brightness_and_no_place():
    train, val, test = ({"A": brighter(30, seed)} for seed in (0, 1, 2))
    found = floors.histogram_floors(train, val, test, ["Edema"], 0)
    assert list(found) == ["histogram", *(f"histogram:{name}" for name in floors.VARIANTS)]
    assert all(reached(by_site["A"]) > 0.95 for by_site in found.values())
    assert all((by_site["A"].scores.dtype, by_site["A"].unscored) == (np.float32, {}) for by_site in found.values())
    moved = np.random.default_rng(0).permuted(pictures(110 + 30 * HALF, 2).reshape(80, -1), axis=1).reshape(80, 16, 16)
    assert np.array_equal(floors.histogram_features(moved), test["A"].features)
    # anatomy alone, here which half is bright, is invisible to it
    sides = np.where((np.arange(16) < 8) == HALF[:, None, None], 160, 90).repeat(16, axis=1).astype(np.uint8)
    features = floors.histogram_features(sides)
    scores, _ = floors.fit_scores(features, HALF[:, None], features, ["Edema"])
    assert auroc(HALF, scores[:, 0]) == pytest.approx(0.5, abs=1e-6)


def middling(seed: int, site: str = "A") -> floors.FloorImages:
    """90 images, of which those with about half of their pixels bright are positive: no line tells them apart."""
    kind = np.arange(90) % 3
    bright = np.random.default_rng(seed).random((90, 16, 16)) < (0.1 + 0.4 * kind)[:, None, None]
    return floors.FloorImages(
        patients=[f"{site}/{seed}-{row}" for row in range(90)],
        features=floors.histogram_features(np.where(bright, 180, 60).astype(np.uint8)),
        labels=(kind == 1).astype(int)[:, None],
    )


def test_each_site_has_the_variant_that_its_validation_patients_choose():
    """A: no line tells; B: brighter, C: darker with the finding, which all sites together cannot know."""
    train, val, test = (
        {"A": middling(seed), "B": brighter(30, seed + 10, "B"), "C": darker(seed + 20, "C")} for seed in (0, 1, 2)
    )
    found = floors.histogram_floors(train, val, test, ["Edema"], 0)
    best = {site: found["histogram"][site] for site in train}
    assert best["A"].variants == {"Edema": "boosted"}
    assert {best[site].variants["Edema"] for site in "BC"} <= set(floors.OWN)
    for site, scores in best.items():
        variant = scores.variants["Edema"]
        assert np.array_equal(scores.scores, found[f"histogram:{variant}"][site].scores)
        assert scores.validation["Edema"] == max(
            found[f"histogram:{name}"][site].validation["Edema"] for name in floors.VARIANTS
        )
        assert reached(scores) > 0.9
    assert min(reached(found["histogram:pooled"][site]) for site in "BC") < 0.6


def test_the_pooled_variant_is_chosen_where_it_is_the_better_one():
    """A has four training images, whose brightness says the opposite of what it says in all others."""
    train = {"A": images(np.array([140, 110, 140, 110]), np.array([0, 1, 0, 1])), "B": brighter(30, 1, "B")}
    val, test = ({site: brighter(30, seed, site) for site in "AB"} for seed in (2, 3))
    found = floors.histogram_floors(train, val, test, ["Edema"], 0)["histogram"]
    assert found["A"].variants["Edema"] in floors.POOLED
    assert reached(found["A"]) > 0.95


def test_nothing_of_a_test_image_enters_the_fit_or_the_choice():
    """The test images say the opposite of training and validation, and all sites together say as they do."""
    train = {"A": brighter(30, 0), "B": images(110 - 30 * (np.arange(400) % 2), np.arange(400) % 2, 1, "B")}
    val = {"A": brighter(30, 2), "B": brighter(-30, 3, "B")}
    test = {"A": brighter(-30, 4), "B": brighter(-30, 5, "B")}
    found = floors.histogram_floors(train, val, test, ["Edema"], 0)
    assert reached(found["histogram:pooled"]["A"]) > 0.95
    assert found["histogram"]["A"].variants["Edema"] in floors.OWN
    assert reached(found["histogram"]["A"]) < 0.05
    turned = {site: replace(one, labels=1 - one.labels) for site, one in test.items()}
    again = floors.histogram_floors(train, val, turned, ["Edema"], 0)
    for arm, by_site in found.items():
        for site, scores in by_site.items():
            assert np.array_equal(scores.scores, again[arm][site].scores)
            assert (scores.variants, scores.validation) == (again[arm][site].variants, again[arm][site].validation)


@pytest.mark.parametrize("label", [1, -1, None], ids=["one class", "unknown", "empty"])
def test_without_validation_the_first_that_could_be_fitted_is_taken(label):
    one = brighter(30, 1)
    none = images(np.zeros(0, int), np.zeros(0, int)) if label is None else replace(one, labels=one.labels * 0 + label)
    known, alike = brighter(30, 0), images(110 + 0 * HALF, HALF * 0, 5, "B")
    found = floors.histogram_floors(
        {"A": known, "B": alike}, {"A": none, "B": none}, {"A": one, "B": one}, ["Edema"], 0
    )
    assert [found["histogram"][site].variants["Edema"] for site in "AB"] == ["linear", "pooled"]
    assert [found["histogram"][site].validation for site in "AB"] == [{}, {}]
    assert found["histogram:linear"]["B"].unscored == {"Edema": "no positive among the 80 training images"}
    assert found["histogram"]["B"].unscored == {}


def test_a_finding_that_no_site_can_fit_has_no_floor():
    one = {"A": images(110 + 0 * HALF, HALF * 0 + 1)}
    (scores,) = floors.histogram_floors(one, one, one, ["Edema"], 0)["histogram"].values()
    assert (scores.variants, scores.unscored) == ({}, {"Edema": "no negative among the 80 training images"})


def test_boosted_trees_repeat_to_the_bit_and_take_two_images():
    train, val, test = ({"A": middling(seed)} for seed in (0, 1, 2))
    first, again = (floors.histogram_floors(train, val, test, ["Edema"], 7) for _ in range(2))
    assert np.array_equal(first["histogram:boosted"]["A"].scores, again["histogram:boosted"]["A"].scores)
    scores, unscored = floors.fit_scores(np.eye(2), np.array([[1], [0]]), np.eye(2), ["Edema"], floors.boosted(0))
    assert (unscored, np.isfinite(scores).all()) == ({}, True)


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
