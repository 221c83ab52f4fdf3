"""Composition: which parts of a recipe can work on sums that nobody sees the terms of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chexfound.errors import ConfigError, Problems
from chexfound.recipe.schema import Recipe, SecAgg
from chexfound.secagg.fixed import levels
from chexfound.secagg.parameters import MINIMUM, SITES_MAX, Parameters

LEVELS_MIN = 1024  # of a site's values, below which rounding is felt in a round's update


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A choice that masked sums exclude.

    Args:
        key: of the recipe.
        excluded: whether a recipe, for so many sites, makes that choice.
        why: it cannot be.
        remedy: what to choose instead, as the commands take it.
    """

    key: str
    excluded: Callable[[Recipe, int], bool]
    why: str
    remedy: str


STILL = "the first step of a warm-up has no learning rate, and no site opens a second sum on weights that did not move"


def _pretrain_stands_still(recipe: Recipe, n: int) -> bool:
    rounds = recipe.train.rounds > 1 and recipe.train.local_steps == 1  # a second, after one that moved nothing
    return (
        "pretrain" in recipe.phases and rounds and recipe.optim.warmup_epochs * recipe.train.OFFICIAL_EPOCH_LENGTH >= 2
    )


def _adapt_stands_still(recipe: Recipe, n: int) -> bool:
    rounds = recipe.adapt.rounds > 1 and recipe.adapt.local_steps == 1
    return "adapt" in recipe.phases and rounds and recipe.adapt.warmup_steps > 1


UNBOUNDED = "Adam's moments are summed within bounds, and without clipping they have none"
COARSE = "Adam's moments span more orders of magnitude than 16 bits hold"


def _pretrain_averages(recipe: Recipe) -> bool:
    adam = recipe.optim.optimizer == "adamw"
    return "pretrain" in recipe.phases and adam and recipe.train.optimizer_state == "average"


def _adapt_averages(recipe: Recipe) -> bool:
    return "adapt" in recipe.phases and recipe.adapt.optimizer_state == "average"


SECAGG = (
    Rule(
        key="optim.clip_grad",
        excluded=lambda recipe, n: _pretrain_averages(recipe) and not recipe.optim.clip_grad,
        why=UNBOUNDED,
        remedy="--set optim.clip_grad=3, or --set train.optimizer_state=local",
    ),
    Rule(
        key="adapt.clip_grad",
        excluded=lambda recipe, n: _adapt_averages(recipe) and not recipe.adapt.clip_grad,
        why=UNBOUNDED,
        remedy="--set adapt.clip_grad=3, or --set adapt.optimizer_state=local",
    ),
    Rule(
        key="train.optimizer_state",
        excluded=lambda recipe, n: _pretrain_averages(recipe) and recipe.secagg.ring == 16,
        why=COARSE,
        remedy="--set train.optimizer_state=local, or --set secagg.ring=32",
    ),
    Rule(
        key="adapt.optimizer_state",
        excluded=lambda recipe, n: _adapt_averages(recipe) and recipe.secagg.ring == 16,
        why=COARSE,
        remedy="--set adapt.optimizer_state=local, or --set secagg.ring=32",
    ),
    Rule(
        key="train.local_steps",
        excluded=_pretrain_stands_still,
        why=STILL,
        remedy="--set train.local_steps=2, or --set optim.warmup_epochs=0",
    ),
    Rule(
        key="adapt.local_steps",
        excluded=_adapt_stands_still,
        why=STILL,
        remedy="--set adapt.local_steps=2, or --set adapt.warmup_steps=0",
    ),
    Rule(
        key="codec",
        excluded=lambda recipe, n: recipe.codec != "none",
        why="what is masked has no zeros left to leave out, nor a scale of its own",
        remedy="--set codec=none",
    ),
    Rule(
        key="robust.clip",
        excluded=lambda recipe, n: recipe.robust.clip is not None,
        why="nobody sees the update of which the norm is to be taken",
        remedy="--set robust.clip=null",
    ),
    Rule(
        key="secagg.ring",
        excluded=lambda recipe, n: levels(recipe.secagg.ring, n) < LEVELS_MIN,
        why=f"so many sites' sum leaves each fewer than {LEVELS_MIN} levels of a value",
        remedy="--set secagg.ring=32, or fewer sites",
    ),
)
# Reductions that need each site's update by itself have no key of the recipe yet; when they do, their rule goes here:
# coordinate-wise median, trimmed mean, Krum, top-k, asynchronous folding (FedBuff).


def check(recipe: Recipe, n_sites: int | None) -> None:
    """Check that a recipe's aggregation can do what the recipe asks of it, before any site is contacted.

    Args:
        recipe: to be run.
        n_sites: of the federation; None while that is not known, and what depends on it cannot be found wrong.

    Raises: ConfigError, with all that does not fit.
    """
    if recipe.aggregation != "secagg":
        if recipe.secagg != SecAgg():
            raise ConfigError("recipe: secagg has values, and the run is in the clear; choose --set aggregation=secagg")
        return
    problems = Problems(ConfigError, "recipe: aggregation: secagg")
    if n_sites is not None:
        try:
            Parameters.of(n_sites, recipe.secagg.colluders)
        except ConfigError as error:
            problems.add(str(error))
    for rule in SECAGG:
        if (n_sites or MINIMUM) <= SITES_MAX and rule.excluded(recipe, n_sites or MINIMUM):
            problems.add(f"{rule.key}: {rule.why}; choose {rule.remedy}")
    problems.check()
