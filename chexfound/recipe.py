"""A run, as a recipe: read from YAML, checked, sent over the wire as one JSON string.

What a recipe holds is in `chexfound/schema.py`; a preset (`chexfound/presets/NAME.yaml`) or a file
of one's own overrides the defaults there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from chexfound import strict_json, strict_yaml
from chexfound.errors import ConfigError, Problems, VersionError
from chexfound.names import utf8, written
from chexfound.schema import ARCHS, Adapt, Recipe, Stage, Train
from chexfound.strict_yaml import shown

VERSION = 1  # of the recipes that travel: another one when a key changes its meaning
_adapter = TypeAdapter(Recipe)
Section = TypeVar("Section")


def changed(section: Section, **values: Any) -> Section:
    """A recipe, or a section of one, with other values (not checked again)."""
    return dataclasses.replace(section, **values)  # type: ignore[type-var]


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("chexfound").joinpath("presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def about(preset: str) -> str:
    """What a preset is for: the first line of its file."""
    return _read(preset)[0].partition("\n")[0].removeprefix("# ")


def load(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a preset by name, or a YAML file by path, and apply overrides such as {"train.rounds": 3}.

    Args:
        name_or_path: of the recipe.
        overrides: by key, whatever the file says.
        defaults: of top-level keys, where neither the file nor `overrides` has one.

    Raises: ConfigError naming every problem at once, with a suggestion for an unknown key.
    """
    text, where = _read(str(name_or_path))
    try:
        values = strict_yaml.load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if not text.strip() and not overrides:
        raise ConfigError(f"{where}: the file is empty; a recipe of defaults says at least its 'name:'")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of keys, not {type(values).__name__}")
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    return validate({**(defaults or {}), **values}, where)


def _read(name: str) -> tuple[str, str]:
    if name in presets():
        return resources.files("chexfound").joinpath("presets", f"{name}.yaml").read_text(), f"preset {name!r}"
    path = Path(name)
    try:
        there = path.is_file()
    except OSError as error:  # too long, say
        raise ConfigError(f"recipe {shown(name)}: cannot be read: {error.strerror}") from error
    if not there:
        near = difflib.get_close_matches(name, presets(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no recipe {shown(name)}: {hint}give a YAML file, or one of the presets {', '.join(presets())}"
        )
    try:
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Turn `--set train.rounds=3` options into a mapping (values are YAML)."""
    result = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {shown(pair)}: write KEY=VALUE, for example --set train.rounds=3")
        try:
            result[key.strip()] = strict_yaml.load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
            why = getattr(error, "problem", None)
            raise ConfigError(
                f"--set {shown(pair)}: the value is not valid YAML" + (f": {why}" if why else "")
            ) from error
    return result


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key[:80]}: {shown(parent)} holds a value, not a section")
        values = child
    values[leaf] = value


def validate(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a Recipe from plain values; everything that is wrong is told in one ConfigError."""
    problems = Problems(ConfigError, where)
    try:
        recipe = _adapter.validate_python(values)
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
    """What does not fit of base_lr and scaling_rule, which are given together and need the pooled batch."""
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


def site_batch_size(phase: Train | Adapt, n_sites: int, section: str) -> int:
    """Images that one of `n_sites` sites takes a step.

    Raises: ConfigError if the pooled batch cannot be divided equally.
    """
    if phase.batch_size is not None:
        return phase.batch_size
    assert phase.pooled_batch_size is not None
    if phase.pooled_batch_size % n_sites:
        near = -(-phase.pooled_batch_size // n_sites) * n_sites
        raise ConfigError(
            f"{section}.pooled_batch_size {phase.pooled_batch_size} cannot be divided equally among {n_sites} sites; "
            f"choose a multiple of {n_sites}: --set {section}.pooled_batch_size={near}"
        )
    return phase.pooled_batch_size // n_sites


def pooled_batch_size(phase: Train | Adapt, n_sites: int) -> int:
    """Images that the centralized arm takes a step: those of `n_sites` sites together."""
    return phase.pooled_batch_size if phase.pooled_batch_size is not None else phase.batch_size * n_sites  # type: ignore[operator]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML and JSON have them."""
    values: dict[str, Any] = _adapter.dump_python(recipe, mode="json")
    return values


def to_json(recipe: Recipe) -> str:
    """The one string that travels as run-config key `recipe`."""
    return json.dumps({"version": VERSION, **to_dict(recipe)}, sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> Recipe:
    """The inverse of `to_json`; the text is checked like any input.

    Raises: ConfigError; VersionError for a recipe of another version, whose keys may mean something else.
    """
    try:
        values = strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("run-config 'recipe': not valid JSON") from error
    if not isinstance(values, dict):
        raise ConfigError("run-config 'recipe': must be a JSON object")
    if (version := values.pop("version", VERSION)) != VERSION:
        raise VersionError(
            f"run-config 'recipe': of version {shown(version)}; this release reads {VERSION}: install the same release "
            "at both ends"
        )
    return validate(values, "run-config 'recipe'")


def to_run_config(recipe: Recipe, more: Mapping[str, str] | None = None) -> str:
    """The text of a TOML file for `flwr run -c FILE.toml`: the recipe under the key `recipe`, and `more` keys.

    A literal string in triple quotes takes everything as it stands but quotes and control characters;
    JSON can write these as escapes, so none is left in it.

    Raises: ConfigError for a value that is not Unicode (a path of undecodable bytes).
    """
    text = to_json(recipe).replace("'", "\\u0027").replace("\x7f", "\\u007f")
    lines = [f"recipe = '''{text}'''"]
    for key, value in (more or {}).items():
        if not utf8(value):
            raise ConfigError(
                f"{key} {written(value)}: holds bytes that are not UTF-8; rename it, or make a link to it"
            )
        lines.append(f"{key} = " + json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"


def from_run_config(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a run, the same at the coordinator and at a site; the preset "demo" if none is given.

    Raises: ConfigError.
    """
    text = values.get("recipe") or ""
    return from_json(str(text)) if text else load("demo")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as a person reads it."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
