"""What composes with masked sums: each rule by itself, and that no site is asked before all hold."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chexfound.errors import ConfigError, DataError
from chexfound.recipe import load as recipes
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe, Robust
from chexfound.secagg.fixed import levels
from server.rounds.start import run_of
from strategies.composition import LEVELS_MIN, SECAGG, check
from tests.secagg.cohort import roster


def good(**values: Any) -> Recipe:
    recipe = Recipe(aggregation="secagg")
    recipe = changed(
        recipe,
        train=changed(recipe.train, optimizer_state="local"),
        adapt=changed(recipe.adapt, optimizer_state="local"),
    )
    return changed(recipe, **values)


def with_codec(recipe: Recipe, codec: str) -> Recipe:
    """As a release with a codec would read it; this one has none."""
    made = copy.copy(recipe)
    object.__setattr__(made, "codec", codec)
    return made


def in_clear(recipe: Recipe) -> Recipe:
    """The same, as plain aggregation."""
    made = copy.copy(recipe)
    object.__setattr__(made, "aggregation", "fedavg")
    return made


def with_train(recipe: Recipe, **values: Any) -> Recipe:
    return changed(recipe, train=changed(recipe.train, **values))


def with_adapt(recipe: Recipe, **values: Any) -> Recipe:
    return changed(recipe, adapt=changed(recipe.adapt, **values))


def with_secagg(recipe: Recipe, **values: Any) -> Recipe:
    return changed(recipe, secagg=changed(recipe.secagg, **values))


def averaged(**values: Any) -> Recipe:
    """With moments that are summed."""
    return changed(with_train(with_adapt(good(), optimizer_state="average"), optimizer_state="average"), **values)


RULES: dict[str, tuple[Recipe, int]] = {
    "optim.clip_grad": (averaged(optim=changed(good().optim, clip_grad=0.0)), 8),
    "adapt.clip_grad": (with_adapt(averaged(), clip_grad=0.0), 8),
    "train.optimizer_state": (with_secagg(with_train(good(), optimizer_state="average"), ring=16), 8),
    "adapt.optimizer_state": (with_secagg(with_adapt(good(), optimizer_state="average"), ring=16), 8),
    "train.local_steps": (with_train(good(), local_steps=1), 8),
    "adapt.local_steps": (with_adapt(good(), local_steps=1), 8),
    "codec": (with_codec(good(), "topk"), 8),
    "robust.clip": (changed(good(), robust=Robust(clip=2.0)), 8),
    "secagg.ring": (with_secagg(good(), ring=16), 32),
}


def test_a_good_recipe_passes_for_every_number_of_sites() -> None:
    for n in range(3, 129):
        check(good(), n)
        check(averaged(), n)


@pytest.mark.parametrize("name", recipes.presets())
@pytest.mark.parametrize("n", [3, 4])
def test_every_preset_runs_under_masks_as_it_is(name: str, n: int) -> None:
    """No option but the aggregation's own, which `chexfound-server run` takes by itself from three sites on."""
    check(recipes.load(name, {"aggregation": "secagg"}), n)


def test_every_rule_has_its_case() -> None:
    assert [rule.key for rule in SECAGG] == list(RULES)


@pytest.mark.parametrize("key", RULES)
def test_each_rule_alone(key: str) -> None:
    recipe, n = RULES[key]
    rule = next(rule for rule in SECAGG if rule.key == key)
    assert [one.key for one in SECAGG if one.excluded(recipe, n)] == [key]
    with pytest.raises(ConfigError) as caught:
        check(recipe, n)
    assert str(caught.value) == f"recipe: aggregation: secagg: {key}: {rule.why}; choose {rule.remedy}"
    if recipe.secagg.ring == 32:
        check(in_clear(recipe), n)


@pytest.mark.parametrize("rule", SECAGG, ids=lambda rule: rule.key)
def test_the_remedies_are_what_a_recipe_can_have(rule: Any) -> None:
    settings = re.findall(r"--set ([^ ,]+)", rule.remedy)
    assert settings
    for setting in settings:
        recipes.load("demo", recipes.parse_overrides([setting]))


