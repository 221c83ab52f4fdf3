"""The last request that this site refused, for its operator: HOME/refused.json, until another run is answered.

It has the code that the coordinator was told, and no text: that may name what only the site's log holds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from chexfound.contract.fields import parse
from chexfound.contract.limits import STRICT
from chexfound.durable.files import write_shown
from chexfound.errors import REFUSALS, ChexfoundError, CodeError, ConfigError, ProtocolError, RosterError, VersionError
from chexfound.identity.roster import read_json

Word = Annotated[str, Field(max_length=200)]
OTHERS = (CodeError, ConfigError, RosterError, VersionError)  # refusals that have no code of REFUSALS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Refused:
    """One request: of which run and phase, by which code, and when (ISO 8601)."""

    run: Word
    phase: Word
    code: Word
    since: Word

    @property
    def why(self) -> str:
        """Give what its code means."""
        return REFUSALS.get(self.code, "see the site's log")


def code_of(error: BaseException) -> str | None:
    """The code of a refusal; None of anything else that went wrong."""
    if isinstance(error, ChexfoundError) and (error.code in REFUSALS or isinstance(error, OTHERS)):
        return error.code
    return None


def note(home: Path, run_id: int, phase: str, code: str) -> None:
    """Put down that a request was refused."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_shown(home / "refused.json", {"run": str(run_id), "phase": phase, "code": code, "since": since})


def answered(home: Path, run_id: int) -> None:
    """Another run than the refused one was answered: what was refused before is past.

    Where the file cannot be removed it stays: what is shown costs no reply.
    """
    last = read(home)
    if last is not None and last.run != str(run_id):
        with contextlib.suppress(OSError):
            (home / "refused.json").unlink()


def read(home: Path) -> Refused | None:
    """The last refusal; None if there is none, or its file cannot be read."""
    try:
        return parse(Refused, read_json(home / "refused.json"), "the last refusal")
    except (OSError, json.JSONDecodeError, ConfigError, ProtocolError):
        return None
