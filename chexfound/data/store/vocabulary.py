"""Names of findings that may leave a site: those of public data sets, and what its operator adds.

A label is free text until somebody has read it: one image of `MUELLER Hans 12.3.1954` is a finding for whoever
ingests it.  So a deployed site tells names that stand here, letter by letter, and no others (docs/site.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from chexfound.data.store.index import UNKNOWN
from chexfound.data.store.reader import Store
from chexfound.parsing import strict_yaml
from chexfound.parsing.names import shown

FILE = Path(__file__).with_name("vocabulary.yaml")
SHOWN = 20  # names, of those that stay


@functools.cache
def released() -> frozenset[str]:
    """The names of this release, each in the spellings that data sets write it in."""
    sections: dict[str, list[str]] = strict_yaml.load(FILE.read_text())
    return frozenset(one for names in sections.values() for name in names for one in spellings(name))


def spellings(name: str) -> set[str]:
    """A name as it is, in lower case, Capitalised and Titled, each with spaces or with underscores."""
    words = name.replace("_", " ")
    written = {words, words.lower(), words.capitalize(), words.title()}
    return {name} | written | {one.replace(" ", "_") for one in written}


def permitted(own: Iterable[str] = ()) -> frozenset[str]:
    """The names that may leave a site whose operator adds these."""
    return released() | frozenset(own)


def withheld(store: Store, ids: np.ndarray, words: frozenset[str]) -> dict[str, int]:
    """Finding -> labelled images of those that the store has and `words` has not, sorted; for the site's own eyes."""
    others = [name for name in store.findings if name not in words]
    labelled = (store.labels(ids, others) != UNKNOWN).sum(0)
    return {name: int(images) for name, images in zip(others, labelled, strict=True) if images}


def said(found: Mapping[str, int]) -> list[str]:
    """Give what the operator is told of `withheld`: which names stay, and the line of site.yaml that lets them out."""
    names = list(found)[:SHOWN]
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    listed = ", ".join(f"{shown(name)} ({found[name]} images)" for name in names)
    quoted = ", ".join("'" + shown(name).replace("'", "''") + "'" for name in names)
    return [
        f"names that are in no vocabulary stay here: {listed}{more}",
        f"to let them out, in site.yaml: findings: [{quoted}{', …' if more else ''}]",
    ]
