"""Checks a recipe: types, bounds, and what its values say together."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from chexfound.errors import ConfigError, Problems
from chexfound.parsing.strict_yaml import shown
from chexfound.recipe.schema import ARCHS, Recipe, Stage

adapter = TypeAdapter(Recipe)


def validate(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a Recipe from plain values; everything that is wrong is told in one ConfigError."""
    problems = Problems(ConfigError, where)
    try:
        recipe = adapter.validate_python(values)
    except ValidationError as error:
        for entry in error.errors():
            problems.add(_explain(entry))
        problems.check()
        raise
    for problem in _inconsistencies(recipe):
        problems.add(problem)
    problems.check()
    return recipe


def _explain(entry: Any) -> str:
    path = [str(part) for part in entry["loc"]]
    key = ".".join(path)[:80]
    if entry["type"] == "unexpected_keyword_argument":
        section: Any = Recipe
        for part in path[:-1]:
            if part == "curriculum":
                section = Stage
            elif not part.isdigit():
                section = {field.name: field.default for field in dataclasses.fields(section)}[part].__class__
        near = difflib.get_close_matches(path[-1], [field.name for field in dataclasses.fields(section)], n=1)
        return f"unknown key {key!r}" + (f"; did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else "")
    return f"{key}: {entry['msg'][0].lower()}{entry['msg'][1:]} (got {shown(entry['input'])})"


def _inconsistencies(recipe: Recipe) -> list[str]:
    found = []
    for name, phase in (("train", recipe.train), ("adapt", recipe.adapt)):
        if (phase.batch_size is None) == (phase.pooled_batch_size is None):
            found.append(
                f"{name}: give either batch_size (a site's) or pooled_batch_size (all sites together), "
                "and set the other to null"
            )
        if phase.deal == "by_size" and recipe.aggregation == "secagg":
            found.append(f"{name}.deal: under masks nobody knows a site's number of images; set it to equally")
    found += _wrong_rate(recipe) + _wrong_stages(recipe)
    if recipe.student.in_chans == 1 and (isinstance(recipe.input.mean, tuple) or isinstance(recipe.input.std, tuple)):
        found.append("input: a mean or std of three channels needs student.in_chans 3")
    for key, low_high in (
        ("crops.global_crops_scale", recipe.crops.global_crops_scale),
        ("crops.local_crops_scale", recipe.crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", recipe.ibot.mask_ratio_min_max),
    ):
        if low_high[0] > low_high[1]:
            found.append(f"{key}: the first number must not be above the second (got {list(low_high)})")
    if recipe.train.sinkhorn_queue and recipe.train.centering != "sinkhorn_knopp":
        found.append("train.sinkhorn_queue: there is a queue for train.centering sinkhorn_knopp only; set it to 0")
    stages = [(f"curriculum.{number}", stage) for number, stage in enumerate(recipe.curriculum)]
    for key, size in (
        ("image_px", recipe.image_px),
        *(
            (f"{name}.{key}", getattr(crops, key))
            for name, crops in [("crops", recipe.crops), *stages]
            for key in ("global_crops_size", "local_crops_size")
        ),
    ):
        if size % recipe.student.patch_size:
            found.append(f"{key}: must be a multiple of student.patch_size {recipe.student.patch_size} (got {size})")
    if recipe.student.stem == "conv" and recipe.student.patch_size != 16:
        found.append(
            f"student.patch_size: the conv stem halves four times, so it must be 16 (got {recipe.student.patch_size})"
        )
    if recipe.split.train + recipe.split.val >= 1:
        found.append("split: train + val must leave patients for the test (their sum must be below 1)")
    if not recipe.phases:
        found.append("phases: name at least one of pretrain, adapt, evaluate")
    if "evaluate" in recipe.phases and "adapt" not in recipe.phases:
        found.append("phases: evaluate judges the head, so it needs adapt (leave evaluate out, or add adapt)")
    if recipe.adapt.n_last_blocks > (depth := ARCHS[recipe.student.arch][1]):
        found.append(
            f"adapt.n_last_blocks: {recipe.student.arch} has {depth} blocks (got {recipe.adapt.n_last_blocks})"
        )
    if recipe.adapt.glori_dim % recipe.adapt.glori_heads:
        found.append(
            f"adapt.glori_dim: must be a multiple of adapt.glori_heads "
            f"(got {recipe.adapt.glori_dim} and {recipe.adapt.glori_heads})"
        )
    if recipe.adapt.findings == ():
        found.append("adapt.findings: name at least one, or set it to null for all that are frequent enough")
    if len(set(recipe.adapt.findings or ())) != len(recipe.adapt.findings or ()):
        found.append("adapt.findings: a finding is named twice")
    return found


def _wrong_rate(recipe: Recipe) -> list[str]:
    """Name what does not fit of base_lr and scaling_rule, which are given together and need the pooled batch."""
    optim, found = recipe.optim, []
    if (optim.base_lr is None) != (optim.scaling_rule is None):
        found.append("optim: base_lr and scaling_rule go together; give both, or lr alone")
    batches = {"train": recipe.train.batch_size}
    batches |= {f"curriculum.{number}": stage.batch_size for number, stage in enumerate(recipe.curriculum)}
    for name, batch_size in batches.items():
        if optim.scaling_rule is not None and batch_size is not None:
            found.append(
                f"{name}.batch_size: optim.scaling_rule needs the images a step over all sites; give pooled_batch_size"
            )
    return found


def _wrong_stages(recipe: Recipe) -> list[str]:
    found = []
    for number, stage in enumerate(recipe.curriculum):
        if stage.batch_size is not None and stage.pooled_batch_size is not None:
            found.append(f"curriculum.{number}: give either batch_size or pooled_batch_size, or none to keep the last")
        if stage.base_lr is not None and recipe.optim.scaling_rule is None:
            found.append(f"curriculum.{number}.base_lr: needs optim.scaling_rule; give lr")
        if stage.lr is not None and recipe.optim.scaling_rule is not None:
            found.append(f"curriculum.{number}.lr: optim.scaling_rule takes base_lr in its place")
    return found
