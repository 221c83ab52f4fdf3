"""Children that do not outlive whoever started them."""

from __future__ import annotations

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """In a child before it becomes its program (`preexec_fn`): SIGTERM when the parent ends, whatever it dies of."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
