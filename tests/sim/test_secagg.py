"""`chexfound-sim` under secure aggregation: as plain FedAvg, and what it leaves is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.commands.main import main as chexfound_command
from chexfound.durable.journal import read_journal
from chexfound.model import checkpoint
from chexfound.parsing.names import ALL_SITES
from chexfound.report.build import build
from server.app import observers

NAMES = ("alpha", "beta", "delta", "epsilon")
LOCAL = ("--set", "train.optimizer_state=local", "--set", "adapt.optimizer_state=local")
MASKED = (*LOCAL, "--set", "aggregation=secagg")
# How near the two must come: later, training amplifies the last bit of a float.  A ReLU of the head that is so near to
# its kink moves its row by 2e-4 here.
WEIGHTS, AUROC = 1e-3, 0.002


@pytest.fixture(scope="session")
def four(make_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals that label the same: a finding of fewer than three has no part."""
    folder = tmp_path_factory.mktemp("hospitals") / "images"
    return make_images(folder, dict.fromkeys(NAMES, 20), dict.fromkeys(NAMES, ["Blob", "Bar"]))


@pytest.fixture(scope="session")
def in_the_clear(simulate: Any, four: Path) -> Any:
    ran = simulate("--arms", "federated,random", *LOCAL, data=four)
    assert ran.code == 0, ran.stderr
    return ran


@pytest.fixture(scope="session")
def masked(simulate: Any, four: Path) -> Any:
    ran = simulate("--arms", "federated,local:alpha,random", *MASKED, data=four)
    assert ran.code == 0, ran.stderr
    return ran


def furthest(first: Any, second: Any) -> float:
    models = [
        checkpoint.load(ran.out / "work" / "seed-0" / "federated" / "model.safetensors") for ran in (first, second)
    ]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][name].double() - models[1][name].double()).abs().max()) for name in models[0])


def figures(ran: Any, arm: str) -> dict[tuple[str, str], float]:
    rows = [row for row in ran.metrics["results"] if row["arm"] == arm and row["auroc"] is not None]
    return {(row["tested_on"], row["finding"]): row["auroc"] for row in rows}


@pytest.mark.parametrize("arm", ["federated", "random"])
def test_auroc_is_that_of_plain_averaging(masked: Any, in_the_clear: Any, arm: str) -> None:
    ours, plain = figures(masked, arm), figures(in_the_clear, arm)
    assert ours.keys() == plain.keys()
    assert len(ours) > len(NAMES)  # of two findings
    assert sum(abs(ours[key] - plain[key]) for key in plain) / len(plain) <= AUROC


def test_weights_are_those_of_plain_averaging(masked: Any, in_the_clear: Any) -> None:
    assert 0 < furthest(masked, in_the_clear) <= WEIGHTS


def test_a_preset_s_moments_are_averaged_under_masks_as_without(simulate: Any, four: Path) -> None:
    """No option but the aggregation's own.

    The mean of roots is not that of squares, so steps differ: of the pairs of test images by which AUROC is counted few
    are ranked otherwise.
    """
    runs = [simulate("--arms", "federated", "--set", f"aggregation={how}", data=four) for how in ("secagg", "fedavg")]
    assert [ran.code for ran in runs] == [0, 0], runs[0].stderr
    ours, plain = (figures(ran, "federated") for ran in runs)
    assert ours.keys() == plain.keys()
    assert len(ours) > len(NAMES)
    rows = [row for row in runs[1].metrics["results"] if row["arm"] == "federated" and row["auroc"] is not None]
    pairs = {(row["tested_on"], row["finding"]): row["positives"] * (row["n"] - row["positives"]) for row in rows}
    assert sum(abs(ours[key] - plain[key]) * pairs[key] for key in plain) <= 0.05 * sum(pairs.values())
    assert 0 < furthest(*runs) <= 10 * WEIGHTS
    up = [ran.metrics["bytes"]["federated/pretrain"]["up"] for ran in runs]
    assert up[0] == pytest.approx(up[1], rel=0.05)  # whole moments, as whole as without
    assert runs[0].metrics["secagg"]["clipped"] == 0


def test_half_the_bytes(simulate: Any, four: Path, masked: Any, in_the_clear: Any) -> None:
    """Ring 2^16: coarser, and yet near."""
    ran = simulate("--arms", "federated", *MASKED, "--set", "secagg.ring=16", data=four)
    assert ran.code == 0, ran.stderr
    assert ran.metrics["secagg"]["ring"] == 16
    up, whole = (one.metrics["bytes"]["federated/pretrain"]["up"] for one in (ran, masked))
    assert up < 0.51 * whole
    assert furthest(ran, in_the_clear) <= 10 * WEIGHTS


def test_what_it_leaves(masked: Any) -> None:
    assert masked.metrics["secagg"] == {"n": 4, "c": 1, "t": 3, "ring": 32, "clipped": 0, "failed": 0}
    history = json.loads((masked.out / "history.json").read_text())
    assert {row["site"] for row in history["pretrain"]["federated"]} == {ALL_SITES}
    assert {row["site"] for row in history["pretrain"]["local:alpha"]} == {"alpha"}
    sites = json.loads((masked.out / "sites.json").read_text())
    assert [(one["name"], one["images"]) for one in sites] == [(name, 24) for name in NAMES]
    folders = sorted(
        path.relative_to(masked.out / "tensorboard").as_posix() for path in masked.out.glob("tensorb*/*/*")
    )
    assert folders == ["federated/all-sites", "local-00-alpha/site-00", "random/all-sites"]
    page = build(masked.out).read_text()
    assert (
        "Secure aggregation: of the 4 sites’ updates, losses and counts the coordinator saw sums over at least" in page
    )
    assert "Federated, all sites together" in page
    assert "Federated, at this site" not in page


