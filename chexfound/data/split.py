"""Which patients train, validate and test: a function of the seed and the patient alone.

A patient ("source/patient") with a split in the manifest, on any of its images, keeps it with all of
them; every other patient is drawn by its id.  So a split does not depend on the site, on who else takes
part, or on the order of ingestion: what all sites train on together is what the pooled images train
on.  A patient that comes with more images tomorrow stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from chexfound.data.store import Store
from chexfound.errors import ConfigError, DataError
from chexfound.rng import unit_interval
from chexfound.schema import Split

Part = Literal["train", "val", "test"]


def split_of(seed: int, patient: str, fractions: Split) -> Part:
    """The part that a patient falls into, each with its fraction as probability."""
    place = unit_interval(seed, "split", patient)
    if place < fractions.train:
        return "train"
    return "val" if place < fractions.train + fractions.val else "test"


@dataclass(frozen=True, eq=False)
class View:
    """What one site has: a store, and the images of some of its patients."""

    store: Store
    ids: np.ndarray  # int64, in canonical order
    name: str

    @staticmethod
    def of(store: Store, name: str, patients: Iterable[str] | None = None) -> View:
        """All images of the named patients ("source/patient"); of all patients if None.

        Raises: DataError if a patient is not in the store, or none is named.
        """
        if patients is None:
            return View(store, store.ids, name)
        wanted = set(patients)
        if absent := sorted(wanted.difference(store.keys)):
            raise DataError(f"site {name!r}: {len(absent)} patients are not in {store.path}, such as {absent[0]!r}")
        if not wanted:
            raise DataError(f"site {name!r}: no patients")
        ids = store.ids[np.fromiter((key in wanted for key in store.keys), bool, len(store))]
        ids.flags.writeable = False
        return View(store, ids, name)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patients(self) -> list[str]:
        """The key "source/patient" of each image, aligned with `ids`."""
        return [self.store.keys[image] for image in self.ids]

    def split(self, seed: int, fractions: Split, which: Part) -> np.ndarray:
        """Ids of a part, int64, in canonical order; decided patient by patient, never by the view as a whole.

        Raises: ConfigError if `which` is not train, val or test.
        """
        if which not in get_args(Part):
            raise ConfigError(f"split {which!r}: must be one of {', '.join(get_args(Part))}")
        store = self.store
        given = {key: part for key, part in zip(store.keys, store.splits, strict=True) if part is not None}
        drawn = {
            patient: split_of(seed, patient, fractions)
            for patient in {store.patients[image] for image in self.ids if store.keys[image] not in given}
        }
        parts = (given.get(store.keys[image]) or drawn[store.patients[image]] for image in self.ids)
        chosen: np.ndarray = self.ids[np.fromiter((part == which for part in parts), bool, len(self))]
        return chosen
