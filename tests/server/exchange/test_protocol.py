"""Who the sites say they are, and a lone one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chexfound.contract import cells
from chexfound.contract.request import Reply, Request
from chexfound.errors import ProtocolError, RefusedError
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from client.home.policy import Policy
from server.exchange.direct import DirectExchange
from server.exchange.protocol import checked_roster

ENROLMENT: dict[str, Any] = {
    "site": "A",
    "images": 10,
    "patients": 8,
    "train": 6,
    "val": 1,
    "test": 3,
    "findings": {"Blob": {"positives": 2, "negatives": 3}},
    "versions": {"chexfound": "0.1.0", "torch": "2", "python": "3"},
    "store_hmac": "0" * 64,
    "cells": 0,
    "withheld": False,
}
FEW = {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
CAREFUL = ENROLMENT | {
    "images": cells.SUPPRESSED,
    "patients": cells.SUPPRESSED,
    "train": 60,
    "val": cells.SUPPRESSED,
    "test": 30,
    "cells": 10,
    "findings": {"Blob": {"positives": 20, "negatives": 30}, "Bar": FEW},
}


def enrolment(**changes: Any) -> Reply:
    return Reply(values=ENROLMENT | changes)


HUGE, NAN = 10**400, float("nan")
HOSTILE = [
    *({"site": name} for name in (None, "", 3, "x" * 65, "a\nb", ["A"])),
    *(
        {key: value}
        for key in ("images", "patients", "train", "val", "test")
        for value in (None, -1, 1.5, True, "1", HUGE, NAN)
    ),
    *(
        {"findings": value}
        for value in (
            None,
            [],
            "Blob",
            {"Blob": 3},
            {"Blob": {}},
            {"": ENROLMENT["findings"]["Blob"]},
            {"Blob": {"positives": 1}},
            {"Blob": {"positives": -1, "negatives": 1}},
            {"Blob": {"positives": 1, "negatives": "1"}},
            {"a\nb": ENROLMENT["findings"]["Blob"]},
            {"Blob": {"positives": 4, "negatives": 3}},  # of 6 training images
            {"Blob": {"positives": 0, "negatives": 0}},  # is left out
        )
    ),
    *({"versions": value} for value in (None, [], {"torch": 2}, {"torch": ""}, {"torch": "x" * 65})),
    *({"images": value} for value in (9, 11)),  # not the sum of train, val and test
    {"train": 7},
    {"patients": 11},
    *({"store_hmac": value} for value in (None, 1, "", "x" * 65, "g" * 64, "0" * 63, "0" * 64 + "\n")),
    {"patients_list": ["Jane"]},
    *({"withheld": value} for value in (None, 0, 3, "Jane", ["Jane"])),
    *({"cells": value} for value in (None, -1, True, "10", cells.SUPPRESSED)),
    *({key: cells.SUPPRESSED} for key in ("images", "patients", "train", "val", "test")),  # where nothing may be
    {"findings": {"Blob": FEW}},
]
CARELESS = [  # of a site that suppresses
    *({key: value} for key in ("images", "patients", "val") for value in ("few", "Suppressed", "", None, 0, [])),
    *({key: 100} for key in ("images", "patients")),  # from which the small part could be taken
    {"val": 12},
    *(
        {"findings": {"Blob": value}}
        for value in (
            FEW | {"positives": 3},
            FEW | {"negatives": 0},
            {"positives": "few", "negatives": "few"},
            {"positives": 9, "negatives": 30},  # images of fewer than 10 patients
        )
    ),
    {"train": cells.SUPPRESSED},  # whose findings are told
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: str(change)[:40])
def test_hostile_enrolments(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="enrolled without"):
        checked_roster([enrolment(site="B"), enrolment(**change)], ["node 1", "node 2"], Recipe())


@pytest.mark.parametrize("change", CARELESS, ids=lambda change: str(change)[:40])
def test_a_count_is_a_number_or_the_word(change: dict[str, Any]) -> None:
    checked_roster([Reply(values=CAREFUL)], ["node 1"], Recipe())
    with pytest.raises(ProtocolError, match="'A' enrolled without"):
        checked_roster([Reply(values=CAREFUL | change)], ["node 1"], Recipe())


@pytest.mark.parametrize("key", list(ENROLMENT))
def test_incomplete_enrolments(key: str) -> None:
    with pytest.raises(ProtocolError, match="enrolled without"):
        checked_roster(
            [Reply(values={name: value for name, value in ENROLMENT.items() if name != key})], ["node 1"], Recipe()
        )


def test_a_direct_exchange_is_one_site(make_site: Any, tiny_recipe: Any) -> None:
    exchange = DirectExchange(make_site("alpha"))
    (member,) = exchange.enrol(tiny_recipe)
    assert (member.name, member.values["images"]) == ("alpha", 29)
    assert [reply.values for reply in exchange.ask([Request(phase="enrol")])] == [member.values]


# ---- what a site grants


def granted(**changed: Any) -> dict[str, Any]:
    return replace(Policy(**changed).limits(2), masked=False).as_dict()


def test_what_a_site_grants_is_no_part_of_what_it_is() -> None:
    """So a site may change it between two starts of one run."""
    (member,) = checked_roster([enrolment(policy=granted())], ["node 1"], recipes.load("demo"))
    assert member.values == ENROLMENT
    assert member.limits is not None
    assert member.limits.max_runs == 5


@pytest.mark.parametrize("only", [False, True], ids=["with its counts", "with nothing else"])
def test_a_site_that_refuses_the_recipe_is_told_with_its_line(only: bool) -> None:
    told = enrolment(policy=granted(max_rounds=3)).values
    if only:
        told = {key: told[key] for key in ("site", "versions", "policy")}
    with pytest.raises(RefusedError, match=r"site 'A' refuses .*'max_rounds: 3', .* rounds of pretrain 20") as refused:
        checked_roster([Reply(values=told | {"site": "A"})], ["node 1"], recipes.load("demo"))
    assert refused.value.code == "policy.work"


@pytest.mark.parametrize("policy", [None, {}, "all", granted() | {"masked": "no"}, granted() | {"Jane": 1}])
def test_what_is_no_policy_is_that_site_s_fault(policy: Any) -> None:
    with pytest.raises(ProtocolError):
        checked_roster([enrolment(policy=policy)], ["node 1"], recipes.load("demo"))


def test_a_site_that_tells_its_policy_alone_must_refuse_by_it() -> None:
    told = {key: value for key, value in enrolment(policy=granted()).values.items() if key not in ("train", "images")}
    with pytest.raises(ProtocolError):
        checked_roster([Reply(values=told)], ["node 1"], recipes.load("demo"))
