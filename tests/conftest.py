"""What a test may need and a machine may lack."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """`require("shared")` or `require("chromium")`: skip where it is absent, fail where CHEXFOUND_REQUIRE names it."""

    def check(what: str) -> None:
        present = SHARED.is_dir() if what == "shared" else shutil.which(what) is not None
        if not present and what in os.environ.get("CHEXFOUND_REQUIRE", "").split(","):
            pytest.fail(f"{what} is absent, and CHEXFOUND_REQUIRE names it")
        if not present:
            pytest.skip(f"{what} is absent")

    return check
