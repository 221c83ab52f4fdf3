"""Starts the processes of a site that train together, a GPU each, watches them, and ends them.

They meet through a file in a private folder and talk over the loopback interface only: nothing of it
can be reached from another machine.  They die with the process that started them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import chexfound
from chexfound.errors import SiteError
from chexfound.parallel.environment import GRACE_S, PARENT, RENDEZVOUS

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
STOP_S = 600.0  # for ranks that were asked to stop: they take their step to its end and save


class Ranks:
    """N processes of `python -m …`, each told its rank in torchrun's variables.

    Args:
        arguments: after `python`.
        number: N.
        on_line: told each line that the first rank writes to its standard output, which is then not shown.
        stop: whether the ranks are to be asked (by SIGTERM) to stop after their step.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        number: int,
        on_line: Callable[[bytes], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._arguments, self._number, self._on_line, self._stop = list(arguments), number, on_line, stop
        self._asked_at: float | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._rest = b""

    def run(self) -> list[int]:
        """Start them and wait; when one fails, the others are ended.

        Returns: the exit codes, rank by rank, negative for a signal; that of a rank that we ended is 0.
        """
        with tempfile.TemporaryDirectory(prefix="chexfound-ranks-") as folder:
            try:
                for rank in range(self._number):
                    self._processes.append(self._start(rank, Path(folder)))
                return self._watch()
            finally:
                for process in self._processes:
                    process.kill()
                for process in self._processes:
                    process.wait()
                    if process.stdout is not None:
                        process.stdout.close()

    def _start(self, rank: int, folder: Path) -> subprocess.Popen[bytes]:
        heard = rank == 0 and self._on_line is not None
        output = subprocess.PIPE if heard else 2 if self._on_line is not None else None
        process = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
            [sys.executable, *self._arguments], env=environment(rank, self._number, folder), stdout=output
        )
        if process.stdout is not None:
            os.set_blocking(process.stdout.fileno(), False)
        return process

    def _watch(self) -> list[int]:
        while True:
            self._hear()
            codes = [process.poll() for process in self._processes]
            if any(codes):  # a failure pulls the others down, and theirs may be seen first: let all tell theirs
                time.sleep(GRACE_S / 4)
                codes = [process.poll() for process in self._processes]
                return [code or 0 for code in codes]
            if None not in codes:
                self._hear()
                return [0] * self._number
            if self._asked_at is None and self._stop is not None and self._stop():
                self._asked_at = time.monotonic()
                for process in self._processes:
                    process.terminate()
            if self._asked_at is not None and time.monotonic() > self._asked_at + STOP_S:
                return [0] * self._number
            time.sleep(0.05)

    def _hear(self) -> None:
        output = self._processes[0].stdout
        while output is not None and (data := output.read(65536)):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                assert self._on_line is not None
                self._on_line(line)


def died(number: int, of: int, code: int) -> SiteError:
    """The error of a rank that ended by itself without a word of ours."""
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}; its last lines above say why"
    hint = "; the machine may be out of memory" if code == -9 else ""
    return SiteError(f"the process of GPU {number} (of {of}) died ({how}{hint}); what was saved is kept")


def environment(rank: int, number: int, folder: Path) -> dict[str, str]:
    """Give what a rank is told: who it is, where it meets the others, whose child it is."""
    package = str(Path(chexfound.__file__).resolve().parents[1])  # the chexfound that runs here, installed or not
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        RENDEZVOUS: f"file://{folder / 'store'}",
        PARENT: str(os.getpid()),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        # DDP warns, from within C++, of an option that it is given on purpose (ranks.py).
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
