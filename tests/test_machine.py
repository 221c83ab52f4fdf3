from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import pytest

from chexfound.machine import benchmark_line


def test_a_line_says_what_where_and_when():
    record = json.loads(benchmark_line("x", ("numpy", "no-such-distribution"), ours=1.5))
    assert list(record) == ["name", "ours", "machine", "versions", "date"]
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["cpu"]
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["numpy"][0].isdigit()
    assert record["versions"]["no-such-distribution"] == "not installed"
    age = datetime.date.today() - datetime.date.fromisoformat(record["date"])
    assert age in (datetime.timedelta(0), datetime.timedelta(days=1))
    with pytest.raises(ValueError, match="not JSON compliant"):
        benchmark_line("x", (), ours=float("nan"))


def test_a_line_names_no_host_and_no_path(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "ward-7-pc")
    text = benchmark_line("x", ("numpy",))
    assert "ward-7-pc" not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
