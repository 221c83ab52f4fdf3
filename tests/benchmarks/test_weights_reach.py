"""The table of docs/threat-model.md is what the command computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from chexfound.recipe import load as recipes

ROOT = Path(__file__).parents[2]


def test_the_table_of_reaches_is_computed() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/weights_reach.py"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = (ROOT / "docs" / "threat-model.md").read_text()
    assert done.stdout in text
    assert set(re.findall(r"^\| `([\w-]+)` \|", done.stdout, re.M)) == set(recipes.presets())
