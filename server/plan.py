"""What a run asks of these sites: images a step, and which findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chexfound import cells, wire
from chexfound import recipe as recipes
from chexfound.errors import ConfigError, Problems
from chexfound.pretrain import curriculum
from chexfound.schema import Adapt, Recipe, Train


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Images a step at each site of this run."""

    pretrain: tuple[int, ...]  # in each stage of the curriculum
    adapt: int

    @staticmethod
    def of(recipe: Recipe, n_sites: int) -> Batches:
        """Each site's share of the recipe's work.

        Raises: ConfigError with every batch that cannot be divided among the sites.
        """
        problems = Problems(ConfigError, "recipe")

        def share(config: Train | Adapt, section: str) -> int:
            try:
                return recipes.site_batch_size(config, n_sites, section)
            except ConfigError as error:
                problems.add(str(error))
                return 0

        pretrain: tuple[int, ...] = ()
        if "pretrain" in recipe.phases:
            pretrain = tuple(
                share(stage.train, f"curriculum.{number - 1}" if number else "train")
                for number, stage in enumerate(curriculum.stages(recipe))
            )
        adapt = share(recipe.adapt, "adapt") if "adapt" in recipe.phases else 0
        problems.check()
        return Batches(pretrain=pretrain, adapt=adapt)

    @staticmethod
    def pooled(recipe: Recipe, n_sites: int) -> Batches:
        """Those of a lone site that does the work of `n_sites`."""
        return Batches(
            pretrain=tuple(recipes.pooled_batch_size(stage.train, n_sites) for stage in curriculum.stages(recipe)),
            adapt=recipes.pooled_batch_size(recipe.adapt, n_sites),
        )

    def pretrain_images(self, recipe: Recipe) -> int:
        """Images that a site takes in all of pretraining."""
        if "pretrain" not in recipe.phases:
            return 0
        stages = zip(curriculum.stages(recipe), self.pretrain, strict=True)
        return sum(stage.pretrain_steps * batch for stage, batch in stages)


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
    return tuple(sorted(ranked[: wire.FINDINGS_MAX]))
