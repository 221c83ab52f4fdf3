"""What training reads: uint8 images of one size in memory-mapped shards, and an SQLite index.

STORE/index.sqlite        who, where, which labels, where the pixels lie, and what was refused
STORE/shard-00000.npy     uint8 (N, px, px), at most `SHARD_IMAGES` each

Patients are named as they came in, or in a hospital's own store by its key (`Naming`); a store says by which.  Of that
index no other text is one to read either: keys stand there, and STORE/texts.sqlite has what they stand for (texts.py).

An image's **id** is its place in the canonical order (source, patient, hash of the pixels), so the
same content has the same ids in whatever order it came in; adding images renumbers.

Guarantee: an ingestion is seen whole or not at all.  A new store is built beside and renamed; in an
old one the pixels are on the disk before the one SQLite transaction that names them, and what lies
in a shard beyond the index is cut off by the next writer.  A process that has the store open
keeps seeing what it opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from chexfound.data import texts
from chexfound.data.naming import Naming
from chexfound.data.shards import Shards, map_shard, sync
from chexfound.errors import DataError
from chexfound.journal import canonical, storage

SCHEMA = 1  # PRAGMA user_version
KEYED = 2  # likewise, where patients are named by a key: the table `naming` says by which
INDEX = "index.sqlite"
UNKNOWN = -1

_TABLES = """
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
_DUPLICATES = """
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


_COLUMNS = ", ".join(field.name for field in fields(Image))
_MARKS = ", ".join("?" for _ in fields(Image))


def is_store(path: Path) -> bool:
    """Whether a folder is a store.

    Raises: DataError if this account may not look.
    """
    try:
        os.stat(path / INDEX)
    except PermissionError as error:
        raise DataError(
            f"{path}: may not be read ({error.strerror}); check owner and mode of that folder, and of those "
            "that it lies in"
        ) from error
    except (OSError, ValueError):  # there is none, or can be none
        return False
    return True


class Store:
    """A store opened for reading; any number of processes may have it open, and it pickles as its path."""

    def __init__(
        self,
        path: Path,
        px: int,
        images: list[Image],
        labels: dict[str, np.ndarray],
        shards: list[np.ndarray],
        key_id: str,
    ) -> None:
        self.path = path
        self.key_id = key_id  # of the key that names its patients; empty: none does
        self.px = px
        self.images = images
        self.ids = np.arange(len(images), dtype=np.int64)
        self.ids.flags.writeable = False
        self.sources = [image.source for image in images]
        self.patients = [image.patient for image in images]
        # A patient's name that is unique over all sources.
        self.keys = [f"{image.source}/{image.patient}" for image in images]
        self.sites = [image.site for image in images]
        self.views = [image.view for image in images]
        self.sexes = [image.sex for image in images]
        self.ages = np.array([math.nan if image.age is None else image.age for image in images], np.float64)
        self.splits = [image.split for image in images]
        self.findings = sorted(labels)
        self._labels = labels
        self._shards = shards
        self._shard = np.array([image.shard for image in images], np.int64)
        self._row = np.array([image.row for image in images], np.int64)

    @staticmethod
    def open(path: Path) -> Store:
        """Open a store for reading.

        Raises: DataError if it is absent, damaged, or written with another schema.
        """
        path = Path(path)
        if not (path / INDEX).is_file():
            raise DataError(f"{path}: no store here (no {INDEX}); make one with `chexfound ingest`")
        with _damage_told(path), contextlib.closing(_connect(path)) as index:
            _check_schema(path, index)
            px = index.execute("SELECT px FROM meta").fetchone()[0]
            key_id = _key_id(index)
            told = texts.told(index, _KEYS) if key_id else {}
            numbers, images = _read_images(index, told)
            labels = _read_labels(index, {number: place for place, number in enumerate(numbers)}, told)
            shards = [map_shard(path, number, count, px) for number, count in _read_shards(index)]
        return Store(path, px, images, labels, shards, key_id)

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    @property
    def refused(self) -> list[tuple[str, str]]:
        """The files that were left out, each with the reason, sorted."""
        with _damage_told(self.path), contextlib.closing(_connect(self.path)) as index:
            rows = index.execute("SELECT file, reason, root FROM refused").fetchall()
            keys = "SELECT file FROM refused UNION SELECT reason FROM refused UNION SELECT root FROM refused"
            told = texts.told(index, keys) if self.key_id else {}
        listed = sorted((told.get(file, file), told.get(root, root), told.get(why, why)) for file, why, root in rows)
        return [(file, reason) for file, _, reason in listed]

    def file(self, image: int) -> str:
        """The file of an image, relative to the folder that was ingested."""
        name = self.images[image].file
        if not self.key_id:
            return name
        with _damage_told(self.path), contextlib.closing(_connect(self.path)) as index:
            return texts.text(index, name)

    def labels(self, ids: Iterable[int] | np.ndarray, findings: Sequence[str]) -> np.ndarray:
        """Labels int8 (n, F): 1, 0, or -1 if unknown, as is a finding that the store does not have."""
        ids = self._checked(ids)
        result = np.full((len(ids), len(findings)), UNKNOWN, np.int8)
        for column, finding in enumerate(findings):
            if finding in self._labels:
                result[:, column] = self._labels[finding][ids]
        return result

    def pixels(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """A copy of the pixels, uint8 (n, px, px), in the order of `ids`."""
        ids = self._checked(ids)
        shard, row = self._shard[ids], self._row[ids]
        result = np.empty((len(ids), self.px, self.px), np.uint8)
        numbers = np.unique(shard)
        if len(numbers) == 1:  # straight into the result ("clip": no buffer between)
            return np.take(self._shards[numbers[0]], row, axis=0, out=result, mode="clip")
        for number in numbers:
            here = np.flatnonzero(shard == number)
            result[here] = self._shards[number][row[here]]
        return result

    def digest(self) -> str:
        """SHA-256 over all that training can see of each image (pixels, labels, who, where), in order."""
        known = {finding: values.tolist() for finding, values in sorted(self._labels.items())}
        digest = hashlib.sha256(canonical(["chexfound store", SCHEMA, self.px]))
        for place, image in enumerate(self.images):
            labels = {finding: values[place] for finding, values in known.items() if values[place] != UNKNOWN}
            who = [image.source, image.patient, image.site, image.view, image.age, image.sex, image.split]
            digest.update(canonical([image.sha256, who, labels]))
        return digest.hexdigest()

    def _checked(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            bad = int(ids[(ids < 0) | (ids >= len(self))][0])
            raise DataError(
                f"{self.path}: no image {bad!r}; ids are below {len(self)}, and change when images are added"
            )
        return ids


# Of a keyed store, the texts that whoever opens it needs; those of files only `Store.file` and `Store.refused` do.
_SAID = ("source", "site", "view", "sex")
_KEYS = " UNION ".join([*(f"SELECT {column} FROM images" for column in _SAID), "SELECT name FROM findings"])  # noqa: S608


def _read_images(index: sqlite3.Connection, told: Mapping[str, str]) -> tuple[list[int], list[Image]]:
    """The rows in canonical order, each with its number in the index."""
    names, found = [field.name for field in fields(Image)], []
    for number, *values in index.execute(f"SELECT id, {_COLUMNS} FROM images"):  # noqa: S608 (our own names)
        row = dict(zip(names, values, strict=True))
        if told:
            row |= {name: told[row[name]] for name in _SAID if row[name]}
        found.append((number, Image(**row)))
    found.sort(key=lambda one: (one[1].source, one[1].patient, one[1].sha256))
    return [number for number, _ in found], [image for _, image in found]


def _read_labels(
    index: sqlite3.Connection, places: Mapping[int, int], told: Mapping[str, str]
) -> dict[str, np.ndarray]:
    labels: dict[str, np.ndarray] = {}
    rows = index.execute("SELECT image, name, value FROM labels JOIN findings ON findings.id = finding")
    for image, key, value in rows:
        finding = told.get(key, key)
        if finding not in labels:
            labels[finding] = np.full(len(places), UNKNOWN, np.int8)
        labels[finding][places[image]] = value
    return labels


def _read_shards(index: sqlite3.Connection) -> list[tuple[int, int]]:
    return index.execute("SELECT number, rows FROM shards ORDER BY number").fetchall()


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, TypeError, ValueError, KeyError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise DataError(f"{path}: the store is being written; try again in a minute") from error
        raise DataError(f"{path}: the store is damaged ({error}); remove it and ingest again") from error


def _check_schema(path: Path, index: sqlite3.Connection) -> None:
    found = index.execute("PRAGMA user_version").fetchone()[0]
    if found not in (SCHEMA, KEYED):
        raise DataError(f"{path}: a store of schema {found!r}, not {SCHEMA} or {KEYED}; remove it and ingest again")


def _key_id(index: sqlite3.Connection) -> str:
    keyed = index.execute("PRAGMA user_version").fetchone()[0] == KEYED
    return str(index.execute("SELECT key FROM naming").fetchone()[0]) if keyed else ""


def key_id(path: Path) -> str:
    """Which key names the patients of a store; empty if none does.

    Raises: DataError if it is absent, damaged, or written with another schema.
    """
    if not (path / INDEX).is_file():
        raise DataError(f"{path}: no store here (no {INDEX}); remove it")
    with _damage_told(path), contextlib.closing(_connect(path)) as index:
        _check_schema(path, index)
        return _key_id(index)


def _connect(path: Path, mode: str = "ro") -> sqlite3.Connection:
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


# ---- writing


class Writer:
    """Adds to a store; made by `writing`, and seen by others only when that block ends well."""

    def __init__(self, folder: Path, px: int, index: sqlite3.Connection, naming: Naming | None, site: str) -> None:
        self.px = px
        self._index = index
        self._naming = naming
        # Pages stay in memory until the commit, so readers are not locked out while images are decoded.
        # What is overwritten is zeroed: the names of before must not be read from the file.
        index.executescript("PRAGMA cache_spill = OFF; PRAGMA synchronous = EXTRA; PRAGMA secure_delete = ON;")
        if naming is not None:
            texts.attach(index, folder, "rwc")
            index.execute("PRAGMA apart.synchronous = EXTRA")
            if not _key_id(index):
                index.execute("VACUUM")  # nor from what earlier releases freed without zeroing it
        index.execute("BEGIN IMMEDIATE")
        index.execute(_DUPLICATES)
        if naming is not None:
            self._name_all(naming, site)
        self.shards = Shards(folder, px, _read_shards(index))
        self._findings: dict[str, int] = dict(index.execute("SELECT name, id FROM findings").fetchall())

    def _name_all(self, naming: Naming, site: str) -> None:
        """Put keys in the place of patients' names and of texts; a store that has them already is left as it is."""
        if _key_id(self._index):
            return
        self._index.create_function("named", 1, naming.name, deterministic=True)
        self._index.execute("UPDATE images SET patient = named(patient)")
        texts.move(self._index, naming, site)
        self._index.execute("CREATE TABLE naming (key TEXT NOT NULL)")
        self._index.execute("INSERT INTO naming VALUES (?)", (naming.key_id,))
        self._index.execute(f"PRAGMA user_version = {KEYED}")

    def _name(self, patient: str) -> str:
        return patient if self._naming is None else self._naming.name(patient)

    def _key(self, text: str) -> str:
        """What stands in the index for a text: a keyed store's key, which may not be there yet, or the text itself."""
        return text if self._naming is None else self._naming.hide(text)

    def _hide(self, text: str) -> str:
        """Likewise, and the text stands beside the index from now on."""
        return text if self._naming is None else texts.hide(self._index, self._naming, text)

    def _hidden(self, image: Image) -> Image:
        said: dict[str, Any] = {name: self._hide(getattr(image, name)) for name in texts.COLUMNS["images"]}
        return replace(image, patient=self._name(image.patient), **said)

    def known(self, root: str, files: Iterable[str]) -> dict[str, tuple[str, int, int, bool]]:
        """File -> (source, size, mtime_ns, whether it was refused) of those that were ever ingested from `root`."""
        rows = self._index.execute(
            "SELECT file, source, size, mtime_ns, 0 FROM images WHERE root = ?1"
            " UNION ALL SELECT file, source, size, mtime_ns, 1 FROM refused WHERE root = ?1",
            (self._key(root),),
        )
        told = self._told("SELECT source FROM images UNION SELECT source FROM refused")
        found = {
            file: (told.get(source, source), size, mtime_ns, bool(refused))
            for file, source, size, mtime_ns, refused in rows
        }
        return {file: found[key] for file in files if (key := self._key(file)) in found}

    def _told(self, keys: str) -> dict[str, str]:
        return {} if self._naming is None else texts.told(self._index, keys)

    def bereft(self, root: str, files: Iterable[str]) -> set[str]:
        """Those files of `root` that were refused as duplicates of pixels that their source no longer has."""
        rows = self._index.execute(
            "SELECT file FROM refused LEFT JOIN duplicates USING (root, file)"
            " WHERE root = ? AND (sha256 IS NOT NULL OR reason LIKE 'duplicate of %') AND NOT EXISTS"
            " (SELECT 1 FROM images WHERE images.source = refused.source AND images.sha256 = duplicates.sha256)",
            (self._key(root),),
        )
        found = {file for (file,) in rows}
        return {file for file in files if self._key(file) in found}

    def add(self, image: Image, pixels: np.ndarray, labels: Mapping[str, int]) -> str | None:
        """Add an image, in place of an earlier one of the same file.

        Args:
            image: its row; hash and place are filled in here, and keys where the store has them.
            pixels: uint8 (px, px).
            labels: finding -> 1 or 0; what is not named is unknown.

        Returns: None; or, when the source already has these very pixels from another file, that file
        (then nothing was added).
        """
        sha256, image = hashlib.sha256(pixels.tobytes()).hexdigest(), self._hidden(image)
        # The same file with the same pixels: touched, or moved with its root.  Its pixels stay put.
        same = self._index.execute(
            "SELECT root, shard, row FROM images WHERE source = ? AND file = ? AND sha256 = ?",
            (image.source, image.file, sha256),
        ).fetchone()
        self._forget(image.root, image.file)
        if same is not None:
            self._forget(same[0], image.file)
        twin = self._index.execute(
            "SELECT file FROM images WHERE source = ? AND sha256 = ?", (image.source, sha256)
        ).fetchone()
        if twin is not None:
            return str(twin[0]) if self._naming is None else texts.text(self._index, twin[0])
        shard, row = same[1:] if same is not None else self.shards.append(pixels)
        self._index.execute(
            "INSERT INTO shards VALUES (?, ?) ON CONFLICT (number) DO UPDATE SET rows = max(rows, excluded.rows)",
            (shard, row + 1),
        )
        cursor = self._index.execute(
            f"INSERT INTO images ({_COLUMNS}) VALUES ({_MARKS})",  # noqa: S608 (names of our own fields)
            astuple(replace(image, sha256=sha256, shard=shard, row=row)),
        )
        assert cursor.lastrowid is not None
        self._label(cursor.lastrowid, labels)
        return None

    def describe(self, image: Image, labels: Mapping[str, int]) -> None:
        """Give an image that is there the manifest's present labels and fields (blank: as it was)."""
        image = self._hidden(image)
        number = self._index.execute(
            "SELECT id FROM images WHERE root = ? AND file = ?", (image.root, image.file)
        ).fetchone()[0]
        self._index.execute(
            "UPDATE images SET patient = ?, site = ?, split = ?, age = coalesce(?, age),"
            " view = coalesce(nullif(?, ''), view), sex = coalesce(nullif(?, ''), sex) WHERE id = ?",
            (image.patient, image.site, image.split, image.age, image.view, image.sex, number),
        )
        self._index.execute("DELETE FROM labels WHERE image = ?", (number,))
        self._label(number, labels)

    def refuse(self, image: Image, reason: str, twin: np.ndarray | None = None) -> None:
        """Note a file that is left out, and why; an earlier image of that file is taken out.

        `twin`: the pixels, if the reason is that another file has the same.
        """
        image = self._hidden(image)
        self._forget(image.root, image.file)
        row = (image.source, image.root, image.file, image.size, image.mtime_ns, self._hide(reason))
        self._index.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?)", row)
        if twin is not None:
            sha256 = hashlib.sha256(twin.tobytes()).hexdigest()
            self._index.execute("INSERT INTO duplicates VALUES (?, ?, ?)", (image.root, image.file, sha256))

    def forget(self, root: str, file: str) -> None:
        """Take a file's row out of the index (its pixels stay in the shard, unnamed)."""
        self._forget(self._key(root), self._key(file))

    def _forget(self, root: str, file: str) -> None:
        for table in ("images", "refused", "duplicates"):
            self._index.execute(f"DELETE FROM {table} WHERE root = ? AND file = ?", (root, file))  # noqa: S608

    def names(self) -> tuple[list[str], list[str]]:
        """The findings with any label and the sources, as they now stand, sorted."""
        findings = "SELECT DISTINCT name FROM labels JOIN findings ON findings.id = finding"
        return self._texts(findings), self._texts("SELECT DISTINCT source FROM images")

    def _texts(self, keys: str) -> list[str]:
        told = self._told(keys)
        return sorted(told.get(key, key) for (key,) in self._index.execute(keys))

    def _label(self, number: int, labels: Mapping[str, int]) -> None:
        for finding, value in sorted(labels.items()):
            key = self._key(finding)
            if key not in self._findings:
                cursor = self._index.execute("INSERT INTO findings (name) VALUES (?)", (self._hide(finding),))
                self._findings[key] = cursor.lastrowid or 0
            self._index.execute("INSERT INTO labels VALUES (?, ?, ?)", (number, self._findings[key], value))

    def check(self) -> None:
        """Raise DataError if a patient now stands in two splits."""
        rows = self._index.execute(
            "SELECT source, patient FROM images GROUP BY source, patient HAVING count(DISTINCT split) > 1"
        ).fetchall()
        if rows:
            told = self._told("SELECT source FROM images")
            named = ", ".join(repr(f"{told.get(source, source)}/{patient}") for source, patient in rows[:5])
            raise DataError(f"with these images, patients would be in two splits: {named}; mend the manifests")

    def commit(self) -> None:
        """Make everything durable: pixels first, then the index that names them."""
        self.check()
        self.shards.sync()
        self._index.execute("COMMIT")
        self.shards.committed = dict(self.shards.rows)


