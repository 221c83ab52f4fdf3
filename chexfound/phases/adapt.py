"""Adaptation at a site: a frozen backbone's features, and K local steps of the head on them."""

from __future__ import annotations

import shutil

import numpy as np
from torch import Tensor

from chexfound.adapt import features
from chexfound.adapt.fit import HeadTrainer, trainable_findings
from chexfound.contract import cells
from chexfound.contract.cells import Told
from chexfound.contract.request import Reply, Request
from chexfound.host import machine
from chexfound.model import checkpoint, vit
from chexfound.model.checkpoint import load_tensors
from chexfound.phases import tally
from chexfound.phases.carried import carried_state, keep_state
from chexfound.phases.site_state import UNDECIDED, Decision, Site
from chexfound.pretrain.health import measures
from chexfound.recipe.schema import Recipe


def extract(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Take the backbone and make the training images' features of it; they stay here, and the reply holds nothing.

    No sum of them leaves either: whoever chose the backbone would read single images in it (docs/decisions/0012).
    """
    backbone = backbone_of(recipe, request.tensors)
    checkpoint.save(site.home / "backbone.safetensors", request.tensors)
    labels = site.training_labels(recipe, request.findings)
    ids = site.training_ids(recipe)
    ids = ids[(labels >= 0).any(1)]
    folder = site.home / "features"
    if not len(ids) or _too_few(site, recipe, labels):
        shutil.rmtree(folder, ignore_errors=True)
        return Reply()
    features.extract(
        recipe,
        backbone,
        lambda places: site.view.store.pixels(ids[places]),
        len(ids),
        request.roster_index,
        folder,
        site.report("features"),
    )
    return Reply()


def adapt(site: Site, recipe: Recipe, request: Request, decision: Decision = UNDECIDED) -> Reply:
    """K local steps of the head on the frozen features; per finding, by how many labelled images."""
    labels = site.training_labels(recipe, request.findings)
    trained = trainable(site, recipe, labels) & ~np.isin(request.findings, decision.excluded)
    labels = labels[(labels >= 0).any(1)]
    labels = np.where(trained, labels, np.int8(-1)).astype(np.int8)
    counts = (labels >= 0).sum(0)
    none = _none(site, recipe)
    values = {
        "images": int((labels >= 0).any(1).sum()) or none,
        "labelled": [int(n) or none for n in counts],
    }
    if not trained.any():
        return Reply(values={**values, "history": []})
    trainer = HeadTrainer(recipe, features.load(site.home / "features"), labels, request.roster_index)
    own_moments = recipe.adapt.optimizer_state == "local"
    if own_moments:
        trainer.load_state(carried_state(site, recipe, request, decision.reset_state))
    trainer.load_global(request.tensors)
    rows = trainer.run(
        request.step,
        request.steps,
        request.batch_size,
        site.report("adapt", request.step, recipe.adapt.total_steps),
    )
    tally.add(site, request, rows)
    tensors = trainer.global_tensors()
    if own_moments:
        keep_state(site, recipe, request, trainer.state())
    else:
        tensors |= trainer.state()
    return Reply(tensors=tensors, values={**values, "history": measures.told(rows)})


def _none(site: Site, recipe: Recipe) -> Told:
    """Give what stands for no labelled image: what stands for few; 0 where masked numbers are added up."""
    return 0 if recipe.aggregation == "secagg" else cells.told(0, 0, site.cells)


def _too_few(site: Site, recipe: Recipe, labels: np.ndarray) -> bool:
    """Whether so few of its training images, or patients, have one of these labels that the site keeps out.

    It then answers as one that has none, so that nobody can tell the two apart.
    """
    ids = site.training_ids(recipe)[(labels >= 0).any(1)]
    patients, images = site.least
    return len(ids) < images or len(set(site.patients(ids))) < patients


def trainable(site: Site, recipe: Recipe, labels: np.ndarray) -> np.ndarray:
    """Which findings the site trains, of the labels (N, F) of its training images."""
    if not len(labels):
        return np.zeros(labels.shape[1], bool)
    both = trainable_findings(labels)
    if _too_few(site, recipe, np.where(both, labels, np.int8(-1))):
        return np.zeros(labels.shape[1], bool)
    return both


def backbone_of(recipe: Recipe, tensors: dict[str, Tensor]) -> vit.VisionTransformer:
    """Build the backbone of a recipe from tensors by its own names, on this machine's device."""
    backbone = vit.build(recipe.student, recipe.input, recipe.position_px)
    load_tensors(backbone, tensors, list(backbone.state_dict()))
    return backbone.to(machine.device())
