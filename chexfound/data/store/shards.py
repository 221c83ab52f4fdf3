"""The pixels of a store: .npy files that grow, of at most `SHARD_IMAGES` images, read by memory map.

The index says how many images of a shard count; the file may hold more, never fewer.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from chexfound.errors import DataError

SHARD_IMAGES = 4096


def shard_path(folder: Path, number: int) -> Path:
    """Give the path of a shard."""
    return folder / f"shard-{number:05d}.npy"


def npy_header(rows: int, px: int) -> bytes:
    """The header of a .npy file; NumPy pads it so that it keeps its length while `rows` grows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (rows, px, px)})
    return buffer.getvalue()


def shard_bytes(rows: int, px: int) -> int:
    """The length of a shard's file, header included."""
    return len(npy_header(rows, px)) + rows * px * px


def map_shard(folder: Path, number: int, rows: int, px: int) -> np.ndarray:
    """The first `rows` images; there may be more, which an ingestion that did not end left."""
    path = shard_path(folder, number)
    if not path.is_file():
        raise DataError(f"{folder}: the store is damaged: {path.name} is missing; remove the store and ingest again")
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        whole = path.stat().st_size >= start + rows * px * px
        if len(shape) != 3 or shape[1:] != (px, px) or fortran or dtype != np.uint8 or not whole:
            raise ValueError(f"not {rows} images of {px} x {px}")
        return np.memmap(path, np.uint8, "r", start, (rows, px, px)).view(np.ndarray)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{folder}: the store is damaged: {path.name}: {error}; remove the store and ingest again"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Shards:
    """Appends images to the shards of a folder; `sync` makes them durable, `cut` undoes the rest."""

    def __init__(self, folder: Path, px: int, committed: Iterable[tuple[int, int]]) -> None:
        self.folder = folder
        self.px = px
        self.committed = dict(committed)
        self.rows = dict(self.committed)
        self.touched: set[int] = set()
        self._file: BinaryIO | None = None
        self.cut()

    def append(self, pixels: np.ndarray) -> tuple[int, int]:
        """Write one image after the last and return (shard, row)."""
        number = max(self.rows, default=0)
        if self.rows.get(number, 0) >= SHARD_IMAGES:
            self.close()
            number += 1
        row = self.rows.get(number, 0)
        if self._file is None:
            path = shard_path(self.folder, number)
            if not row:
                path.write_bytes(npy_header(0, self.px))
            self._file = open(path, "rb+")  # noqa: SIM115 (held open until the shard is full or the ingestion ends)
            self._file.seek(shard_bytes(row, self.px))
        self._file.write(pixels.tobytes())
        self.rows[number] = row + 1
        self.touched.add(number)
        return number, row

    def sync(self) -> None:
        """Write the headers and wait until all of it is on the disk."""
        self.close()
        for number in sorted(self.touched):
            path = shard_path(self.folder, number)
            with open(path, "rb+") as file:
                file.write(npy_header(self.rows[number], self.px))
            sync(path)
        sync(self.folder)

    def cut(self) -> None:
        """Cut off, or remove, what the index does not name."""
        with contextlib.suppress(OSError):  # what a full disk did not take is cut anyway
            self.close()
        for path in sorted(self.folder.glob("shard-*.npy")):
            rows = self.committed.get(int(path.stem.removeprefix("shard-")))
            if rows is None:
                path.unlink()
            elif path.stat().st_size != shard_bytes(rows, self.px):
                with open(path, "rb+") as file:
                    file.write(npy_header(rows, self.px))
                    file.truncate(shard_bytes(rows, self.px))

    def close(self) -> None:
        """Close the shard that is being filled."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
