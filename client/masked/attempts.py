"""A site's attempts at sums on its disk: what must survive a crash between their stages, and what spans them.

    HOME/secagg/journal.jsonl          which attempts were seen, which sums were opened; digests only
    HOME/secagg/attempt/secrets.json   the one attempt's secrets, 0600; gone with its answer, refusal or time
    HOME/secagg/attempt/STAGE.json     what was asked and answered in a stage, as it left
    HOME/secagg/attempt/masked-32.bin  the masked arrays, as they left; with them goes what
                                       client/answer/delivery.py kept of them

Each answer is on the disk before its first byte leaves, and is given again, the same, to the same request; to another
request for the same stage nothing is given.  No attempt counts twice, none after its time; and no second sum on the
same weights, or of the same step of the same training, is opened over other sites or of other work (differencing).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.contract.request import Reply
from chexfound.durable.files import canonical, remove_unfinished, storage, write_json
from chexfound.durable.journal import Journal
from chexfound.errors import ProtocolError, RefusedError
from chexfound.phases import payload
from chexfound.secagg import messages
from chexfound.secagg.messages import STAGES, Attempt
from client.answer.delivery import Parts
from client.masked.ledger import WORK, differs, in_force, same_sum

log = logging.getLogger("chexfound.client")


@dataclass(frozen=True, kw_only=True)
class AttemptStage:
    """Hold what was asked and answered in a stage, and what later stages stand on."""

    asked: str
    values: dict[str, Any]
    kept: dict[str, Any]


class Attempts:
    """Those of one site; one process at a time.

    Args:
        home: of the site.
        attempt_s: seconds after which an attempt's secrets serve no more.
    """

    def __init__(self, home: Path, attempt_s: float) -> None:
        self.attempt_s, self.home = attempt_s, home
        self.folder = home / "secagg" / "attempt"
        self.journal = Journal(home / "secagg" / "journal.jsonl")

    def close(self) -> None:
        """Let another process have it."""
        self.journal.close()

    # -- which attempt

    def _before(self, stage: str, attempt: Attempt) -> AttemptStage | None:
        """The answer that was given to this stage already; None if it is this stage's turn.

        Raises: RefusedError.
        """
        if stage not in STAGES:
            raise ProtocolError(f"there is no stage {stage!r}")
        if not self._is_open(attempt):
            if stage != "advertise":
                raise RefusedError("secagg.order", "no such attempt is open here")
            seen = [e["attempt"] for e in self.journal.entries if e["event"] == "begun" and e["of"] == _of(attempt)]
            if seen and attempt.attempt <= max(seen):
                raise RefusedError("secagg.attempt")
            return None
        opened = self._opened() or {}
        if "ended" in opened:
            raise RefusedError("secagg.attempt", f"this attempt ended here: {opened['ended']}")
        if _late(opened):
            raise RefusedError("secagg.late")
        if (given := self._given(stage)) is not None:
            return given
        place = STAGES.index(stage)
        if place and self._read(STAGES[place - 1]) is None:
            raise RefusedError("secagg.order")
        if place < len(STAGES) - 1 and self._read(STAGES[place + 1]) is not None:
            raise RefusedError("secagg.incomplete")
        return None

    def _opened(self) -> dict[str, Any] | None:
        """Give what is known of the one attempt on the disk: the last that the journal has begun, or none.

        One whose file was lost or damaged is none: it takes up no room, and its number does not serve again.
        """
        begun = [entry for entry in self.journal.entries if entry["event"] == "begun"]
        try:
            opened = self._read("attempt")
            attempt = Attempt(**opened["attempt"]) if opened is not None else None
            if opened is None or attempt is None or not {"began", "until"} <= set(opened):
                return None
        except (RefusedError, KeyError, TypeError, ValueError):
            return None
        last = {"of": _of(attempt), "attempt": attempt.attempt}
        return opened if begun and begun[-1] == {"event": "begun", **last} else None

    def _is_open(self, attempt: Attempt) -> bool:
        opened = self._opened()
        return opened is not None and opened["attempt"] == asdict(attempt)

    def _begin(self, attempt: Attempt) -> None:
        """A new attempt, and the end of any other.  It is in the journal first: its secrets never serve twice."""
        self._forget_parts()
        self.journal.append({"event": "begun", "of": _of(attempt), "attempt": attempt.attempt})
        with storage(self.folder):  # from here on nothing of the one before counts, however little of it goes
            if self.folder.exists():
                shutil.rmtree(self.folder)
        now = time.time()
        values = {"attempt": asdict(attempt), "began": now, "until": now + self.attempt_s}
        write_json(self.folder / "attempt.json", values)

    def refuse(self, attempt: Attempt, error: RefusedError, **about: str) -> None:
        """Note a refusal, in the log and in the journal."""
        log.error("event=refused code=%s phase=%s round=%d %s", error.code, attempt.phase, attempt.round + 1, error)
        entry = {"event": "refused", "of": _of(attempt), "attempt": attempt.attempt, "code": error.code, **about}
        if entry not in self.journal.entries:  # or who asks again and again would fill the disk
            self.journal.append(entry)

    def _end(self, attempt: Attempt, error: RefusedError) -> None:
        """Refused: if that was the open attempt, it is over here and its secrets are gone."""
        about = {}
        if error.code == "secagg.differencing":  # what the operator may release
            about = self._work(attempt, self._kept("consistency")["survivors"], self._kept("masked")["summed"])
        self.refuse(attempt, error, **about)
        if self._is_open(attempt):
            if "ended" not in (opened := self._opened() or {}):
                write_json(self.folder / "attempt.json", opened | {"ended": error.code})
            self._forget()

    def sweep(self) -> None:
        """Drop secrets that serve no more: of an attempt that is over, whose time is, or that was never begun."""
        remove_unfinished(self.folder)
        opened = self._opened()
        if opened is None or "ended" in opened or _late(opened):
            self._forget()
        elif (self.folder / "unmask.json").exists():
            self._forget(answered=True)

    def _forget(self, *, answered: bool = False) -> None:
        """Drop the secrets, and what is large; of an attempt that was refused, the answers too."""
        drop = ["secrets.json", "masked-*.bin"] + ([] if answered else [f"{stage}.json" for stage in STAGES])
        for pattern in drop:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        self._forget_parts()

    def _forget_parts(self) -> None:
        """Drop what was still to be collected of the attempt's masked arrays: it is not given after its end."""
        if (opened := self._opened()) is not None:
            Parts(self.home, opened["attempt"]["run"]).forget()
        elif (self.folder / "attempt.json").exists():  # damaged: of whichever run it was
            for run in self.home.glob("parts/*"):
                Parts(self.home, run.name).forget()

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RefusedError("secagg.incomplete", f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise RefusedError("secagg.incomplete", f"{path}: not what was written")
        return values

    def _given(self, stage: str) -> AttemptStage | None:
        values = self._read(stage)
        try:
            return None if values is None else AttemptStage(**values)
        except TypeError as error:
            raise RefusedError("secagg.incomplete", f"{stage}.json: {error}") from error

    def _kept(self, stage: str) -> dict[str, Any]:
        given = self._given(stage)
        if given is None:
            raise RefusedError("secagg.incomplete")
        return given.kept

    def _reply(self, stage: str, given: AttemptStage) -> Reply:
        if stage != "masked":
            return Reply(values=given.values)
        arrays: dict[int, np.ndarray] = {}
        for ring, size in given.kept["sizes"].items():
            path = self.folder / f"masked-{ring}.bin"
            try:
                # Where it is, not in memory: a message with it takes as much again.
                arrays[int(ring)] = np.memmap(path, f"<u{int(ring) // 8}", "r")
            except (OSError, ValueError) as error:  # gone, empty, or not of whole numbers
                raise RefusedError("secagg.incomplete", str(error)) from error
            if arrays[int(ring)].size != size:
                raise RefusedError("secagg.incomplete", f"{path}: not as long as it was written")
        if payload.digest(arrays) != given.values["payload"]:
            raise RefusedError("secagg.incomplete", "the masked arrays are not what was signed")
        return Reply(values=given.values, masked=arrays)

    # -- what a stage leaves

    def _values(self, stage: str) -> dict[str, Any]:
        given = self._given(stage)
        if given is None:
            raise RefusedError("secagg.incomplete")
        return given.values

    def _arrays(self, sizes: Mapping[int, int]) -> dict[int, np.memmap[Any, Any]]:
        return {
            ring: payload.map_new(self.folder / f"masked-{ring}.bin", f"<u{ring // 8}", size)
            for ring, size in sizes.items()
        }

    # -- what spans attempts

    def _check_differencing(self, attempt: Attempt, survivors: list[str], summed: list[str]) -> None:
        """Into the journal before the answer leaves: over which sites this sum on these weights is, and of what.

        Two sums over the same sites tell of one as well, if the second counts its images otherwise, say; and two on
        weights that are nearly the same, as a run that begins anew can have them sent, tell almost as much.

        Raises: RefusedError if there was another, and the operator has not released it.
        """
        work = self._work(attempt, survivors, summed)
        before: list[dict[str, str | None]] = []  # opened, and not released since
        for entry in in_force(self.journal.entries):
            if entry["event"] not in ("opened", "released") or not same_sum(entry, work):
                continue
            if entry["event"] == "opened":
                before.append({name: entry.get(name) for name in WORK})
            elif all(entry.get(name, work[name]) == work[name] for name in ("over", "asked")):
                before = []  # a word for this very sum, or for whichever it is
        if any(differs(one, work) for one in before):
            raise RefusedError("secagg.differencing")
        if work not in before:
            self.journal.append({"event": "opened", **work, "of": _of(attempt)})

    def _work(self, attempt: Attempt, survivors: list[str], summed: list[str]) -> dict[str, str]:
        """On which weights a sum is, of which step of a training, over which sites, and of what work; digests.

        Weights that this site derives itself have the name of those, not of the bytes that were sent: within the
        tolerance there are many of these, and one sum.  Which findings are left out of the counts hangs on each run's
        split, and one's counts tell nothing of another's.
        """
        shared, masked = self._kept("share"), self._kept("masked")
        left = [] if attempt.phase == "counts" else summed
        settings = shared["told"]["settings"]
        counted = [settings["images"], settings.get("labelled", []), left]
        return {
            "phase": attempt.phase,
            "weights": masked["weights"],
            "place": shared["place"],
            "over": messages.names_digest(survivors).hex(),
            "asked": hashlib.sha256(canonical([shared["question"], left])).hexdigest(),
            "counted": hashlib.sha256(canonical(counted)).hexdigest(),
        }


def _late(opened: dict[str, Any]) -> bool:
    """Whether an attempt's time is over, or the clock has been set back so far that nobody can tell."""
    return not opened["began"] - 3600 <= time.time() <= opened["until"]


def _of(attempt: Attempt) -> str:
    """Digest of what an attempt is one of."""
    return hashlib.sha256(canonical([attempt.run, attempt.phase, attempt.round])).hexdigest()
