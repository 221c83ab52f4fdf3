"""Every example runs as a stranger runs it: from the command line, without a data set."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def test_features(tmp_path: Path, tiny_images: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("00-0.png", "01-0.png"):
        (tmp_path / "images" / name).write_bytes((tiny_images / "alpha" / name).read_bytes())
    (tmp_path / "images" / "02-0.png").write_bytes(b"no picture")
    ran = run("features.py", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out.npz"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "02-0.png" in ran.stdout
    with np.load(tmp_path / "out.npz") as found:
        assert found["names"].tolist() == ["00-0.png", "01-0.png"]
        assert found["features"].shape == (2, 192)
        assert np.isfinite(found["features"]).all()


def test_own_head(tmp_path: Path) -> None:
    ran = run("own_head.py", "--steps", "20", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    area = float(ran.stdout.splitlines()[-1].removeprefix("AUROC "))
    assert 0 <= area <= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_own_strategy(tmp_path: Path) -> None:
    ran = run("own_strategy.py", "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "the trimmed mean 2\n" in ran.stdout
    assert ran.stdout.count("AUROC") >= 3
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_every_example_is_run_here_and_teaches() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.stem == "made_up" or (f'"{path.name}"' in here and f"python examples/{path.name}" in text)
