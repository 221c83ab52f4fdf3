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


def map_large() -> None:
    """From then on have each block of a MB or more mapped by itself, so that it is given back when it is freed.

    glibc puts blocks of up to 32 MB into its heap, where those that were freed between others stay as holes.  It costs
    a page fault for every page of a new block: for a process that holds models, not for one that trains.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
