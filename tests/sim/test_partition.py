from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.store.index import Image
from chexfound.data.store.reader import Store
from chexfound.errors import ConfigError
from sim.partition import MIN_PATIENTS, partition

Row = tuple[str, str, str, str]  # source, patient, site, findings divided by |


def make_store(rows: list[Row]) -> Store:
    rows = sorted(rows)
    images = [Image(source=row[0], patient=row[1], site=row[2], file=str(n)) for n, row in enumerate(rows)]
    listed = [set(row[3].split("|")) - {""} for row in rows]
    findings = set().union(*listed)
    labels = {name: np.array([1 if name in found else 0 for found in listed], np.int8) for name in findings}
    return Store(Path("memory"), 8, images, labels, [], key_id="")


def of_sizes(**sizes: int) -> Store:
    return make_store([(source, f"p{n:03}", "", "") for source, size in sizes.items() for n in range(size)])


def sizes(store: Store, by: str, seed: int = 0) -> dict[str, int]:
    return {name: len(patients) for name, patients in partition(store, by, seed).sites.items()}


class TestBySourceAndSite:
    def test_by_source(self):
        store = of_sizes(b=9, a=8)
        sites, notes = partition(store, "source", 0)
        assert list(sites) == ["a", "b"]
        assert sites["a"] == [f"a/p{n:03}" for n in range(8)]
        assert notes == []

    def test_by_site_and_source_where_none_is_named(self):
        rows = [("s", f"p{n}", "Ulm" if n < 9 else "", "") for n in range(20)]
        assert sizes(make_store(rows), "site") == {"Ulm": 9, "s": 11}

    def test_a_patient_goes_where_most_of_its_images_are(self):
        crowd = [("s", f"{site}{n}", site, "") for site in ("Aachen", "Bonn") for n in range(8)]
        torn = [("s", "x", "Bonn", ""), ("s", "x", "Bonn", ""), ("s", "x", "Aachen", "")]
        tied = [("s", "y", "Bonn", ""), ("s", "y", "Aachen", "")]
        found = partition(make_store(crowd + torn + tied), "site", 0).sites
        assert "s/x" in found["Bonn"]
        assert "s/y" in found["Aachen"]

    def test_same_number_at_two_sources_is_two_patients(self):
        assert sum(sizes(of_sizes(a=10, b=10), "source").values()) == 20


class TestMerging:
    def test_small_ones_become_other(self):
        sites, notes = partition(of_sizes(a=20, b=7, c=5), "source", 0)
        assert {name: len(patients) for name, patients in sites.items()} == {"a": 20, "other": 12}
        assert notes == ["fewer than 8 patients: b (7), c (5); merged into other"]

    def test_small_other_goes_to_the_smallest(self):
        sites, notes = partition(of_sizes(a=20, b=9, d=9, c=5), "source", 0)
        assert {name: len(patients) for name, patients in sites.items()} == {"a": 20, "b": 14, "d": 9}
        assert notes == [
            "fewer than 8 patients: c (5); merged into b, the smallest other site: together they are still fewer"
        ]

    def test_a_site_that_is_called_other(self):
        assert sizes(of_sizes(a=20, other=9, c=5), "source") == {"a": 20, "other": 14}

    def test_all_small(self):
        sites, notes = partition(of_sizes(a=4, b=5), "source", 0)
        assert list(sites) == ["other"]
        assert notes[-1] == "all patients are now at one site, other: give more patients, or another --by"

    def test_a_lone_small_source_keeps_its_name(self):
        assert sizes(of_sizes(a=4), "source") == {"a": 4}

    def test_long_notes_are_cut(self):
        notes = partition(of_sizes(big=9, **{f"s{n:02}": 1 for n in range(30)}), "source", 0).notes
        assert notes[0].endswith("s11 (1) and 18 more; merged into other")

    def test_shards_too(self):
        assert sizes(of_sizes(a=31), "iid:4") == {"shard-0": 15, "shard-1": 8, "shard-2": 8}


@st.composite
def stores(draw) -> Store:
    names = st.sampled_from(["", "A", "B", "A|C"])
    row = st.tuples(st.sampled_from("ab"), st.integers(0, 40).map(str), st.sampled_from(["", "x", "y"]), names)
    return make_store(draw(st.lists(row, min_size=12, max_size=60)))


