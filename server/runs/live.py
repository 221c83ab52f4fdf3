"""live.json in a run's folder: what the run does now and whom it waits for, for `status` and `watch`."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import Any

from chexfound.durable.files import write_shown
from chexfound.errors import ChexfoundError
from chexfound.recipe import load as recipes
from server.runs.submission import SCHEMA


class Live:
    """Follows a run's events.  Written whole each time, not durably: it tells of a process.

    A disk that is full costs what is shown, not the run, nor the word on why it ended.

    Args:
        flower_run: Flower's number of the run.
        submission: the token that it was submitted with.
    """

    def __init__(self, folder: Path, flower_run: str, submission: str = "") -> None:
        self.folder = folder
        self.values: dict[str, Any] = {
            "schema": SCHEMA, "state": "waiting", "round": None, "rounds": None, "since": _now(),
            "waiting_for": [], "replied": [], "lost": [], "flower_run": flower_run, "submission": submission,
            "error": None,
        }  # fmt: skip
        self._rounds: dict[str, int] = {}
        self._write()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take in an event of the run or of its exchange."""
        kind = event["event"]
        if kind == "asked":  # anew, those too that were lost before
            phase, rounds = event["phase"], self._of(event["phase"])
            self.values |= {"state": phase, "rounds": rounds, "round": event["round"] + 1 if rounds else None}
            self.values |= {"since": _now(), "waiting_for": event["sites"], "replied": [], "lost": []}
        elif kind == "replied":
            self.values["waiting_for"] = [name for name in self.values["waiting_for"] if name != event["site"]]
            self.values["replied"] = [*self.values["replied"], event["site"]]
            self._found(event["site"])
        elif kind == "refused":
            self.values["waiting_for"] = [name for name in self.values["waiting_for"] if name != event["site"]]
            self._found(event["site"])
        elif kind == "lost":
            self.values["lost"] = sorted({*self.values["lost"], event["site"]})
        elif kind == "back":
            self._found(event["site"])
        elif kind == "done":
            self.values |= {"state": "done", "since": _now(), "waiting_for": []}
        else:
            return
        self._write()

    def failed(self, error: ChexfoundError) -> None:
        """The run ended with an error."""
        self.values |= {"state": "failed", "since": _now(), "error": {"code": error.code, "text": str(error)}}
        self._write()

    def _found(self, site: str) -> None:
        self.values["lost"] = [name for name in self.values["lost"] if name != site]

    def _of(self, phase: str) -> int | None:
        path = self.folder / "recipe.yaml"
        if not self._rounds and path.exists():
            self._rounds = recipes.load(path).rounds
        return self._rounds.get(phase)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_shown(self.folder / "live.json", self.values)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
