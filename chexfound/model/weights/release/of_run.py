"""A model that a run of ours left, in parts: from its model/, from an arm's folder, or from the run's own.

The model is backbone and head of findings.  The DINO and iBOT heads that it was pretrained with stand
only in the last round's weights, which a run's folder keeps beside its journal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.weights.architecture import Backbone, Projection, check, head_of_recipe
from chexfound.model.weights.in_parts import ALL, Part, Weights
from chexfound.model.weights.published.tensor_names import PROJECTIONS
from chexfound.model.weights.release import folder as folders
from chexfound.model.weights.release import run_model, summary
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Dino, Ibot, Recipe

NONE_BESIDE = "no round's weights lie beside the model: export the folder of the run itself"


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, an arm's, or the model/ in one."""
    return any((path / name).is_file() for name in ("model/config.json", "journal.jsonl")) or _is_model(path)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() and folders.stated(path) is None


def read(path: Path, wanted: Collection[str] = ALL) -> Weights:
    """The parts of a run's model; with its DINO and iBOT heads, if they are wanted, also how it was trained.

    Raises: CheckpointError if a part is absent, damaged, or does not fit the others.
    """
    path = Path(path)
    model = path if _is_model(path) else path / "model" if _is_model(path / "model") else None
    found = _of_model(model) if model is not None else _of_arm(path)
    if not set(wanted) & set(PROJECTIONS):
        return found
    sha256 = found.source["weights_sha256"]
    base = path.parent if model == path else path
    run = _run_folder(base, sha256)
    if run is None and (projections := _of_pretraining(base, sha256, found.recipe)):
        found = replace(found, projections=projections, source={**found.source, "whose": "teacher"})
        return replace(found, summary=summary.of_recipe(found))
    if run is None:
        return replace(found, left_out={name: NONE_BESIDE for name in PROJECTIONS}, summary=summary.of_recipe(found))
    projections, why_not, whose = _projections(run, found)
    source = {**found.source, **({"whose": whose} if whose else {})}
    found = replace(found, projections=projections, left_out=why_not, source=source)
    return replace(found, summary=summary.of_run(found, run))


def _of_model(folder: Path) -> Weights:
    recipe, findings, backbone, head = run_model.load(folder)
    return _weights(
        recipe,
        findings,
        dict(backbone.state_dict()),
        None if head is None else dict(head.state_dict()),
        str(folders.config(folder)["weights_sha256"]),
    )


def _of_arm(folder: Path) -> Weights:
    """An arm of a simulation that has no model/: its weights, its recipe, and the findings in its journal."""
    try:
        entries = read_journal(folder / "journal.jsonl")
        recipe = recipes.load(str(folder / "recipe.yaml"))
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{folder}: not a run's folder: {error}") from error
    if not entries or entries[-1]["event"] != "done":
        raise CheckpointError(f"{folder}: the run in it is not finished; resume it first")
    tensors = checkpoint.load(folder / "model.safetensors")
    sha256 = checkpoint.digest(tensors)
    if sha256 != entries[-1]["model_sha256"]:
        raise CheckpointError(
            f"{folder}: model.safetensors is not the file that the journal tells of: changed or damaged"
        )
    head = checkpoint.with_prefix(tensors, "head.")
    backbone = checkpoint.with_prefix(tensors, "backbone.")
    return _weights(recipe, tuple(entries[0]["findings"]), backbone, head or None, sha256)


def _weights(
    recipe: Recipe,
    findings: tuple[str, ...],
    backbone: dict[str, Tensor],
    head: dict[str, Tensor] | None,
    sha256: str,
) -> Weights:
    if "pos_embed" not in backbone:
        raise CheckpointError("the model has no pos_embed")
    config = Backbone.of_recipe(recipe, grid=round((backbone["pos_embed"].shape[1] - 1) ** 0.5))
    check(lambda: config.build(recipe.input), backbone, "backbone")
    part = None
    if head is not None:
        head_config = head_of_recipe(recipe, len(findings))
        check(head_config.build, head, "head")
        part = Part(head_config, head)
    return Weights(
        backbone=Part(config, backbone),
        head=part,
        findings=findings if part else (),
        input=recipe.input,
        image_px=recipe.image_px,
        source={"run": recipe.name, "weights_sha256": sha256},
        recipe=recipe,
    )


def _run_folder(folder: Path, sha256: str) -> Path | None:
    """The folder, here or of an arm below, of the run that ended with these weights."""
    for journal in (folder / "journal.jsonl", *sorted(folder.glob("work/*/*/journal.jsonl"))):
        if journal.is_file():
            entries = read_journal(journal)
            if entries and entries[-1].get("model_sha256") == sha256:
                return journal.parent
    return None


def _of_pretraining(folder: Path, sha256: str, recipe: Recipe | None) -> dict[str, Part]:
    """The teacher's heads that `chexfound pretrain` left beside its model; nothing if it is not of this model."""
    try:
        about = json.loads((folder / "pretraining.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(about, dict) or about.get("model_sha256") != sha256:
        return {}
    tensors = checkpoint.load(folder / "heads.safetensors")
    return {name: _projection(tensors, f"teacher.{name}.", recipe, name) for name in PROJECTIONS}


def _projections(run: Path, found: Weights) -> tuple[dict[str, Part], dict[str, str], str | None]:
    """DINO and iBOT head of the last round of pretraining, or why there are none; and whose they are."""
    rounds = [e for e in read_journal(run / "journal.jsonl") if e["event"] == "round" and e["phase"] == "pretrain"]
    if not rounds:
        return {}, {name: "there was no pretraining" for name in PROJECTIONS}, None
    path = run / "rounds" / Path(str(rounds[-1]["file"])).name
    if not path.is_file():
        return {}, {name: f"the last round's weights, rounds/{path.name}, are gone" for name in PROJECTIONS}, None
    tensors = checkpoint.load(path)
    if checkpoint.digest(tensors) != rounds[-1]["sha256"]:
        raise CheckpointError(f"{path}: is not what the journal says it should be; the file was changed or damaged")
    whose = "teacher" if any(name.startswith("teacher.") for name in tensors) else "student"
    assert found.backbone is not None
    if not _equal(checkpoint.with_prefix(tensors, f"{whose}.backbone."), found.backbone.tensors):
        raise CheckpointError(f"{path}: its {whose}'s backbone is not the model's; their heads are of another model")
    return {name: _projection(tensors, f"{whose}.{name}.", found.recipe, name) for name in PROJECTIONS}, {}, whose


def _projection(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe | None, name: str) -> Part:
    assert recipe is not None
    own = checkpoint.with_prefix(tensors, prefix)
    section: Dino | Ibot = recipe.dino if name == "dino_head" else recipe.ibot
    config = Projection.of_shapes(own, centered=section.head_centered)
    check(config.build, own, name)
    return Part(config, own)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return checkpoint.digest(one) == checkpoint.digest(other)
