"""The only state that must survive: an append-only, hash-chained log, and files replaced atomically.

Guarantee: after `append` or `replace_file` returns, the record or the file survives a crash of the
process and of the machine (fsync of the file and of its folder).  A crash inside leaves the old
state.  The chain finds an accidental or partial change of earlier records; it does not stop someone
who may rewrite the whole file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chexfound.errors import CheckpointError, ConfigError, StorageError

GENESIS = "0" * 64
_PATH_AT_FAULT = {
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "a part of its path is a file",
    errno.EISDIR: "it is a folder",
    errno.ENOTEMPTY: "it is a folder that is not empty",
    errno.ELOOP: "its links lead in a circle",
}


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn every error of the operating system into ours, which says what to do.

    Raises: ConfigError if no file can have such a path, else StorageError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"{path}: no space left to write ({os.strerror(error.errno)}; {_room(path)}); "
                "nothing was half-written; free some space there"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{path}: may not be written ({os.strerror(error.errno)}); check the folder's owner and mode"
            ) from error
        if error.errno in _PATH_AT_FAULT:
            reason = _PATH_AT_FAULT[error.errno]
            raise ConfigError(f"{path}: cannot be written there: {reason}; give another path") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"{path}: cannot be written ({reason}); check the disk and that its folder is there"
        ) from error


def _room(path: Path) -> str:
    """How much is free on the disk of a path, as far as that can be asked: a quota is not seen."""
    for place in (path, *Path(os.path.abspath(path)).parents):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(place).free
            return f"{free / 1e9:.1f} GB are free on the disk of {place}"
    return "how much is free cannot be told"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replace_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, that file takes its place.

    It is readable by its owner only until then, and after that as `mode` says (default: as the umask does).

    Raises: StorageError if the disk is full or not writable; `path` is then as it was.
    """
    path = Path(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well, that folder takes its place.

    Raises: ConfigError if there is a file, or a folder that is not empty; StorageError.
    """
    path = Path(os.path.realpath(path))  # a link is followed: what it leads to is made, not the link replaced
    with storage(path):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file; give a new folder")
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: the folder is not empty; give a new one, or empty it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        with storage(path):
            os.chmod(temporary, 0o777 & ~_umask())
            _sync_folder(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder and below: what it had not yet put in place.

    For a folder that no other process writes into.

    Raises: StorageError.
    """
    with storage(folder):
        for path in list(Path(folder).rglob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)  # for this moment, in which another thread may write
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably."""
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), atomically and durably."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON without NaN, atomically and durably."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def canonical(value: Any) -> bytes:
    """The one JSON text of a value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


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
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"{self.path}: another process is writing this journal; stop it, or choose another folder"
            ) from error
        try:
            self.records, self._size = _read(self.path)
            self._file.truncate(self._size)
            with storage(self.path):
                _sync_folder(self.path.parent)
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
        """What was appended, oldest first."""
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
