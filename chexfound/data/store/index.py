"""The index of a store: an SQLite database of images and labels, and its checks."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote

import numpy as np

from chexfound.data.store import texts
from chexfound.errors import DataError

SCHEMA = 1  # PRAGMA user_version
KEYED = 2  # likewise, where patients are named by a key: the table `naming` says by which
INDEX = "index.sqlite"
UNKNOWN = -1

TABLES = """
CREATE TABLE meta (px INTEGER NOT NULL);
CREATE TABLE shards (number INTEGER PRIMARY KEY, rows INTEGER NOT NULL);
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    source TEXT NOT NULL, patient TEXT NOT NULL, site TEXT NOT NULL, view TEXT NOT NULL,
    age REAL, sex TEXT NOT NULL, split TEXT CHECK (split IN ('train', 'val', 'test')),
    root TEXT NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards (number), row INTEGER NOT NULL,
    UNIQUE (root, file), UNIQUE (source, sha256), UNIQUE (shard, row)
);
CREATE TABLE findings (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE labels (
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    finding INTEGER NOT NULL REFERENCES findings (id),
    value INTEGER NOT NULL CHECK (value IN (0, 1)),
    PRIMARY KEY (image, finding)
) WITHOUT ROWID;
CREATE TABLE refused (
    source TEXT NOT NULL, root TEXT NOT NULL, file TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (root, file)
);
"""
# Apart from `refused`, and made by each writer: stores that were there before it still open.
DUPLICATES = """
CREATE TABLE IF NOT EXISTS duplicates (
    root TEXT NOT NULL, file TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (root, file)
)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A row of the index; the last three are filled in by the store."""

    source: str
    patient: str
    file: str  # relative to `root`; read from a keyed store, the key of that (`Store.file`), and so is `root`
    root: str = ""  # the folder that was ingested, absolute: files of two folders may have one name
    size: int = 0  # of the file, bytes
    mtime_ns: int = 0
    site: str = ""
    view: str = ""
    age: float | None = None  # years
    sex: str = ""
    split: str | None = None  # the manifest's own
    sha256: str = ""  # of the stored pixels
    shard: int = -1
    row: int = -1


COLUMNS = ", ".join(field.name for field in fields(Image))
MARKS = ", ".join("?" for _ in fields(Image))


# Of a keyed store, the texts that whoever opens it needs; those of files only `Store.file` and `Store.refused` do.
_SAID = ("source", "site", "view", "sex")
KEYS = " UNION ".join([*(f"SELECT {column} FROM images" for column in _SAID), "SELECT name FROM findings"])  # noqa: S608


def read_images(index: sqlite3.Connection, told: Mapping[str, str]) -> tuple[list[int], list[Image]]:
    """The rows in canonical order, each with its number in the index."""
    names, found = [field.name for field in fields(Image)], []
    for number, *values in index.execute(f"SELECT id, {COLUMNS} FROM images"):  # noqa: S608 (our own names)
        row = dict(zip(names, values, strict=True))
        if told:
            row |= {name: told[row[name]] for name in _SAID if row[name]}
        found.append((number, Image(**row)))
    found.sort(key=lambda one: (one[1].source, one[1].patient, one[1].sha256))
    return [number for number, _ in found], [image for _, image in found]


def read_labels(index: sqlite3.Connection, places: Mapping[int, int], told: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read the labels int8 (N,) of each finding, −1 where unknown, in the order of the images' places."""
    labels: dict[str, np.ndarray] = {}
    rows = index.execute("SELECT image, name, value FROM labels JOIN findings ON findings.id = finding")
    for image, key, value in rows:
        finding = told.get(key, key)
        if finding not in labels:
            labels[finding] = np.full(len(places), UNKNOWN, np.int8)
        labels[finding][places[image]] = value
    return labels


def read_shards(index: sqlite3.Connection) -> list[tuple[int, int]]:
    """Read the number and the size of each shard, in order."""
    return index.execute("SELECT number, rows FROM shards ORDER BY number").fetchall()


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise what SQLite says of a damaged index as a DataError that names the store."""
    try:
        yield
    except (sqlite3.DatabaseError, TypeError, ValueError, KeyError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise DataError(f"{path}: the store is being written; try again in a minute") from error
        raise DataError(f"{path}: the store is damaged ({error}); remove it and ingest again") from error


def check_schema(path: Path, index: sqlite3.Connection) -> None:
    """Raise DataError if the index is of another version than this code reads."""
    found = index.execute("PRAGMA user_version").fetchone()[0]
    if found not in (SCHEMA, KEYED):
        raise DataError(f"{path}: a store of schema {found!r}, not {SCHEMA} or {KEYED}; remove it and ingest again")


def read_key_id(index: sqlite3.Connection) -> str:
    """Read which key the patients of a store are named by; empty for none."""
    keyed = index.execute("PRAGMA user_version").fetchone()[0] == KEYED
    return str(index.execute("SELECT key FROM naming").fetchone()[0]) if keyed else ""


def key_id(path: Path) -> str:
    """Give the identifier of the key that names the patients of a store; empty if none does.

    Raises: DataError if it is absent, damaged, or written with another schema.
    """
    if not (path / INDEX).is_file():
        raise DataError(f"{path}: no store here (no {INDEX}); remove it")
    with damage_told(path), contextlib.closing(connect(path)) as index:
        check_schema(path, index)
        return read_key_id(index)


def connect(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """Open the index.  Rolls back first what a process that died in its commit left half-done."""
    address = f"file:{quote(str((path / INDEX).absolute()))}?mode="
    if mode == "ro" and any((path / f"{name}-journal").exists() for name in (INDEX, texts.TEXTS)):
        # Only a connection that may write can roll back; where we may not, the reading below tells so.
        with contextlib.suppress(sqlite3.OperationalError):
            with contextlib.closing(sqlite3.connect(f"{address}rw", uri=True, timeout=30)) as index:
                texts.attach(index, path, "rw")
                index.execute("SELECT px FROM meta").fetchone()
                index.execute("SELECT 1 FROM apart.texts").fetchone()
    index = sqlite3.connect(address + mode, uri=True, timeout=30, isolation_level=None)
    index.execute("PRAGMA foreign_keys = ON")
    if mode == "ro":
        texts.attach(index, path, mode)
    return index
