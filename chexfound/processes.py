"""Children that do not outlive whoever started them, and memory that a process does not keep for nothing."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys


def die_with_parent() -> None:
    """In a child before it becomes its program (`preexec_fn`): SIGTERM when the parent ends, whatever it dies of."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def trim() -> None:
    """Give memory that was freed back to the operating system; glibc keeps blocks of up to 32 MB for the next.

    Of a message with a model in it that is as much as the model, several times.  Other C libraries are left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
