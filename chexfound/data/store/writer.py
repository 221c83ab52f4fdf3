"""Writes a store: images and labels, in transactions that a crash leaves whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.data.store import texts
from chexfound.data.store.index import (
    COLUMNS,
    DUPLICATES,
    INDEX,
    KEYED,
    MARKS,
    SCHEMA,
    TABLES,
    Image,
    connect,
    read_key_id,
    read_shards,
)
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import Store
from chexfound.data.store.shards import Shards, sync
from chexfound.durable.files import lock, storage
from chexfound.errors import DataError

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
            if not read_key_id(index):
                index.execute("VACUUM")  # nor from what earlier releases freed without zeroing it
        index.execute("BEGIN IMMEDIATE")
        index.execute(DUPLICATES)
        if naming is not None:
            self._name_all(naming, site)
        self.shards = Shards(folder, px, read_shards(index))
        self._findings: dict[str, int] = dict(index.execute("SELECT name, id FROM findings").fetchall())

    def _name_all(self, naming: Naming, site: str) -> None:
        """Put keys in the place of patients' names and of texts; a store that has them already is left as it is."""
        if read_key_id(self._index):
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
        """Give what stands in the index for a text: a keyed store's key, which may not be there yet, or itself."""
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
            f"INSERT INTO images ({COLUMNS}) VALUES ({MARKS})",  # noqa: S608 (names of our own fields)
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
        site: likewise, as `chexfound.data.intake.ingest.ingest` has it.

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
        lock(handle, DataError(f"{folder}: another process is filling this store; wait for it, or give another folder"))
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
    with contextlib.closing(connect(folder, "rwc")) as index:
        index.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {SCHEMA};")
        index.execute("INSERT INTO meta VALUES (?)", (px,))
        index.execute("COMMIT")


@contextlib.contextmanager
def _transaction(folder: Path, px: int, naming: Naming | None, site: str) -> Iterator[Writer]:
    with contextlib.closing(connect(folder, "rw")) as index:
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
