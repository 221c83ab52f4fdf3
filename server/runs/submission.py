"""A run's submissions to Flower, so that none is made twice and none is lost, whoever is killed and wherever.

What is meant to be done is on the disk before it is done: run.json gets a token, then the SuperLink is asked, then its
number is added.  The token goes along in the run's configuration (`submission`), so that the number can be found again.
A ServerApp begins only with the last token of its folder, and holds serverapp.lock for as long as it lives.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chexfound.durable import files, journal
from chexfound.durable.files import storage, write_json
from chexfound.errors import CheckpointError, ConfigError, StorageError

SCHEMA = 1  # of run.json and live.json
LOCK = "serverapp.lock"
TAKE_S = 2.0  # in which a lock that is only looked at (`status`) is free again


def read(path: Path, expected: Mapping[str, type]) -> dict[str, Any] | None:
    """A JSON file of a run's folder, if it is there.

    Raises: CheckpointError.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: not of schema {SCHEMA}, which this release reads")
    if odd := [key for key, kind in expected.items() if not isinstance(values.get(key), kind)]:
        raise CheckpointError(f"{path}: damaged at {odd[0]!r}")
    return values


def about(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder: what was submitted; None for a run of which `chexfound-server run` knows nothing.

    Raises: CheckpointError.
    """
    path = folder / "run.json"
    values = read(path, {"recipe": str, "rounds": dict, "flower_runs": list})
    if values is not None and not all(isinstance(one, dict) and "id" in one for one in values["flower_runs"]):
        raise CheckpointError(f"{path}: damaged at 'flower_runs'")
    return values


def live(folder: Path) -> dict[str, Any] | None:
    """live.json of a folder: what its ServerApp last said of itself.

    Raises: CheckpointError.
    """
    values = read(folder / "live.json", {"state": str, "flower_run": str, "waiting_for": list, "replied": list})
    return None if values is None else {"submission": "", "lost": []} | values


def last(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The last submission in run.json: its token (`submission`) and Flower's number (`id`; None: not known yet)."""
    return values["flower_runs"][-1] if values and values["flower_runs"] else {}


# -- by the coordinator's command


def intend(folder: Path) -> str:
    """Put down that the run is going to be submitted; returns the token that goes along.

    Raises: ConfigError if nothing can be submitted again from this folder; StorageError, and nothing was done.
    """
    values = about(folder)
    if values is None:
        raise ConfigError(
            f"{folder}: holds no run.json, so it was not started by chexfound-server run; submit it again as it was"
        )
    token = secrets.token_hex(16)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    values["flower_runs"].append({"id": None, "submission": token, "at": now})
    write_json(folder / "run.json", values)
    return token


def withdraw(folder: Path) -> None:
    """Take back the intent that was put down last."""
    values = about(folder)
    assert values is not None  # `intend` wrote it
    del values["flower_runs"][-1]
    write_json(folder / "run.json", values)


def record(folder: Path, number: str) -> None:
    """Put down which number Flower gave the last submission.

    A disk that is full now costs a look into Flower's database, by the token.
    """
    values = about(folder)
    assert values is not None  # `intend` wrote it
    values["flower_runs"][-1]["id"] = number
    with contextlib.suppress(StorageError):
        write_json(folder / "run.json", values)


def served(folder: Path) -> bool:
    """Whether a process works at the run."""
    return journal.held(folder / LOCK) or journal.held(folder / "journal.jsonl")


# -- by the ServerApp


@contextlib.contextmanager
def alone(folder: Path, token: str, number: str) -> Iterator[None]:
    """Hold a run's folder, as long as its ServerApp lives: the kernel lets go of it, whatever that dies of.

    Args:
        folder: the run's.
        token: of the submission by which this process was started; empty for one by hand.
        number: Flower's, of this run.

    Raises: ConfigError if another process works there, or the run was submitted again since, or twice at once.
    """
    with storage(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "ab")  # noqa: SIM115 (held, with its lock, as long as the run)
    with lock:
        busy = ConfigError(f"{folder}: another process works at this run; stop it, or choose another folder")
        files.lock(lock, busy, TAKE_S)
        if journal.held(folder / "journal.jsonl"):
            raise busy
        if token and token != last(about(folder)).get("submission"):
            raise ConfigError(f"{folder}: this run was submitted again since; that submission goes on with it")
        before = live(folder)
        if token and before is not None and before["submission"] == token and before["flower_run"] != number:
            raise ConfigError(f"{folder}: Flower has this submission twice; its run {before['flower_run']} is the one")
        yield
