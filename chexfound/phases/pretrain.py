"""A round of pretraining at a site: K local steps from the coordinator's student."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from torch import Tensor

from chexfound.contract.request import Reply, Request
from chexfound.errors import DivergedError, StateError
from chexfound.host import machine
from chexfound.model import checkpoint
from chexfound.model.checkpoint import load_tensors
from chexfound.parallel import group
from chexfound.phases import tally
from chexfound.phases.carried import all_travels, carried_state, keep_state
from chexfound.phases.site_state import UNDECIDED, Decision, Site
from chexfound.pretrain import checkpoints, positions, teacher
from chexfound.pretrain.health import measures, watch
from chexfound.pretrain.health.probe import Probe
from chexfound.pretrain.train import DTYPES, Pretrainer
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe

log = logging.getLogger("chexfound.site")
log.addHandler(logging.NullHandler())  # whoever runs the site shows its log; a simulation has its own display


def pretrain(site: Site, recipe: Recipe, request: Request, decision: Decision = UNDECIDED) -> Reply:
    """K local steps of DINO + iBOT + KoLeo from the coordinator's student, in one process or as one of a group."""
    ids = site.training_ids(recipe)
    store = site.view.store
    trainer = Pretrainer(
        recipe,
        lambda places: store.pixels(ids[places]),
        len(ids),
        request.roster_index,
        step=request.step,
        device=machine.device(),
    )
    travels = all_travels(recipe)
    kept = {} if travels else carried_state(site, recipe, request, decision.reset_state)
    if kept:
        trainer.load_state(positions.enter(kept, recipe, request.step))
    trainer.load_global(request.tensors)
    _take_teacher(site, trainer, recipe, request, kept)
    # What every site and the coordinator knows of this round, and the next teacher is derived from.
    began = trainer.global_tensors(teacher=True) if recipe.teacher.policy == "rederive" else {}
    progress = site.report("pretrain", request.step, recipe.pretrain_steps)
    under_way = _saves(site, recipe, request, kept) if recipe.train.saveckp_freq or site.stop else None
    state = "travels" if travels else "kept" if kept else "fresh"
    kept.clear()  # it is in the trainer
    try:
        probe = probe_of(site, recipe, request, decision.excluded)
        asked = (request.step, request.steps, request.batch_size)
        rows = checkpoints.run(trainer, *asked, progress, under_way, probe, site.stop)
    except DivergedError as error:
        raise checkpoints.diverged(site.home, store, ids, trainer, error) from error
    if not travels:
        keep_state(site, recipe, request, trainer.state(copy=False) | checkpoint.add_prefix(began, "model."))
    if group.first():
        tally.add(site, request, rows)
        _warn(site, recipe, request, rows)
    tensors = trainer.global_tensors(teacher=recipe.teacher.policy == "average", copy=False)
    if recipe.train.optimizer_state == "average":
        tensors |= trainer.moments(copy=False)
    if under_way is not None:
        under_way.clear()
    return Reply(tensors=tensors, values={"images": len(ids), "state": state, "history": measures.told(rows)})


def _take_teacher(site: Site, trainer: Pretrainer, recipe: Recipe, request: Request, kept: dict[str, Tensor]) -> None:
    """Put a teacher where none was sent: derived anew, the site's own, or, where there is none yet, the student."""
    if any(name.startswith("teacher.") for name in request.tensors):
        return
    if request.step and recipe.teacher.policy == "rederive":
        if not kept:
            raise StateError(
                f"site {site.name!r}: pretraining step {request.step} needs the weights that the round before began "
                "with, and they are not on its disk; resume the run, which sends the teacher once"
            )
        before = checkpoint.with_prefix(kept, "model.")
        derived = teacher.rederived(recipe, request.step, before, request.tensors)
        load_tensors(trainer.model, derived, list(derived))
    elif not kept:
        trainer.model.teacher.load_state_dict(trainer.model.student.state_dict())


def probe_of(site: Site, recipe: Recipe, request: Request, excluded: tuple[str, ...] = ()) -> Probe | None:
    """Make the probe that looks at the teacher while it trains, of the run's findings or all whose names may leave."""
    config, findings = recipe.health, request.findings or tuple(site.findings())
    ids = site.training_ids(recipe)
    if not config.eval_period_iterations:
        return None
    return Probe(
        lambda places: site.view.store.pixels(ids[places]),
        site.training_labels(recipe, findings),
        site.patients(ids),
        every=config.eval_period_iterations,
        limit=config.probe_images,
        seed=recipe.seed,
        roster_index=request.roster_index,
        dtype=DTYPES[recipe.compute_precision.param_dtype],
        fewest=max(measures.FEWEST_PATIENTS, site.cells),
        left_out=excluded,
    )


def _warn(site: Site, recipe: Recipe, request: Request, rows: list[dict[str, Any]]) -> None:
    """Say in the site's own log what begins to ail its training."""
    path = site.home / "health" / f"{recipes.digest(recipe)[:16]}.json"
    for one in watch.new_symptoms(path, recipe, request.step, rows):
        log.warning(
            "event=warning symptom=%s site=%s round=%d seen=%r advice=%r",
            one.name, site.name, request.round + 1, one.seen, one.advice,
        )  # fmt: skip


def _saves(site: Site, recipe: Recipe, request: Request, kept: dict[str, Tensor]) -> checkpoints.Checkpoints:
    """Say where a round keeps its state while it is under way, for a site that dies in it and is asked again."""
    asked = [request.step, request.steps, request.batch_size, request.roster_index]
    given = [checkpoint.digest(tensors) for tensors in (request.tensors, kept)]
    images = [site.view.store.digest(), hashlib.sha256(site.training_ids(recipe).tobytes()).hexdigest()]
    return checkpoints.Checkpoints(site.home / "saves", checkpoints.key(recipes.to_json(recipe), asked, given, images))
