"""Sites that weigh much, by a journal's record: their images at the start, their share in a round."""

from __future__ import annotations

from typing import Any

from server.runs.records import count, figure, read, rows, site
from strategies.ceiling import outsized


def warnings(event: Any) -> list[str]:
    """A sentence for each such site of a record."""
    if read(event, "event") == "start":
        images = {site(one): number for one in rows(event, "roster") if (number := count(one, "train")) is not None}
        return [
            f"{name} has {times:g} times as many training images as the median of the sites: ask whether that is so"
            for name, times in outsized(images).items()
        ]
    capped = read(event, "capped")
    return [
        f"{name} would be {part:.0%} of the sum: its weight is cut to the ceiling"
        for name in (capped if isinstance(capped, dict) else ())
        if (part := figure(capped, name)) is not None
    ]