def test_its_model_can_be_released(masked: Any, tmp_path: Path) -> None:
    source = masked.out / "work" / "seed-0" / "federated"
    assert chexfound_command(["weights", "export", str(source), "--out", str(tmp_path / "release")]) == 0
    totals = read_journal(source / "journal.jsonl")[0]["totals"]
    train = totals["train"]
    summary = json.loads((tmp_path / "release" / "training_summary.json").read_text())
    assert summary["all_sites"]["train"] == train
    sites = f"**Sites**: alpha, beta, delta, epsilon (together {train} training images; {totals['patients']} patients)."
    assert sites in (tmp_path / "release" / "README.md").read_text()


def test_no_arm_of_one_site_is_summed(masked: Any) -> None:
    starts = {path.parent.name: read_journal(path)[0] for path in masked.out.glob("work/seed-0/*/journal.jsonl")}
    assert {arm for arm, start in starts.items() if "secagg" in start} == {"federated", "random"}


# ---- what cannot be


def test_all_that_does_not_fit_is_said_at_once_and_nothing_is_left(simulate: Any, four: Path) -> None:
    coarse = ("--set", "secagg.ring=16", "--set", "robust.clip=2")
    ran = simulate("--by", "iid:2", "--set", "aggregation=secagg", *coarse, data=four)
    assert ran.code == 2
    said = " ".join(ran.stderr.split())
    for part in ("4 problems", "is for 3 to 128 sites", *LOCAL, "robust.clip=null"):
        assert part in said
    assert not ran.out.exists()


def test_two_sites_are_found_with_the_images(simulate: Any, four: Path, make_images: Any, tmp_path: Path) -> None:
    ran = simulate(*MASKED, data=make_images(tmp_path / "two", {"alpha": 20, "beta": 20}))
    assert ran.code == 2
    assert "secure aggregation is for 3 to 128 sites; this federation has 2" in " ".join(ran.stderr.split())
    assert not ran.out.exists()


def test_an_arm_without_a_federation_needs_no_three_sites(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    data = make_images(tmp_path / "two", {"alpha": 20, "beta": 20})
    ran = simulate("--arms", "centralized", *MASKED, data=data)
    assert ran.code == 0, ran.stderr
    assert ran.metrics["secagg"] is None


def test_no_finding_is_labelled_by_enough(simulate: Any, tiny_images: Path) -> None:
    named = ("--set", "adapt.findings=[Bar, Blob]")
    ran = simulate("--arms", "federated", *MASKED, *named, data=tiny_images)
    assert ran.code == 3
    assert "none of Bar, Blob is labelled at 3 sites" in " ".join(ran.stderr.split())
    ran = simulate("--arms", "federated", *MASKED, data=tiny_images)
    assert ran.code == 2
    assert "no finding has adapt.min_positives 3" in " ".join(ran.stderr.split())
    assert not ran.out.exists()


def test_a_finding_of_too_few_sites_is_no_arms(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    labelled = dict.fromkeys(NAMES, ["Blob", "Bar"]) | {"alpha": ["Blob"], "beta": ["Blob"]}
    data = make_images(tmp_path / "uneven", dict.fromkeys(NAMES, 20), labelled)
    ran = simulate("--arms", "federated,centralized", *MASKED, data=data)
    assert ran.code == 0, ran.stderr
    assert ran.metrics["findings"] == ["Blob"]
    assert "Labelled at fewer than 3 sites, of which secure aggregation tells no sum: Bar." in ran.metrics["notes"]


# ---- interrupted


@contextlib.contextmanager
def interrupted(kind: str, number: int) -> Iterator[None]:
    """As Ctrl-C at so manieth an event of a kind."""
    left = [number]

    def stop(event: dict[str, Any]) -> None:
        left[0] -= event["event"] == kind
        if not left[0]:
            raise KeyboardInterrupt

    observers.append(stop)
    try:
        yield
    finally:
        observers.remove(stop)


ENROLLED, A_SUM = 4, 20  # replies: of the enrolment, and of five stages; the first sum is of the counts


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("replied", ENROLLED + A_SUM + 10),  # shares dealt, not all masked
        ("replied", ENROLLED + 2 * A_SUM - 1),  # opened at all sites but one, and not added up
        ("features", 1),
    ],
)
def test_it_goes_on_after_an_interruption(simulate: Any, four: Path, in_the_clear: Any, kind: str, number: int) -> None:
    with interrupted(kind, number):
        ran = simulate("--arms", "federated", *MASKED, data=four)
    assert ran.code == 130
    resumed = simulate("--resume", out=ran.out)
    assert resumed.code == 0, resumed.stderr
    assert furthest(resumed, in_the_clear) <= WEIGHTS


@pytest.mark.parametrize("left", ["of another run", "nothing"])
def test_it_goes_on_at_sites_that_have_another_backbone_by_now(
    simulate: Any, four: Path, in_the_clear: Any, left: str
) -> None:
    with interrupted("round", 3):  # the first of the head
        ran = simulate("--arms", "federated", *MASKED, data=four)
    assert ran.code == 130
    for path in (ran.out / "work" / "seed-0" / "federated" / "sites").glob("*/backbone.safetensors"):
        if left == "nothing":
            path.unlink()
        else:
            checkpoint.save(path, {name: tensor + 1 for name, tensor in checkpoint.load(path).items()})
    resumed = simulate("--resume", out=ran.out)
    assert resumed.code == 0, resumed.stderr
    assert furthest(resumed, in_the_clear) <= WEIGHTS
