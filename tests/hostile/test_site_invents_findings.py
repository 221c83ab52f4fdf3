"""A registered site that enrols with thousands of findings that nobody else has heard of."""

from __future__ import annotations

from typing import Any

import pytest

from chexfound.contract.request import Reply, Request
from chexfound.errors import ProtocolError
from chexfound.recipe import load as recipes
from chexfound.wire import envelopes
from server.exchange import protocol
from server.exchange.protocol import checked_roster
from server.rounds.work import bounded, choose_findings

LARGE = {"positives": 50, "negatives": 50}


def enrolment(name: str, findings: list[str], *, masked: bool = False) -> Reply:
    """Of a site with these findings, whatever else it may be."""
    about = {"site": name, "versions": {"chexfound": protocol.chexfound.__version__}, "cells": 0, "withheld": False}
    if masked:
        return Reply(values={**about, "findings": findings})
    counts = {"images": 200, "patients": 200, "train": 100, "val": 40, "test": 60, "store_hmac": "0" * 64}
    return Reply(values={**about, **counts, "findings": dict.fromkeys(findings, LARGE)})


def invented(number: int, prefix: str = "invented") -> list[str]:
    return [f"{prefix} {place}" for place in range(number)]


@pytest.mark.parametrize("masked", [False, True])
def test_more_findings_than_a_request_can_name_are_the_senders_fault(masked: bool) -> None:
    """The honest site is not named."""
    honest = enrolment("honest", ["Nodule"], masked=masked)
    liar = enrolment("liar", invented(5_000), masked=masked)
    recipe = recipes.load("demo", {"aggregation": "secagg"} if masked else {})
    with pytest.raises(ProtocolError, match="5000 findings; 4096 are the most") as error:
        checked_roster([honest, liar], ["node 1", "node 2"], recipe)
    assert "'liar'" in str(error.value)
    assert "honest" not in str(error.value)


@pytest.mark.parametrize("liars", [1, 3])
def test_what_a_few_invent_together_makes_no_honest_site_fail(make_message: Any, liars: int) -> None:
    """The request that comes of it is one that a site takes, and has the findings that honest sites share."""
    asked = [enrolment(f"liar {one}", invented(envelopes.FINDINGS_MAX, f"of {one}")) for one in range(liars)]
    asked += [enrolment(name, ["Nodule", "Zebra"]) for name in ("north", "south")]
    roster = checked_roster(asked, ["node"] * len(asked), recipes.load("demo"))
    findings = choose_findings(recipes.load("demo"), [member.values["findings"] for member in roster])
    assert {"Nodule", "Zebra"} <= set(findings)
    assert len(findings) == envelopes.FINDINGS_MAX
    assert list(findings) == sorted(findings)
    request = Request(phase="features", findings=findings)
    assert envelopes.unpack_request(envelopes.pack_request(request)).message.findings == findings


def test_names_of_most_sites_come_first_under_masks_too() -> None:
    """There no count is known; the names of a lone site give way."""
    names = [invented(envelopes.FINDINGS_MAX), ["Nodule"], ["Nodule", "Zebra"]]
    kept = bounded({name for site in names for name in site}, names)
    assert len(kept) == envelopes.FINDINGS_MAX
    assert "Nodule" in kept
