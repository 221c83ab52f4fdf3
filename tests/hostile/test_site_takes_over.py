"""A registered site that sends an update of its own making: what passes is what the recipe's steps could have led to.

Before, a weight was held against the largest weight of any tensor: an update that moved the model by many times its own
norm passed, and its losses looked normal.  Now the sender is refused by name, and the others' round is as without him.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chexfound.contract.request import Reply
from chexfound.errors import ProtocolError
from chexfound.phases import dispatch
from chexfound.pretrain.bounds import UpdateBound
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from server.rounds.masked import MaskedRounds
from server.rounds.start import run_of
from tests.secagg.federation import Federation

pytest_plugins = ("tests.secagg.fixtures",)
SITES = ["alpha", "beta", "gamma"]
Weights = dict[str, Tensor]
BLOCK = "student.backbone.blocks.0.mlp.fc1.weight"


def loud(sent: Weights, reply: Weights, recipe: Any) -> Weights:
    """Every weight as large as the largest of any tensor."""
    most = max(float(t.abs().max()) for n, t in sent.items() if n.startswith("student."))
    return {
        n: torch.full_like(t, most) if n.startswith("student.") and not n.endswith("weight_g") else t
        for n, t in reply.items()
    }


def beyond(sent: Weights, reply: Weights, recipe: Any) -> Weights:
    """A hundredth beyond the box, in one tensor."""
    bound = UpdateBound.of(recipe, "pretrain", range(recipe.train.local_steps))
    return reply | {BLOCK: (sent[BLOCK] + 1.01 * bound.box(BLOCK, sent[BLOCK])).float()}


def other_teacher(sent: Weights, reply: Weights, recipe: Any) -> Weights:
    name = "teacher.backbone.cls_token"
    return reply | {name: reply[name] + 0.1}


def poison(monkeypatch: pytest.MonkeyPatch, name: str, attack: Callable[[Weights, Weights, Any], Weights]) -> None:
    """From its first round on that site answers with what `attack` makes of its reply."""
    honest = dispatch.run

    def run(site: Any, recipe: Any, request: Any, *decision: Any) -> Reply:
        reply = honest(site, recipe, request, *decision)
        if site.name != name or request.phase != "pretrain":
            return reply
        return replace(reply, tensors=attack(request.tensors, reply.tensors, recipe))

    monkeypatch.setattr(dispatch, "run", run)


@pytest.mark.parametrize("attack", [loud, beyond, other_teacher])
def test_an_update_beyond_the_box_is_refused_and_its_sender_named(
    attack: Any, make_exchange: Callable[..., Any], tiny_recipe_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = recipes.load(tiny_recipe_file, {"phases": ["pretrain"]})
    poison(monkeypatch, "beta", attack)
    with pytest.raises(ProtocolError, match=r"site 'beta' in pretrain, round 1: a reply's .* beyond where"):
        run_of(recipe, make_exchange(recipe, SITES), tmp_path / "run").run()


def test_with_a_quorum_the_others_go_on_as_if_he_had_not_come(
    make_exchange: Callable[..., Any], tiny_recipe_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = recipes.load(
        tiny_recipe_file, {"phases": ["pretrain"], "federation.quorum_sites": 2, "train.batch_size": 4,
                           "train.pooled_batch_size": None},
    )  # fmt: skip
    hashes = []
    for attack in (loud, lambda sent, reply, recipe: {n: torch.zeros(1) for n in reply}):
        with monkeypatch.context() as patch:
            poison(patch, "beta", attack)
            outcome = run_of(recipe, make_exchange(recipe, SITES), tmp_path / f"run-{len(hashes)}").run()
        hashes.append(outcome.model_sha256)
    assert hashes[0] == hashes[1]  # of alpha and gamma alone


def test_what_a_site_can_still_do_is_bounded_by_its_steps(
    make_exchange: Callable[..., Any], tiny_recipe_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Not stopped: all weights to the wall of the box, away from where honest steps lead."""

    def wall(sent: Weights, reply: Weights, recipe: Any) -> Weights:
        bound = UpdateBound.of(recipe, "pretrain", range(recipe.train.local_steps))
        return reply | {
            n: (sent[n] - 0.999 * bound.box(n, sent[n]) * (reply[n] - sent[n]).sign()).float()
            for n in reply
            if n.startswith("student.") and not n.endswith("weight_g")
        }

    recipe = recipes.load(tiny_recipe_file, {"phases": ["pretrain"], "train.rounds": 1})
    poison(monkeypatch, "beta", wall)
    assert run_of(recipe, make_exchange(recipe, SITES), tmp_path / "run").run().model_sha256


def test_under_masks_moments_of_steps_that_nobody_took_are_refused(
    fed: Federation, tmp_path: Path, monkeypatch: Any
) -> None:
    """A count of steps that is too large: no site would correct its next step for how young the moments are."""

    def older(sent: Weights, reply: Weights, recipe: Any) -> Weights:
        return {n: t + 1000 if n.endswith(".step") else t for n, t in reply.items()}

    train = curriculum.changed(fed.recipe.train, local_steps=2, optimizer_state="average")
    fed.recipe = curriculum.changed(fed.recipe, train=train)
    poison(monkeypatch, "beta", older)
    with pytest.raises(ProtocolError, match=r"pretrain, round 1: the sum of 4 sites: a reply's 'optimizer\..*\.step'"):
        run_of(fed.recipe, fed.exchange(), tmp_path / "run").run()


def test_under_masks_a_mean_beyond_the_box_is_refused(fed: Federation, tmp_path: Path, monkeypatch: Any) -> None:
    """Only the sum is seen, so nobody can be named; the round does not count."""

    def shout(sent: Weights, reply: Weights, recipe: Any) -> Weights:
        return {n: t + 1e4 if n == BLOCK else t for n, t in reply.items()}

    fed.recipe = curriculum.changed(fed.recipe, train=curriculum.changed(fed.recipe.train, local_steps=2))
    ranges = MaskedRounds._ranges

    def wider(*given: Any) -> dict[str, float]:  # an attacker is not held by the range that clips
        return {n: r * 1e3 if n == BLOCK else r for n, r in ranges(*given).items()}

    monkeypatch.setattr(MaskedRounds, "_ranges", wider)
    poison(monkeypatch, "beta", shout)
    with pytest.raises(ProtocolError, match=rf"pretrain, round 1: the sum of 4 sites: a reply's '{BLOCK}'"):
        run_of(fed.recipe, fed.exchange(), tmp_path / "run").run()
