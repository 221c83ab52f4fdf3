"""Work that a run asks of its sites: which findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from chexfound.contract import cells
from chexfound.errors import ConfigError
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes


def choose_findings(recipe: Recipe, counts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The findings that the head learns, sorted: the recipe's own, or all with enough of both classes.

    Of more than a request can name those that most sites label, then those of the most images: no site's names make
    another fail.

    Raises: ConfigError if none is left, naming the closest.
    """
    if recipe.adapt.findings is not None:
        return tuple(recipe.adapt.findings)
    totals: dict[str, list[int]] = {}
    for site in counts:
        for name, count in site.items():
            total = totals.setdefault(name, [0, 0])
            total[0] += cells.known(count["positives"])
            total[1] += cells.known(count["negatives"])
    minimum = recipe.adapt.min_positives
    enough = [name for name, both in totals.items() if min(both) >= minimum]
    chosen = bounded(enough, counts, {name: min(totals[name]) for name in enough})
    if not chosen:
        best = max(totals, key=lambda name: min(totals[name]), default=None)
        closest = (
            f"; the closest is {best!r} with {totals[best][0]} and {totals[best][1]}"
            if best
            else "; no image is labelled"
        )
        raise ConfigError(
            f"no finding has adapt.min_positives {minimum} positive and as many negative training images "
            f"over all sites{closest}. "
            "Lower adapt.min_positives, name adapt.findings, or leave out the head with --set phases=[pretrain]"
        )
    return chosen


def bounded(
    names: Collection[str], sites: Sequence[Collection[str]], images: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Names of findings, sorted; of more than a request can hold those of the most sites, then of the most images."""
    holders = Counter(name for site in sites for name in site)
    ranked = sorted(names, key=lambda name: (-holders[name], -(images or {}).get(name, 0), name))
    return tuple(sorted(ranked[: envelopes.FINDINGS_MAX]))
