from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_line_of_the_checks_cost(tiny_images: Path) -> None:
    """On the demo's small model: its figures are there, and the checks are part of the round that has them."""
    done = subprocess.run(
        [sys.executable, "benchmarks/site_checks.py", "--data", tiny_images, "--preset", "demo"]
        + ["--steps", "2", "--batch", "2", "--rounds", "2", "--json"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = json.loads(done.stdout)
    assert row["name"] == "site_checks"
    assert 0 < row["checks"] < row["ours"]
    assert abs(row["ratio"] - row["rival"] / row["ours"]) < 0.002
    assert (row["steps"], row["batch"], len(row["first"])) == (2, 2, 2)
