"""The benchmarks that stand on a finished simulation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_backbone_probe_reads_a_run(one_worker: Any) -> None:
    spec = importlib.util.spec_from_file_location("backbone_probe", BENCHMARKS / "backbone_probe.py")
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    rows = list(probe.measure(one_worker.out, "Blob"))
    arms = {row["arm"] for row in rows}
    assert {"random weights", "federated", "centralized"} <= arms
    assert "random" not in arms
    assert {row["tested_on"] for row in rows} <= {"alpha", "beta"}  # gamma labels no Blob
    assert all(0 <= row["auroc"] <= 1 and row["n"] for row in rows)
