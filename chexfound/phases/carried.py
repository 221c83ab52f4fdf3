"""State that a site carries from a round to the next, on its own disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from chexfound.contract.request import Request
from chexfound.model import checkpoint
from chexfound.parallel import group
from chexfound.phases.site_state import Site
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe


def state_folder(site: Site, recipe: Recipe, phase: str) -> Path:
    """Give the folder of what a site carries from a phase's round to the next: STEP.safetensors, by global step."""
    return site.home / "state" / recipes.digest(recipe)[:16] / phase


def carries(recipe: Recipe, phase: str) -> bool:
    """Whether a phase's rounds stand on state that stays at the site."""
    if phase == "pretrain":
        return not all_travels(recipe)
    return phase == "adapt" and recipe.adapt.optimizer_state == "local"


def all_travels(recipe: Recipe) -> bool:
    """Whether a pretraining round stands on nothing but what the coordinator sends."""
    return (
        recipe.teacher.policy == "average"
        and recipe.train.optimizer_state == "average"
        and recipe.train.centering == "sinkhorn_knopp"
        and not recipe.train.sinkhorn_queue
        and not (recipe.compute_precision.param_dtype == "fp16" and recipe.compute_precision.grad_scaler)
    )


def carried_state(site: Site, recipe: Recipe, request: Request, reset: bool = False) -> dict[str, Tensor]:
    """State as it was at the start of global step `request.step`; nothing at step 0, afresh, or where there is none."""
    if not request.step or reset:
        if group.first():
            shutil.rmtree(state_folder(site, recipe, request.phase), ignore_errors=True)
        return {}
    path = state_folder(site, recipe, request.phase) / f"{request.step:08d}.safetensors"
    return checkpoint.load(path) if path.exists() else {}


def keep_state(site: Site, recipe: Recipe, request: Request, state: dict[str, Tensor]) -> None:
    """Keep the state for the next round, and this round's own start until the next is done.

    The coordinator may die between our reply and its checkpoint, and then ask for this round again.
    """
    if not group.first():
        return
    folder = state_folder(site, recipe, request.phase)
    after = request.step + request.steps
    path = folder / f"{after:08d}.safetensors"
    checkpoint.save(path, state)
    for old in folder.glob("*.safetensors"):
        if int(old.stem) not in (request.step, after):
            old.unlink()
