"""Digests of the earlier rounds that a site stands on: under masks all sites of a sum must stand on the same.

A site carries an optimizer, a teacher or a queue from round to round, and in `adapt` and `evaluate` the backbone that
it was sent before.  A coordinator that brought one of them to another state could tell that site's update from the sum.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from chexfound.contract.request import Request
from chexfound.durable.files import canonical, write_json
from chexfound.errors import RefusedError
from chexfound.model import checkpoint
from chexfound.phases import carried
from chexfound.phases.site_state import UNDECIDED, Decision, Site
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.secagg.messages import weights_of


def base(site: Site, phase: str, weights: str, backbone: str = "") -> str:
    """Digest of all weights that a phase starts from: those sent (`weights`), and the backbone sent before; hex.

    Args:
        site: whose backbone it is.
        phase: that starts.
        weights: digest of those sent.
        backbone: the same of the backbone, if it is not to be named by its bytes.

    Raises: RefusedError if there is none.
    """
    if phase not in ("adapt", "evaluate"):
        return weights
    return weights_of(weights, backbone or backbone_digest(site))


def backbone_digest(site: Site) -> str:
    """Digest of the backbone that the site was sent last; hex.

    Raises: RefusedError if there is none.
    """
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
    if not request.step or not carried.carries(recipe, request.phase):
        return ""
    folder = carried.state_folder(site, recipe, request.phase)
    if not (folder / f"{request.step:08d}.safetensors").exists():
        return ""
    return _read(site, recipe, request.phase).get(str(request.step), "")


def begin(site: Site, recipe: Recipe, request: Request) -> None:
    """Say nothing any more of the state that a round is about to leave, which may be there before `record` is."""
    if carried.carries(recipe, request.phase):
        _write(site, recipe, request.phase, {str(request.step): present(site, recipe, request)})


def record(site: Site, recipe: Recipe, request: Request, base: str, decision: Decision = UNDECIDED) -> None:
    """Add the round that was just done to the state that it left; `base`: as the function of that name gives it."""
    if not carried.carries(recipe, request.phase):
        return
    before = "" if decision.reset_state else present(site, recipe, request)
    fields = [before, request.phase, request.step, request.steps, request.batch_size, base]
    fields += [request.findings, decision.excluded]
    after = hashlib.sha256(canonical(fields)).hexdigest()
    kept = {str(request.step): before, str(request.step + request.steps): after}
    _write(site, recipe, request.phase, kept)


def record_features(site: Site, recipe: Recipe, request: Request) -> None:
    """Remember of what the features are that were just made."""
    write_json(_features_file(site), {"of": _features_of(site, recipe, request), "files": _feature_files(site)})


def check_features(site: Site, recipe: Recipe, request: Request) -> None:
    """Check that the features here are those of this recipe, of these findings and of the backbone here.

    Another view or another recipe's crops would do for the coordinator what other weights do.

    Raises: RefusedError.
    """
    try:
        kept: Any = json.loads(_features_file(site).read_text())
    except (OSError, ValueError):
        kept = None
    if kept != {"of": _features_of(site, recipe, request), "files": _feature_files(site)}:
        raise RefusedError("secagg.weights", "the features here are not those of this run")


def _features_file(site: Site) -> Path:
    return site.home / "secagg" / "features.json"


def _features_of(site: Site, recipe: Recipe, request: Request) -> str:
    images = hashlib.sha256(site.training_ids(recipe).tobytes()).hexdigest()  # of which labels are then read
    fields = [recipes.to_json(recipe), list(request.findings), backbone_digest(site), images]
    return hashlib.sha256(canonical(fields)).hexdigest()


def _feature_files(site: Site) -> list[list[Any]]:
    paths = sorted((site.home / "features").glob("*.npy"))
    abouts = [(path.name, path.stat()) for path in paths]
    return [[name, about.st_mtime_ns, about.st_size, about.st_ino] for name, about in abouts]


def _write(site: Site, recipe: Recipe, phase: str, kept: dict[str, str]) -> None:
    write_json(carried.state_folder(site, recipe, phase) / "lineage.json", kept)


def _read(site: Site, recipe: Recipe, phase: str) -> dict[str, str]:
    try:
        values: Any = json.loads((carried.state_folder(site, recipe, phase) / "lineage.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {step: digest for step, digest in values.items() if isinstance(digest, str)}
