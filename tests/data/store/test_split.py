from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.errors import ConfigError, DataError
from chexfound.recipe.schema import Recipe, Split

HALF = Split(train=0.5, val=0.25)
USUAL = Split(train=0.6, val=0.15)
PARTS = ("train", "val", "test")


@pytest.fixture
def store(tmp_path: Path, make_manifest) -> Store:
    rows = [{"file": f"{s}{n}.png", "source": s, "patient_id": f"p{n // 2}"} for s in "ab" for n in range(24)]
    ingest(make_manifest(tmp_path / "in", rows), tmp_path / "store", 16)
    return Store.open(tmp_path / "store")


KEYS = st.binary(min_size=32, max_size=32)


def simulated(seed: int, fractions: Split = HALF) -> Membership:
    return Membership.simulated(seed, fractions)


@given(KEYS, st.text(max_size=8))
def test_a_part_is_a_function_of_key_and_patient(key, patient):
    assert Membership(key=key, fractions=HALF).part(patient) == Membership(key=key, fractions=HALF).part(patient)
    assert Membership(key=key, fractions=HALF).part(patient) in PARTS


def test_known_values_of_a_simulation():
    # Golden: another value here moves every patient of every simulation's split.
    found = [simulated(0, USUAL).part(f"patient-{n}") for n in range(12)]
    assert " ".join(found) == "train train train train train train train test train train val val"


@given(KEYS)
@settings(max_examples=20)
def test_the_fractions_are_hit(key):
    parts = [Membership(key=key, fractions=USUAL).part(f"p{n}") for n in range(10_000)]
    # Five standard deviations of a fraction of a half, the widest.
    assert [parts.count(part) / len(parts) for part in PARTS] == pytest.approx([0.6, 0.15, 0.25], abs=0.025)


@given(KEYS, KEYS)
@settings(max_examples=20)
def test_who_knows_one_key_s_parts_knows_nothing_of_another_s(key, other):
    """Of those that train by the one, the other's fractions train, validate and test."""
    assume(key != other)
    one, second = (Membership(key=k, fractions=USUAL) for k in (key, other))
    parts = [second.part(name) for name in (f"p{n}" for n in range(10_000)) if one.part(name) == "train"]
    assert [parts.count(part) / len(parts) for part in PARTS] == pytest.approx([0.6, 0.15, 0.25], abs=0.035)


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_hospital_s_key_and_fractions_leave_a_recipe_no_say(seed, other):
    recipes = [replace(Recipe(), seed=n, split=Split(train=0.1 + n / 200, val=0.1)) for n in (seed, other)]
    first, second = (Membership.of(recipe, bytes(32), USUAL) for recipe in recipes)
    assert first == second
    assert (Membership.of(recipes[0]) == Membership.of(recipes[1])) == (seed == other)


def test_patients_who_come_later_move_nobody(store, tmp_path, make_manifest):
    before = {part: {store.keys[i] for i in View.of(store, "x").split(simulated(0), part)} for part in PARTS}
    ingest(
        make_manifest(
            tmp_path / "more", [{"file": f"n{n}.png", "source": "c", "patient_id": f"n{n}"} for n in range(9)]
        ),
        tmp_path / "store",
        16,
    )
    after = Store.open(tmp_path / "store")
    assert len(after) > len(store)
    for part in PARTS:
        now = {after.keys[i] for i in View.of(after, "x").split(simulated(0), part)}
        assert {key for key in now if key in set(store.keys)} == before[part]


def test_more_training_only_moves_patients_into_training():
    small, large = (simulated(0, Split(train=train, val=0.2)) for train in (0.3, 0.5))
    names = [f"p{n}" for n in range(500)]
    moved = {(small.part(name), large.part(name)) for name in names}
    assert ("train", "val") not in moved
    assert ("train", "test") not in moved


def test_parts_are_disjoint_complete_and_by_patient(store):
    view = View.of(store, "all")
    parts = [view.split(simulated(1), part) for part in PARTS]
    assert np.array_equal(np.sort(np.concatenate(parts)), store.ids)
    patients = [{store.keys[image] for image in ids} for ids in parts]
    assert sum(map(len, patients)) == len(set().union(*patients))
    assert all((np.diff(ids) > 0).all() for ids in parts)