class TestAlways:
    @given(stores(), st.sampled_from(["source", "site", "iid:2", "dirichlet:2:0.3", "iid:1"]), st.integers(0, 9))
    def test_disjoint_complete_sorted_repeatable(self, store, by, seed):
        if len(set(store.keys)) < 2:
            return
        sites, _ = partition(store, by, seed)
        dealt = [patient for patients in sites.values() for patient in patients]
        assert sorted(dealt) == sorted(set(store.keys))
        assert all(patients == sorted(patients) for patients in sites.values())
        assert list(sites) == sorted(sites)
        assert len(sites) == 1 or all(len(patients) >= MIN_PATIENTS for patients in sites.values())
        assert partition(store, by, seed).sites == sites

    @pytest.mark.parametrize("by", ["iid:3", "dirichlet:3:1"])
    def test_seed_matters(self, by):
        store = make_store([("a", f"p{n}", "", "A" if n % 2 else "") for n in range(60)])
        assert partition(store, by, 0).sites != partition(store, by, 1).sites


class TestLots:
    def test_iid_is_even(self):
        assert sizes(of_sizes(a=50, b=51), "iid:4") == {
            "shard-0": 26,
            "shard-1": 25,
            "shard-2": 25,
            "shard-3": 25,
        }

    def share_of_commonest(self, alpha: float) -> float:
        store = make_store([("a", f"p{n:03}", "", f"F{n % 4}") for n in range(400)])
        finding = {key: n % 4 for n, key in enumerate(store.keys)}
        shards = partition(store, f"dirichlet:4:{alpha}", 0).sites.values()
        assert [len(patients) for patients in shards] == [100] * 4
        return float(np.mean([Counter(finding[p] for p in patients).most_common(1)[0][1] / 100 for patients in shards]))

    def test_alpha_sets_how_far_the_mixtures_differ(self):
        assert self.share_of_commonest(0.05) > 0.7
        assert self.share_of_commonest(1000) < 0.36

    def test_a_patient_counts_by_its_first_positive(self):
        # One class would be dealt as in a shuffle; with alpha near 0 each shard is (nearly) of one class.
        rows = [
            ("a", f"p{n:02}", "", findings) for n in range(20) for findings in (("", "B|A") if n < 10 else ("B", ""))
        ]
        sites = partition(make_store(rows), "dirichlet:2:0.00001", 3).sites
        assert sorted(sites.values()) == [
            [f"a/p{n:02}" for n in range(10)],
            [f"a/p{n:02}" for n in range(10, 20)],
        ]


class TestErrors:
    @pytest.mark.parametrize(
        ("by", "message"),
        [
            ("sorce", "--by 'sorce': did you mean 'source'"),
            ("sites", "--by 'sites': did you mean 'site'"),
            ("iid", "did you mean 'iid:4'"),
            ("iid:4:2", "did you mean 'iid:4'"),
            ("dirichlet:4", "did you mean 'dirichlet:4:0.5'"),
            ("hospital?", "write source, site, iid:N or dirichlet:N:ALPHA"),
            ("", "write source, site, iid:N or dirichlet:N:ALPHA"),
            ("iid:x", "'x' is not a number of sites"),
            ("iid:0", r"there must be at least 1 site \(got 0\)"),
            ("dirichlet:-2:1", r"there must be at least 1 site \(got -2\)"),
            ("dirichlet:2:0", r"ALPHA must be a number above 0 \(got '0'\)"),
            ("dirichlet:2:nan", "ALPHA must be a number above 0"),
            ("dirichlet:2:much", "ALPHA must be a number above 0"),
            ("iid:21", "20 patients cannot fill 21 sites: some would be empty; ask for fewer"),
            ("dirichlet:21:1", "20 patients cannot fill 21 sites"),
        ],
    )
    def test_message(self, by, message):
        with pytest.raises(ConfigError, match=message):
            partition(of_sizes(a=20), by, 0)


def test_real_sources(require, tmp_path):
    from chexfound.data.intake.walk import find

    entries = find(require("shared") / "data" / "cxr").entries
    images = [entry.image for entry in entries]
    store = Store(tmp_path, 8, images, {}, [], key_id="")
    assert sizes(store, "source") == {
        "covid-chestxray": 94,
        "guangzhou-pediatric": 389,
        "hannover-mhh": 56,
        "nih-chestxray14": 478,
    }
    assert sum(sizes(store, "site").values()) == 94 + 389 + 56 + 478
