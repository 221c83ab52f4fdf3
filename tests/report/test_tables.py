"""The tables: reasons where there is no figure, at most four sites abreast, units that a person reads."""

from __future__ import annotations

import pytest

from chexfound.evaluate.results import Comparison, Metrics, Result
from chexfound.report import tables
from chexfound.report.run_folder import ReportedRun, read


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
    (finding,) = tables.results(ReportedRun(out=None, metrics=Metrics(results=rows)))
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
    (finding,) = tables.results(ReportedRun(out=None, metrics=Metrics(results=rows)))
    assert finding["empty"] == [("empty", "no positive")]
    cells = {line["arm"]: line["cells"] for line in finding["tables"][0]["lines"]}
    assert cells["federated"][0]["auroc"] == "0.800"
    assert cells["random"] == [{"reason": "one class in training"}]


def test_differences_name_each_comparison_once(make_run):
    found = tables.differences(read(make_run()))
    lines = found["lines"]
    assert list(found["columns"]) == ["pooled", "own", "random"]
    assert len(lines) == len({(line["finding"], line["site"]) for line in lines}) == 10
    assert lines[0]["finding"] == "Pneumonia"
    first = lines[0]["cells"]
    assert first["pooled"]["ci"].startswith("[")
    assert first["own"]["ci"].startswith("[")
    assert "*" not in first["own"]["words"]
    lone = next(line for line in lines if line["site"] == "hannover-mhh")
    assert lone["cells"]["own"] == {"reason": "its training images hold no finding with both classes"}


def test_a_column_of_an_arm_that_was_not_run_is_left_out(make_run):
    def no_random(metrics):
        for rows, key in (("results", "arm"), ("comparisons", "second")):
            metrics[rows] = [row for row in metrics[rows] if row[key] != "random" and "local:" not in row[key]]

    assert list(tables.differences(read(make_run(change=no_random)))["columns"]) == ["pooled"]


def test_a_difference_without_an_interval_cannot_be_judged():
    rows = [Result(arm=arm, tested_on="a", finding="f", auroc=0.8) for arm in ("federated", "random")]
    pair = {"first": "federated", "second": "random", "finding": "f", "tested_on": "a", "difference": 0.2}
    reason = "no interval: all positives are of one patient"
    metrics = Metrics(results=rows, comparisons=[Comparison(**pair, reason=reason)])
    (line,) = tables.differences(ReportedRun(out=None, metrics=metrics))["lines"]
    assert line["cells"]["random"]["words"] == "cannot be judged (all positives are of one patient)"
    assert line["cells"]["random"]["verdict"] == "unjudged"


def test_phases_stand_below_their_arm():
    seconds = {"federated/pretrain": 10, "federated/adapt": 5, "ingest": 1, "federated": 20, "random@1": 3, "total": 24}
    run = ReportedRun(out=None, metrics=Metrics(results=[], seconds=seconds))
    lines = tables.seconds(run)
    assert [(line["name"], line["part"]) for line in lines] == [
        ("ingest", False),
        ("Federated", False),
        ("pretrain", True),
        ("adapt", True),
        ("Random weights, seed 1", False),
        ("total", False),
    ]
    assert max(line["share"] for line in lines[:-1]) == 100
    assert lines[-1]["share"] is None
    assert not tables.side_by_side(run)


def test_phases_without_their_arm_stand_alone_and_arms_side_by_side_are_told():
    deployed = ReportedRun(out=None, metrics=Metrics(results=[], seconds={"federated/pretrain": 10}))
    assert [(line["name"], line["part"]) for line in tables.seconds(deployed)] == [("Federated: pretrain", False)]
    beside = {"centralized": 9, "local:a": 8, "total": 10}
    assert tables.side_by_side(ReportedRun(out=None, metrics=Metrics(results=[], seconds=beside)))


def test_what_was_left_out_names_findings_and_sites():
    untrained = "not trained: b has not both classes among its training images"
    rows = [
        Result(arm=arm, tested_on=site, finding=finding, auroc=0.8)
        for arm in ("federated", "local:b")
        for site in ("a", "b")
        for finding in ("one",)
    ]
    rows += [Result(arm="federated", tested_on="a", finding="two_x", auroc=0.8)]
    rows += [Result(arm="local:b", tested_on="a", finding="two_x", reason=untrained)]
    rows += [Result(arm=arm, tested_on="b", finding="two_x", reason="no positive") for arm in ("federated", "local:b")]
    assert tables.left_out(ReportedRun(out=None, metrics=Metrics(results=rows))) == [
        ("Local: b", f"has no figure for two x: {untrained}"),
        ("b", "has no figure for two x: no positive"),
    ]


def test_flat_names_nested_values():
    assert tables.flat({"a": {"b": 1}, "c": [1, 2]}) == [("a.b", "1"), ("c", "1, 2")]


def test_without_comparisons_a_star_says_how_two_were_told_apart(make_run):
    first = tables.differences(read(make_run(change=lambda metrics: metrics.pop("comparisons"))))["lines"][0]["cells"]
    assert first["own"]["words"].endswith("*")
    assert first["own"]["ci"] == ""
    assert "*" not in first["pooled"]["words"]
