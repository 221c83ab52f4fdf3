"""Fills a store from folders of DICOM files and of images listed in a manifest.

Three steps: `find` says which files there are and what is known of each (a manifest's faults end it
here, before anything is written); the decoders turn each into px x px uint8 or into a reason; the
store's writer takes them in the order of their paths, so that threads change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.data.intake.manifest import MANIFEST, Entry
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import is_store
from chexfound.data.store.writer import Writer, writing
from chexfound.errors import ConfigError, DataError, EmptyError
from chexfound.parsing.names import utf8, written
from chexfound.recipe.schema import LARGEST_IMAGE_PX

if TYPE_CHECKING:
    pass

from chexfound.data.intake.decode import Decoded, decoded
from chexfound.data.intake.walk import find


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """Hold what an ingestion did, and what the store then holds."""

    images: int  # added now
    patients: int  # of the images added now
    refused: list[tuple[str, str]]  # (file, reason), now
    skipped_existing: int  # files that were there already, unchanged (refused ones too)
    findings: list[str]  # of the store, sorted
    sources: list[str]  # of the store, sorted


def ingest(
    source: Path,
    store: Path,
    image_px: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    naming: Naming | None = None,
    site: str = "",
) -> IngestSummary:
    """Add the images under `source` to the store at `store`, which is made if it is absent.

    A file already there with the same path, size and time is not decoded again, but takes its manifest's
    present labels; a changed one takes the place of the old.  What has gone from `source` stays in the store.

    Args:
        source: a folder; below it, each folder with a `manifest.csv` is read by that, the rest as DICOM.
        store: a store, or a folder to be.
        image_px: side of the stored images, pixels.
        progress: called with (files done, files in all).
        naming: by which keys the store names its patients, and all else (default: none; a manifest's names are kept,
            and of a PatientID `chexfound.data.intake.dicom.pseudonym`).
        site: the source of DICOM files that no manifest lists (default: of each the first folder below `source`,
            which in a PACS may be a patient's).

    Raises:
        ConfigError: image_px is out of range, or a path is not UTF-8 or cannot be.
        DataError: no such folder, a manifest at fault, or a store that does not fit.
        EmptyError: no usable image.
        StorageError: the disk is full or refuses.  Whatever is raised, the store is as it was.
    """
    source, store = Path(source), Path(store)
    if not 1 <= image_px <= LARGEST_IMAGE_PX:
        raise ConfigError(f"image_px: must be 1 to {LARGEST_IMAGE_PX} (got {image_px!r})")
    for path in (source, store):
        if not (utf8(path.absolute()) and utf8(os.path.realpath(path))):
            raise ConfigError(f"{written(path)}: the path is not UTF-8 as the index must be; rename the folder")
    if not is_store(source) and not os.path.isdir(source):  # the first tells what may not be read
        raise DataError(f"{source}: no such folder; give the folder that holds the images")
    found = find(source, leave=store, site=site)
    if not found.entries:
        hint = f"; {found.loose} PNG or JPEG files lie there, and need a {MANIFEST} beside them" if found.loose else ""
        raise EmptyError(f"{source}: no images: neither DICOM files nor a {MANIFEST}{hint}")
    with writing(store, image_px, naming, site) as writer:
        return _fill(writer, source, found.entries, progress)


def _fill(
    writer: Writer,
    root: Path,
    entries: list[Entry],
    progress: Callable[[int, int], None] | None,
) -> IngestSummary:
    files = [entry.image.file for entry in entries]
    known = writer.known(str(root.resolve()), files)
    fates: dict[str, _Fate] = {}
    for done, (entry, result) in enumerate(decoded(entries, known, writer.px), start=1):
        file = entry.image.file
        if result is None:
            if entry.listed:
                writer.describe(entry.image, entry.labels)
            fates[file] = _Fate(old=True, refused=known[file][-1])
        else:
            fates[file] = _store(writer, entry, result)
        if progress is not None:
            progress(done, len(entries))
    # A duplicate stands in for its twin if that was refused or changed, now or since.
    bereft = writer.bereft(str(root.resolve()), files)
    for entry, result in decoded((entry for entry in entries if entry.image.file in bereft), {}, writer.px):
        assert result is not None  # nothing is known to it
        fates[entry.image.file] = _store(writer, entry, result)
    return _summary(writer, root, fates)


@dataclass(frozen=True, kw_only=True)
class _Fate:
    """Hold what became of a file."""

    old: bool = False  # it was in the store, or refused, before
    refused: bool = False
    patient: str = ""
    reason: str = ""


def _summary(writer: Writer, root: Path, fates: dict[str, _Fate]) -> IngestSummary:
    refused = [(file, fate.reason) for file, fate in fates.items() if fate.refused and not fate.old]
    patients = [fate.patient for fate in fates.values() if not (fate.refused or fate.old)]
    if all(fate.refused for fate in fates.values()):
        reasons = "".join(f"\n  - {file}: {reason}" for file, reason in refused[:10])
        more = f"\n  - and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise EmptyError(
            f"{root}: no usable image among {len(fates)} files"
            f"{':' if refused else ', all refused before'}{reasons}{more}"
        )
    findings, sources = writer.names()
    return IngestSummary(
        images=len(patients),
        patients=len(set(patients)),
        refused=refused,
        skipped_existing=sum(fate.old for fate in fates.values()),
        findings=findings,
        sources=sources,
    )


def _store(writer: Writer, entry: Entry, result: Decoded) -> _Fate:
    """Put a decoded image into the store, or among the refused."""
    reason = result.reason
    if result.pixels is not None:
        twin = writer.add(result.image, result.pixels, entry.labels)
        if twin is None:
            return _Fate(patient=f"{entry.image.source}/{result.image.patient}")
        reason = f"duplicate of {twin}"
    writer.refuse(result.image, reason, twin=result.pixels)
    return _Fate(refused=True, reason=reason)
