"""The site's SuperNode, as a process of its own.

`python -m client.node.flower_node SITE_HOME …` takes flower-supernode's options.
It says in SITE_HOME/node.json what it does, for `chexfound-client status` and probes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from chexfound.durable.files import write_shown

SCHEMA = 1
EVERY_S = 15.0  # that the file is written at least
OVER = "over.json"  # in the site's home while nobody waits for what the worker does
AWAY_S = 60.0  # without an answer, after which the coordinator counts as away


def now() -> str:
    """Now, in UTC, as the file has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Status:
    """node.json: state, since when, last contact.

    States: connecting, idle, receiving, working, sending, away, draining, stopped.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "schema": SCHEMA, "pid": os.getpid(), "state": "connecting", "since": now(), "contact": None,
            "run": None, "phase": None, "round": None, "done": None, "of": None, "refused": None,
        }  # fmt: skip
        self._heard = datetime.datetime.now(datetime.UTC)
        self._write()
        threading.Thread(target=self._keep, daemon=True).start()

    @staticmethod
    def stopped(home: Path) -> None:
        """Say that nothing runs any more."""
        try:
            values = json.loads((home / "node.json").read_text())
        except (OSError, ValueError):
            return
        write_shown(home / "node.json", values | {"state": "stopped", "since": now()})

    def state(self, name: str, **about: Any) -> None:
        """It is now in this state."""
        with self._lock:
            before = self._values["state"], self._values["run"], self._values["refused"]
            if name != self._values["state"]:
                if self._values["state"] == "connecting":
                    print("connected; waiting for a run", flush=True)
                self._values |= {"state": name, "since": now()}
            if "phase" in about:  # another message
                with contextlib.suppress(OSError):
                    (self.home / OVER).unlink(missing_ok=True)
            if isinstance(about.get("round"), str):
                short = about["round"].isdecimal() and len(about["round"]) < 10  # it comes from outside
                about["round"] = int(about["round"]) if short else None
            self._values |= about
            if before != (self._values["state"], self._values["run"], self._values["refused"]):
                self._write()

    def contact(self) -> None:
        """The coordinator answered."""
        with self._lock:
            self._heard = datetime.datetime.now(datetime.UTC)
            self._values["contact"] = self._heard.isoformat(timespec="seconds")

    def over(self) -> None:
        """Nobody waits any more for the reply to the message in hand: the worker may stop."""
        write_shown(self.home / OVER, {"since": now()})

    def _keep(self) -> None:
        while True:
            threading.Event().wait(EVERY_S)
            with self._lock:
                silent = (datetime.datetime.now(datetime.UTC) - self._heard).total_seconds()
                if self._values["state"] == "idle" and silent > AWAY_S:
                    self._values |= {"state": "away", "since": now()}
                self._write()

    def _write(self) -> None:
        write_shown(self.home / "node.json", self._values | progress(self.home))


def progress(home: Path) -> dict[str, Any]:
    """Phase, done and of how many, as the worker wrote them last."""
    try:
        values = json.loads((home / "work.json").read_text())
        return {key: values[key] for key in ("phase", "done", "of")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main() -> None:
    """Run until told to stop."""
    from chexfound.host import logs
    from client.home import approval
    from client.node.flwr_private import run_supernode

    logs.show()
    home = Path(sys.argv[1])
    run_supernode(sys.argv[2:], lambda content: approval.check(home, content), Status(home))


if __name__ == "__main__":
    main()
