"""The site's worker: one process that answers all messages, so that models and state stay in memory between them.

`python -m client.worker SITE_HOME HOST:PORT SECRET_FILE KEEP_WARM_S`; no code of the coordinator is ever loaded.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from pathlib import Path

import httpx

from chexfound import logs
from chexfound.processes import die_with_parent
from client import site
from client.app import app
from client.flwr_private import Tasks

log = logging.getLogger("chexfound.client")
POLL_S = 0.05  # between two questions to this machine's own SuperNode


class _Progress(logs.Steps):
    """A line now and then, and SITE/work.json for who asks."""

    def __init__(self, home: Path) -> None:
        super().__init__(log)
        self.home, self._again = home, 0.0

    def __call__(self, name: str, phase: str, done: int, total: int) -> None:
        super().__call__(name, phase, done, total)
        if time.monotonic() > self._again:
            self._again = time.monotonic() + 1
            temporary = self.home / ".work.json.tmp"
            temporary.write_text(json.dumps({"phase": phase, "done": done, "of": total}))
            os.replace(temporary, self.home / "work.json")


def release() -> None:
    """Give the memory back that the last message left filled; what was in it is on the disk."""
    site.forget()
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def work(home: Path, tasks: Tasks, keep_warm_s: float) -> None:
    """Answer messages for ever; so long without one, give back the memory, the GPU's too."""
    site.on_progress = _Progress(home)
    held, last = False, time.monotonic()
    while True:
        token = tasks.take()
        if token is None:
            if held and time.monotonic() - last > keep_warm_s:
                release()
                held = False
            time.sleep(POLL_S)
            continue
        (home / "work.json").unlink(missing_ok=True)
        try:
            tasks.answer(token, app)
        except httpx.HTTPError as error:
            log.warning("event=undelivered reason=%r", type(error).__name__)
        held, last = True, time.monotonic()


def main() -> None:
    """Run until told to stop."""
    die_with_parent()
    logs.show()
    home, address, secret, keep_warm_s = sys.argv[1:]
    work(Path(home), Tasks(address, Path(secret)), float(keep_warm_s))


if __name__ == "__main__":
    main()
