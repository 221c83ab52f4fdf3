"""What a run leaves, and that the same seed gives the same bits however it is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from chexfound import load_backbone, load_head
from chexfound.commands.main import main as chexfound_command
from chexfound.model import checkpoint
from chexfound.pretrain.health.symptoms import Symptom
from server.rounds import health

SITES, FINDINGS = ["alpha", "beta", "gamma"], ["Bar", "Blob"]
TRAINED = {"federated", "centralized", "local:alpha", "local:beta", "random", "shuffled"}
HISTOGRAMS = {"histogram", *(f"histogram:{name}" for name in ("linear", "boosted", "pooled", "pooled-boosted"))}
FITTED = {"site-view", *HISTOGRAMS}
SHA256 = re.compile(r"[0-9a-f]{64}")


def test_one_worker_and_two_give_the_same_hashes(one_worker: Any, two_workers: Any) -> None:
    assert set(one_worker.hashes) == TRAINED
    assert one_worker.hashes == two_workers.hashes
    assert one_worker.metrics["results"] == two_workers.metrics["results"]
    assert one_worker.metrics["differences"] == two_workers.metrics["differences"]


def test_the_same_seed_twice_and_another_seed(one_worker: Any, simulate: Any) -> None:
    again = simulate("--arms", "federated", "--seeds", "1")
    (replicate,) = one_worker.metrics["replicates"]
    assert again.hashes == {"federated": replicate["model_sha256"]["federated"]}
    assert again.hashes["federated"] != one_worker.hashes["federated"]
    assert again.metrics["seed"] == 1


def test_everything_is_there(one_worker: Any) -> None:
    out = one_worker.out
    for name in ("report.html", "metrics.json", "recipe.yaml", "history.json", "sites.json"):
        assert (out / name).stat().st_size > 0, name
    assert {path.name for path in (out / "model").iterdir()} >= {"head.safetensors", "config.json", "README.md"}
    assert len({path.parent for path in (out / "tensorboard").rglob("events.out.tfevents.*")}) >= len(TRAINED)
    assert one_worker.stdout.rstrip().endswith(f"report: {out / 'report.html'}")
    assert not list(out.rglob("*.tmp"))
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["adapt"]["findings"] == FINDINGS
    assert recipe["seed"] == 0
    weights = checkpoint.load(out / "work" / "seed-0" / "federated" / "model.safetensors")
    assert checkpoint.digest(weights) == one_worker.hashes["federated"]
    assert torch.equal(load_backbone(out / "model").cls_token, weights["backbone.cls_token"])
    card = (out / "model" / "README.md").read_text()
    assert one_worker.hashes["federated"] in card
    for part in ("features", "state", "health"):  # what an arm needed only while it trained is gone
        assert not list((out / "work").rglob(part)), part


def test_its_model_can_be_released_with_its_heads(one_worker: Any, tmp_path: Path) -> None:
    for source, arm in (
        (one_worker.out, "federated"),
        (one_worker.out / "work" / "seed-0" / "centralized", "centralized"),
    ):
        assert chexfound_command(["weights", "export", str(source), "--out", str(tmp_path / arm)]) == 0
        assert {"dino_head.safetensors", "ibot_head.safetensors"} <= {path.name for path in (tmp_path / arm).iterdir()}
        summary = json.loads((tmp_path / arm / "training_summary.json").read_text())
        assert (summary["arm"], summary["weights_sha256"]) == (arm, one_worker.hashes[arm])
        assert load_head(tmp_path / arm).findings == tuple(FINDINGS)
        assert load_backbone(tmp_path / arm).embed_dim == load_backbone(source).embed_dim


# ---- the schema of metrics.json


def number(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def interval(value: Any, low: float = 0.0) -> bool:
    return isinstance(value, list) and len(value) == 2 and low <= value[0] <= value[1] <= 1


def check_results(rows: list[dict[str, Any]], arms: set[str], sites: list[str], findings: list[str]) -> None:
    keys = [
        "arm",
        "trained_on",
        "tested_on",
        "finding",
        "n",
        "positives",
        "auroc",
        "auroc_ci",
        "auprc",
        "auprc_ci",
        "reason",
    ]
    for row in rows:
        assert list(row) == (keys + ["variant", "validation_auroc"] if row["arm"] in HISTOGRAMS else keys)
        assert isinstance(row["trained_on"], str)
        assert type(row["n"]) is int
        assert type(row["positives"]) is int
        assert 0 <= row["positives"] <= row["n"]
        for name in ("auroc", "auprc"):
            assert row[name] is None or number(row[name]), row
            assert row[f"{name}_ci"] is None or interval(row[f"{name}_ci"]), row
            if row[name] is None or row[f"{name}_ci"] is None:
                assert isinstance(row["reason"], str), row
                assert row["reason"]
            if row[name] is None:
                assert row[f"{name}_ci"] is None
        if row["auroc"] is not None and row["auroc_ci"] is not None:
            assert row["reason"] is None
    cells = [(row["arm"], row["tested_on"], row["finding"]) for row in rows]
    assert sorted(cells) == sorted((arm, site, finding) for arm in arms for site in sites for finding in findings)


def check_differences(rows: list[dict[str, Any]], sites: list[str], findings: list[str]) -> None:
    for row in rows:
        assert set(row) == {"finding", "tested_on", "federated_minus_centralized", "ci", "reason"}
        value = row["federated_minus_centralized"]
        assert value is None or (isinstance(value, float) and -1 <= value <= 1)
        assert row["ci"] is None or interval(row["ci"], -1.0)
        assert (row["reason"] is None) == (value is not None and row["ci"] is not None), row
    cells = [(row["tested_on"], row["finding"]) for row in rows]
    assert sorted(cells) == [(site, finding) for site in sorted(sites) for finding in sorted(findings)]


def check_schema(metrics: dict[str, Any], trained: set[str], fitted: set[str], sites: list[str]) -> None:
    assert metrics["schema"] == 1
    assert type(metrics["seed"]) is int
    assert metrics["sites"] == sites
    assert metrics["findings"] == FINDINGS
    check_results(metrics["results"], trained | fitted, sites, FINDINGS)
    if {"federated", "centralized"} <= trained:
        check_differences(metrics["differences"], sites, FINDINGS)
    else:
        assert metrics["differences"] == []
    assert set(metrics["model_sha256"]) == trained
    assert all(SHA256.fullmatch(value) for value in metrics["model_sha256"].values())
    seconds = metrics["seconds"]
    assert {"total", *trained} <= set(seconds)
    assert all(isinstance(value, float) and value >= 0 for value in seconds.values())
    for phase, moved in metrics["bytes"].items():
        assert phase.startswith("federated/")
        assert set(moved) == {"down", "up"}
        assert all(type(value) is int for value in moved.values())
        assert moved["down"] > 0
        assert (moved["up"] == 0) == (phase == "federated/features")  # nothing that is made of features leaves a site
    assert all(set(row) == {"arm", "reason"} and row["reason"] for row in metrics["not_trained"])
    assert metrics["void"] is None
    assert all(isinstance(note, str) for note in metrics["notes"])
    assert isinstance(metrics["machine"], dict)
    assert "torch" in metrics["versions"]


def test_metrics_by_source(one_worker: Any) -> None:
    metrics = one_worker.metrics
    check_schema(metrics, TRAINED, FITTED, SITES)
    assert set(metrics["bytes"]) == {"federated/pretrain", "federated/features", "federated/adapt"}
    rows = {(row["arm"], row["tested_on"], row["finding"]): row for row in metrics["results"]}
    assert rows["federated", "beta", "Bar"]["n"] == 0  # beta labels Blob only
    gamma = rows["federated", "gamma", "Bar"]
    assert (gamma["positives"], gamma["auroc"]) == (0, None)
    assert "positive" in gamma["reason"]
    local = rows["local:beta", "alpha", "Bar"]  # beta cannot have learnt it
    assert local["auroc"] is None
    assert local["reason"] == "not trained: beta has not both classes among its training images"


def test_a_local_arm_without_a_trainable_finding_is_listed(one_worker: Any) -> None:
    assert one_worker.metrics["not_trained"] == [
        {"arm": "local:gamma", "reason": "no finding has both classes among its training images"}
    ]


def test_replicates_and_the_mean_over_seeds(one_worker: Any) -> None:
    metrics = one_worker.metrics
    (replicate,) = metrics["replicates"]
    assert replicate["seed"] == 1
    check_results(replicate["results"], TRAINED | FITTED, SITES, FINDINGS)
    check_differences(replicate["differences"], SITES, FINDINGS)
    assert set(replicate["model_sha256"]) == TRAINED
    assert all(replicate["model_sha256"][arm] != metrics["model_sha256"][arm] for arm in TRAINED)
    for row in metrics["across_seeds"]:
        assert set(row) == {"finding", "tested_on", "seeds", "mean_federated_minus_centralized", "ci", "reason"}
        assert set(row["seeds"]) <= {0, 1}
        assert row["mean_federated_minus_centralized"] is not None or row["reason"]
    cells = [(row["tested_on"], row["finding"]) for row in metrics["across_seeds"]]
    assert sorted(cells) == [(site, finding) for site in SITES for finding in FINDINGS]


def test_sites_and_history(one_worker: Any) -> None:
    sites = json.loads((one_worker.out / "sites.json").read_text())
    assert [site["name"] for site in sites] == SITES
    trained = sum(site["train"] for site in sites)
    for site in sites:
        assert site["train"] + site["val"] + site["test"] == site["images"]
        for counts in site["findings"].values():
            assert sum(counts.values()) == site["images"]
        epochs = {"federated": 16 / site["train"], "centralized": 48 / trained, "local": 48 / site["train"]}
        if site["name"] == "gamma":
            del epochs["local"]  # it has no model of its own
        assert site["epochs"] == pytest.approx(epochs, abs=0.006)
    history = json.loads((one_worker.out / "history.json").read_text())
    assert set(history) == {"pretrain", "adapt"}
    assert set(history["pretrain"]) == TRAINED - {"random", "shuffled"}
    assert set(history["adapt"]) == TRAINED
    steps = {(row["site"], row["step"]) for row in history["pretrain"]["federated"]}
    assert steps == {(site, step) for site in SITES for step in range(4)}


def test_the_images_that_the_arms_draw_are_counted(one_worker: Any) -> None:
    """Four steps of pretraining and six of the head, 12 images each, of which each of three sites takes 4.

    gamma has no finding with both classes: it has a part in pretraining, and none in a head.
    """
    sites, shares = ("alpha", "beta", "gamma"), {"pretrain": 16, "adapt": 24}
    pooled = {"pretrain": 48, "adapt": 72}
    federated = {phase: {site: images for site in sites} for phase, images in shares.items()}
    federated["adapt"]["gamma"] = 0
    for one in (one_worker.metrics, *one_worker.metrics["replicates"]):
        drawn = one["drawn"]
        assert drawn.pop("federated") == federated
        assert drawn.pop("random") == drawn.pop("shuffled") == {"adapt": federated["adapt"]}
        assert drawn.pop("centralized") == {phase: {"all sites, pooled": images} for phase, images in pooled.items()}
        assert drawn.pop("local:alpha") == {phase: {"alpha": images} for phase, images in pooled.items()}
        assert drawn.pop("local:beta") == {phase: {"beta": images} for phase, images in pooled.items()}
        assert drawn == {}
    page = (one_worker.out / "report.html").read_text()
    assert "gamma took no step in training the head" in page
    assert "did not do equal work" not in page


def test_a_runs_differences_are_those_of_its_results(one_worker: Any) -> None:
    """Each difference in metrics.json is the federated figure less the other; of several seeds, their mean."""
    metrics = one_worker.metrics
    seeds = [metrics, *metrics["replicates"]]
    at = [{(row["arm"], row["tested_on"], row["finding"]): row["auroc"] for row in one["results"]} for one in seeds]

    def gap(number: int, row: dict[str, Any], other: str) -> float:
        return (
            at[number]["federated", row["tested_on"], row["finding"]]
            - at[number][other, row["tested_on"], row["finding"]]
        )

    told = []
    for number, one in enumerate(seeds):
        told += [
            (row["federated_minus_centralized"], gap(number, row, "centralized"))
            for row in one["differences"]
            if row["federated_minus_centralized"] is not None
        ]
        told += [
            (row["difference"], gap(number, row, row["second"]))
            for row in one["comparisons"]
            if row["difference"] is not None
        ]
    for key, value in (
        ("across_seeds", "mean_federated_minus_centralized"),
        ("comparisons_across_seeds", "mean_difference"),
    ):
        told += [
            (row[value], np.mean([gap(seed, row, row.get("second", "centralized")) for seed in row["seeds"]]))
            for row in metrics[key]
            if row[value] is not None
        ]
    assert len([value for value, _ in told if value]) > 10
    for value, expected in told:
        assert value == pytest.approx(expected, abs=1e-12)


# ---- other ways to deal, fewer arms


def test_by_lot_with_fewer_arms(simulate: Any) -> None:
    ran = simulate("--by", "iid:2", "--arms", "federated,centralized,random")
    assert ran.code == 0, ran.stderr
    check_schema(ran.metrics, {"federated", "centralized", "random"}, set(), ["shard-0", "shard-1"])
    assert ran.metrics["not_trained"] == []


def test_what_ails_an_arm_is_told_as_it_begins_and_once(simulate: Any, monkeypatch: Any) -> None:
    ill = [Symptom("uniform-teacher", "entropy [high]", "not shown: the advice goes by the name")]
    monkeypatch.setattr(health, "symptoms", lambda rows, **_: ill)
    ran = simulate("--arms", "federated,centralized", "--set", "phases=[pretrain]")
    assert ran.code == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "uniform-teacher" in line or " done in " in line]
    sites = "; ".join(f"{site}: entropy [high]" for site in SITES)
    for line, said in zip(
        lines,
        (
            f"seed 0: federated, round 1: uniform-teacher ({sites}): the teacher says nothing: lower",
            "seed 0: federated done in",
            "seed 0: centralized, round 1: uniform-teacher (all sites, pooled: entropy [high]): the teacher",
            "seed 0: centralized done in",
        ),
        strict=True,
    ):
        assert said in line


def test_one_site_need_not_wait_for_another(simulate: Any) -> None:
    """`federation.min_sites` is 2 by default; a simulation has the sites that it dealt."""
    ran = simulate(
        "--by", "iid:1", "--arms", "federated", "--set", "phases=[pretrain]", "--set", "federation.min_sites=3"
    )
    assert ran.code == 0, ran.stderr
    metrics = ran.metrics
    assert (metrics["sites"], metrics["results"]) == (["shard-0"], [])
    assert set(metrics["model_sha256"]) == {"federated"}


def test_small_sites_are_merged_and_it_is_printed(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    images = make_images(
        tmp_path / "images",
        {"alpha": 20, "beta": 5, "delta": 6},
        {name: ["Blob"] for name in ("alpha", "beta", "delta")},
    )
    ran = simulate("--arms", "site-view,histogram", "--set", "adapt.pooled_batch_size=2", data=images)
    assert ran.code == 0, ran.stderr
    note = "fewer than 8 patients: beta (5), delta (6); merged into other"
    assert note in ran.stdout
    metrics = ran.metrics
    assert metrics["sites"] == ["alpha", "other"]
    assert note in metrics["notes"]
    assert {row["arm"] for row in metrics["results"]} == FITTED
    assert metrics["model_sha256"] == {}
    assert (ran.out / "report.html").exists()


def test_the_shuffled_floor_needs_the_federated_arm(simulate: Any) -> None:
    ran = simulate("--arms", "shuffled,histogram")
    assert ran.code == 0, ran.stderr
    assert {row["arm"] for row in ran.metrics["results"]} == HISTOGRAMS
    assert any("without the federated arm it is left out" in note for note in ran.metrics["notes"])


def test_resume_when_all_is_done(two_workers: Any, simulate: Any) -> None:
    before = two_workers.metrics
    ran = simulate("--resume", out=two_workers.out)
    assert ran.code == 0, ran.stderr
    assert "already done: federated" in ran.stdout
    after = ran.metrics
    for key in ("results", "differences", "model_sha256", "across_seeds", "not_trained", "notes", "sites"):
        assert after[key] == before[key]
