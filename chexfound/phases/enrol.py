"""Enrolment: counts, versions and hashes of a site; no image, no patient."""

from __future__ import annotations

import hmac
import platform
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import torch

import chexfound
from chexfound.contract import cells
from chexfound.contract.cells import Told
from chexfound.contract.request import Reply, Request
from chexfound.data.store.index import UNKNOWN
from chexfound.data.store.split import Part
from chexfound.errors import DataError
from chexfound.phases.site_state import Site
from chexfound.recipe.schema import Recipe


def enrol(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Counts, versions and hashes; no image, no patient.  Under secure aggregation no count: of findings the names."""
    about = {"site": site.name, "versions": versions(), "cells": site.cells, "withheld": _withholds(site)}
    if site.limits is not None:
        about["policy"] = site.limits
    if recipe.aggregation == "secagg":
        numbers = counts(site, recipe, request).values
        if not numbers["train"]:  # which the coordinator cannot see
            raise DataError(f"site {site.name!r} has no training image, or of few patients; leave it out")
        return Reply(values={**about, "findings": sorted(numbers["findings"])})
    parts = {which: site.told(site.split(recipe, which)) for which in get_args(Part)}
    values = {**about, **_totals(site, parts), **parts, "findings": _listed(site, recipe)}
    store_hmac = hmac.new(site.digest_key, site.view.store.digest().encode(), "sha256").hexdigest()
    return Reply(values={**values, "store_hmac": store_hmac})


def versions() -> dict[str, str]:
    """Give the releases that a site's numbers hang on."""
    return {"chexfound": chexfound.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _withholds(site: Site) -> bool:
    """Whether the site has findings of enough patients whose names may not leave."""
    names = sorted(set(site.view.store.findings) - set(site.findings()))
    labelled = (site.view.store.labels(site.view.ids, names) != UNKNOWN).any(1)
    patients = len(set(site.patients(site.view.ids[labelled])))
    return patients >= max(site.cells, 1)


def _totals(site: Site, parts: Mapping[str, Told]) -> dict[str, Told]:
    """Count all images and patients, where none of the parts is small: else it would be what the others leave."""
    if cells.SUPPRESSED in parts.values():
        return {"images": cells.SUPPRESSED, "patients": cells.SUPPRESSED}
    return {"images": len(site.view.ids), "patients": len(set(site.patients(site.view.ids)))}


def _listed(site: Site, recipe: Recipe) -> dict[str, dict[str, Told]]:
    """Training images with and without each finding that enough patients are labelled for; both, or neither."""
    names = site.findings()
    labels, patients = site.training_labels(recipe, names), site.patients(site.training_ids(recipe))
    numbers = _by_finding(names, labels)
    if not site.cells:
        return numbers
    any_label = site.view.store.labels(site.training_ids(recipe), names) != UNKNOWN
    listed = cells.patients_with(any_label, patients) >= site.cells
    none: dict[str, Told] = {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
    return {name: numbers.get(name, none) for name, one in zip(names, listed.tolist(), strict=True) if one}


def _by_finding(names: Sequence[str], labels: np.ndarray) -> dict[str, dict[str, Told]]:
    """Images with and without each finding that any image is labelled for."""
    counted = zip(names, (labels == 1).sum(0).tolist(), (labels == 0).sum(0).tolist(), strict=True)
    return {name: {"positives": ones, "negatives": zeros} for name, ones, zeros in counted if ones or zeros}


def counts(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Images, patients and the split, and training images by finding, as numbers that are to be added up.

    What is of few patients adds nothing.
    """
    parts = {which: cells.known(site.told(site.split(recipe, which))) for which in get_args(Part)}
    patients = len(set(site.patients(site.view.ids)))
    names = site.findings()
    values = {
        "images": sum(parts.values()),
        "patients": cells.known(cells.told(patients, patients, site.cells)),
        **parts,
        "findings": _by_finding(names, site.training_labels(recipe, names)),
    }
    return Reply(values=values)
