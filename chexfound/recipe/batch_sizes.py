"""How many images a step takes at each site, so that all together make the recipe's batch."""

from __future__ import annotations

from dataclasses import dataclass

from chexfound.errors import ConfigError, Problems
from chexfound.recipe import curriculum
from chexfound.recipe.schema import Adapt, Recipe, Stage, Train


def site_batch_size(phase: Train | Adapt, n_sites: int, section: str) -> int:
    """Images that one of `n_sites` sites takes a step.

    Raises: ConfigError if the pooled batch cannot be divided equally.
    """
    if phase.batch_size is not None:
        return phase.batch_size
    assert phase.pooled_batch_size is not None
    if phase.pooled_batch_size % n_sites:
        near = -(-phase.pooled_batch_size // n_sites) * n_sites
        raise ConfigError(
            f"{section}.pooled_batch_size {phase.pooled_batch_size} cannot be divided equally among {n_sites} sites; "
            f"choose a multiple of {n_sites}: --set {section}.pooled_batch_size={near}"
        )
    return phase.pooled_batch_size // n_sites


def fitted(recipe: Recipe, n_sites: int) -> tuple[Recipe, list[str]]:
    """Choose, for each pooled batch that so many sites cannot share equally, the nearest that they can.

    Returns: the recipe, and a sentence for each batch that is another one now.
    """
    told: list[str] = []

    def choose(section: Train | Adapt | Stage, name: str) -> Train | Adapt | Stage:
        asked = section.pooled_batch_size
        if asked is None or not asked % n_sites:
            return section
        near = max(1, (asked + n_sites // 2) // n_sites) * n_sites
        told.append(
            f"{name}.pooled_batch_size is {near}, not {asked}: {n_sites} sites take {near // n_sites} images each"
        )
        return curriculum.changed(section, pooled_batch_size=near)

    if "pretrain" in recipe.phases:
        stages = [choose(stage, f"curriculum.{number}") for number, stage in enumerate(recipe.curriculum)]
        recipe = curriculum.changed(recipe, train=choose(recipe.train, "train"), curriculum=tuple(stages))
    if "adapt" in recipe.phases:
        recipe = curriculum.changed(recipe, adapt=choose(recipe.adapt, "adapt"))
    return recipe, told


def pooled_batch_size(phase: Train | Adapt, n_sites: int) -> int:
    """Images that the centralized arm takes a step: those of `n_sites` sites together."""
    return phase.pooled_batch_size if phase.pooled_batch_size is not None else phase.batch_size * n_sites  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Images a step at each site of this run."""

    pretrain: tuple[int, ...]  # in each stage of the curriculum
    adapt: int

    @staticmethod
    def of(recipe: Recipe, n_sites: int) -> BatchSizes:
        """Each site's share of the recipe's work.

        Raises: ConfigError with every batch that cannot be divided among the sites.
        """
        problems = Problems(ConfigError, "recipe")

        def share(config: Train | Adapt, section: str) -> int:
            try:
                return site_batch_size(config, n_sites, section)
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
        return BatchSizes(pretrain=pretrain, adapt=adapt)

    @staticmethod
    def pooled(recipe: Recipe, n_sites: int) -> BatchSizes:
        """Those of a lone site that does the work of `n_sites`."""
        return BatchSizes(
            pretrain=tuple(pooled_batch_size(stage.train, n_sites) for stage in curriculum.stages(recipe)),
            adapt=pooled_batch_size(recipe.adapt, n_sites),
        )

    def pretrain_images(self, recipe: Recipe) -> int:
        """Images that a site takes in all of pretraining."""
        if "pretrain" not in recipe.phases:
            return 0
        stages = zip(curriculum.stages(recipe), self.pretrain, strict=True)
        return sum(stage.pretrain_steps * batch for stage, batch in stages)
