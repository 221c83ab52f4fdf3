"""metrics.json of a deployed run, as the report reads it."""

from __future__ import annotations

import json

import pytest

from chexfound.contract import cells
from chexfound.durable.journal import Journal, read_journal
from chexfound.model.weights import export
from chexfound.recipe import load as recipes
from chexfound.report.build import build
from server.exchange.protocol import Member
from server.rounds.loop import Outcome
from server.rounds.result import secagg, write_metrics


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs trained nothing: what is written of a model is not looked at here."""
    monkeypatch.setattr(export, "of_finished", lambda run, out, metrics: None)


def test_the_report_of_a_deployed_run_says_what_is_not_known_and_nothing_false(tmp_path):
    values = {"site": "a", "images": 9, "patients": 8, "train": 5, "val": 2, "test": 2, "findings": {}}
    values |= {"cells": 0, "withheld": False}
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"event": "start", "roster": [values]})
    row = {"arm": "federated", "tested_on": "a", "finding": "Mass", "n": 2, "positives": 1}
    row |= {"auroc": 0.8, "auroc_ci": [0.7, 0.9]}
    outcome = Outcome(
        roster=[Member(name="a", values=values)],
        findings=("Mass",),
        tensors={},
        model_sha256="0" * 64,
        results=[row],
    )
    write_metrics(tmp_path, recipes.load("demo"), outcome)
    page = build(tmp_path).read_text()
    assert "A deployed run trains the federated arm only" in page
    assert "No image leaves a site" in page
    assert "would need the pooled images" not in page
    assert ".npz" not in page


def test_what_a_site_suppressed_is_neither_a_number_nor_nothing(tmp_path):
    word = cells.SUPPRESSED
    values = {"site": "a", "images": word, "patients": word, "train": 60, "val": word, "test": 30}
    values |= {
        "findings": {"Mass": {"positives": 20, "negatives": 40}, "Nodule": {"positives": word, "negatives": word}}
    }
    values |= {"cells": 10, "withheld": True}
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"event": "start", "roster": [values]})
    told = {"arm": "federated", "tested_on": "a", "finding": "Mass", "n": 30, "positives": 12, "reason": None}
    told |= {"auroc": 0.8, "auroc_ci": [0.7, 0.9], "auprc": 0.8, "auprc_ci": [0.7, 0.9]}
    outcome = Outcome(
        roster=[Member(name="a", values=values)],
        findings=("Mass", "Nodule"),
        tensors={},
        model_sha256="0" * 64,
        results=[told, cells.row({**told, "finding": "Nodule"})],
    )
    write_metrics(tmp_path, recipes.load("demo"), outcome)
    assert json.loads((tmp_path / "metrics.json").read_text())["results"][1]["auroc"] == word
    (site,) = json.loads((tmp_path / "sites.json").read_text())
    assert (site["val"], site["cells"], site["withheld"]) == (word, 10, True)
    page = build(tmp_path).read_text()
    assert page.count("suppressed (fewer than 10 patients)") >= 5  # images, patients, val; the labels, the row
    assert "a withholds findings that are in no vocabulary" in page


COUNTS = {"images": 30, "patients": 24, "train": 15, "val": 7, "test": 8}
ROUND = {
    "event": "round", "phase": "pretrain", "round": 0, "seconds": 1.0, "bytes": {"down": 2, "up": 3},
    "sites": [{"site": "all sites", "history": [{"step": step, "loss": 2.0, "dino": 2.0} for step in range(2)]}],
    "cohort": ["a", "b", "d"], "clipped": 5,
    "missing": [{"site": "c", "reason": "late"}],
}  # fmt: skip


def test_a_run_under_secure_aggregation_has_figures_of_all_sites_alone(tmp_path):
    roster = [{"site": site, "versions": {}, "cells": 10, "withheld": False, "findings": ["Mass"]} for site in "abcd"]
    findings = {"Mass": {"positives": 6, "negatives": 9}}
    with Journal(tmp_path / "journal.jsonl") as journal:
        parameters = {"n": 4, "c": 1, "t": 3, "ring": 32}
        totals = {**COUNTS, "findings": findings, "cells": 10}
        journal.append({"event": "start", "roster": roster, "totals": totals, "secagg": parameters})
        journal.append({"event": "attempt", "phase": "pretrain", "round": 0, "failed": "too few"})
        journal.append(ROUND)
    row = {"arm": "federated", "tested_on": "all sites", "finding": "Mass", "n": 8, "positives": 3}
    outcome = Outcome(
        roster=[Member(name=values["site"], values=values) for values in roster],
        findings=("Mass",),
        tensors={},
        model_sha256="0" * 64,
        results=[row | {"auroc": 0.8, "auroc_ci": [0.7, 0.9], "reason": None}],
    )
    overrides = {"aggregation": "secagg", "train.optimizer_state": "local", "adapt.optimizer_state": "local"}
    write_metrics(tmp_path, recipes.load("demo", overrides), outcome)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["secagg"] == {**parameters, "clipped": 5, "failed": 1}
    *alone, together = json.loads((tmp_path / "sites.json").read_text())
    told = {"cells": 10, "withheld": False, "epochs": {}, "findings": {}}
    assert alone == [{"name": site, **told} for site in "abcd"]
    assert {key: together[key] for key in COUNTS} == COUNTS
    assert (together["name"], together["findings"]) == ("all sites", findings)
    assert together["epochs"]["federated"] == round(100 * 32 / 15, 2)
    page = build(tmp_path).read_text()
    for told in (
        "4 sites",
        "Mass: the federated model reaches an AUROC of 0.80 over all sites together",
        "Mass, all sites together",
        "of the 4 sites’ updates, losses and counts the coordinator saw sums over at least 3 sites",
        "An attempt at a sum gave none once",
        "5 values of the sites’ updates were beyond their range",
        "pretrain, round 1 went without c (late)",
        "Federated, all sites together",
    ):
        assert told in page, told
    assert "5 sites" not in page
    assert "the simulation’s own" not in page


def test_a_run_in_the_clear_says_nothing_of_secure_aggregation(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"event": "start", "roster": [{"site": "a", **COUNTS, "findings": {}}]})
    assert secagg(read_journal(tmp_path / "journal.jsonl")) is None
