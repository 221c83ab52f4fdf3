"""What the processes of a site tell each other by environment variables.  Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

RENDEZVOUS = "CHEXFOUND_RENDEZVOUS"  # a URL where the ranks meet, set by launch.py; torchrun sets MASTER_ADDR
PARENT = "CHEXFOUND_PARENT"  # process id of who started the ranks, set by launch.py
GRACE_S = 2.0  # a rank that fails for another's sake waits so long, for whoever ends it, before it complains


def to_come() -> int:
    """How many ranks there are, by torchrun's variables or launch.py's; 1 where those are no numbers."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return int(given[1]) if all(text.isascii() and text.isdigit() for text in given) else 1


def teller() -> str:
    """What stands before an error that is told here: nothing, or the GPU that it is of.

    An error of all is the first rank's to tell, and the end of the others while they wait here.
    """
    if to_come() == 1 or os.environ["RANK"] == "0":
        return ""
    time.sleep(GRACE_S)
    return named(int(os.environ["RANK"]), to_come())


def named(rank: int, of: int) -> str:
    """How an error says which rank it is of."""
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


def end(code: int) -> NoReturn:
    """End this process; a rank not by the interpreter's own end, which may wait for others that are gone."""
    if to_come() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
