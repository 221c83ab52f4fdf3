from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chexfound.evaluate.areas import auroc
from chexfound.model.checkpoint import digest
from chexfound.pretrain.health import measures
from chexfound.pretrain.health.probe import Probe
from chexfound.pretrain.train import Pretrainer


def test_entropy_of_known_assignments():
    uniform, sure = torch.full((3, 8), 1 / 8), torch.eye(8)[:3]
    half = torch.tensor([[0.5, 0.5, 0, 0]])
    assert measures.mean_entropy(uniform).item() == pytest.approx(math.log(8))
    assert measures.mean_entropy(sure).item() == 0.0
    assert measures.mean_entropy(half).item() == pytest.approx(math.log(2))


def test_prototypes_in_use():
    sure = torch.eye(8)
    one = torch.eye(8)[[3, 3, 3, 3]]
    assert measures.perplexity_share(sure).item() == pytest.approx(1.0)
    assert measures.perplexity_share(one).item() == pytest.approx(1 / 8)
    assert measures.perplexity_share(torch.eye(8)[[0, 1, 0, 1]]).item() == pytest.approx(2 / 8)
    assert (measures.usage(sure).item(), measures.usage(one).item()) == (1.0, 0.25)


def test_spread_of_features():
    corners = torch.cat([torch.eye(4), -torch.eye(4)])  # mean 0, each channel ±1 twice of 8: std 1/2
    assert measures.feature_std(corners).item() == pytest.approx(1.0)
    assert measures.feature_std(torch.ones(5, 4)).item() == pytest.approx(0.0, abs=1e-6)
    assert measures.feature_std(7 * corners).item() == pytest.approx(1.0)  # lengths do not matter


def test_effective_rank():
    assert measures.rankme(torch.eye(6)) == pytest.approx(6.0, rel=1e-5)
    assert measures.rankme(torch.ones(9, 6)) == pytest.approx(1.0, rel=1e-4)
    assert measures.rankme(torch.zeros(9, 6)) == 1.0
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measures.rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-5)


