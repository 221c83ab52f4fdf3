"""The tables: reasons where there is no figure, at most four sites abreast, units that a person reads."""

from __future__ import annotations

import pytest

from chexfound.report import tables
from chexfound.report.run import Metrics, Result, Run, read


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (400.9, "6 min 41 s"),
        (3599.6, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations(seconds, said):
    assert tables.duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (48_200_000, "48.2 MB"), (5e12, "5.0 TB")],
)
def test_sizes(count, said):
    assert tables.size(count) == said


def test_four_sites_abreast_and_none_lost():
    sites = [f"s{index}" for index in range(9)]
    rows = [Result(arm="federated", tested_on=site, finding="f", auroc=0.8, auroc_ci=(0.7, 0.9)) for site in sites]
    (finding,) = tables.results(Run(out=None, metrics=Metrics(results=rows)))
    assert [[head["site"] for head in table["sites"]] for table in finding["tables"]] == [
        sites[:4],
        sites[4:8],
        sites[8:],
    ]


def test_a_site_without_figures_is_told_once_and_a_gap_in_its_cell():
    rows = [Result(arm=arm, tested_on="empty", finding="f", reason="no positive") for arm in ("federated", "random")]
    rows += [
        Result(arm="federated", tested_on="a", finding="f", auroc=0.8),
        Result(arm="random", tested_on="a", finding="f", reason="one class in training"),
    ]
    (finding,) = tables.results(Run(out=None, metrics=Metrics(results=rows)))
    assert finding["empty"] == [("empty", "no positive")]
    cells = {line["arm"]: line["cells"] for line in finding["tables"][0]["lines"]}
    assert cells["federated"][0]["auroc"] == "0.800"
    assert cells["random"] == [{"reason": "one class in training"}]


def test_differences_name_each_comparison_once(make_run):
    lines = tables.differences(read(make_run()))
    assert len(lines) == len({(line["finding"], line["site"]) for line in lines}) == 10
    first = lines[0]
    assert first["finding"] == "Pneumonia"
    assert first["pooled"]["ci"].startswith("[")
    assert first["own"]["ci"].startswith("[")
    assert "*" not in first["own"]["words"]
    assert next(line for line in lines if line["site"] == "hannover-mhh")["own"] is None


def test_shares_are_of_the_longest(make_run):
    lines = tables.seconds(read(make_run()))
    assert max(line["share"] for line in lines[:-1]) == 100
    assert (lines[-1]["name"], lines[-1]["share"]) == ("total", None)


def test_flat_names_nested_values():
    assert tables.flat({"a": {"b": 1}, "c": [1, 2]}) == [("a.b", "1"), ("c", "1, 2")]


def test_without_comparisons_a_star_says_how_two_were_told_apart(make_run):
    first = tables.differences(read(make_run(change=lambda metrics: metrics.pop("comparisons"))))[0]
    assert first["own"]["words"].endswith("*")
    assert first["own"]["ci"] == ""
    assert "*" not in first["pooled"]["words"]
