"""JSON from outside: no key given twice, of which Python's reader keeps the last and a person reads the first."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from chexfound.parsing.strict_yaml import shown


def loads(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text; `options` are those of `json.loads`.

    Raises: ValueError, for a key given twice in one object too; RecursionError.
    """
    return json.loads(text, object_pairs_hook=_object, **options)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(key)} is given twice")
    return values
