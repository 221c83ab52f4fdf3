"""Listeners told what happens inside a task, in the process that does it; set by the pool that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnWarnings = Callable[[int, str, list[dict[str, Any]]], None]  # seed, arm, what `server.rounds.health.warnings` gives
on_warnings: OnWarnings | None = None  # told what begins to ail a lone arm, as it does


def warner(seed: int, arm: str, listener: OnWarnings | None) -> Callable[[dict[str, Any]], None]:
    """Pass the warnings in an arm's journal records on to a listener, if there is one."""
    from server.rounds import health

    def warn(event: dict[str, Any]) -> None:
        if listener is not None and (found := health.warnings(event)):
            listener(seed, arm, found)

    return warn
