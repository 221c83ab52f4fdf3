"""Fills a store from folders of DICOM files and of images listed in a manifest.

Three steps: `find` says which files there are and what is known of each (a manifest's faults end it
here, before anything is written); the decoders turn each into px x px uint8 or into a reason; the
store's writer takes them in the order of their paths, so that threads change nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.data.manifest import DICOM_SUFFIXES, MANIFEST, Entry, read_manifest, unreadable_file
from chexfound.data.naming import Naming
from chexfound.data.store import Image, Writer, is_store, writing
from chexfound.errors import ConfigError, DataError, EmptyError
from chexfound.names import RULE, utf8, word, written
from chexfound.schema import LARGEST_IMAGE_PX

if TYPE_CHECKING:
    import numpy as np

    from chexfound.data.dicom import Header

_AHEAD = 64  # images decoded before they are stored; bounds the memory
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What an ingestion did, and what the store then holds."""

    images: int  # added now
    patients: int  # of the images added now
    refused: list[tuple[str, str]]  # (file, reason), now
    skipped_existing: int  # files that were there already, unchanged (refused ones too)
    findings: list[str]  # of the store, sorted
    sources: list[str]  # of the store, sorted


@dataclass
class _Found:
    entries: list[Entry] = field(default_factory=list)
    loose: int = 0  # pictures that no manifest lists


def ingest(
    source: Path,
    store: Path,
    image_px: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    naming: Naming | None = None,
    site: str = "",
) -> Summary:
    """Add the images under `source` to the store at `store`, which is made if it is absent.

    A file already there with the same path, size and time is not decoded again, but takes its manifest's
    present labels; a changed one takes the place of the old.  What has gone from `source` stays in the store.

    Args:
        source: a folder; below it, each folder with a `manifest.csv` is read by that, the rest as DICOM.
        store: a store, or a folder to be.
        image_px: side of the stored images, pixels.
        progress: called with (files done, files in all).
        naming: by which keys the store names its patients, and all else (default: none; a manifest's names are kept,
            and of a PatientID `chexfound.data.dicom.pseudonym`).
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
        elif _is_dicom(path):
            self.found.entries.append(_loose_dicom(path, self.root, self.site))
        self.found.loose += path.suffix.lower() in (".png", ".jpg", ".jpeg")

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


def _is_dicom(path: Path) -> bool:
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
    refusal = "" if word(image.source) else f"its source would be {image.source!r}, not {RULE}; rename the folder"
    return Entry(path=path, image=image, labels={}, refusal=refusal)


def _fill(
    writer: Writer,
    root: Path,
    entries: list[Entry],
    progress: Callable[[int, int], None] | None,
) -> Summary:
    files = [entry.image.file for entry in entries]
    known = writer.known(str(root.resolve()), files)
    fates: dict[str, _Fate] = {}
    for done, (entry, result) in enumerate(_decoded(entries, known, writer.px), start=1):
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
    for entry, result in _decoded((entry for entry in entries if entry.image.file in bereft), {}, writer.px):
        assert result is not None  # nothing is known to it
        fates[entry.image.file] = _store(writer, entry, result)
    return _summary(writer, root, fates)


@dataclass(frozen=True, kw_only=True)
class _Fate:
    """What became of a file."""

    old: bool = False  # it was in the store, or refused, before
    refused: bool = False
    patient: str = ""
    reason: str = ""


def _summary(writer: Writer, root: Path, fates: dict[str, _Fate]) -> Summary:
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
    return Summary(
        images=len(patients),
        patients=len(set(patients)),
        refused=refused,
        skipped_existing=sum(fate.old for fate in fates.values()),
        findings=findings,
        sources=sources,
    )


def _store(writer: Writer, entry: Entry, result: _Decoded) -> _Fate:
    """Put a decoded image into the store, or among the refused."""
    reason = result.reason
    if result.pixels is not None:
        twin = writer.add(result.image, result.pixels, entry.labels)
        if twin is None:
            return _Fate(patient=f"{entry.image.source}/{result.image.patient}")
        reason = f"duplicate of {twin}"
    writer.refuse(result.image, reason, twin=result.pixels)
    return _Fate(refused=True, reason=reason)


# ---- decoding


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    image: Image
    pixels: np.ndarray | None = None  # uint8 (px, px)
    reason: str = ""  # why there are none


def _decoded(
    entries: Iterable[Entry],
    known: dict[str, tuple[str, int, int, bool]],
    px: int,
) -> Iterator[tuple[Entry, _Decoded | None]]:
    """Each entry with its decoded image, in order; None for a file that is in the store, unchanged."""
    from chexfound.data.dicom import quiet

    pending: deque[tuple[Entry, Future[_Decoded] | None]] = deque()
    with quiet(), ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
        try:
            for entry in entries:
                entry, future = _stated(entry), None
                if not _unchanged(entry, known):
                    future = pool.submit(_decode, entry, px)
                pending.append((entry, future))
                if len(pending) > _AHEAD:
                    yield _next(pending)
            while pending:
                yield _next(pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _unchanged(entry: Entry, known: dict[str, tuple[str, int, int, bool]]) -> bool:
    """Whether the store knows this file as it is.

    One that was refused is tried anew if a manifest lists it, since the manifest may have been mended.
    """
    source, size, mtime_ns, refused = known.get(entry.image.file, ("", -1, -1, False))
    same = (source, size, mtime_ns) == (entry.image.source, entry.image.size, entry.image.mtime_ns)
    return same and not (entry.listed and (refused or entry.refusal))


def _stated(entry: Entry) -> Entry:
    """The entry with its file's size and time (a file that cannot be asked has none, and fails to decode)."""
    try:
        stat = entry.path.stat()
    except OSError:
        return entry
    return replace(entry, image=replace(entry.image, size=stat.st_size, mtime_ns=stat.st_mtime_ns))


