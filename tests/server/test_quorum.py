"""A round that a quorum closes without some sites: what counts, what is told, and who goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chexfound.contract.request import Request
from chexfound.durable.journal import read_journal
from chexfound.errors import ProtocolError, SiteError
from server.exchange.protocol import Member, Missing
from server.rounds.result import subsets
from server.rounds.start import run_of

SITES = ["alpha", "beta"]
Rule = Callable[[Request], bool]


class Unreliable:
    """Sites of which some do not answer: `absent` says which requests come to nothing."""

    def __init__(self, exchange: Any, absent: Rule, spoiled: Rule = lambda request: False) -> None:
        self.exchange, self.absent, self.spoiled = exchange, absent, spoiled
        self.sent: list[Request | None] = []

    def enrol(self, recipe: Any, before: Sequence[Member] = ()) -> list[Member]:
        return self.exchange.enrol(recipe, before)

    def ask(self, requests: Sequence[Request | None]) -> Iterator[Any]:
        self.sent += requests
        asked = [None if request is None or self.absent(request) else request for request in requests]
        for request, mine, reply in zip(requests, asked, self.exchange.ask(asked), strict=True):
            if request is not None and mine is None:
                yield Missing(reason="late", error=SiteError("no reply"))
            elif request is not None and self.spoiled(request):
                yield replace(reply, values=reply.values | {"images": -1})
            else:
                yield reply


@pytest.fixture
def short(tiny_recipe: Any) -> Any:
    return replace(
        tiny_recipe,
        federation=replace(tiny_recipe.federation, quorum_sites=1, quorum_weight=0.2),
        train=replace(tiny_recipe.train, rounds=3, local_steps=1),
        adapt=replace(tiny_recipe.adapt, rounds=2, local_steps=1),
    )


def beta(phase: str, *numbers: int) -> Rule:
    return lambda request: (
        request.roster_index == 1 and request.phase == phase and (not numbers or request.round in numbers)
    )


def rounds(folder: Path, phase: str) -> list[dict[str, Any]]:
    entries = read_journal(folder / "journal.jsonl")
    return [entry for entry in entries if entry["event"] == "round" and entry["phase"] == phase]


def test_a_round_without_a_site_says_so(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    run_of(short, Unreliable(make_exchange(short, SITES), beta("pretrain", 1)), tmp_path).run()
    first, second, third = rounds(tmp_path, "pretrain")
    assert [one["site"] for one in second["sites"]] == ["alpha"]
    assert second["missing"] == [{"site": "beta", "reason": "late"}]
    assert "missing" not in first | third
    assert [one["site"] for one in third["sites"]] == SITES
    assert subsets(tmp_path) == ["Only a part of the sites: pretrain, round 2 went without beta (late)."]


def test_a_site_that_missed_a_round_is_sent_what_it_cannot_derive(
    short: Any, make_exchange: Any, tmp_path: Path
) -> None:
    derived = replace(short, teacher=replace(short.teacher, policy="rederive"))
    exchange = Unreliable(make_exchange(derived, SITES), beta("pretrain", 1))
    run_of(derived, exchange, tmp_path).run()
    with_teacher = {
        (request.round, request.roster_index): any(name.startswith("teacher.") for name in request.tensors)
        for request in exchange.sent
        if request is not None and request.phase == "pretrain"
    }
    assert with_teacher == {(0, 0): False, (0, 1): False, (1, 0): False, (1, 1): False, (2, 0): False, (2, 1): True}


def test_a_site_without_this_runs_features_has_no_part_in_the_head(
    short: Any, make_exchange: Any, tmp_path: Path
) -> None:
    exchange = Unreliable(make_exchange(short, SITES), beta("features"))
    outcome = run_of(short, exchange, tmp_path).run()
    assert {request.phase for request in exchange.sent if request and request.roster_index == 1} == {
        "pretrain", "features",
    }  # fmt: skip
    assert all(one["missing"] == [{"site": "beta", "reason": "behind"}] for one in rounds(tmp_path, "adapt"))
    assert {row["tested_on"] for row in outcome.results} == {"alpha"}
    assert len(subsets(tmp_path)) == 4  # features, two rounds of adapt, evaluate


def test_a_reply_that_cannot_be_is_one_that_did_not_come(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    """And nothing of it is folded in: the same model as without it."""
    hashes = []
    for number, exchange in enumerate(
        (
            Unreliable(make_exchange(short, SITES), lambda request: False, beta("pretrain", 1)),
            Unreliable(make_exchange(short, SITES), beta("pretrain", 1)),
        )
    ):
        hashes.append(run_of(short, exchange, tmp_path / str(number)).run().model_sha256)
    assert hashes[0] == hashes[1]
    assert rounds(tmp_path / "0", "pretrain")[1]["missing"] == [{"site": "beta", "reason": "protocol"}]


def test_too_few_are_no_quorum(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    both = replace(short, federation=replace(short.federation, quorum_sites=2))
    with pytest.raises(SiteError, match=r"pretrain, round 2: no quorum: 1 of 2 sites .* missing: beta \(late\)"):
        run_of(both, Unreliable(make_exchange(both, SITES), beta("pretrain", 1)), tmp_path).run()
    assert len(rounds(tmp_path, "pretrain")) == 1


def test_too_few_images_are_no_quorum(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    heavy = replace(short, federation=replace(short.federation, quorum_weight=0.99))
    with pytest.raises(SiteError, match="quorum_weight 0.99"):
        run_of(heavy, Unreliable(make_exchange(heavy, SITES), beta("pretrain", 1)), tmp_path).run()


@pytest.mark.parametrize(
    ("absent", "spoiled", "error"),
    [(beta("pretrain", 1), beta("x"), SiteError), (beta("x"), beta("pretrain", 1), ProtocolError)],
)
def test_without_a_quorum_every_site_is_needed(
    short: Any, make_exchange: Any, tmp_path: Path, absent: Rule, spoiled: Rule, error: Any
) -> None:
    all_of_them = replace(short, federation=replace(short.federation, quorum_sites=None))
    with pytest.raises(error):
        run_of(all_of_them, Unreliable(make_exchange(all_of_them, SITES), absent, spoiled), tmp_path).run()


def test_a_quorum_of_all_gives_the_same_model_as_none(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    outcomes = []
    for quorum in (None, 1):
        recipe = replace(short, federation=replace(short.federation, quorum_sites=quorum))
        outcomes.append(run_of(recipe, make_exchange(recipe, SITES), tmp_path / str(quorum)).run().model_sha256)
    assert outcomes[0] == outcomes[1]
