from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run the tests are shared and slow at times: how long an example takes says nothing.
settings.register_profile("chexfound", deadline=None)
settings.load_profile("chexfound")

ROOT = Path(__file__).resolve().parents[1]


def _find(name: str) -> tuple[Path | None, str]:
    """Where a thing that not every machine has lies, and what to say where it does not."""
    if name == "shared":
        folder = ROOT.parent / "shared"
        return (
            folder if folder.is_dir() else None
        ), "no folder ../shared beside the repository (real X-rays)"
    if name == "chromium":
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        return (Path(found) if found else None), "no Chromium on the PATH"
    raise ValueError(f"require({name!r}): unknown")


@pytest.fixture(scope="session")
def require() -> Callable[[str], Path]:
    """require("shared") or require("chromium"): its path.

    Where it is absent the test is skipped, or fails if CHEXFOUND_REQUIRE names it.
    """

    def path_of(name: str) -> Path:
        found, reason = _find(name)
        if found is None:
            if name in os.environ.get("CHEXFOUND_REQUIRE", "").split(","):
                pytest.fail(f"{reason}, and CHEXFOUND_REQUIRE asks for {name}")
            pytest.skip(reason)
        return found

    return path_of


@pytest.fixture(scope="session")
def reference(require: Callable[[str], Path]) -> Path:
    """The folder of values that the public implementation computes; skips where it is absent."""
    return require("shared") / "reference"
