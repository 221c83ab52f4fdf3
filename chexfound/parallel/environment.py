"""Environment variables by which the processes of a site tell each other.  Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

RENDEZVOUS = "CHEXFOUND_RENDEZVOUS"  # a URL where the ranks meet, set by launch.py
PARENT = "CHEXFOUND_PARENT"  # process id of who started the ranks, set by launch.py
GRACE_S = 2.0  # a rank that fails for another's sake waits so long, for whoever ends it, before it complains


def to_come() -> int:
    """How many ranks there are, by torchrun's variables or launch.py's; 1 where those are no numbers."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return int(given[1]) if all(text.isascii() and text.isdigit() for text in given) else 1


def named(rank: int, of: int) -> str:
    """Give the words with which an error says which rank it is of."""
    return f"GPU {rank} (of {of}): "


def follow_parent() -> None:
    """Die with the process that started us, whatever it dies of, and leave Ctrl-C to it."""
    if PARENT not in os.environ:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)


@contextlib.contextmanager
def stoppable(*numbers: int, text: str = "") -> Iterator[list[int]]:
    """Collect in the list that is given the first of these signals that comes; the next does what it did before.

    Args:
        numbers: of the signals.
        text: is said when the first one comes.
    """
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        restore()
        if text:
            print(text, file=sys.stderr, flush=True)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


def end(code: int) -> NoReturn:
    """End this process; a rank not by the interpreter's own end, which may wait for others that are gone."""
    if to_come() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
