"""A run's records as they are shown: what one lacks is not told; whoever wrote it, `status` and `watch` go on."""

from __future__ import annotations

import math
from typing import Any


def read(record: Any, *way: str | int) -> Any:
    """Give what lies in a record, one key or place after another; None if it does not."""
    value = record
    for step in way:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def rows(record: Any, *way: str | int) -> list[dict[str, Any]]:
    """The rows of a record's list."""
    found = read(record, *way)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def texts(record: Any, *way: str | int) -> list[str] | None:
    """A record's list of words; None if it has none."""
    found = read(record, *way)
    return [str(word) for word in found] if isinstance(found, list) else None


def figure(record: Any, *way: str | int) -> float | None:
    """A finite number of a record; None if there is none."""
    found = read(record, *way)
    try:
        known = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    except OverflowError:  # an integer beyond the floats
        return None
    return found if known else None


def count(record: Any, *way: str | int) -> int | None:
    """A number of things of a record; None if there is none."""
    found = figure(record, *way)
    return found if isinstance(found, int) and found >= 0 else None


def site(row: Any) -> str:
    """Whose row it is."""
    return str(read(row, "site") or "?")
