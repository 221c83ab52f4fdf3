"""Deals the patients of one store to simulated sites: by where they come from, or by lot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from chexfound.data.store.reader import Store
from chexfound.errors import ConfigError
from chexfound.rng import numpy_generator
from sim.options import PartitionRule

MIN_PATIENTS = 8
OTHER = "other"
_TOLD = 12  # small groups named in a note
Groups = dict[str, list[str]]


class Partition(NamedTuple):
    """Site -> its patients ("source/patient", sorted), sites by name; and what the user should be told."""

    sites: Groups
    notes: list[str]


def partition(store: Store, by: str, seed: int) -> Partition:
    """Deal the patients of `store` to sites; every patient goes, with all images, to exactly one.

    Args:
        store: the images of all sites together.
        by: `source`; `site` (the source where an image names none; a patient goes to the site of most of
            its images, ties to the first by name); `iid:N`; `dirichlet:N:ALPHA` (N shards of equal size,
            each with its own mixture of findings q ~ Dir(ALPHA p), p the mixture of the whole; a patient
            counts by the first of its positive findings in order of name.  Source: Hsu, Qi, Brown 2019).
        seed: of the lots.

    Groups of fewer than 8 patients are merged into `other`, and `other`, if it stays below 8, into the
    smallest group that remains.

    Raises: ConfigError if `by` has another form, N < 1, or a shard would be empty.
    """
    rule = PartitionRule.parse(by)
    n, patients = rule.shards, sorted(set(store.keys))
    if n > len(patients):
        raise ConfigError(
            f"--by {by!r}: {len(patients)} patients cannot fill {n} sites: some would be empty; ask for fewer"
        )
    if rule.form == "source":
        groups = _by_majority(store.keys, store.sources)
    elif rule.form == "site":
        groups = _by_majority(
            store.keys, [site or source for site, source in zip(store.sites, store.sources, strict=True)]
        )
    elif rule.form == "iid":
        order = numpy_generator(seed, "partition", "iid", n).permutation(len(patients))
        groups = _named([[patients[place] for place in part] for part in np.array_split(order, n)])
    else:
        lots = numpy_generator(seed, "partition", "dirichlet", n, by.split(":")[2])
        groups = _named(_dirichlet(_classes(store), n, rule.alpha, lots))
    return _merged(groups)


def _named(parts: list[list[str]]) -> Groups:
    return {f"shard-{number}": sorted(part) for number, part in enumerate(parts)}


def _by_majority(patients: list[str], groups: list[str]) -> Groups:
    counts: dict[str, Counter[str]] = {}
    for patient, group in zip(patients, groups, strict=True):
        counts.setdefault(patient, Counter())[group] += 1
    result: Groups = {}
    for patient, found in sorted(counts.items()):
        result.setdefault(min(found, key=lambda group: (-found[group], group)), []).append(patient)
    return result


def _classes(store: Store) -> dict[str, list[str]]:
    """First positive finding of a patient, or "none" -> patients, both sorted."""
    positive = store.labels(store.ids, store.findings) == 1
    # A last column that is always set stands for "none", so argmax finds the first positive or that.
    first = np.hstack([positive, np.ones((len(store), 1), bool)]).argmax(1)
    of_patient: dict[str, int] = {}
    for patient, finding in zip(store.keys, first.tolist(), strict=True):
        of_patient[patient] = min(finding, of_patient.get(patient, finding))
    names = [*store.findings, "none"]
    result: dict[str, list[str]] = {}
    for patient, finding in sorted(of_patient.items(), key=lambda item: (names[item[1]], item[0])):
        result.setdefault(names[finding], []).append(patient)
    return result


def _dirichlet(classes: Mapping[str, list[str]], n: int, alpha: float, lots: np.random.Generator) -> list[list[str]]:
    """Equal shards, filled patient by patient from class k with probability q_k while k has any left."""
    left = [list(lots.permutation(np.array(patients, object))) for patients in classes.values()]
    total = sum(map(len, left))
    prior = np.array([len(patients) / total for patients in left])
    parts: list[list[str]] = []
    for number in range(n):
        mixture = lots.dirichlet(alpha * prior)
        part: list[str] = []
        for _ in range(total // n + (number < total % n)):
            there = np.array([bool(patients) for patients in left])
            weights = mixture * there
            if not weights.sum() > 0:  # all that this shard wants is gone
                weights = prior * there
            part.append(left[lots.choice(len(left), p=weights / weights.sum())].pop())
        parts.append(part)
    return parts


def _merged(groups: Groups) -> Partition:
    """Groups of at least 8 patients, where that can be."""
    small = sorted(name for name, patients in groups.items() if len(patients) < MIN_PATIENTS)
    if not small or len(groups) == 1:
        return Partition({name: sorted(groups[name]) for name in sorted(groups)}, [])
    sites = {name: list(patients) for name, patients in groups.items() if name not in small}
    target, note = OTHER, ""
    merged = [patient for name in small for patient in groups[name]]
    if sites and len(merged) + len(sites.get(OTHER, [])) < MIN_PATIENTS:
        target = min(sites, key=lambda name: (len(sites[name]), name))
        note = ", the smallest other site: together they are still fewer"
    sites[target] = [*sites.get(target, []), *merged]
    named = ", ".join(f"{name} ({len(groups[name])})" for name in small[:_TOLD])
    named += f" and {len(small) - _TOLD} more" if len(small) > _TOLD else ""
    notes = [f"fewer than {MIN_PATIENTS} patients: {named}; merged into {target}{note}"]
    if len(sites) == 1:
        notes.append(f"all patients are now at one site, {target}: give more patients, or another --by")
    return Partition({name: sorted(sites[name]) for name in sorted(sites)}, notes)
