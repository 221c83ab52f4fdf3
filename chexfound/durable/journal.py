"""The only state that must survive: an append-only, hash-chained log, and files replaced atomically.

Guarantee: after `append` or `replace_file` returns, the record or the file survives a crash of the
process and of the machine (fsync of the file and of its folder).  A crash inside leaves the old
state.  The chain finds an accidental or partial change of earlier records; it does not stop someone
who may rewrite the whole file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from chexfound.durable.files import canonical, lock, storage, sync_folder
from chexfound.errors import CheckpointError, ConfigError

GENESIS = "0" * 64


class Journal:
    """An append-only JSON-lines file in which each record holds the hash of the one before.

    A record is `{"seq": n, "prev": hash, "data": {...}, "sha256": hash}`.  A last line without its
    newline was being written when the process died: it is cut off at opening.  Anything else that
    does not verify raises CheckpointError, naming the line.  One process at a time: a second one
    raises ConfigError.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written must not wait in memory and reach the disk later.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open, with its lock)
        busy = ConfigError(f"{self.path}: another process is writing this journal; stop it, or choose another folder")
        try:
            lock(self._file, busy)
            self.records, self._size = _read(self.path)
            self._file.truncate(self._size)
            with storage(self.path):
                sync_folder(self.path.parent)
        except BaseException:
            self._file.close()
            raise
        self._head = self.records[-1]["sha256"] if self.records else GENESIS

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Give what was appended, oldest first."""
        return [record["data"] for record in self.records]

    def append(self, data: dict[str, Any]) -> str:
        """Add a record and return its hash once it is on the disk."""
        data = json.loads(json.dumps(data, allow_nan=False))  # as it is read back: a key that is a number becomes text
        record = {"seq": len(self.records), "prev": self._head, "data": data}
        record["sha256"] = head = hashlib.sha256(canonical(record)).hexdigest()
        with storage(self.path):
            try:
                self._file.truncate(self._size)  # an append that failed may have left a torn line
                line = memoryview(canonical(record) + b"\n")
                while line:  # a full disk shows as a short write first
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size = os.fstat(self._file.fileno()).st_size
        self.records.append(record)
        self._head = head
        return head


def held(path: Path) -> bool:
    """Whether a process has a journal open."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The verified records of a journal, and the length of the file that they fill."""
    data = path.read_bytes()
    good = data.rfind(b"\n") + 1
    records: list[dict[str, Any]] = []
    head = GENESIS
    for number, line in enumerate(data[:good].splitlines(), start=1):
        try:
            record = json.loads(line)
            stated = record.pop("sha256")
            valid = (
                set(record) == {"seq", "prev", "data"}
                and isinstance(record["data"], dict)
                and record["seq"] == len(records)
                and record["prev"] == head
                and hashlib.sha256(canonical(record)).hexdigest() == stated
            )
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise CheckpointError(
                f"{path}: line {number} does not continue the chain before it: the journal was changed or damaged"
            )
        head = record["sha256"] = stated
        records.append(record)
    return records, good


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal that another process may be writing (a torn last line is left out)."""
    return [record["data"] for record in _read(Path(path))[0]]
