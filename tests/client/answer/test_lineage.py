"""What of earlier rounds a site stands on: digests that are the same only where all that was done is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.request import Request
from chexfound.errors import RefusedError
from chexfound.model import checkpoint
from chexfound.phases import carried
from chexfound.phases.site_state import Decision
from chexfound.recipe.schema import Adapt, Recipe, Train
from chexfound.secagg.messages import weights_of
from client.answer import lineage

RECIPE = Recipe(aggregation="secagg", train=Train(optimizer_state="local"), adapt=Adapt(optimizer_state="local"))
WEIGHTS = ["0" * 64, "1" * 64, "2" * 64]


@pytest.fixture
def site(tmp_path: Path) -> Any:
    """A site as far as lineage looks at it: its home."""
    return make(tmp_path / "home")


def make(home: Path) -> Any:
    home.mkdir()
    return SimpleNamespace(home=home, remembered={}, training_ids=lambda recipe: np.arange(3))


def request(round_: int, phase: str = "pretrain", **changes: Any) -> Request:
    return Request(**({"phase": phase, "round": round_, "step": 2 * round_, "steps": 2, "batch_size": 4} | changes))


def do(site: Any, asked: Request, weights: str, recipe: Recipe = RECIPE, **decided: Any) -> str:
    """A round as client/masked/stages.py does it: the state that it leaves, and its record; the digest after it."""
    folder = carried.state_folder(site, recipe, asked.phase)
    folder.mkdir(parents=True, exist_ok=True)
    lineage.begin(site, recipe, asked)
    (folder / f"{asked.step + asked.steps:08d}.safetensors").write_bytes(b"")
    lineage.record(site, recipe, asked, weights, Decision(**decided))
    return lineage.present(site, recipe, replace(asked, step=asked.step + asked.steps))


def test_a_site_that_did_nothing_stands_on_nothing(site: Any) -> None:
    assert lineage.present(site, RECIPE, request(0)) == ""
    assert lineage.present(site, RECIPE, request(3)) == ""


def test_sites_that_did_the_same_rounds_stand_on_the_same(tmp_path: Path) -> None:
    for phase in ("pretrain", "adapt"):
        after = []
        for name in ("A", "B"):
            site = make(tmp_path / f"{phase}-{name}")
            after.append([do(site, request(number, phase), WEIGHTS[number]) for number in range(3)])
        assert after[0] == after[1]
        assert len({*after[0], ""}) == 4


OTHER: dict[str, Callable[[], tuple[Any, ...]]] = {
    "other weights": lambda: (request(1), "9" * 64),
    "other steps": lambda: (request(1, steps=3), WEIGHTS[1]),
    "another batch": lambda: (request(1, batch_size=5), WEIGHTS[1]),
    "afresh": lambda: (request(1), WEIGHTS[1], {"reset_state": True}),
    "another start": lambda: (request(1, step=0), WEIGHTS[1]),
    "other findings": lambda: (request(1, findings=("Edema",)), WEIGHTS[1]),
    "a finding left out": lambda: (request(1), WEIGHTS[1], {"excluded": ("Edema",)}),
}


@pytest.mark.parametrize("other", OTHER)
def test_whoever_did_another_round_stands_on_something_else(other: str, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert do(one, request(0), WEIGHTS[0]) == do(two, request(0), WEIGHTS[0])
    after = do(one, request(1), WEIGHTS[1])
    assert after
    asked, weights, *decided = OTHER[other]()
    assert do(two, asked, weights, **dict(*decided)) not in ("", after)


def test_one_that_missed_a_round_stands_on_something_else(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    for number in range(2):
        do(one, request(number), WEIGHTS[number])
    do(two, request(0), WEIGHTS[0])
    assert lineage.present(two, RECIPE, request(2)) == ""  # no state at that step, so it starts afresh
    assert do(one, request(2), WEIGHTS[2]) != do(two, request(2), WEIGHTS[2], reset_state=True)


def test_starting_afresh_is_standing_on_nothing(tmp_path: Path) -> None:
    """Whatever was there before."""
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    do(one, request(0), WEIGHTS[0])
    do(two, request(0), "9" * 64)
    first, second = (do(site, request(1), WEIGHTS[1], reset_state=True) for site in (one, two))
    assert first == second


def test_a_round_that_is_asked_again_stands_where_it_stood(site: Any) -> None:
    """The coordinator may die before it has the reply: another attempt at the same round."""
    do(site, request(0), WEIGHTS[0])
    before = lineage.present(site, RECIPE, request(1))
    first = do(site, request(1), WEIGHTS[1])
    assert lineage.present(site, RECIPE, request(1)) == before
    assert do(site, request(1), WEIGHTS[1]) == first
    assert do(site, request(1), "9" * 64) != first


def test_a_site_that_dies_in_a_round_stands_on_nothing_after_it(site: Any) -> None:
    """Its state may be of that round already, and what the record has of it is of the round's last attempt."""
    do(site, request(0), WEIGHTS[0])
    before = lineage.present(site, RECIPE, request(1))
    assert do(site, request(1), WEIGHTS[1])
    lineage.begin(site, RECIPE, request(1))  # again, and then it dies
    assert lineage.present(site, RECIPE, request(2)) == ""
    assert lineage.present(site, RECIPE, request(1)) == before


def test_phases_and_recipes_do_not_mix(site: Any) -> None:
    after = do(site, request(0), WEIGHTS[0])
    assert lineage.present(site, RECIPE, request(1, "adapt")) == ""
    assert do(site, request(0, "adapt"), WEIGHTS[0]) not in ("", after)
    assert lineage.present(site, replace(RECIPE, seed=1), request(1)) == ""
    assert lineage.present(site, RECIPE, request(1)) == after


