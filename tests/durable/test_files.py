"""The lock that keeps a second process out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from chexfound.durable.files import lock
from chexfound.errors import ConfigError

BUSY = ConfigError("busy")


def test_a_lock_keeps_the_next_out_until_it_is_closed(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock") as second:
        lock(first, BUSY)
        with pytest.raises(ConfigError, match="busy"):
            lock(second, BUSY)
        first.close()
        lock(second, BUSY)


def test_a_folder_is_locked_as_a_file(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        lock(first, BUSY)
        with pytest.raises(ConfigError, match="busy"):
            lock(second, BUSY)
    finally:
        os.close(first)
        os.close(second)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock") as second:
        lock(first, BUSY)
        threading.Timer(0.3, first.close).start()
        began = time.monotonic()
        lock(second, BUSY, wait_s=60.0)
        assert time.monotonic() - began >= 0.2