def test_a_phase_that_is_not_done_excludes_nothing() -> None:
    recipe = with_secagg(averaged(), ring=16)
    check(changed(recipe, phases=()), 8)
    with pytest.raises(ConfigError, match="adapt.optimizer_state") as caught:
        check(changed(recipe, phases=("adapt", "evaluate")), 8)
    assert "train.optimizer_state" not in str(caught.value)
    with pytest.raises(ConfigError, match="train.optimizer_state") as caught:
        check(changed(recipe, phases=("pretrain",)), 8)
    assert "adapt.optimizer_state" not in str(caught.value)


def test_rounds_of_one_step_that_move_the_weights_compose() -> None:
    still = with_train(with_adapt(good(), local_steps=1), local_steps=1)
    check(changed(with_adapt(still, warmup_steps=0), optim=changed(still.optim, warmup_epochs=0)), 8)
    check(with_train(with_adapt(still, rounds=1), rounds=1), 8)  # no second sum


def test_numbers_for_masks_without_masks() -> None:
    with pytest.raises(ConfigError, match="the run is in the clear; choose --set aggregation=secagg"):
        check(in_clear(with_secagg(good(), ring=16)), 8)


def test_a_small_ring_has_a_largest_number_of_sites() -> None:
    for n in range(3, 129):
        if levels(16, n) >= LEVELS_MIN:
            check(with_secagg(good(), ring=16), n)
        else:
            with pytest.raises(ConfigError, match="secagg.ring"):
                check(with_secagg(good(), ring=16), n)
    assert (levels(16, 31), levels(16, 32)) == (1057, 1023)
    check(with_secagg(good(), ring=16), 31)


@pytest.mark.parametrize("n", [0, 1, 2, 129, 100_000])
def test_numbers_of_sites_that_it_is_not_for(n: int) -> None:
    for recipe in (good(), with_secagg(good(), ring=16)):
        with pytest.raises(ConfigError, match=f"for 3 to 128 sites; this federation has {n}$"):
            check(recipe, n)


def test_more_colluders_than_can_be_held_against() -> None:
    check(with_secagg(good(), colluders=6), 8)
    with pytest.raises(ConfigError, match="c is at most 6"):
        check(with_secagg(good(), colluders=7), 8)


def test_while_the_sites_are_not_known_only_the_recipe_is_looked_at() -> None:
    check(good(), None)
    check(with_secagg(good(), ring=16, colluders=99), None)
    with pytest.raises(ConfigError, match="robust.clip"):
        check(changed(good(), robust=Robust(clip=2.0)), None)


def test_all_that_does_not_fit_is_told_at_once() -> None:
    recipe = averaged(optim=changed(good().optim, clip_grad=0.0), robust=Robust(clip=2.0))
    recipe = with_train(with_adapt(recipe, local_steps=1, clip_grad=0.0), local_steps=1)
    recipe = with_codec(with_secagg(recipe, ring=16, colluders=99), "topk")
    with pytest.raises(ConfigError, match="10 problems") as caught:
        check(recipe, 40)
    for key in [*RULES, "c = 99"]:
        assert key in str(caught.value)


# -- before any site is contacted


class Asked(AssertionError):
    """Somebody was."""


class Exchange:
    """One that no run may use."""

    def __init__(self, n: int | None) -> None:
        self.sites = None if n is None else roster(f"S{number:03d}" for number in range(n))

    def __getattr__(self, name: str) -> Any:
        raise Asked(name)


@pytest.mark.parametrize("key", RULES)
def test_a_recipe_outside_fails_before_any_site_is_contacted(key: str, tmp_path: Path) -> None:
    recipe, n = RULES[key]
    with pytest.raises(ConfigError, match=key):
        run_of(recipe, Exchange(n), tmp_path / "run").run()  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n", [2, 129])
def test_so_does_a_federation_of_too_few_or_too_many(n: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"this federation has {n}"):
        run_of(good(), Exchange(n), tmp_path / "run").run()  # type: ignore[arg-type]


def test_a_recipe_inside_asks(tmp_path: Path) -> None:
    """Else the tests above would pass of an exchange that is never used."""
    with pytest.raises(Asked, match="enrol"):
        run_of(good(), Exchange(8), tmp_path / "run").run()  # type: ignore[arg-type]


def test_sites_without_keys_are_not_asked_either(tmp_path: Path) -> None:
    recipe = replace(good(), federation=replace(good().federation, min_sites=3))
    with pytest.raises(DataError, match="needs sites with keys"):
        run_of(recipe, Exchange(None), tmp_path / "run").run()  # type: ignore[arg-type]
