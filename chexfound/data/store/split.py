"""Which patients train, validate and test: a function of a key and the patient alone.

A patient ("source/patient") with a split in the manifest, on any of its images, keeps it with all of
them; every other patient is drawn by HMAC-SHA256 of its name.  So a split does not depend on the site, on who else
takes part, or on the order of ingestion: what all sites train on together is what the pooled images train
on.  A patient that comes with more images tomorrow stays where it is.

A hospital's key and fractions are its own (client/home/secret.py, site.yaml): who chooses either can tell by a count
whether a patient is there.  In a simulation they are the recipe's seed and fractions, under a key that everybody has.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from chexfound.data.store.reader import Store
from chexfound.errors import ConfigError, DataError
from chexfound.recipe.schema import Recipe, Split

Part = Literal["train", "val", "test"]
SIMULATED = b"chexfound simulation: no secret"  # the key of all simulations, so that they repeat anywhere


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Which part a patient falls into, each with its fraction as probability: without the key nobody can tell."""

    key: bytes
    fractions: Split

    @staticmethod
    def simulated(seed: int, fractions: Split) -> Membership:
        """Give the membership of a simulation's seed: anybody can tell which part a patient is in."""
        return Membership(key=hmac.digest(SIMULATED, f"seed {seed}".encode(), "sha256"), fractions=fractions)

    @staticmethod
    def of(recipe: Recipe, key: bytes | None = None, fractions: Split | None = None) -> Membership:
        """Give the membership of a recipe, in a simulation; a hospital has a key and fractions of its own."""
        simulated = Membership.simulated(recipe.seed, recipe.split)
        return Membership(key=key or simulated.key, fractions=fractions or simulated.fractions)

    def part(self, patient: str) -> Part:
        """The part that a patient falls into."""
        place = (int.from_bytes(hmac.digest(self.key, patient.encode(), "sha256")[:8], "big") >> 11) / (1 << 53)
        if place < self.fractions.train:
            return "train"
        return "val" if place < self.fractions.train + self.fractions.val else "test"


@dataclass(frozen=True, eq=False)
class View:
    """Hold what one site has: a store, and the images of some of its patients."""

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

    def split(self, membership: Membership, which: Part) -> np.ndarray:
        """Ids of a part, int64, in canonical order; decided patient by patient, never by the view as a whole.

        Raises: ConfigError if `which` is not train, val or test.
        """
        if which not in get_args(Part):
            raise ConfigError(f"split {which!r}: must be one of {', '.join(get_args(Part))}")
        store = self.store
        given = {key: part for key, part in zip(store.keys, store.splits, strict=True) if part is not None}
        drawn = {
            patient: membership.part(patient)
            for patient in {store.patients[image] for image in self.ids if store.keys[image] not in given}
        }
        parts = (given.get(store.keys[image]) or drawn[store.patients[image]] for image in self.ids)
        chosen: np.ndarray = self.ids[np.fromiter((part == which for part in parts), bool, len(self))]
        return chosen
