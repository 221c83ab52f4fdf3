"""JSON values from outside that must be numbers."""

from __future__ import annotations

import math

from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives


def finite(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def count(value: object) -> bool:
    """Whether a JSON value is a number of things: an integer in 0 … 2**40."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
