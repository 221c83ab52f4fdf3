"""The federated arm: the ServerApp and the ClientApps of all sites, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chexfound.model import checkpoint
from chexfound.recipe import load as recipes
from sim.arms.plan import ArmPlan
from sim.engine import listeners


def run_federated(plan: ArmPlan, arm: str, pool: Any) -> None:
    """One of the arms in which all sites take part, through the ServerApp and the ClientApps."""
    from flwr.app import Context, RecordDict

    from server.app import app, observers
    from sim.engine.in_process import RUN_ID, InProcessGrid
    from sim.engine.keys import give_keys

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
    warn = listeners.warner(plan.recipe.seed, arm, pool.on_warnings)
    observers.append(warn)
    try:
        app(InProcessGrid(pool, nodes, run_config, sites), context)
    finally:
        observers.remove(warn)


def node_config(plan: ArmPlan, arm: str, site: str) -> dict[str, Any]:
    """Give what the ClientApp of a simulated site is told."""
    config: dict[str, Any] = {
        "site": site,
        "data": str(plan.store),
        "home": str(plan.site_home(arm, site)),
        "patients": str(plan.patients_file(site)),
        "shuffle-labels": arm == "shuffled",
    }
    return config | ({"split-key": plan.split_key.hex()} if plan.split_key else {})


def _backbone_file(plan: ArmPlan) -> Path:
    path = plan.arm_folder("shuffled") / "backbone.safetensors"
    if not path.exists():
        model = checkpoint.load(plan.arm_folder("federated") / "model.safetensors")
        checkpoint.save(path, checkpoint.with_prefix(model, "backbone."))
    return path
