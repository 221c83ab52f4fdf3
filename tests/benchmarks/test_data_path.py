from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/data_path.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_line_for_each_setting():
    done = run("--rounds", "1", "--cold-rows", "256", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["setting"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == ["plain", "grey", "colour", "read", "read-cold", "sampler"]
    for row in rows.values():
        assert (row["name"], bool(row["machine"]), bool(row["date"])) == ("data_path", True, True)
        if row["setting"] != "sampler":
            assert row["unit"] == "img/s"
            assert min(row["ours"], row["rival"]) > 0
            assert abs(row["ratio"] - row["ours"] / row["rival"]) < 0.01 * row["ratio"] + 0.01
    assert rows["sampler"]["seconds"] > 0


def test_a_store_of_another_size_is_refused(tiny_store_path):
    done = run("--data", str(tiny_store_path))
    assert done.returncode == 3
    assert "holds images of 64 px; this is measured at 256 px" in done.stderr
    assert "Traceback" not in done.stderr