@contextlib.contextmanager
def writing(path: Path, px: int, naming: Naming | None = None, site: str = "") -> Iterator[Writer]:
    """Open a store for adding, or make it; commits when the block ends well, else leaves all as it was.

    Args:
        path: of the store.
        px: side of its images, pixels.
        naming: by which keys patients and all else are named; what is in the store without them is named anew, in the
            same transaction.
        site: likewise, as `chexfound.data.sources.ingest` has it.

    Raises: DataError if the store is damaged, holds images of another size or names by another key, is being
    written by another process, or if `path` is something else; StorageError if the disk is full or refuses;
    ConfigError if there can be no such path.
    """
    path = Path(path).absolute()
    with storage(path), _disk_told():
        if (path / INDEX).is_file():
            with _locked(path):
                found = Store.open(path)
                if found.px != px:
                    raise DataError(
                        f"{path}: holds images of {found.px} px, not {px!r}; give another folder, or {found.px} px"
                    )
                if found.key_id and found.key_id != (naming.key_id if naming else ""):
                    raise DataError(
                        f"{path}: names its patients by {'another' if naming else 'a'} key of the site that made it, "
                        "so new images cannot be added to theirs; give another folder"
                    )
                with _transaction(path, px, naming, site) as writer:
                    yield writer
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DataError(f"{path}: exists and is not a store; give a folder that is new or empty")
        with _building(path) as folder:
            _create(folder, px)
            with _transaction(folder, px, naming, site) as writer:
                yield writer
            os.rename(folder, path)
            sync(path.parent)


