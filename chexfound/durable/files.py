"""Files that are replaced atomically, and errors of the disk as sentences."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from chexfound.errors import ConfigError, StorageError

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


def lock(file: int | IO[Any], otherwise: Exception, wait_s: float = 0.0) -> None:
    """Take the exclusive lock on an open file or folder; closing it, or the process's end, gives it back.

    Raises: `otherwise` if another process has it, for `wait_s` seconds on.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise otherwise from error
            time.sleep(0.05)


def _room(path: Path) -> str:
    """How much is free on the disk of a path, as far as that can be asked: a quota is not seen."""
    for place in (path, *Path(os.path.abspath(path)).parents):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(place).free
            return f"{free / 1e9:.1f} GB are free on the disk of {place}"
    return "how much is free cannot be told"


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before this returns."""
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
            sync_folder(path.parent)
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
            sync_folder(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
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


def absent(path: str | Path) -> bool:
    """Tell whether there is nothing at a path, as far as may be seen: what may not be looked at is not absent."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


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


def write_shown(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, for whoever looks at what a process does now.

    It is not durable, since a power cut ends the process too; and where the disk is full the file stays as it was,
    since what is shown must cost no run.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(value))
        os.replace(temporary, path)


def canonical(value: Any) -> bytes:
    """The one JSON text of a value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
