"""Names: which may travel between the ends, how others are written, and what several of a thing are called."""

from __future__ import annotations

import os

RULE = "1 to 64 printable characters"
ALL_SITES = "all sites"  # of whom a figure is that no site's own is known of (aggregation: secagg)


def is_name(value: object) -> bool:
    """Whether a value is a name: 1 to 64 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()


def utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a path is UTF-8, as whatever we store or show must be."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def written(path: str | os.PathLike[str]) -> str:
    r"""A path as text that can be stored and shown: a byte that is not UTF-8 becomes, say, `\xe9`."""
    return os.fspath(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def shown(value: object, length: int = 300) -> str:
    r"""Foreign text as a table may have it: a newline or an escape becomes `\n`, `\x1b`; cut to a length."""
    text = str(value)
    text = text if len(text) <= length else f"{text[:length]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, what: str) -> str:
    """So many of a thing: `1 site`, `2 sites`."""
    return f"{number} {what}" + ("" if number == 1 else "s")
