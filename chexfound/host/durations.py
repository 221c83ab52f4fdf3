"""Times as a person reads them."""

from __future__ import annotations

_UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))


def span(seconds: float, digits: int = 0) -> str:
    """A length of time in the largest unit that it is at least two of, as it is printed: 119.6 s are 2 minutes.

    Args:
        seconds: not below zero.
        digits: behind the point.
    """
    for size, name in _UNITS:
        if round(seconds / size, digits) >= 2:
            return f"{seconds / size:.{digits}f} {name}"
    return f"{seconds:.{digits}f} s"
