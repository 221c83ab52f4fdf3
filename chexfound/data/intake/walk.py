"""Finds the images of a folder: what a manifest lists, and DICOM files wherever they lie."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from chexfound.data.intake.manifest import DICOM_SUFFIXES, MANIFEST, Entry, read_manifest, unreadable_file
from chexfound.data.intake.pictures import READERS
from chexfound.data.store.index import Image
from chexfound.parsing.names import RULE, is_name, utf8, written


@dataclass
class _Found:
    entries: list[Entry] = field(default_factory=list)
    loose: int = 0  # pictures that no manifest lists


def find(root: Path, leave: Path | None = None, site: str = "") -> _Found:
    """List the images below `root`, sorted by path; names that start with a dot are left out.

    A link to a folder elsewhere is followed; what cannot be read is listed, with the reason.

    Raises: DataError with every fault of a manifest.
    """
    walk = _Walk(root, leave, site)
    for folder, folders, files in os.walk(root, onerror=walk.unreadable, followlinks=True):
        here = Path(folder)
        if MANIFEST in files:
            folders.clear()  # a manifest speaks for all that lies below it
            walk.found.entries += read_manifest(here, root)
            continue
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and walk.enters(here / name)]
        for name in sorted(files):
            if not name.startswith(".") and name != "DICOMDIR":
                walk.take(here / name)
    walk.found.entries.sort(key=lambda entry: entry.image.file)
    return walk.found


class _Walk:
    """A walk that follows links to folders: enters each once, by its own name if it has one below the root."""

    def __init__(self, root: Path, leave: Path | None, site: str) -> None:
        self.found, self.site = _Found(), site
        self.root, self.real = root, Path(os.path.realpath(root))
        self.leave = None if leave is None else Path(os.path.realpath(leave))
        self.seen = {self.real}

    def refuse(self, path: Path, reason: str) -> None:
        self.found.entries.append(replace(_loose_dicom(path, self.root, self.site), refusal=reason))

    def unreadable(self, error: OSError) -> None:
        self.refuse(Path(error.filename), "the folder may not be read")

    def take(self, path: Path) -> None:
        """Note a file if it is DICOM, or cannot be."""
        if reason := _not_utf8(path) or unreadable_file(path):
            self.refuse(path, reason)
        elif is_dicom(path):
            self.found.entries.append(_loose_dicom(path, self.root, self.site))
        self.found.loose += path.suffix.lower() in READERS

    def enters(self, path: Path) -> bool:
        """Whether to enter a folder: not the store, and none twice."""
        real = Path(os.path.realpath(path))
        if real == self.leave or real in self.seen:
            return False
        if reason := _not_utf8(path) or (self._leads_up(path, real) if os.path.islink(path) else ""):
            self.refuse(path, reason)
            return False
        if os.path.islink(path) and real.is_relative_to(self.real):
            parts = real.relative_to(self.real).parts
            if not any(part.startswith(".") for part in parts):
                return False  # it is entered by its own name
        self.seen.add(real)
        return True

    def _leads_up(self, path: Path, real: Path) -> str:
        holds = any(Path(os.path.realpath(below)).is_relative_to(real) for below in (self.root, path.parent))
        return "a link to a folder that holds this one is not followed" if holds else ""


def _not_utf8(path: Path) -> str:
    return "" if utf8(path.name) else "its name is not UTF-8; rename it"


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, by its suffix or by its first bytes."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _loose_dicom(path: Path, root: Path, site: str) -> Entry:
    relative = path.relative_to(root)
    source = site or (relative.parts[0] if len(relative.parts) > 1 else root.resolve().name)
    image = Image(source=written(source), patient="", root=str(root.resolve()), file=written(relative.as_posix()))
    refusal = "" if is_name(image.source) else f"its source would be {image.source!r}, not {RULE}; rename the folder"
    return Entry(path=path, image=image, labels={}, refusal=refusal)
