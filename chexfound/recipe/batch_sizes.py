"""How many images a step takes at each site, so that all together make the recipe's batch."""

from __future__ import annotations

from dataclasses import dataclass

from chexfound.errors import ConfigError, Problems
from chexfound.recipe import curriculum
from chexfound.recipe.schema import Adapt, Recipe, Train


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
