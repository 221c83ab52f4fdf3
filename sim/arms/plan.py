"""The arms of the comparison: an arm is a function of (recipe, shards, seed), kept in a folder of its own.

federated, random and shuffled go through Flower's messages with all sites; centralized and
local:<site> are one site each, asked directly.  All call the same phases, with equal work.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.data.store.split import Membership
from chexfound.durable.files import write_json
from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError
from chexfound.evaluate.scores import Scores, load_scores
from chexfound.model import checkpoint
from chexfound.phases import tally
from chexfound.recipe import load as recipes
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe
from sim.options import damage_told

FEDERATED_ARMS = ("federated", "random", "shuffled")
FITTED_ARMS = ("site-view", "histogram")


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One seed of a simulation: who has what, and where it is kept."""

    recipe: Recipe  # with the seed, and adapt.findings resolved
    store: Path
    sites: dict[str, list[str]]  # site -> its patients, sorted by site
    folder: Path
    split_key: bytes | None = None  # in the place of the seed's; none: `chexfound-sim`'s own

    @property
    def membership(self) -> Membership:
        """Which patients train, validate and test."""
        return Membership.of(self.recipe, self.split_key)

    def arm_folder(self, arm: str) -> Path:
        """Give the folder of an arm; a site's by its place in the roster, since two names may be read as one."""
        if not arm.startswith("local:"):
            return self.folder / arm
        site = arm.removeprefix("local:")
        return self.folder / f"local-{list(self.sites).index(site):02d}-{re.sub(r'[^a-zA-Z0-9]+', '_', site)[:40]}"

    def arm_recipe(self, arm: str) -> Recipe:
        """Give the recipe of an arm: the floors' without pretraining, a lone site's without the evaluation."""
        out = {"federated": (), "random": ("pretrain",), "shuffled": ("pretrain",)}.get(arm, ("evaluate",))
        recipe = changed(self.recipe, phases=tuple(phase for phase in self.recipe.phases if phase not in out))
        return recipe if arm in FEDERATED_ARMS else lone_recipe(recipe)

    def arm_roster(self, arm: str) -> list[str]:
        """The sites that take part in an arm's run, as its journal names them."""
        return sorted(self.sites) if arm in FEDERATED_ARMS else [trained_on(arm)]

    def site_home(self, arm: str, site: str) -> Path:
        """The disk of a site within an arm."""
        return self.arm_folder(arm) / "sites" / f"{list(self.sites).index(site):02d}"

    def patients_file(self, site: str) -> Path:
        """The shard of a site, as its node reads it."""
        return self.folder / "shards" / f"{list(self.sites).index(site):02d}.json"

    def write_shards(self) -> None:
        """Put every site's list of patients on the disk."""
        for site, patients in self.sites.items():
            write_json(self.patients_file(site), patients)

    def drawn(self, arm: str) -> dict[str, dict[str, int]]:
        """Phase -> site -> images that the steps of an arm were taken on; as its sites counted them."""
        homes = {site: self.site_home(arm, site) for site in self.sites}
        if arm not in FEDERATED_ARMS:
            homes = {trained_on(arm): self.arm_folder(arm) / "own"}
        totals = {site: tally.total(home) for site, home in homes.items()}
        phases = [phase for phase in ("pretrain", "adapt") if any(phase in total for total in totals.values())]
        return {phase: {site: total.get(phase, 0) for site, total in totals.items()} for phase in phases}

    def scores(self, arm: str) -> dict[str, Scores]:
        """An arm's scores on each site's held-out images; what it could not train is marked unscored."""
        unscored = finished(self, arm)["unscored"]
        return {site: load_scores(self.site_home(arm, site) / "scores.npz", unscored) for site in self.sites}


def lone_recipe(recipe: Recipe) -> Recipe:
    """Take out of a recipe what only several sites can do: a lone one has its teacher, and of it there is no sum."""
    policy = "average" if recipe.teacher.policy == "rederive" else recipe.teacher.policy
    return changed(recipe, teacher=changed(recipe.teacher, policy=policy), aggregation="fedavg")


def finished(plan: ArmPlan, arm: str) -> dict[str, Any]:
    """The last record of an arm that is done; empty if it is not, or if it or its model is not what it says.

    Raises: CheckpointError if its journal is damaged.
    """
    folder = plan.arm_folder(arm)
    path = folder / "journal.jsonl"
    if not path.exists():
        return {}
    with damage_told(path):
        entries = read_journal(path)
        if not entries or entries[-1]["event"] != "done" or not _is_of(entries[0], plan, arm):
            return {}
        done, model, unscored = entries[-1], entries[-1]["model_sha256"], entries[-1]["unscored"]
    try:
        if {"adapt", "evaluate"} <= set(plan.recipe.phases):
            for site in plan.sites:
                load_scores(plan.site_home(arm, site) / "scores.npz", unscored)
        tensors = checkpoint.load(folder / "model.safetensors")
    except CheckpointError:
        return {}
    return done if checkpoint.digest(tensors) == model else {}


def _is_of(start: dict[str, Any], plan: ArmPlan, arm: str) -> bool:
    """Whether a journal that starts so is this arm's; if not, running the arm says what differs."""
    return start["recipe_sha256"] == recipes.digest(plan.arm_recipe(arm)) and plan.arm_roster(arm) == sorted(
        member["site"] for member in start["roster"]
    )


def discard(plan: ArmPlan, arm: str) -> None:
    """Drop what an arm needed only while it trained: cached features, optimizer states, the ends of its curves."""
    homes = [plan.site_home(arm, site) for site in plan.sites] + [plan.arm_folder(arm) / "own"]
    for home in homes:
        for part in ("features", "state", "health"):
            shutil.rmtree(home / part, ignore_errors=True)


def trained_on(arm: str) -> str:
    """Say in words what an arm learned from."""
    if arm.startswith("local:"):
        return arm.removeprefix("local:")
    return {"federated": "all sites, federated", "centralized": "all sites, pooled"}.get(arm, "all sites")
