"""The site's worker: one process that answers all messages, so that what was imported and opened stays.

`python -m client.node.worker SITE_HOME HOST:PORT SECRET_FILE KEEP_WARM_S`; no code of the coordinator is ever loaded.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import sys
import time
from pathlib import Path

from chexfound.durable.files import write_shown
from chexfound.errors import ChexfoundError, SiteError
from chexfound.host import logs
from chexfound.host.processes import die_with_parent, trim
from chexfound.wire.inflate import inflate_once
from client.answer import delivery, hospital
from client.app import handle
from client.masked import stages
from client.node import flower_node
from client.node.flwr_private import Tasks

log = logging.getLogger("chexfound.client")
SWEEP_S = 60.0  # between two looks for secrets that serve no more
POLL_S = (0.05, 1.0)  # between two questions to this machine's own SuperNode: a twentieth of the time without a message


class _Progress(logs.Steps):
    """A line now and then, and SITE/work.json for who asks; and no step more once nobody waits for the reply."""

    def __init__(self, home: Path) -> None:
        super().__init__(log)
        self.home, self._again = home, 0.0

    def __call__(self, name: str, phase: str, done: int, total: int) -> None:
        if (self.home / flower_node.OVER).exists():
            raise SiteError("the run has ended at the coordinator, or waits no more; what was begun is left")
        super().__call__(name, phase, done, total)
        if time.monotonic() > self._again:
            self._again = time.monotonic() + 1
            write_shown(self.home / "work.json", {"phase": phase, "done": done, "of": total})


def release() -> None:
    """Give the memory back that the last message left filled; what was in it is on the disk."""
    hospital.forget()
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def sweep(home: Path) -> None:
    """Drop the secrets of an attempt at a sum whose time is over, and old parts, though nobody asks."""
    try:
        stages.sweep(home)
        delivery.sweep(home)
    except ChexfoundError as error:  # its operator is releasing a sum, say
        log.warning("event=sweep error=%s %s", error.code, error)


def work(home: Path, tasks: Tasks, keep_warm_s: float) -> None:
    """Answer messages for ever; so long without one, give back the memory, the GPU's too."""
    hospital.on_progress = _Progress(home)
    held, last = False, time.monotonic()
    sweep_at = last
    while True:
        token = tasks.take()
        if time.monotonic() > sweep_at:
            sweep(home)
            sweep_at = time.monotonic() + SWEEP_S
        if token is None:
            idle = time.monotonic() - last
            if held and idle > keep_warm_s:
                release()
                held = False
            time.sleep(min(max(idle / 20, POLL_S[0]), POLL_S[1]))
            continue
        with contextlib.suppress(OSError):
            (home / "work.json").unlink(missing_ok=True)
        try:
            tasks.answer(token, functools.partial(handle, spend=True))
        except Exception as error:  # noqa: BLE001 (a message that Flower cannot read raises anything; the next may do)
            log.warning("event=undelivered reason=%r", type(error).__name__)
        trim()
        held, last = True, time.monotonic()


def main() -> None:
    """Run until told to stop."""
    die_with_parent()
    inflate_once()
    home, address, secret, keep_warm_s = sys.argv[1:]
    logs.show(Path(home) / logs.REASONS)
    work(Path(home), Tasks(address, Path(secret)), float(keep_warm_s))


if __name__ == "__main__":
    main()
