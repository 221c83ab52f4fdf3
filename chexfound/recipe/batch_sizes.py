"""How many images a step takes at each site, so that all together make the recipe's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from chexfound.errors import ConfigError, Problems
from chexfound.recipe import curriculum
from chexfound.recipe.schema import Adapt, Recipe, Stage, Train


def dealt(pooled: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Deal a pooled batch among sites in proportion to `sizes`, (n,) ≥ 0, by Webster's method (Sainte-Laguë).

    Returns: n whole numbers ≥ 1 that sum to `pooled`; of equal sizes, those at the front have one image more.

    Raises: ConfigError if there are more sites than images.
    """
    if pooled < len(sizes):
        raise ConfigError(f"a pooled batch of {pooled} images cannot be dealt among {len(sizes)} sites")
    shares = [1] * len(sizes)
    for _ in range(pooled - len(sizes)):
        shares[max(range(len(sizes)), key=lambda site: Fraction(sizes[site], 2 * shares[site] + 1))] += 1
    return tuple(shares)


def fitted(recipe: Recipe, n_sites: int) -> tuple[Recipe, list[str]]:
    """Choose, for each pooled batch that so many sites cannot share equally, the nearest that they can.

    Returns: the recipe, and a sentence for each batch that is another one now.
    """
    told: list[str] = []

    def choose(section: Train | Adapt | Stage, name: str, deal: str) -> Train | Adapt | Stage:
        asked = section.pooled_batch_size
        if asked is None or deal == "by_size" or not asked % n_sites:
            return section
        near = max(1, (asked + n_sites // 2) // n_sites) * n_sites
        told.append(
            f"{name}.pooled_batch_size is {near}, not {asked}: {n_sites} sites take {near // n_sites} images each"
        )
        return curriculum.changed(section, pooled_batch_size=near)

    if "pretrain" in recipe.phases:
        deal = recipe.train.deal
        stages = [choose(stage, f"curriculum.{number}", deal) for number, stage in enumerate(recipe.curriculum)]
        recipe = curriculum.changed(recipe, train=choose(recipe.train, "train", deal), curriculum=tuple(stages))
    if "adapt" in recipe.phases:
        recipe = curriculum.changed(recipe, adapt=choose(recipe.adapt, "adapt", recipe.adapt.deal))
    return recipe, told


def pooled_batch_size(phase: Train | Adapt, n_sites: int) -> int:
    """Images that the centralized arm takes a step: those of `n_sites` sites together."""
    return phase.pooled_batch_size if phase.pooled_batch_size is not None else phase.batch_size * n_sites  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Images a step of each site of a run, in the order of the roster."""

    pretrain: tuple[tuple[int, ...], ...]  # in each stage of the curriculum
    adapt: tuple[int, ...]

    @staticmethod
    def of(recipe: Recipe, images: Sequence[int]) -> BatchSizes:
        """Deal the recipe's batches among sites with so many training images.

        Raises: ConfigError with every batch that has fewer images than there are sites.
        """
        problems = Problems(ConfigError, "recipe")

        def share(config: Train | Adapt, section: str) -> tuple[int, ...]:
            if config.pooled_batch_size is None:
                return (config.batch_size or 0,) * len(images)
            try:
                return dealt(config.pooled_batch_size, images if config.deal == "by_size" else [1] * len(images))
            except ConfigError as error:
                problems.add(f"{section}.pooled_batch_size: {error}")
                return ()

        pretrain: tuple[tuple[int, ...], ...] = ()
        if "pretrain" in recipe.phases:
            pretrain = tuple(
                share(stage.train, f"curriculum.{number - 1}" if number else "train")
                for number, stage in enumerate(curriculum.stages(recipe))
            )
        adapt = share(recipe.adapt, "adapt") if "adapt" in recipe.phases else ()
        problems.check()
        return BatchSizes(pretrain=pretrain, adapt=adapt)

    @staticmethod
    def pooled(recipe: Recipe, n_sites: int) -> BatchSizes:
        """Give a lone site the batches of `n_sites` together."""
        return BatchSizes(
            pretrain=tuple((pooled_batch_size(stage.train, n_sites),) for stage in curriculum.stages(recipe)),
            adapt=(pooled_batch_size(recipe.adapt, n_sites),),
        )

    def pretrain_images(self, recipe: Recipe) -> list[int]:
        """Count the images that each site takes in all of pretraining; none if there is none."""
        stages = zip(curriculum.stages(recipe), self.pretrain, strict=False)
        by_stage = [[stage.pretrain_steps * batch for batch in batches] for stage, batches in stages]
        return [sum(images) for images in zip(*by_stage, strict=True)]
