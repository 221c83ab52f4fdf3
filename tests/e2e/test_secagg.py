"""A run under secure aggregation, over real sites: one killed in a round and started again, another for good."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chexfound import recipe as recipes
from chexfound.journal import read_journal
from chexfound.model import checkpoint
from chexfound.names import ALL_SITES
from chexfound.schema import Recipe
from tests.e2e.conftest import PATIENCE_S
from tests.e2e.hospitals import Hospitals, kill

pytestmark = pytest.mark.e2e
SITES = 4  # c = 1, t = 3
ROUND_S, STAGE_S = 110.0, 20.0  # a node that was killed is let in again after a minute
RARE = {"Consolidation", "Nodule", "Pneumothorax"}  # that st-brigid does not label


@pytest.fixture(scope="module")
def secret(recipe: Recipe) -> Recipe:
    """For four sites, with rounds long enough to be interrupted."""
    return replace(
        recipe,
        aggregation="secagg",
        federation=replace(recipe.federation, min_sites=SITES, round_timeout_s=ROUND_S),
        secagg=replace(recipe.secagg, stage_timeout_s=STAGE_S),
        train=replace(recipe.train, local_steps=40, optimizer_state="local"),
        adapt=replace(recipe.adapt, optimizer_state="local"),
    )


def until_at_work(made: Hospitals, site: str, number: int) -> None:
    """Until a site trains for a round (from 1)."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        node = made.node(site)
        if node["state"] == "working" and node["phase"] == "train.masked" and node["round"] == number:
            return
        if (made.left / "metrics.json").exists():
            break
        time.sleep(0.02)
    pytest.fail(f"{site} is not at work on round {number}: {node}")


@pytest.fixture(scope="module")
def secured(federation: Any, secret: Recipe, tmp_path_factory: Any) -> Hospitals:
    """In the second round of pretraining `back` is killed and started again, and `gone` is killed."""
    made = Hospitals(federation, tmp_path_factory.mktemp("images") / "phantoms", SITES)
    for name in made.names:
        made.enrol(name)
    for name in made.names:
        made.approve(name)
    made.running = made.up()
    sites = {name: made.serve(name, secret.image_px) for name in made.names}
    path = federation.folder / "recipe.yaml"
    path.write_text(recipes.to_yaml(secret))
    made.server("run", path, "--name", "first", "--detach")
    made.left = made.folder / "runs" / "first"

    made.back, made.gone = "riverside", "westgate"
    until_at_work(made, made.back, 2)
    kill(sites[made.back], made.node(made.back)["pid"])
    until_at_work(made, made.gone, 2)
    kill(sites[made.gone], made.node(made.gone)["pid"])
    made.serve(made.back, secret.image_px)
    made.said = made.server("watch", "first")
    return made


def rounds(made: Hospitals, phase: str) -> list[dict[str, Any]]:
    entries = read_journal(made.left / "journal.jsonl")
    return [entry for entry in entries if entry["event"] == "round" and entry["phase"] == phase]


def test_the_round_ends_with_the_survivors_and_says_so(secured: Hospitals) -> None:
    first, second = rounds(secured, "pretrain")
    assert first["cohort"] == secured.names
    assert second["cohort"] == sorted(set(secured.names) - {secured.gone})
    assert [one["site"] for one in second["missing"]] == [secured.gone]
    assert f"without {secured.gone}" in secured.said


def test_who_came_back_answers_in_the_same_attempt(secured: Hospitals) -> None:
    events = read_journal(secured.left / "journal.jsonl")
    mine = [(one["event"], one["round"]) for one in events if one.get("site") == secured.back]
    assert mine == [("lost", 1), ("back", 1)]
    assert not [one for one in events if one["event"] == "attempt"]
    home = secured.home(secured.back) / "sites" / secured.back
    begun = [one for one in read_journal(home / "secagg" / "journal.jsonl") if one["event"] == "begun"]
    assert len({one["of"] for one in begun}) == len(begun) == 6  # counts, two rounds, features, one round, evaluate
    assert {one["attempt"] for one in begun} == {1}


def test_the_run_goes_to_its_end_without_who_is_gone(secured: Hospitals) -> None:
    (adapted,) = rounds(secured, "adapt")
    assert secured.gone not in adapted["cohort"]
    assert set(adapted["zeroed"]) == RARE & set(read_journal(secured.left / "journal.jsonl")[0]["findings"])
    model = checkpoint.load(secured.left / "model.safetensors")
    assert model
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_no_site_has_a_figure_of_its_own(secured: Hospitals) -> None:
    events = read_journal(secured.left / "journal.jsonl")
    assert {key for one in events[0]["roster"] for key in one} == {"site", "versions", "findings"}
    assert {site["site"] for event in events if event["event"] == "round" for site in event["sites"]} == {ALL_SITES}
    metrics = json.loads((secured.left / "metrics.json").read_text())
    assert {row["tested_on"] for row in metrics["results"]} == {ALL_SITES}
    assert {one["name"] for one in json.loads((secured.left / "sites.json").read_text()) if "train" in one} == {
        ALL_SITES
    }


def test_what_it_leaves_is_read_by_all_commands(secured: Hospitals, tmp_path: Path) -> None:
    assert re.search(r"start +4 sites: .*; together \d+ images", secured.said)
    assert re.search(r"pretrain +round 2 of 2, 3 sites, loss", secured.said)
    status = secured.server("status")
    assert "first: done" in status
    assert "AUROC" in status
    secured.server("report", "first")
    page = (secured.left / "report.html").read_text()
    assert "Secure aggregation: of the 4 sites’ updates" in page
    assert f"Only a part of the sites: pretrain, round 2 went without {secured.gone}" in page
    secured.server("fetch-model", "first", "--out", tmp_path / "model")
    assert "Aggregation**: secure" in (tmp_path / "model" / "README.md").read_text()