def test_without_the_state_the_record_says_nothing(site: Any) -> None:
    assert do(site, request(0), WEIGHTS[0])
    (carried.state_folder(site, RECIPE, "pretrain") / "00000002.safetensors").unlink()
    assert lineage.present(site, RECIPE, request(1)) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', '{"2": 7}', "\ud800"])
def test_a_record_that_cannot_be_read_says_nothing(site: Any, text: str) -> None:
    """And the site starts afresh, with all the others."""
    do(site, request(0), WEIGHTS[0])
    path = carried.state_folder(site, RECIPE, "pretrain") / "lineage.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert lineage.present(site, RECIPE, request(1)) == ""


def test_where_all_travels_nothing_is_kept(site: Any) -> None:
    recipe = replace(RECIPE, adapt=replace(RECIPE.adapt, optimizer_state="average"))
    assert not carried.carries(recipe, "adapt")
    lineage.begin(site, recipe, request(0, "adapt"))
    lineage.record(site, recipe, request(0, "adapt"), WEIGHTS[0])
    assert not list(site.home.rglob("lineage.json"))
    assert lineage.present(site, recipe, request(1, "adapt")) == ""


# -- weights


def test_before_the_head_the_weights_are_those_sent(site: Any) -> None:
    for phase in ("counts", "pretrain", "features"):
        assert lineage.base(site, phase, WEIGHTS[0]) == WEIGHTS[0]


@pytest.mark.parametrize("phase", ["adapt", "evaluate"])
def test_a_head_stands_on_the_backbone_too(site: Any, phase: str) -> None:
    with pytest.raises(RefusedError) as caught:
        lineage.base(site, phase, WEIGHTS[0])
    assert caught.value.code == "secagg.weights"
    backbone = {"w": torch.arange(4.0)}
    checkpoint.save(site.home / "backbone.safetensors", backbone)
    found = lineage.base(site, phase, WEIGHTS[0])
    assert found == weights_of(WEIGHTS[0], checkpoint.digest(backbone))
    assert lineage.base(site, phase, WEIGHTS[1]) != found


def test_another_backbone_is_seen_though_the_last_one_is_remembered(site: Any) -> None:
    path = site.home / "backbone.safetensors"
    found = []
    for value in (1.0, 2.0, 1.0):
        checkpoint.save(path, {"w": torch.full((4,), value)})
        found += [lineage.base(site, "adapt", WEIGHTS[0]) for _ in range(2)]
    assert found[0] == found[1] == found[4] == found[5] != found[2] == found[3]


# -- features


def extract(site: Any, recipe: Recipe = RECIPE, findings: tuple[str, ...] = ("Edema",)) -> Request:
    """A phase `features` as client/masked/stages.py does it: backbone, files, and the record of what they are of."""
    checkpoint.save(site.home / "backbone.safetensors", {"w": torch.arange(4.0)})
    (site.home / "features").mkdir(exist_ok=True)
    for name in ("cls.npy", "patches.npy"):
        (site.home / "features" / name).write_bytes(b"features")
    asked = request(0, "features", findings=findings)
    lineage.record_features(site, recipe, asked)
    return replace(asked, phase="adapt")


def refused(site: Any, recipe: Recipe, asked: Request) -> None:
    with pytest.raises(RefusedError, match="the features here are not those of this run") as caught:
        lineage.check_features(site, recipe, asked)
    assert caught.value.code == "secagg.weights"


def test_features_of_this_run_pass(site: Any) -> None:
    asked = extract(site)
    assert lineage.check_features(site, RECIPE, asked) is None
    later = replace(asked, round=3, step=9)
    assert lineage.check_features(make_again(site), RECIPE, later) is None  # in every round, restarted or not


def make_again(site: Any) -> Any:
    return SimpleNamespace(home=site.home, remembered={}, training_ids=lambda recipe: np.arange(3))


def test_a_site_without_labelled_images_has_none_and_passes(site: Any) -> None:
    asked = extract(site)
    for path in (site.home / "features").iterdir():
        path.unlink()
    (site.home / "features").rmdir()
    refused(site, RECIPE, asked)
    lineage.record_features(site, RECIPE, asked)
    assert lineage.check_features(site, RECIPE, asked) is None


def test_features_of_something_else_are_refused(site: Any) -> None:
    asked = extract(site)
    refused(site, replace(RECIPE, seed=1), asked)
    refused(site, RECIPE, replace(asked, findings=("Nodule",)))
    refused(site, RECIPE, replace(asked, findings=("Edema", "Nodule")))
    other = make_again(site)
    other.training_ids = lambda recipe: np.arange(4)  # other shares of the patients, or images that came since
    refused(other, RECIPE, asked)
    checkpoint.save(site.home / "backbone.safetensors", {"w": torch.ones(4)})
    refused(site, RECIPE, asked)


@pytest.mark.parametrize("change", ["other bytes", "one less", "one more", "put anew"])
def test_features_that_were_changed_are_refused(site: Any, change: str) -> None:
    asked = extract(site)
    path = site.home / "features" / "cls.npy"
    if change == "other bytes":
        path.write_bytes(b"something else")
    elif change == "one less":
        path.unlink()
    elif change == "one more":
        (path.parent / "more.npy").write_bytes(b"")
    else:
        other = path.with_suffix(".new")
        other.write_bytes(b"features")
        other.replace(path)
    refused(site, RECIPE, asked)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "null"])
def test_features_without_a_record_are_refused(site: Any, text: str | None) -> None:
    asked = extract(site)
    path = site.home / "secagg" / "features.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    refused(site, RECIPE, asked)
