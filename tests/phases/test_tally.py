"""The images that a site's steps were taken on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound.contract.request import Request
from chexfound.phases import tally


@pytest.fixture
def add(make_site: Callable[..., Any]) -> Callable[..., dict[str, int]]:
    """`add(phase, step, images, …)`: a round's rows, one a step; returns the totals then."""
    site = make_site("alpha", tally=True)

    def call(phase: str, step: int, *images: int) -> dict[str, int]:
        tally.add(site, Request(phase=phase, step=step), [{"step": step, "images": number} for number in images])
        return tally.total(site.home)

    return call


def test_rounds_add_up_by_phase(add: Callable[..., dict[str, int]]) -> None:
    assert add("pretrain", 0, 4, 4) == {"pretrain": 8}
    assert add("pretrain", 2, 4, 3) == {"pretrain": 15}
    assert add("adapt", 0, 5) == {"pretrain": 15, "adapt": 5}


def test_a_round_that_is_asked_for_again_counts_once(add: Callable[..., dict[str, int]]) -> None:
    add("pretrain", 0, 4, 4)
    add("pretrain", 2, 4, 4)
    assert add("pretrain", 2, 4, 4) == {"pretrain": 16}
    assert add("pretrain", 0, 4, 4) == {"pretrain": 8}  # a run that begins anew


def test_a_site_that_keeps_none_has_none(make_site: Callable[..., Any], tmp_path: Path) -> None:
    site = make_site("alpha")
    tally.add(site, Request(phase="adapt"), [{"step": 0, "images": 4}])
    assert not (site.home / tally.FILE).exists()
    assert tally.total(site.home) == {}
