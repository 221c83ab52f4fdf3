"""What of Flower's private API both ends touch, so that a new minor version breaks one file loudly."""

from __future__ import annotations

import json
from typing import cast

from flwr.app import Array
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)

RETRY_S = (0.05, 0.5)  # between two tries to pull an object: doubled each time, up to this


def retry_soon() -> None:
    """Ask again soon for an object that is not there yet: Flower waits 1 s, 2 s, 4 s … for what takes milliseconds.

    Without Flower's limit of tries, which would come too soon; that of two hours stays.
    """
    sooner = {"initial_backoff": RETRY_S[0], "backoff_cap": RETRY_S[1], "max_tries_per_object": None}
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__
        assert defaults is not None
        assert defaults.keys() >= sooner.keys()
        defaults.update(sooner)


def inflate_once() -> None:
    """Have arrays that arrive put together in one copy beside their chunks; Flower takes three, of a whole model."""
    Array.inflate = classmethod(_inflate)  # type: ignore[assignment, method-assign]


def _inflate(cls: type[Array], object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
    """As Flower's `Array.inflate`.

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
