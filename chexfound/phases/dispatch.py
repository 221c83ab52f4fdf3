"""Dispatch of a request to its phase at a site: (site, recipe, request) -> reply.

One piece of code for all: the ClientApp calls it at a hospital, the simulation calls it for the
centralized arm and for each site alone.  A site's state lives under its home on its own disk:
everything that a later request stands on is written, atomically, before the reply is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from chexfound.contract.request import Reply, Request
from chexfound.errors import DataError, ProtocolError, StoppedError
from chexfound.host import machine
from chexfound.phases import gpus
from chexfound.phases.adapt import adapt, extract
from chexfound.phases.enrol import counts, enrol
from chexfound.phases.evaluate import evaluate
from chexfound.phases.pretrain import pretrain
from chexfound.phases.site_state import UNDECIDED, Decision, Site
from chexfound.pretrain.beginning import FILE
from chexfound.recipe.schema import Recipe

Phase = Callable[..., Reply]  # (site, recipe, request), and the site's decision where it is of one in DECIDED


def run(site: Site, recipe: Recipe, request: Request, decision: Decision = UNDECIDED) -> Reply:
    """Do what is asked, once the recipe's thread count is set (another count gives other bits).

    Raises: ChexfoundError; the site's state is then what it was before.
    """
    torch.set_num_threads(recipe.threads)
    request = replace(request, tensors={n: t for n, t in request.tensors.items() if n != FILE})  # looked at before
    if site.view.store.px != recipe.image_px:
        raise DataError(
            f"site {site.name!r}: the store holds images of {site.view.store.px} px, the recipe asks "
            f"for {recipe.image_px}; ingest again with --image-px {recipe.image_px}"
        )
    if request.phase not in PHASES:
        raise ProtocolError(f"unknown phase {request.phase!r}")
    if request.phase in ("pretrain", "adapt") and not (request.steps > 0 and request.batch_size > 0):
        raise ProtocolError(f"phase {request.phase!r} asks for no step, or for no image a step")
    decided = (decision,) if request.phase in DECIDED else ()
    return PHASES[request.phase](site, recipe, request, *decided)


def _pretrain(site: Site, recipe: Recipe, request: Request, decision: Decision) -> Reply:
    """Pretrain in this process, or by a process for each of the GPUs that the site trains on."""
    if site.stop is not None and site.stop():
        raise StoppedError(f"stopped before step {request.step}")
    number = machine.gpus(site.gpus)
    if number > 1:
        return gpus.ask_all(site, recipe, request, decision, number)
    return pretrain(site, recipe, request, decision)


DECIDED = ("pretrain", "adapt")  # phases of which a site decides something itself
PHASES: dict[str, Phase] = {
    "enrol": enrol,
    "counts": counts,
    "pretrain": _pretrain,
    "features": extract,
    "adapt": adapt,
    "evaluate": evaluate,
}
