"""Small cells: what is about few patients is not told, and neither is that from which it could be taken.

A site tells a count, a figure or a row only of `least` patients or more (site.yaml, `cells.patients`); in its place
stands SUPPRESSED, which is neither 0 nor null.  None and few are one answer: that a group is empty would tell of
whoever might have been in it.  Of positives and negatives of a finding either both are told or neither, so a total
(of a row, of a part of the patients) never gives the small one by subtraction; and where one part of the patients is
small, neither are the totals over the parts.

What may still be told apart: how many images nobody labelled (a total less both counts).  That says what was read,
not what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

SUPPRESSED: Literal["suppressed"] = "suppressed"
FIGURES = ("n", "positives", "auroc", "auroc_ci", "auprc", "auprc_ci")  # of a row of results
Told = int | Literal["suppressed"]


def told(count: int, patients: int, least: int) -> Told:
    """A count of so many patients, as it leaves."""
    return count if patients >= least else SUPPRESSED


def known(value: Any) -> Any:
    """A count that was told, for adding up: what was suppressed adds nothing."""
    return 0 if value == SUPPRESSED else value


def large(labels: np.ndarray, patients: Sequence[str], least: int) -> np.ndarray:
    """Tell which findings have an image with them, and one without, of at least `least` patients each: bool (F,).

    Args:
        labels: int8 (N, F); 1, 0, or −1 if unknown.
        patients: of each image.
        least: patients; 0: of all findings.
    """
    if not least:
        return np.ones(labels.shape[1], bool)
    both = patients_with(labels == 1, patients), patients_with(labels == 0, patients)
    enough: np.ndarray = np.minimum(*both) >= least
    return enough


def patients_with(marks: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """How many patients have an image that is marked, int64 (F,); `marks` is bool (N, F)."""
    if not len(patients):
        return np.zeros(marks.shape[1], np.int64)
    order = np.argsort(np.array(patients), kind="stable")
    _, starts = np.unique(np.array(patients)[order], return_index=True)
    counted: np.ndarray = np.logical_or.reduceat(marks[order], starts, axis=0).sum(0)
    return counted


def row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results without what it says; whose it is, and of which finding, was asked."""
    return {**result, **dict.fromkeys(FIGURES, SUPPRESSED), "reason": None}


def shown(value: Any, least: int | None = None) -> str:
    """A count as people read it; `least`, if it is known, as the site's operator set it."""
    if value == SUPPRESSED:
        return f"suppressed (fewer than {least} patients)" if least else SUPPRESSED
    return f"{value:,}"
