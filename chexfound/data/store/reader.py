"""The store that training reads: uint8 images of one size in memory-mapped shards, and an SQLite index.

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
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chexfound.data.store import texts
from chexfound.data.store.index import (
    INDEX,
    KEYS,
    SCHEMA,
    UNKNOWN,
    Image,
    check_schema,
    connect,
    damage_told,
    read_images,
    read_key_id,
    read_labels,
    read_shards,
)
from chexfound.data.store.shards import map_shard
from chexfound.durable.files import canonical
from chexfound.errors import DataError


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
        with damage_told(path), contextlib.closing(connect(path)) as index:
            check_schema(path, index)
            px = index.execute("SELECT px FROM meta").fetchone()[0]
            key_id = read_key_id(index)
            told = texts.told(index, KEYS) if key_id else {}
            numbers, images = read_images(index, told)
            labels = read_labels(index, {number: place for place, number in enumerate(numbers)}, told)
            shards = [map_shard(path, number, count, px) for number, count in read_shards(index)]
        return Store(path, px, images, labels, shards, key_id)

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    @property
    def refused(self) -> list[tuple[str, str]]:
        """The files that were left out, each with the reason, sorted."""
        with damage_told(self.path), contextlib.closing(connect(self.path)) as index:
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
        with damage_told(self.path), contextlib.closing(connect(self.path)) as index:
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
