"""Parts of a phase that one site may have and another not."""

from __future__ import annotations

import numpy as np

from chexfound.contract.request import Request
from chexfound.phases.adapt import trainable
from chexfound.phases.pretrain import probe_of
from chexfound.phases.site_state import Site
from chexfound.pretrain.health import measures
from chexfound.recipe.schema import Recipe


def parted(recipe: Recipe, request: Request) -> list[str]:
    """Name what one site may have a part in and another none: findings; of pretraining the probe's figures."""
    if request.phase != "pretrain":
        return list(request.findings)
    return list(measures.PROBED) if recipe.health.eval_period_iterations else []


def declared(site: Site, recipe: Recipe, request: Request) -> list[str]:
    """Give what the site has a part in, of what `parted` names."""
    if request.phase == "pretrain":
        probe = probe_of(site, recipe, request)
        return probe.figures() if probe is not None else []
    if request.phase == "evaluate":
        labels = site.labels(site.split(recipe, "test"), request.findings)
    else:
        labels = site.training_labels(recipe, request.findings)
    if not len(labels):
        return []
    has = np.any(labels >= 0, axis=0)
    if request.phase == "adapt":
        has = trainable(site, recipe, labels)
    return [finding for finding, one in zip(request.findings, has.tolist(), strict=True) if one]