def _next(pending: deque[tuple[Entry, Future[_Decoded] | None]]) -> tuple[Entry, _Decoded | None]:
    entry, future = pending.popleft()
    return entry, None if future is None else future.result()


def _decode(entry: Entry, px: int) -> _Decoded:
    """Pixels of one file, squeezed to px x px, or the reason why it has none."""
    import cv2

    from chexfound.data import dicom

    image = entry.image
    if entry.refusal:
        return _Decoded(image=image, reason=entry.refusal)
    try:
        if _is_dicom(entry.path):
            grey, header = dicom.read(entry.path)
            image = _completed(image, header)
        else:
            grey = read_picture(entry.path)
    except DataError as error:
        return _Decoded(image=image, reason=str(error).removeprefix(f"{entry.path}: "))
    if not image.patient:
        return _Decoded(
            image=image,
            reason=f"no PatientID, so its patient cannot be kept in one split; list it in a {MANIFEST}",
        )
    pixels = cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA)
    if pixels.min() == pixels.max():
        return _Decoded(image=image, reason="constant pixels")
    return _Decoded(image=image, pixels=pixels)


def _completed(image: Image, header: Header) -> Image:
    """The row with what the header adds; what a manifest says stands."""
    age = header.age if header.age == header.age else None  # nan: unknown
    return replace(
        image,
        patient=image.patient or header.patient,
        view=image.view or header.view,
        sex=image.sex or header.sex,
        age=age if image.age is None else image.age,
    )


def read_picture(path: Path) -> np.ndarray:
    """Decode a PNG or JPEG to grey uint8 (height, width); 16-bit grey is stretched from its range.

    Raises: DataError "PATH: REASON" if it is truncated, damaged, constant, or of too many pixels.
    """
    import numpy as np
    from PIL import Image as Picture

    from chexfound.data.dicom import LARGEST_PIXELS, stretch, too_many

    try:
        # Pillow, since OpenCV fills what is missing of a truncated file with grey and says nothing.
        with Picture.open(path, formats=("PNG", "JPEG")) as picture:
            if reason := too_many(picture.width * picture.height):
                raise DataError(f"{path}: {reason}")
            if picture.mode.startswith("I"):
                grey = stretch(np.asarray(picture))
            else:
                grey = np.asarray(picture.convert("L"))
    except DataError:
        raise
    except Picture.DecompressionBombError as error:  # from about 1.8 · 10**8 pixels, Pillow is first
        raise DataError(f"{path}: {too_many(LARGEST_PIXELS + 1)}") from error
    except Exception as error:  # as for DICOM: any codec, any exception
        raise DataError(
            f"{path}: cannot be decoded ({type(error).__name__}); the file is damaged or not an image"
        ) from error
    if grey is None or grey.min() == grey.max():
        raise DataError(f"{path}: constant pixels")
    return grey