_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


@contextlib.contextmanager
def _disk_told() -> Iterator[None]:
    """SQLite's own words for a disk that is full or refuses as the system's, which `storage` explains."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = _SQLITE.get(error.sqlite_errorcode & 0xFF)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise DataError(
            f"{folder}: another process is filling this store; wait for it, or give another folder"
        ) from error
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _building(path: Path) -> Iterator[Path]:
    """A folder beside `path` to build in: empty, ours alone, gone if the block fails."""
    folder = path.parent / f".{path.name}.building"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for left in folder.iterdir():  # by a process that was killed
            left.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _create(folder: Path, px: int) -> None:
    with contextlib.closing(_connect(folder, "rwc")) as index:
        index.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA};")
        index.execute("INSERT INTO meta VALUES (?)", (px,))
        index.execute("COMMIT")


@contextlib.contextmanager
def _transaction(folder: Path, px: int, naming: Naming | None, site: str) -> Iterator[Writer]:
    with contextlib.closing(_connect(folder, "rw")) as index:
        writer = Writer(folder, px, index, naming, site)
        try:
            yield writer
            writer.commit()
        except BaseException:
            if index.in_transaction:
                index.execute("ROLLBACK")
            with contextlib.suppress(OSError):  # the next writer cuts what could not be cut now
                writer.shards.cut()
            raise
