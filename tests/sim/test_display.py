from __future__ import annotations

import io

import pytest
from rich.console import Console

from sim import display


@pytest.mark.parametrize(("every_s", "lines"), [(0.0, 2), (60.0, 0)])
def test_a_log_is_told_now_and_then_what_goes_on(every_s: float, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "EVERY_S", every_s)
    log = io.StringIO()
    with display.Display(Console(file=log)) as shown:
        shown.arm = "federated"
        for done in (1, 2):
            shown.update("[north]", "pretrain, round 3", done, 5)
    said = log.getvalue().splitlines()
    assert [line.split("  ")[-1] for line in said] == [
        f"federated: [north] · pretrain, round 3: {done} of 5" for done in (1, 2)
    ][:lines]


def test_a_terminal_has_bars_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "EVERY_S", 0.0)
    log = io.StringIO()
    with display.Display(Console(file=log, force_terminal=True)) as shown:
        shown.update("north", "pretrain", 1, 5)
    assert "north · pretrain: 1 of 5" not in log.getvalue()
