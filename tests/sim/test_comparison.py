"""A comparison that cannot lie: runs whose answer is known beforehand, each of which one broken arm gets wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from chexfound import load_backbone, load_head
from chexfound.adapt.fit import predict
from chexfound.data.store.reader import Store
from chexfound.evaluate.scores import Scores, load_scores
from chexfound.model import checkpoint
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.curriculum import changed
from sim.arms.compare import figures, over_seeds
from sim.arms.plan import ArmPlan

BRIGHT, DARK = 0.7, 0.3  # share of the rows that are bright: the level itself is lost as images are taken in
PLAIN = ("adapt.head=linear", "adapt.views=0", "adapt.dropout=0", "adapt.min_positives=1")
Images = Iterator[tuple[str, str, str, bool, float]]  # source, patient, part of the split, has the finding, share


def plant(folder: Path, images: Images) -> Path:
    """A folder with a manifest of images with bright rows at the top; the finding, Blob, is known of every image."""
    rows, lots = [], np.random.default_rng(0)
    for number, (source, patient, part, positive, share) in enumerate(images):
        (folder / source).mkdir(parents=True, exist_ok=True)
        file, found = f"{source}/{number}.png", "Blob" if positive else "No Finding"
        level = np.where(np.arange(32) < 32 * share, 180, 70)[:, None]
        cv2.imwrite(str(folder / file), lots.normal(level, 12, (32, 32)).clip(0, 255).astype(np.uint8))
        rows.append({"file": file, "source": source, "patient_id": patient, "findings": found, "split": part})
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "labelled.json").write_text(json.dumps({row["source"]: ["Blob"] for row in rows}))
    return folder


def settings(*values: str) -> list[str]:
    return [part for value in (*PLAIN, *values) for part in ("--set", value)]


def aurocs(ran: Any) -> dict[tuple[str, str], Any]:
    assert ran.code == 0, ran.stderr
    return {(row["arm"], row["tested_on"]): row["auroc"] for row in ran.metrics["results"]}


# ---- the shuffled arm


def one_bright_patient() -> Images:
    """Of twenty training patients of a site one has the finding, on twenty bright images.

    Whatever patient the shuffle gives that patient's label to (but itself, by 1 in 20), bright then means healthy:
    a head that learned from shuffled labels ranks the test patients the wrong way round, one from true labels right.
    """
    for source in ("a", "b"):
        for patient in range(20):
            for _ in range(1 if patient else 20):
                yield source, f"{source}{patient}", "train", not patient, DARK if patient else BRIGHT
        for patient in range(20, 36):
            yield source, f"{source}{patient}", "test", patient % 2 == 0, DARK if patient % 2 else BRIGHT


@pytest.fixture(scope="module")
def shuffled(simulate: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The federated arm, and the head on shuffled labels, where both can know what they should."""
    data = plant(tmp_path_factory.mktemp("planted") / "images", one_bright_patient())
    given = settings(
        "train.rounds=1", "optim.warmup_epochs=0", "optim.lr=0.005", "adapt.lr=0.0003", "adapt.local_steps=20"
    )
    ran = simulate("--arms", "federated,shuffled", *given, data=data)
    assert ran.code == 0, ran.stderr
    return ran


def test_the_shuffled_arm_learns_what_only_shuffled_labels_say(shuffled: Any) -> None:
    found = aurocs(shuffled)
    for site in ("a", "b"):
        assert found["federated", site] > 0.95
        assert found["shuffled", site] < 0.25


def test_the_shuffled_head_stands_on_the_federated_backbone(shuffled: Any) -> None:
    """Its scores are those of its head on that backbone, and not on the one that pretraining began with."""
    work = shuffled.out / "work" / "seed-0"
    store, head = Store.open(shuffled.out / "store"), load_head(work / "shuffled")
    ids = np.array([place for place in store.ids if store.splits[place] == "test" and store.sources[place] == "a"])
    kept = load_scores(work / "shuffled" / "sites" / "00" / "scores.npz", {})
    assert kept.patients == [store.keys[place] for place in ids]

    def away(backbone: Any) -> float:
        scores = predict(backbone, head, store.pixels(ids), head.n_blocks)
        return float(np.abs(scores - kept.scores).max())

    backbone = load_backbone(work / "federated")
    assert away(backbone) < 1e-6
    first = checkpoint.with_prefix(initial_weights(recipes.load(shuffled.out / "recipe.yaml")), "teacher.backbone.")
    backbone.load_state_dict(first)
    assert away(backbone) > 1e-3


# ---- the grey-level floor


