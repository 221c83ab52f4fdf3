"""A coordinator that asks a hospital for its own update, where three hospitals or more could have sent it masked.

Nobody has written a site.yaml here: what holds is what holds by itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chexfound.contract.request import Reply, Request
from chexfound.pretrain.train import initial_weights
from client.home.policy import Policy
from tests.secagg.federation import NAMES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
VICTIM = "alpha"
PHASES = ("enrol", "pretrain", "features", "adapt", "evaluate")


def asked(fed: Federation, phase: str) -> Request:
    return Request(phase=phase, steps=1, batch_size=2, findings=("Bar", "Blob"), tensors=initial_weights(fed.recipe))


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_in_the_clear_is_refused_before_an_image_is_touched(phase: str, fed: Federation) -> None:
    plain = replace(fed.recipe, aggregation="fedavg")
    assert fed.ask(VICTIM, asked(fed, phase), recipe=plain) == "secagg.plain"
    assert fed.refused(VICTIM) == ["secagg.plain"]
    assert fed.attempt().finish()["images"] == 96  # the next honest sum has this site in it


def test_what_a_masked_run_is_asked_in_the_clear_is_refused(fed: Federation) -> None:
    for phase in ("pretrain", "adapt", "evaluate"):
        assert fed.ask(VICTIM, asked(fed, phase)) == "secagg.plain"
    told = fed.ask(VICTIM, asked(fed, "enrol"))
    assert isinstance(told, Reply)
    assert set(told.values) == {"site", "versions", "findings", "cells", "withheld"}  # no count
    assert fed.attempt().finish()["images"] == 96


@pytest.mark.parametrize("line", ["plain: accepted", "secagg: {required: false}"])
def test_only_the_operator_s_own_line_opens_it(line: str, fed: Federation) -> None:
    (fed.homes[VICTIM] / "site.yaml").write_text(line)
    plain = replace(fed.recipe, aggregation="fedavg")
    told = fed.ask(VICTIM, asked(fed, "pretrain"), recipe=plain)
    assert isinstance(told, Reply)
    assert any(torch.is_tensor(tensor) for tensor in told.tensors.values())
    for name in NAMES[1:]:  # one site's word is no other's
        assert fed.ask(name, asked(fed, "pretrain"), recipe=plain) == "secagg.plain"


def test_it_goes_by_the_roster_that_the_operator_approved() -> None:
    assert [Policy().masked(n) for n in (1, 2, 3, 128)] == [False, False, True, True]
