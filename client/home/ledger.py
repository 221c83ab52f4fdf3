"""Which runs a site took part in, and how long it worked on each.

    HOME/runs.json    the runs of the last 30 days: when each was begun, when it last asked, and the seconds of its work

The one place where runs are counted, of those in the clear and of those under masks.  Imports nothing heavy: the
command line stands on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from chexfound.contract.fields import parse
from chexfound.contract.limits import STRICT
from chexfound.durable.files import replace_file, storage
from chexfound.errors import ConfigError, ProtocolError
from chexfound.identity.roster import read_json
from chexfound.recipe.load import digest
from chexfound.recipe.schema import Recipe

RUNS_S = 30 * 86400.0
Moment = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Begun:
    """One run, as runs.json has it: seconds since 1970, and of work."""

    began: Moment
    last: Moment
    seconds: Moment = 0.0


def read(home: Path) -> dict[str, Begun]:
    """The runs that asked for something in the last 30 days; see `key_of`.

    Raises: ConfigError for a file that was damaged.
    """
    path = home / "runs.json"
    if not path.exists():
        return {}
    try:
        runs = parse(dict[str, Begun], read_json(path), "the runs")
    except ProtocolError as error:
        raise ConfigError(f"{path}: damaged; see which runs this site took part in, then remove it") from error
    return {key: one for key, one in runs.items() if one.last > time.time() - RUNS_S}


def key_of(recipe: Recipe, run_id: int) -> str:
    """Flower's number of a run, and the digest of its recipe: under one number a coordinator may send others."""
    return f"{run_id}-{digest(recipe)[:16]}"


def begun(runs: Mapping[str, Begun]) -> int:
    """Count the runs that were begun in the last 30 days."""
    return sum(one.began > time.time() - RUNS_S for one in runs.values())


def asked(home: Path, key: str) -> None:
    """Note that a run asks for something, and begins if it did not before."""
    runs, now = read(home), time.time()
    _write(home, runs | {key: replace(runs.get(key, Begun(began=now, last=now)), last=now)})


def worked(home: Path, key: str, seconds: float) -> None:
    """Note the time that an answer took."""
    runs = read(home)
    if (one := runs.get(key)) is not None:
        _write(home, runs | {key: replace(one, last=time.time(), seconds=one.seconds + seconds)})


def _write(home: Path, runs: Mapping[str, Begun]) -> None:
    path = home / "runs.json"
    values = {key: {"began": one.began, "last": one.last, "seconds": one.seconds} for key, one in runs.items()}
    with storage(path):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replace_file(path, 0o600) as temporary:
        temporary.write_text(json.dumps(values))