@given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 10**6))
def test_figures_keep_their_bounds(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.softmax(5 * torch.randn(n, k, generator=generator), -1)
    told = measures.figures(targets, torch.randn(n, 7, generator=generator))
    row = {name: value.item() for name, value in told.items()} | {"log_k": math.log(k)}
    assert measures.problem(row) is None
    assert 1.0 <= measures.rankme(torch.randn(n, k, generator=generator)) <= min(n, k) + 1e-6


def clusters(n=60, patients=20):
    labels = torch.arange(n) % 2
    features = torch.randn(n, 5, generator=torch.Generator().manual_seed(0)) * 0.1
    features[:, 0] += 2.0 * labels - 1
    return features, labels, [f"p{number % patients}" for number in range(n)]


def test_neighbours_tell_clusters_apart():
    features, labels, patients = clusters()
    scores = measures.knn_scores(features, labels, patients)
    assert scores[labels == 1].min() > 0.99
    assert scores[labels == 0].max() < 0.01
    shuffled = labels[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    noise = measures.knn_scores(torch.randn(60, 5, generator=torch.Generator().manual_seed(2)), shuffled, patients)
    assert 0.2 < noise.mean() < 0.8


def test_on_few_images_that_look_alike_noise_scores_chance():
    labels, patients = torch.arange(40) % 2, [str(number) for number in range(40)]
    scored = [
        auroc(labels.numpy(), measures.knn_scores(5 + torch.randn(40, 16, generator=generator), labels, patients))
        for generator in (torch.Generator().manual_seed(seed) for seed in range(100))
    ]
    assert np.mean(scored) == pytest.approx(0.5, abs=0.03)  # with 20 neighbours: 0.39


def test_a_patient_s_own_images_have_no_vote():
    features, labels, _ = clusters(n=6, patients=2)
    features[:] = torch.eye(6, 5)
    features[1] = features[0]  # the nearest image to 0 is 1, of the same patient and positive
    labels = torch.tensor([1, 1, 0, 0, 0, 0])
    own = measures.knn_scores(features, labels, ["a", "a", "b", "b", "c", "c"], k=1)
    other = measures.knn_scores(features, labels, list("abcdef"), k=1)
    assert (own[0], other[0]) == (0.0, 1.0)


def test_unknown_labels_do_not_vote():
    features = torch.eye(3)[[0, 0, 1]]
    scores = measures.knn_scores(features, torch.tensor([0, -1, 1]), list("abc"), k=1)
    assert scores[0] == 1.0  # the only other voter is positive


@pytest.fixture
def site(images):
    pixels = np.concatenate([images] * 3)
    labels = (np.arange(30) % 2).astype(np.int8)[:, None]
    return pixels, labels, [f"p{number}" for number in range(30)]


def probe(site, every=2, limit=30, fewest=5, **changed):
    pixels, labels, patients = (
        changed.get(name, value) for name, value in zip(("pixels", "labels", "patients"), site, strict=True)
    )
    given = dict(every=every, limit=limit, fewest=fewest, seed=0, roster_index=0)
    return Probe(lambda places: pixels[places], labels, patients, **given)


def test_a_probe_leaves_training_as_it_is(small, site):
    recipe = small(student__drop_path_rate=0.3)
    plain, watched = (Pretrainer(recipe, lambda places: site[0][places], 30, 0) for _ in range(2))
    rows = plain.run(0, 4, 4)
    seen = watched.run(0, 4, 4, None, probe(site))
    assert digest(plain.state()) == digest(watched.state())
    assert [sorted(set(row) - set(rows[0])) for row in seen] == [
        [],
        list(told := ["knn_auroc", "probe_images", "rankme"]),
        [],
        told,
    ]
    assert all(
        {name: value for name, value in row.items() if name in rows[0]} == plain_row
        for row, plain_row in zip(seen, rows, strict=True)
    )
    assert 1 <= seen[1]["rankme"] <= 24


def test_a_probe_tells_nothing_of_a_few(small, site):
    model = Pretrainer(small(), lambda places: site[0][places], 30, 0).model.teacher["backbone"]
    assert set(probe(site)(model, 1)) == {"probe_images", "rankme", "knn_auroc"}
    assert probe(site)(model, 0) == {}
    assert probe(site, limit=19)(model, 1) == {}
    assert probe(site, patients=["a", "b", "c", "d"] * 7 + ["a", "b"])(model, 1) == {}
    rare = np.zeros((30, 1), np.int8)
    rare[:4] = 1
    assert set(probe(site, labels=rare)(model, 1)) == {"probe_images", "rankme"}  # four patients with the finding
    assert set(probe(site, labels=np.full((30, 1), -1, np.int8))(model, 1)) == {"probe_images", "rankme"}


def test_a_probe_tells_nothing_of_fewer_patients_than_the_site_allows(small, site):
    model = Pretrainer(small(), lambda places: site[0][places], 30, 0).model.teacher["backbone"]
    assert set(probe(site, fewest=15)(model, 1)) == {"probe_images", "rankme", "knn_auroc"}  # 15 with, 15 without
    assert set(probe(site, fewest=16)(model, 1)) == {"probe_images", "rankme"}
    assert probe(site, fewest=31)(model, 1) == {}


@given(st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30), st.floats(0.5, 12))
def test_what_is_told_has_four_digits(figure, log_k):
    (row,) = measures.told([{"step": 123_456, "log_k": log_k, "probe_images": 98_765, "rankme": figure}])
    assert (row["step"], row["log_k"], row["probe_images"]) == (123_456, log_k, 98_765)
    assert abs(row["rankme"] - figure) <= 5.1e-4 * abs(figure)
    assert len(f"{row['rankme']:e}".split("e")[0].strip("-").replace(".", "").rstrip("0")) <= 4


@given(st.floats(0, 1), st.sampled_from([2, 256, 65_536, 131_072]))
def test_what_can_be_can_be_told(share, k):
    """Rounded up, a figure at its bound is not taken for one that cannot be."""
    row = {"step": 0, "log_k": math.log(k), "teacher_entropy": share * math.log(k), "prototype_usage": share}
    assert measures.problem(measures.told([row])[0]) is None
