"""How Flower puts an array together that arrives in chunks, by its private API."""

from __future__ import annotations

import json
from typing import cast

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)

from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives

# -- how Flower receives, by its private API


def inflate_once() -> None:
    """Have arrays that arrive put together in one copy beside their chunks; Flower takes three, of a whole model."""
    Array.inflate = classmethod(_inflate)  # type: ignore[assignment, method-assign]


def _inflate(cls: type[Array], object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
    """Put an array together from its chunks, as Flower's `Array.inflate` does.

    Raises: what Flower's raises, over content that is no array's or other chunks than it names.
    """
    children = children or {}
    about = json.loads(get_object_body(object_content, cls).decode())
    named = get_object_children_ids_from_object_content(object_content)
    ids = [named[place] for place in about["arraychunk_ids"]]
    if set(ids) != set(children):
        raise ValueError("an array without its chunks, or with others")
    data = b"".join(cast(bytes, children[one].data) for one in ids)  # type: ignore[attr-defined]
    return cls(dtype=about["dtype"], shape=tuple(about["shape"]), stype=about["stype"], data=data)
