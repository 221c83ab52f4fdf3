"""The recipe as `flwr run -c FILE.toml` takes it, and what the app bundle holds."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk  # private: what `flwr build` and `flwr run` call
from flwr.common.config import get_fused_config_from_fab, parse_config_args
from flwr.supercore.run import Run
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError, VersionError
from chexfound.recipe import check
from chexfound.recipe import load as recipes

ROOT = Path(__file__).resolve().parents[1]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=3, unique=True),
)
def test_any_recipe_comes_through(name: str, findings: list[str]) -> None:
    recipe = check.validate({"name": name, "adapt": {"findings": findings}}, "here")
    text = recipes.to_run_config(recipe)
    assert recipes.from_run_config(tomllib.loads(text)) == recipe


@pytest.mark.parametrize("name", ["it's", "'''", "'", "\x7f", "a\\", 'say "x"', "two\nlines", "é"])
def test_awkward_text_comes_through_flower(name: str, tmp_path: Path) -> None:
    recipe = check.validate({"name": name}, "here")
    path = tmp_path / "run.toml"
    path.write_text(recipes.to_run_config(recipe))
    assert recipes.from_run_config(parse_config_args([str(path)])) == recipe


def test_no_recipe_is_the_demo() -> None:
    assert recipes.from_run_config({}) == recipes.from_run_config({"recipe": ""}) == recipes.load("demo")


def test_a_recipe_that_is_none() -> None:
    with pytest.raises(ConfigError, match="run-config 'recipe'"):
        recipes.from_run_config({"recipe": "rounds: 3"})


def test_the_bundle_is_the_four_packages_and_small() -> None:
    data = build_fab_from_disk(ROOT)
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    packages = {"chexfound", "client", "server", "strategies"}
    assert {name.split("/")[0] for name in names} == {"pyproject.toml", ".info"} | packages
    assert not [name for name in names if "_app" in name.split("/")]
    assert {"server/app.py", "client/app.py", "chexfound/presets/demo.yaml"} <= set(names)
    assert len(data) < 2 * 2**20  # Flower takes 10 MiB


def test_the_bundle_knows_its_run_config_keys() -> None:
    values = get_fused_config_from_fab(build_fab_from_disk(ROOT), Run.create_empty(1))
    assert values == {"recipe": "", "backbone": "", "run-dir": "", "submission": ""}


def test_a_recipe_of_another_version_is_refused() -> None:
    text = recipes.to_json(recipes.load("demo")).replace('"version":1', '"version":2')
    with pytest.raises(VersionError, match="of version 2; this release reads 1: install the same release"):
        recipes.from_run_config({"recipe": text})
