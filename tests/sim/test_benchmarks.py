"""The benchmarks that stand on a finished simulation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from chexfound.data.store.reader import Store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_backbone_probe_reads_a_run(one_worker: Any) -> None:
    probe = module("backbone_probe")
    rows = list(probe.measure(one_worker.out, "Blob"))
    arms = {row["arm"] for row in rows}
    assert {"random weights", "federated", "centralized"} <= arms
    assert "random" not in arms
    assert {row["tested_on"] for row in rows} <= {"alpha", "beta"}  # gamma labels no Blob
    assert all(0 <= row["auroc"] <= 1 and row["n"] for row in rows)


def test_the_grey_level_floor_is_that_of_a_run(one_worker: Any) -> None:
    rows = list(module("histogram_floor").measure(Store.open(one_worker.out / "store"), "source", "Blob", [0, 1]))
    found = {(row["seed"], row["tested_on"]): row for row in rows}
    metrics = one_worker.metrics
    for one in (metrics, *metrics["replicates"]):
        for row in one["results"]:
            if row["finding"] == "Blob" and row["arm"] == "histogram" and row["auroc"] is not None:
                told = found.pop((one["seed"], row["tested_on"]))
                keys = ("auroc", "variant", "validation_auroc", "n", "positives")
                assert [told[key] for key in keys] == [row[key] for key in keys]
                assert told["variants"][told["variant"]] == told["auroc"]
    assert rows
    assert not found
