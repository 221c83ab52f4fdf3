"""Texts of a hospital's own store, which stand apart from its index: the index has keys in their place.

STORE/texts.sqlite        key -> text, 0600: paths of files, names of folders, of sources and of findings, reasons

Who has the index alone finds nobody in it, whatever a PACS or a registrar wrote into a path or a label.  Both files
change in one transaction (SQLite's, over attached files), so no key is ever without its text.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from chexfound.data.store.naming import Naming

TEXTS = "texts.sqlite"

# Of the index: every column of free text, a patient's name apart, which has a key of its own (`Naming.name`).
COLUMNS = {
    "images": ("source", "site", "view", "sex", "root", "file"),
    "findings": ("name",),
    "refused": ("source", "root", "file", "reason"),
    "duplicates": ("root", "file"),
}


def attach(index: sqlite3.Connection, path: Path, mode: str) -> None:
    """Attach the texts of the store at `path` to its index, if there are any, or if they may be made ("rwc")."""
    file = (path / TEXTS).absolute()
    if mode == "rwc":
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    if file.exists():
        index.execute("ATTACH ? AS apart", (f"file:{quote(str(file))}?mode={mode}",))


def move(index: sqlite3.Connection, naming: Naming, site: str) -> None:
    """Within a transaction, put keys in the place of all texts of an index that has none yet.

    DICOM files that no manifest listed had the name of their first folder as source; now they have the site's.
    """
    index.create_function("hidden", 1, naming.hide, deterministic=True)
    index.execute("CREATE TABLE apart.texts (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")
    # Found again as if new, and again as duplicates: the reason named a file, by which they were known.
    index.execute("DELETE FROM refused WHERE reason LIKE 'duplicate of %'")
    index.execute("DELETE FROM duplicates")
    if site:
        _rename_loose(index, site)
    for table, columns in COLUMNS.items():
        for column in columns:
            # All names are our own.
            index.execute(
                f"INSERT OR IGNORE INTO apart.texts SELECT hidden({column}), {column} FROM {table} WHERE {column} <> ''"  # noqa: S608
            )
            index.execute(f"UPDATE {table} SET {column} = hidden({column})")  # noqa: S608


def _folder(root: str, file: str) -> str:
    return file.partition("/")[0] if "/" in file else Path(root).name


def _rename_loose(index: sqlite3.Connection, site: str) -> None:
    index.create_function("folder", 2, _folder, deterministic=True)
    unlisted = "site = '' AND split IS NULL AND id NOT IN (SELECT image FROM labels)"
    loose = f"source <> ? AND source = folder(root, file) AND {unlisted}"
    index.execute(f"UPDATE OR IGNORE images SET source = ? WHERE {loose}", (site, site))  # noqa: S608
    # What two folders had is left once; the other file is found again, as a duplicate.
    index.execute(f"DELETE FROM images WHERE {loose}", (site,))  # noqa: S608
    index.execute("UPDATE refused SET source = ? WHERE source = folder(root, file)", (site,))


def hide(index: sqlite3.Connection, naming: Naming, text: str) -> str:
    """The key of a text, which is kept beside."""
    key = naming.hide(text)
    if key:
        index.execute("INSERT OR IGNORE INTO apart.texts VALUES (?, ?)", (key, text))
    return key


def text(index: sqlite3.Connection, key: str) -> str:
    """Give what a key stands for."""
    return str(index.execute("SELECT text FROM apart.texts WHERE key = ?", (key,)).fetchone()[0])


def told(index: sqlite3.Connection, keys: str) -> dict[str, str]:
    """Key -> text of those that a query on the index gives."""
    return dict(index.execute(f"SELECT key, text FROM apart.texts WHERE key IN ({keys})"))  # noqa: S608 (our own)
