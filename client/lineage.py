"""What of earlier rounds a site stands on, as digests: under masks all sites of a sum must stand on the same.

A site carries an optimizer, a teacher or a queue from round to round, and in `adapt` and `evaluate` the backbone that
it was sent before.  A coordinator that brought one of them to another state could tell that site's update from the sum.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from chexfound import phases
from chexfound.errors import RefusedError
from chexfound.journal import canonical, write_json
from chexfound.model import checkpoint
from chexfound.phases import Request, Site
from chexfound.schema import Recipe
from chexfound.secagg.messages import weights_of


def base(site: Site, phase: str, weights: str) -> str:
    """Digest of all weights that a phase starts from: those sent (`weights`), and the backbone sent before; hex.

    Raises: RefusedError if there is none.
    """
    if phase not in ("adapt", "evaluate"):
        return weights
    return weights_of(weights, _backbone_digest(site))


def _backbone_digest(site: Site) -> str:
    path = site.home / "backbone.safetensors"
    try:
        about = path.stat()
    except OSError as error:
        raise RefusedError("secagg.weights", "there is no backbone here yet") from error
    key = (about.st_mtime_ns, about.st_size, about.st_ino)
    if site.remembered.get("backbone", (None, ""))[0] != key:
        site.remembered["backbone"] = (key, checkpoint.digest(checkpoint.load(path)))
    digest: str = site.remembered["backbone"][1]
    return digest


def present(site: Site, recipe: Recipe, request: Request) -> str:
    """Digest of the rounds that the carried state at the request's first step includes; empty if there is none."""
    if not request.step or not phases.carries(recipe, request.phase):
        return ""
    folder = phases.state_folder(site, recipe, request.phase)
    if not (folder / f"{request.step:08d}.safetensors").exists():
        return ""
    return _read(site, recipe, request.phase).get(str(request.step), "")


def record(site: Site, recipe: Recipe, request: Request, weights: str) -> None:
    """Add the round that was just done to the state that it left."""
    if not phases.carries(recipe, request.phase):
        return
    before = "" if request.fresh else present(site, recipe, request)
    fields = [before, request.phase, request.step, request.steps, request.batch_size, weights]
    after = hashlib.sha256(canonical(fields)).hexdigest()
    kept = {str(request.step): before, str(request.step + request.steps): after}
    write_json(phases.state_folder(site, recipe, request.phase) / "lineage.json", kept)


def _read(site: Site, recipe: Recipe, phase: str) -> dict[str, str]:
    try:
        values: Any = json.loads((phases.state_folder(site, recipe, phase) / "lineage.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {step: digest for step, digest in values.items() if isinstance(digest, str)}
