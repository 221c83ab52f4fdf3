"""Who is told what happens inside a task, in the process that does it; set by the pool that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnWarnings = Callable[[int, str, list[dict[str, Any]]], None]  # seed, arm, what `server.health.warnings` gives
on_warnings: OnWarnings | None = None  # told what begins to ail a lone arm, as it does
