"""The arms of the comparison: an arm is a function of (recipe, shards, seed), kept in a folder of its own.

federated, random and shuffled go through Flower's messages with all sites; centralized and
local:<site> are one site each, asked directly.  All call the same phases, with equal work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound import phases
from chexfound import recipe as recipes
from chexfound.data.split import Membership, View
from chexfound.data.store import Store
from chexfound.errors import CheckpointError
from chexfound.evaluate.metrics import Scores, load_scores
from chexfound.journal import read_journal, write_json
from chexfound.model import checkpoint
from chexfound.phases import Request, Site
from chexfound.recipe import changed
from chexfound.schema import Recipe
from sim import listeners
from sim.listeners import OnWarnings

FEDERATED_ARMS = ("federated", "random", "shuffled")
FITTED_ARMS = ("site-view", "histogram")


@dataclass(frozen=True, kw_only=True)
class Plan:
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
        """Where an arm is kept; a site by its place in the roster, since two names may be read as one."""
        if not arm.startswith("local:"):
            return self.folder / arm
        site = arm.removeprefix("local:")
        return self.folder / f"local-{list(self.sites).index(site):02d}-{re.sub(r'[^a-zA-Z0-9]+', '_', site)[:40]}"

    def arm_recipe(self, arm: str) -> Recipe:
        """What an arm is trained by: the floors without pretraining, a lone site without the evaluation."""
        out = {"federated": (), "random": ("pretrain",), "shuffled": ("pretrain",)}.get(arm, ("evaluate",))
        phases = tuple(phase for phase in self.recipe.phases if phase not in out)
        teacher = self.recipe.teacher
        if arm not in FEDERATED_ARMS and teacher.policy == "rederive":
            teacher = changed(teacher, policy="average")  # a lone site has its teacher: there is nothing to derive
        aggregation = self.recipe.aggregation if arm in FEDERATED_ARMS else "fedavg"  # of one site there is no sum
        return changed(self.recipe, phases=phases, teacher=teacher, aggregation=aggregation)

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

    def scores(self, arm: str) -> dict[str, Scores]:
        """An arm's scores on each site's held-out images; what it could not train is marked unscored."""
        unscored = finished(self, arm)["unscored"]
        return {site: load_scores(self.site_home(arm, site) / "scores.npz", unscored) for site in self.sites}


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Say of a file of this run that cannot be read as what was written that it is damaged.

    Raises: CheckpointError.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged, so the run cannot be resumed; start it anew in another folder"
        ) from error


def recipe_sha256(recipe: Recipe) -> str:
    """The digest that a run's journal starts with."""
    return hashlib.sha256(recipes.to_json(recipe).encode()).hexdigest()


def finished(plan: Plan, arm: str) -> dict[str, Any]:
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


def _is_of(start: dict[str, Any], plan: Plan, arm: str) -> bool:
    """Whether a journal that starts so is this arm's; if not, running the arm says what differs."""
    return start["recipe_sha256"] == recipe_sha256(plan.arm_recipe(arm)) and plan.arm_roster(arm) == sorted(
        member["site"] for member in start["roster"]
    )


def run_federated(plan: Plan, arm: str, pool: Any) -> None:
    """One of the arms in which all sites take part, through the ServerApp and the ClientApps."""
    from flwr.app import Context, RecordDict

    from server.app import app, observers
    from sim.engine import RUN_ID, InProcessGrid
    from sim.keys import give_keys

    # random and shuffled are a head alone: on the weights that all arms start from, or on the federated ones.
    backbone = str(_backbone_file(plan)) if arm == "shuffled" else ""
    run_config: dict[str, bool | float | int | str] = {
        "recipe": recipes.to_json(plan.arm_recipe(arm)),
        "run-dir": str(plan.arm_folder(arm)),
        "backbone": backbone,
    }
    sites = None
    if plan.recipe.aggregation == "secagg":
        sites = give_keys({site: plan.site_home(arm, site) for site in plan.sites}, plan.arm_folder(arm) / "authority")
    nodes = [node_config(plan, arm, site) | ({"secured": True} if sites else {}) for site in plan.sites]
    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    warn = _warner(plan, arm, pool.on_warnings)
    observers.append(warn)
    try:
        app(InProcessGrid(pool, nodes, run_config, sites), context)
    finally:
        observers.remove(warn)