def turned_in_the_test() -> Images:
    """At a, bright means the finding in training and validation and its absence in the test; at b, always its absence.

    So who has seen a test image of a, in the fit or in the choice of a variant, is right about the others.
    """
    for site, parts in {"a": {"train": 16, "val": 8, "test": 24}, "b": {"train": 40, "val": 8, "test": 8}}.items():
        for part, number in parts.items():
            for patient in range(number):
                bright = site == "a" and part != "test"
                share = BRIGHT if bright == (patient % 2 == 0) else DARK
                yield site, f"{site}-{part}-{patient}", part, patient % 2 == 0, share


def test_the_grey_level_floor_has_seen_no_test_image(simulate: Any, tmp_path: Path) -> None:
    data = plant(tmp_path / "images", turned_in_the_test())
    ran = simulate("--arms", "histogram", *settings("adapt.pooled_batch_size=2"), data=data)
    found = aurocs(ran)
    assert found["histogram:pooled", "a"] > 0.95  # what a choice by the test patients would have taken
    assert found["histogram", "a"] < 0.05
    assert found["histogram:linear", "a"] < 0.05
    assert found["histogram", "b"] > 0.95
    (row,) = [row for row in ran.metrics["results"] if (row["arm"], row["tested_on"]) == ("histogram", "a")]
    assert (row["variant"], row["validation_auroc"], row["trained_on"]) == ("linear", 1.0, "a")


# ---- equal work


def three_sites_of_few() -> Images:
    """3, 3 and 6 training images of which each is told apart: 12 in all, where 12 a step are wanted."""
    for site, number in {"a": 3, "b": 3, "c": 6}.items():
        for patient in range(number):
            yield site, f"{site}{patient}", "train", patient % 3 == 0, 0.1 + 0.15 * patient
        for patient in range(number, number + 8):
            yield site, f"{site}{patient}", "test", patient % 2 == 0, 0.1 * (patient - number + 1)


def test_a_lone_arm_takes_the_whole_batch_in_a_step_of_the_head(simulate: Any, tmp_path: Path) -> None:
    """Where a step sees every image equally often, a head that stands still has the same loss in every step.

    A batch of 12 is one, two or four times all that a lone arm has; a third of it, 4, is no such number of any.
    """
    data = plant(tmp_path / "images", three_sites_of_few())
    given = settings("phases=[adapt, evaluate]", "adapt.head=glori", "adapt.lr=1e-12", "adapt.pooled_batch_size=12")
    ran = simulate("--arms", "centralized,local", *given, data=data)
    assert ran.code == 0, ran.stderr
    curves = json.loads((ran.out / "history.json").read_text())["adapt"]
    assert set(curves) == {"centralized", "local:a", "local:b", "local:c"}
    for arm, rows in curves.items():
        losses = [row["loss"] for row in rows]
        assert len(losses) == 6
        assert max(losses) - min(losses) < 1e-3, arm


# ---- the sign


@pytest.fixture
def two_arms(tiny_store_path: Path, tiny_recipe: Any, tmp_path: Path) -> Callable[[int], Any]:
    """`two_arms(seed)`: a plan, and scores of which the federated ones are all right and all others all wrong."""

    def make(seed: int) -> Any:
        recipe = changed(tiny_recipe, seed=seed, adapt=changed(tiny_recipe.adapt, findings=("Blob",)))
        plan = ArmPlan(recipe=recipe, store=tiny_store_path, sites={"a": ["a/0"]}, folder=tmp_path)
        labels = np.tile(np.array([[1], [0]], np.int8), (10, 1))
        patients = [f"a/{number}" for number in range(20)]
        right = {"a": Scores(patients, labels, labels.astype(np.float32), ["Blob"])}
        wrong = {"a": Scores(patients, labels, 1 - labels.astype(np.float32), ["Blob"])}
        return plan, {"federated": right} | dict.fromkeys(("centralized", "random", "local:a", "histogram"), wrong)

    return make


def test_what_the_federated_arm_is_better_by_is_above_zero(two_arms: Any) -> None:
    (plan, scores), (other, others) = two_arms(0), two_arms(1)
    _, ((difference),), comparisons = figures(plan, scores)
    assert (difference["federated_minus_centralized"], difference["ci"]) == (1.0, [1.0, 1.0])
    assert [(row["first"], row["difference"]) for row in comparisons] == [("federated", 1.0)] * 3
    assert {row["second"] for row in comparisons} == {"random", "local:a", "histogram"}
    (mean,), means = over_seeds([plan, other], [scores, others])
    assert (mean["mean_federated_minus_centralized"], mean["ci"]) == (1.0, [1.0, 1.0])
    assert [(row["first"], row["mean_difference"]) for row in means] == [("federated", 1.0)] * 3
