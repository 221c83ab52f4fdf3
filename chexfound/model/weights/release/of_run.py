"""A model that a run of ours left, in parts: from its journal, its weights, and those of its last round.

The model is backbone and head of findings; the DINO and iBOT heads that it was pretrained with stand in the last
round's weights, beside the journal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.weights.architecture import Backbone, Projection, check, head_of_recipe
from chexfound.model.weights.in_parts import ALL, Part, Weights
from chexfound.model.weights.published.tensor_names import PROJECTIONS
from chexfound.model.weights.release import folder as folders
from chexfound.model.weights.release import summary
from chexfound.parsing import strict_json
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Dino, Ibot, Recipe


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run's or a simulation's arm's, or holds, or is, the model/ of one."""
    return any((path / name).is_file() for name in ("model/config.json", "journal.jsonl")) or _is_format_1(path)


def read(path: Path, wanted: Collection[str] = ALL) -> Weights:
    """Read the parts of a run's model; with its DINO and iBOT heads, if they are wanted, also how it was trained.

    Raises: CheckpointError if a part is absent, damaged, or does not fit the others.
    """
    path = Path(path)
    model = path / "model"
    said = folders.stated(model)
    if said is not None and not set(wanted) & set(PROJECTIONS):
        return folders.read(model, wanted)
    run = path if (path / "journal.jsonl").is_file() else None
    if run is None and said is not None and isinstance(said.source, folders.FromRun):
        run = _run_folder(path, said.source.weights_sha256)
    if run is not None:
        return of_arm(run, wanted)
    return folders.read(model, wanted) if said is not None else _of_format_1(path if _is_format_1(path) else model)


def _is_format_1(model: Path) -> bool:
    try:
        return {"recipe", "weights_sha256"} <= set(strict_json.loads((model / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return False


def _of_format_1(model: Path) -> Weights:
    """Read the model/ that runs left before it was a release: names of ours, and recipe and findings in config.json."""
    try:
        values = strict_json.loads((model / "config.json").read_text())
        if values["format"] != 1:
            raise ValueError(f"format {values['format']}")
        recipe, findings, sha256 = values["recipe"], values["findings"], values["weights_sha256"]
        recipe = recipes.from_json(json.dumps(recipe))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{model}: its config.json is of no release that this one reads: {error}") from error
    tensors = checkpoint.load(model / "model.safetensors")
    if checkpoint.digest(tensors) != sha256:
        raise CheckpointError(f"{model}: model.safetensors is not the file that its config.json tells of")
    head = checkpoint.with_prefix(tensors, "head.")
    return _weights(recipe, tuple(findings), checkpoint.with_prefix(tensors, "backbone."), head or None, sha256)


def of_arm(run: Path, wanted: Collection[str] = ALL, metrics: Mapping[str, Any] | None = None) -> Weights:
    """Read the parts of a run's model, as `read` does, from a folder with the run's journal in it.

    Args:
        run: the folder.
        wanted: the parts.
        metrics: the run's figures, where they are not written yet; else those of metrics.json, if it is there.

    Raises: CheckpointError as `read`, or if the run is not finished.
    """
    found = _of_arm(run)
    if not set(wanted) & set(PROJECTIONS):
        return found
    projections, why_not, whose = _projections(run, found)
    source = {**found.source, **({"whose": whose} if whose else {})}
    found = replace(found, projections=projections, left_out=why_not, source=source)
    return replace(found, summary=summary.of_run(found, run, metrics))


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
