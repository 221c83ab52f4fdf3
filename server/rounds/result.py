"""Results of a run with the federated arm only (a deployed one): figures and model, as a simulation's."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chexfound.durable.files import write_json
from chexfound.durable.journal import read_journal
from chexfound.evaluate.results import SCHEMA
from chexfound.host.machine import RUN_PACKAGES, machine, versions
from chexfound.parsing.names import ALL_SITES
from chexfound.recipe.batch_sizes import BatchSizes
from chexfound.recipe.schema import Recipe
from server.rounds.loop import Outcome
from server.runs import weight


def costs(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Seconds and payload bytes by phase, added up from a run's journal."""
    seconds: dict[str, float] = {}
    moved: dict[str, dict[str, int]] = {}
    for entry in read_journal(folder / "journal.jsonl"):
        if entry["event"] not in ("round", "features"):
            continue
        phase = entry.get("phase", "features")
        seconds[phase] = round(seconds.get(phase, 0.0) + entry["seconds"], 3)
        total = moved.setdefault(phase, {"down": 0, "up": 0})
        for way, number in entry["bytes"].items():
            total[way] += number
    return seconds, moved


def history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Learning curves by phase, one row a site and step, from a run's journal."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in read_journal(folder / "journal.jsonl"):
        if entry["event"] == "round":
            for site in entry["sites"]:
                rows.setdefault(entry["phase"], []).extend({**row, "site": site["site"]} for row in site["history"])
    return rows


def subsets(folder: Path) -> list[str]:
    """A sentence for each round, from a run's journal, that a quorum closed without some sites."""
    said = []
    for entry in read_journal(folder / "journal.jsonl"):
        if entry["event"] in ("round", "features", "done") and entry.get("missing"):
            who = ", ".join(f"{one['site']} ({one['reason']})" for one in entry["missing"])
            what = f"{entry['phase']}, round {entry['round'] + 1}" if entry["event"] == "round" else entry["event"]
            said.append(f"Only a part of the sites: {'evaluate' if what == 'done' else what} went without {who}.")
    return said


def weights(folder: Path) -> list[str]:
    """A sentence for each site of a run's journal that weighs much."""
    entries = read_journal(folder / "journal.jsonl")
    return list(dict.fromkeys(f"{text}." for entry in entries for text in weight.warnings(entry)))


def secagg(entries: Sequence[dict[str, Any]]) -> dict[str, int] | None:
    """How a journal's run was aggregated under masks; None if it was not.

    n, c, t and ring as in docs/secure-aggregation.md; `clipped`, values beyond their range; `failed`, attempts.
    """
    if not entries or "secagg" not in entries[0]:
        return None
    return {
        **entries[0]["secagg"],
        "clipped": sum(entry.get("clipped", 0) for entry in entries),
        "failed": sum(entry["event"] == "attempt" for entry in entries),
    }


def site_rows(recipe: Recipe, start: dict[str, Any]) -> list[dict[str, Any]]:
    """sites.json: what each site enrolled with, and how often it saw its images; by the journal's first record.

    Under secure aggregation sites enrol with no count: what they have together is one more row, the last.
    """
    roster, rows = start["roster"], []
    seen = BatchSizes.of(recipe, [values.get("train", 1) for values in roster]).pretrain_images(recipe)
    if "totals" in start:
        rows = [
            {
                "name": values["site"],
                "cells": values["cells"],
                "withheld": values["withheld"],
                "epochs": {},
                "findings": {},
            }
            for values in roster
        ]
        roster, seen = [{"site": ALL_SITES, **start["totals"]}], [sum(seen)]
    for values, images in zip(roster, seen or [0] * len(roster), strict=True):
        rows.append(
            {
                "name": values["site"],
                **{key: values.get(key) for key in ("images", "patients", "train", "val", "test")},
                "cells": values["cells"],
                "withheld": values.get("withheld", False),
                "epochs": {"federated": round(images / max(values["train"], 1), 2)},
                "findings": values["findings"],
            }
        )
    return rows


def write_metrics(folder: Path, recipe: Recipe, outcome: Outcome) -> None:
    """Write history.json, sites.json, model/ and, last, metrics.json into the run's folder."""
    from chexfound.model.weights import export  # at the end of a run: it takes its time

    seconds, moved = costs(folder)
    entries = read_journal(folder / "journal.jsonl")
    write_json(folder / "history.json", {phase: {"federated": rows} for phase, rows in history(folder).items()})
    write_json(folder / "sites.json", site_rows(recipe, entries[0]))
    metrics: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": recipe.seed,
        "sites": [member.name for member in outcome.roster],
        "findings": list(outcome.findings),
        "results": outcome.results,
        "differences": [],
        "model_sha256": {"federated": outcome.model_sha256},
        "seconds": {f"federated/{phase}": value for phase, value in seconds.items()},
        "bytes": {f"federated/{phase}": value for phase, value in moved.items()},
        "rounds": recipe.rounds,
        "replicates": [],
        "across_seeds": [],
        "not_trained": [],
        "void": None,
        "deployed": True,  # the federated arm only, and no image leaves a site: the report says so
        "notes": [*subsets(folder), *weights(folder)],
        "secagg": secagg(entries),
        "machine": machine(),
        "versions": versions(*RUN_PACKAGES),
        "date": datetime.date.today().isoformat(),
    }
    export.of_finished(folder, folder / "model", metrics)
    write_json(folder / "metrics.json", metrics)
