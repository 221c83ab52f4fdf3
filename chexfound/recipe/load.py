"""A run, as a recipe: read from YAML, checked, sent over the wire as one JSON string.

What a recipe holds is in `chexfound/recipe/schema.py`; a preset (`chexfound/presets/NAME.yaml`) or a file
of one's own overrides the defaults there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from chexfound.errors import ConfigError, VersionError
from chexfound.parsing import strict_json, strict_yaml
from chexfound.parsing.names import utf8, written
from chexfound.parsing.strict_yaml import shown
from chexfound.recipe.check import adapter, validate
from chexfound.recipe.schema import Recipe

VERSION = 1  # of the recipes that travel: another one when a key changes its meaning


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("chexfound").joinpath("presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def about(preset: str) -> str:
    """Say what a preset is for: the first line of its file."""
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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML and JSON have them."""
    values: dict[str, Any] = adapter.dump_python(recipe, mode="json")
    return values


def to_json(recipe: Recipe) -> str:
    """The one string that travels as run-config key `recipe`.

    A key that came after the first runs is left out at its default, so that their recipes' digests stay.
    """
    values = to_dict(recipe)
    for section in (values["train"], values["adapt"]):
        if section["deal"] == "equally":
            del section["deal"]
    return json.dumps({"version": VERSION, **values}, sort_keys=True, separators=(",", ":"))


def digest(recipe: Recipe) -> str:
    """Give the SHA-256 of a recipe's `to_json`, in hexadecimal: which recipe a run, a state or a sum is of."""
    return hashlib.sha256(to_json(recipe).encode()).hexdigest()


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
