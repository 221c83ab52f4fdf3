from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_a_line_says_how_fast_each_guard_is() -> None:
    """Against itself, so that it needs no other commit: both figures are of the same order then."""
    command = [sys.executable, ROOT / "benchmarks" / "guard.py", "--worktree", ROOT, "--rounds", "2", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert (row["name"], row["unit"], row["part_bytes"]) == ("guard_throughput", "MB/s", 32_000_000)
    assert {"machine", "versions", "date"} <= set(row)
    assert row["ratio"] == row["ours"] / row["rival"]
    assert 0.2 < row["ratio"] < 5


def test_a_checkout_that_has_no_guard_is_said(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "guard.py", "--worktree", tmp_path, "--rounds", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert "no checkout with a server/services/guard.py" in done.stderr
