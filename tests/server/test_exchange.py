"""Who the sites say they are, and a lone one."""

from __future__ import annotations

from typing import Any

import pytest

from chexfound import cells
from chexfound.errors import ProtocolError
from chexfound.phases import Reply, Request
from server.exchange import DirectExchange, checked_roster

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
        checked_roster([enrolment(site="B"), enrolment(**change)], ["node 1", "node 2"])


@pytest.mark.parametrize("change", CARELESS, ids=lambda change: str(change)[:40])
def test_a_count_is_a_number_or_the_word(change: dict[str, Any]) -> None:
    checked_roster([Reply(values=CAREFUL)], ["node 1"])
    with pytest.raises(ProtocolError, match="'A' enrolled without"):
        checked_roster([Reply(values=CAREFUL | change)], ["node 1"])


@pytest.mark.parametrize("key", list(ENROLMENT))
def test_incomplete_enrolments(key: str) -> None:
    with pytest.raises(ProtocolError, match="enrolled without"):
        checked_roster([Reply(values={name: value for name, value in ENROLMENT.items() if name != key})], ["node 1"])


def test_a_direct_exchange_is_one_site(make_site: Any, tiny_recipe: Any) -> None:
    exchange = DirectExchange(make_site("alpha"))
    (member,) = exchange.enrol(tiny_recipe)
    assert (member.name, member.values["images"]) == ("alpha", 29)
    assert [reply.values for reply in exchange.ask([Request(phase="enrol")])] == [member.values]
