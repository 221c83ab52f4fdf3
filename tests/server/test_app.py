"""What the ServerApp logs of a run's events."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from server.app import log_event

MISSING = [{"site": "c", "reason": "late"}]
COST = {"seconds": 1.0, "bytes": {"down": 2, "up": 3}}
ROUND = {"event": "round", "phase": "pretrain", "round": 1, **COST}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({**ROUND, "sites": [], "missing": MISSING}, ["event=missing phase=pretrain round=2 site=c reason=late"]),
        (
            {"event": "features", **COST, "missing": MISSING},
            ["event=missing phase=features round=1 site=c reason=late"],
        ),
        (
            {"event": "done", "model_sha256": "ab", "missing": MISSING},
            ["event=done model_sha256=ab", "event=missing phase=evaluate round=1 site=c reason=late"],
        ),
        (
            {"event": "attempt", "phase": "adapt", "round": 2, "failed": "too few"},
            ["event=attempt phase=adapt round=3 failed='too few'"],
        ),
        (
            {**ROUND, "sites": [{"site": "all sites", "history": [{"loss": 2.5}]}], "cohort": ["a", "b"]},
            ["event=round phase=pretrain round=2 loss=2.5000 seconds=1.0 up=3 down=2"],
        ),
    ],
    ids=lambda value: value["event"] if isinstance(value, dict) else "",
)
def test_lines(caplog: pytest.LogCaptureFixture, event: dict[str, Any], said: list[str]) -> None:
    caplog.set_level(logging.INFO, "chexfound.server")
    log_event(event)
    assert set(said) <= set(caplog.messages)