def _warner(plan: Plan, arm: str, listener: OnWarnings | None) -> Callable[[dict[str, Any]], None]:
    """What passes the warnings in a journal's record on."""
    from server import health

    def warn(event: dict[str, Any]) -> None:
        if listener is not None and (found := health.warnings(event)):
            listener(plan.recipe.seed, arm, found)

    return warn


def node_config(plan: Plan, arm: str, site: str) -> dict[str, Any]:
    """What the ClientApp of a simulated site is told."""
    config: dict[str, Any] = {
        "site": site,
        "data": str(plan.store),
        "home": str(plan.site_home(arm, site)),
        "patients": str(plan.patients_file(site)),
        "shuffle-labels": arm == "shuffled",
    }
    return config | ({"split-key": plan.split_key.hex()} if plan.split_key else {})


def _backbone_file(plan: Plan) -> Path:
    path = plan.arm_folder("shuffled") / "backbone.safetensors"
    if not path.exists():
        model = checkpoint.load(plan.arm_folder("federated") / "model.safetensors")
        checkpoint.save(path, checkpoint.with_prefix(model, "backbone."))
    return path


def run_alone(plan: Plan, arm: str) -> float:
    """The centralized arm, or a site alone: one site, asked directly; then tested at every site.

    Returns: the seconds that it took.
    """
    began = time.monotonic()
    from client import site as site_module
    from server.exchange import DirectExchange
    from server.plan import Batches
    from server.run import Run

    store = Store.open(plan.store)
    listener = site_module.on_progress

    def progress(phase: str, done: int, total: int) -> None:
        if listener is not None:
            listener(arm, phase, done, total)

    patients = None if arm == "centralized" else plan.sites[arm.removeprefix("local:")]
    folder, n_sites, recipe = plan.arm_folder(arm), len(plan.sites), plan.recipe
    view, key = View.of(store, trained_on(arm), patients), plan.split_key
    own = Site(view=view, home=folder / "own", progress=progress, split_key=key)
    batches = Batches.pooled(recipe, n_sites)
    warn = _warner(plan, arm, listeners.on_warnings)
    outcome = Run(plan.arm_recipe(arm), DirectExchange(own), folder, batches=batches, on_event=warn).run()
    for name, shard in plan.sites.items() if "evaluate" in recipe.phases else ():
        tested = Site(view=View.of(store, name, shard), home=plan.site_home(arm, name), split_key=key)
        request = Request(phase="evaluate", findings=outcome.findings, tensors=outcome.tensors)
        phases.run(tested, recipe, request)
    return time.monotonic() - began


def trained_on(arm: str) -> str:
    """What an arm learned from, in words."""
    if arm.startswith("local:"):
        return arm.removeprefix("local:")
    return {"federated": "all sites, federated", "centralized": "all sites, pooled"}.get(arm, "all sites")


def discard(plan: Plan, arm: str) -> None:
    """Drop what an arm needed only while it trained: cached features, optimizer states, the ends of its curves."""
    homes = [plan.site_home(arm, site) for site in plan.sites] + [plan.arm_folder(arm) / "own"]
    for home in homes:
        for part in ("features", "state", "health"):
            shutil.rmtree(home / part, ignore_errors=True)


def trainable(plan: Plan, site: str) -> bool:
    """Whether a site alone has both classes of any finding among its training images."""
    from chexfound.adapt.train import trainable_findings

    view = View.of(Store.open(plan.store), site, plan.sites[site])
    ids = view.split(plan.membership, "train")
    return bool(trainable_findings(view.store.labels(ids, list(plan.recipe.adapt.findings or ()))).any())


def load_json(path: Path) -> Any:
    """A file that this simulation wrote."""
    return json.loads(path.read_text())
