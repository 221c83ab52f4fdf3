"""How a model was trained, in plain values: what a release's training_summary.json and card tell.

Nothing of a machine's paths, of patients, or of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError
from chexfound.model.weights.in_parts import Weights

FROM_METRICS = ("date", "machine", "versions", "deployed")


def of_recipe(weights: Weights) -> dict[str, Any]:
    """Give what is known where only the model is at hand."""
    recipe = weights.recipe
    assert recipe is not None
    pretrained = "pretrain" in recipe.phases
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "weights_sha256": weights.source["weights_sha256"],
        "phases": list(recipe.phases),
        "pretrain": {"rounds": recipe.pretrain_rounds, "steps": recipe.pretrain_steps} if pretrained else None,
        "adapt": {"rounds": recipe.adapt.rounds, "steps": recipe.adapt.total_steps} if weights.head else None,
        "findings": list(weights.findings),
    }


def of_run(weights: Weights, run: Path, metrics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Tell also what a run's journal and its metrics tell: sites, rounds, losses, bytes, seconds, results.

    Without `metrics` those of metrics.json, in the run's folder or, of a simulation's arm, three above.
    """
    entries = read_journal(run / "journal.jsonl")
    result = of_recipe(weights)
    result["sites"] = [
        {key: site.get(key) for key in ("site", "images", "patients", "train", "val", "test")}
        for site in entries[0]["roster"]
    ]
    if "totals" in entries[0]:  # under secure aggregation no site's own counts are known
        result["all_sites"] = {
            key: entries[0]["totals"].get(key) for key in ("images", "patients", "train", "val", "test")
        }
    for phase in ("pretrain", "adapt"):
        rounds = [entry for entry in entries if entry["event"] == "round" and entry["phase"] == phase]
        result[phase] = _phase(rounds, result[phase]) if rounds else None
    return result | (_of_file(run, weights) if metrics is None else _of_metrics(metrics, weights))


def _phase(rounds: list[dict[str, Any]], known: Mapping[str, Any] | None) -> dict[str, Any]:
    curve = []
    for entry in rounds:
        last = [site["history"][-1]["loss"] for site in entry["sites"] if site["history"]]
        curve.append(round(sum(last) / len(last), 5) if last else None)
    return {
        "rounds": len(rounds),
        "steps": (known or {}).get("steps"),
        "seconds": round(sum(entry["seconds"] for entry in rounds), 3),
        "bytes": {way: sum(entry["bytes"][way] for entry in rounds) for way in ("down", "up")},
        "loss_by_round": curve,  # the last step's of each round, the sites' mean
    }


def _of_file(run: Path, weights: Weights) -> dict[str, Any]:
    places = [run, *([run.parents[2]] if run.parent.parent.name == "work" else [])]
    for path in (place / "metrics.json" for place in places):
        if not path.is_file():
            continue
        try:
            if told := _of_metrics(json.loads(path.read_text()), weights):
                return told
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a run's figures: {error!r}") from error
    return {}


def _of_metrics(metrics: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """The model's own arm, and its rows of results."""
    for seed in (metrics, *metrics["replicates"]):
        for arm, sha256 in seed["model_sha256"].items():
            if sha256 == weights.source["weights_sha256"]:
                rows = [row for row in seed["results"] if row["arm"] == arm]
                kept = {key: metrics[key] for key in FROM_METRICS if key in metrics}
                return {"arm": arm, "results": rows, **kept}
    return {}
