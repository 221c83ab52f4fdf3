"""The card of a run's model: what it tells of sites that keep small numbers to themselves, and of sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from chexfound.contract import cells
from chexfound.model.weights.in_parts import Weights
from chexfound.model.weights.release import of_run
from chexfound.model.weights.release.card import card
from chexfound.recipe.curriculum import changed

ROW = {"arm": "federated", "tested_on": "north", "n": 30, "positives": 12, "auroc": 0.8, "auroc_ci": [0.7, 0.9]}


def told(make_run: Callable[..., Path], recipe: dict[str, Any] | None = None, **summary: Any) -> str:
    weights: Weights = of_run.read(make_run())
    assert weights.recipe is not None
    changes: dict[str, Any] = {"recipe": changed(weights.recipe, **(recipe or {}))}
    return card(replace(weights, **changes, summary=weights.summary | summary), None, {})


def test_it_tells_who_took_part_and_what_came_of_it(make_run) -> None:
    absent = {**ROW, "finding": "Mass", "auroc": None, "auroc_ci": None, "reason": "one class only"}
    text = told(make_run, results=[{**ROW, "finding": "Effusion"}, absent])
    assert "north (6 training images; 5 patients)" in text
    assert "| north | Effusion | 30 | 12 | 0.800 [0.700, 0.900] |" in text
    assert "| north | Mass | 30 | 12 | – (one class only) |" in text
    assert "secure" not in text


def test_what_a_site_suppressed_is_said_as_such(make_run) -> None:
    site = {"site": "north", "train": 60, "patients": cells.SUPPRESSED}
    text = told(make_run, sites=[site], results=[cells.row({**ROW, "finding": "Nodule"})])
    assert "north (60 training images; suppressed patients)" in text
    assert "| north | Nodule | suppressed | suppressed | of few patients |" in text


def test_of_a_run_under_masks_there_is_what_all_sites_have(make_run) -> None:
    sites = [{"site": name, "train": None, "patients": None} for name in ("a", "b", "c")]
    text = told(make_run, {"aggregation": "secagg"}, sites=sites, all_sites={"train": 15, "patients": 24})
    assert "**Sites**: a, b, c (together 15 training images; 24 patients)." in text
    assert "**Aggregation**: secure" in text
