"""YAML from outside: no aliases, no key given twice; and values as a message may quote them."""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class _Loader(yaml.SafeLoader):
    """YAML without aliases (a few lines of them unfold to gigabytes) and without a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not taken in a recipe; write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key.value)} is given twice", key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises: yaml.YAMLError, an alias or a key given twice included; ValueError for a date such as 2024-13-45;
    RecursionError.
    """
    return yaml.load(text, _Loader)  # noqa: S506 (a safe loader)


def shown(value: Any) -> str:
    """A value as a message quotes it: what is long or deep is cut."""
    try:
        text = _repr.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:79]}…"