def test_a_patient_falls_alike_at_both_sources(store):
    train = View.of(store, "all").split(simulated(1), "train")
    of = {source: {store.patients[i] for i in train if store.sources[i] == source} for source in "ab"}
    assert of["a"] == of["b"] != set()


def test_view_of_patients(store):
    view = View.of(store, "site", ["b/p3", "a/p0"])
    assert view.patients == ["a/p0", "a/p0", "b/p3", "b/p3"]
    assert len(view) == 4
    assert not view.ids.flags.writeable
    whole = View.of(store, "all")
    for part in PARTS:  # a site's split does not depend on who else is there
        assert set(view.split(simulated(0), part)) <= set(whole.split(simulated(0), part))


def test_view_of_unknown_patients(store):
    with pytest.raises(DataError, match=r"site 'x': 2 patients are not in .*store, such as 'a/p99'"):
        View.of(store, "x", ["a/p0", "a/p99", "c/p0"])
    with pytest.raises(DataError, match="site 'x': no patients"):
        View.of(store, "x", [])


def test_unknown_part(store):
    with pytest.raises(ConfigError, match="split 'dev': must be one of train, val, test"):
        View.of(store, "x").split(simulated(0), "dev")


@pytest.fixture
def mixed(tmp_path: Path, make_manifest) -> Store:
    """Source a gives train and test; b nothing; c a split for each third patient, on one of its two images."""

    def stated(source: str, n: int) -> str:
        if source == "a":
            return "train" if n < 12 else "test"
        return "test" if source == "c" and n % 6 == 0 else ""

    rows = [
        {"file": f"{s}{n}.png", "source": s, "patient_id": f"{s}{n // 2}", "split": stated(s, n)}
        for s in "abc"
        for n in range(24)
    ]
    ingest(make_manifest(tmp_path / "in", rows), tmp_path / "store", 16)
    return Store.open(tmp_path / "store")


def test_a_given_split_is_kept_patient_by_patient(mixed):
    parts = {
        key: part for part in PARTS for key in (mixed.keys[i] for i in View.of(mixed, "x").split(simulated(0), part))
    }
    for n in range(12):
        assert parts[f"a/a{n}"] == ("train" if n < 6 else "test")
        assert parts[f"b/b{n}"] == simulated(0).part(f"b{n}")
        assert parts[f"c/c{n}"] == ("test" if n % 3 == 0 else simulated(0).part(f"c{n}"))


def test_a_given_split_is_of_the_source_that_gives_it(tmp_path, make_manifest):
    """A number that two sources have may be two people: the one's part is given, the other's is drawn."""
    rows = [
        {"file": f"{s}{n}.png", "source": s, "patient_id": f"p{n}", "split": "test" if s == "a" else ""}
        for s in "ab"
        for n in range(12)
    ]
    ingest(make_manifest(tmp_path / "in", rows), tmp_path / "store", 16)
    store = Store.open(tmp_path / "store")
    tested = {store.keys[image] for image in View.of(store, "x").split(simulated(0), "test")}
    drawn = {f"b/p{n}" for n in range(12) if simulated(0).part(f"p{n}") == "test"}
    assert tested == {f"a/p{n}" for n in range(12)} | drawn
    assert 0 < len(drawn) < 12


@given(st.integers(0, 99), st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_pooled_parts_are_the_sites_together_however_dealt(mixed, seed, sites):
    """What one site tests on, no arm may train on."""
    keys = sorted(set(mixed.keys))
    dealt = np.array_split(np.array(keys, object), sites)  # with 3: by source
    views = [View.of(mixed, "site", patients) for patients in dealt]
    for part in PARTS:
        of_sites = np.sort(np.concatenate([view.split(simulated(seed), part) for view in views]))
        assert View.of(mixed, "all").split(simulated(seed), part).tolist() == of_sites.tolist()


def test_a_manifest_s_own_split_wins(tmp_path, make_manifest):
    rows = [{"file": f"{n}.png", "patient_id": f"p{n}", "split": PARTS[n % 3]} for n in range(9)]
    ingest(make_manifest(tmp_path / "in", rows), tmp_path / "store", 16)
    view = View.of(Store.open(tmp_path / "store"), "all")
    assert [view.split(simulated(0), part).tolist() for part in PARTS] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
