"""Reads values from outside as dataclasses, strictly."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from chexfound.durable.files import canonical
from chexfound.errors import ProtocolError

_T = TypeVar("_T")


def parse(kind: type[_T], value: Any, what: str) -> _T:
    """Read a value from outside as a `kind`.

    Raises: ProtocolError, which says of how many values it is malformed and quotes none.
    """
    adapter: TypeAdapter[_T] = TypeAdapter(kind)
    try:
        return adapter.validate_json(canonical(value))  # as JSON: strict, and yet an object is a dataclass
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        wrong = error.error_count() if isinstance(error, ValidationError) else 1
        raise ProtocolError(f"{what}: malformed ({wrong} values)") from error
