"""Whole runs of `chexfound-sim`, made once for all tests that only look at them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Ran(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: Path
    stdout: str
    stderr: str

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.out / "metrics.json").read_text())

    @property
    def hashes(self) -> dict[str, str]:
        return self.metrics["model_sha256"]


@pytest.fixture(scope="session")
def simulate(tiny_images: Path, tiny_recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """`simulate("--seeds", "3", out=…)` calls the command in this process, on the three hospitals."""

    def run(*arguments: str, out: Path | None = None, data: Path | None = None, recipe: str | None = None) -> Ran:
        from sim.cli import main

        out = out or tmp_path_factory.mktemp("simulation") / "out"
        given = ["--out", str(out), *arguments]
        if "--workers" not in arguments:
            given += ["--workers", "1"]
        if "--resume" not in arguments:
            given += ["--data", str(data or tiny_images), "--recipe", recipe or str(tiny_recipe_file)]
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(given)
        return Ran(code, out, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture(scope="session")
def one_worker(simulate: Callable[..., Ran]) -> Ran:
    """All arms, two seeds, in this process."""
    ran = simulate("--seeds", "0,1")
    assert ran.code == 0, ran.stderr
    return ran


@pytest.fixture(scope="session")
def two_workers(simulate: Callable[..., Ran]) -> Ran:
    """All arms, one seed, in two worker processes."""
    ran = simulate("--workers", "2")
    assert ran.code == 0, ran.stderr
    return ran
