"""Decodes files ahead of who stores them, in worker processes and in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chexfound.data.intake.manifest import MANIFEST, Entry
from chexfound.data.intake.pictures import READERS, read_picture
from chexfound.data.intake.walk import is_dicom
from chexfound.data.store.index import Image
from chexfound.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from chexfound.data.intake.dicom import Header

_AHEAD = 64  # images decoded before they are stored; bounds the memory
_THREADS = min(4, os.cpu_count() or 1)


# ---- decoding


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One file as it was decoded, or the reason why it was not."""

    image: Image
    pixels: np.ndarray | None = None  # uint8 (px, px)
    reason: str = ""  # why there are none


def decoded(
    entries: Iterable[Entry],
    known: dict[str, tuple[str, int, int, bool]],
    px: int,
) -> Iterator[tuple[Entry, Decoded | None]]:
    """Each entry with its decoded image, in order; None for a file that is in the store, unchanged."""
    from chexfound.data.intake.dicom import quiet

    pending: deque[tuple[Entry, Future[Decoded] | None]] = deque()
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


def _next(pending: deque[tuple[Entry, Future[Decoded] | None]]) -> tuple[Entry, Decoded | None]:
    entry, future = pending.popleft()
    return entry, None if future is None else future.result()


def _decode(entry: Entry, px: int) -> Decoded:
    """Pixels of one file, squeezed to px x px, or the reason why it has none."""
    import cv2

    from chexfound.data.intake import dicom

    image = entry.image
    if entry.refusal:
        return Decoded(image=image, reason=entry.refusal)
    try:
        if is_dicom(entry.path):
            grey, header = dicom.read(entry.path)
            image = _completed(image, header)
        else:
            grey = READERS.get(entry.path.suffix.lower(), read_picture)(entry.path)
    except DataError as error:
        return Decoded(image=image, reason=str(error).removeprefix(f"{entry.path}: "))
    if not image.patient:
        return Decoded(
            image=image,
            reason=f"no PatientID, so its patient cannot be kept in one split; list it in a {MANIFEST}",
        )
    pixels = cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA)
    if pixels.min() == pixels.max():
        return Decoded(image=image, reason="constant pixels")
    return Decoded(image=image, pixels=pixels)


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
