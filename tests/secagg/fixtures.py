"""Fixtures of the tests of secure aggregation, wherever they are: `pytest_plugins = ("tests.secagg.fixtures",)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.recipe import load as recipes
from client.answer import hospital
from tests.secagg.federation import LABELLED, NAMES, SMALL, Federation, label_rare


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    """A folder with the four hospitals' store."""
    folder = tmp_path_factory.mktemp("secured")
    images = make_images(folder / "images", dict.fromkeys(NAMES, 20), LABELLED, label_rare)
    ingest(images, folder / "store", 64)
    return folder


@pytest.fixture
def fed(hospitals: Path, tiny_recipe_file: Path, tmp_path: Path) -> Iterator[Federation]:
    """The four hospitals, as new."""
    yield Federation(recipes.load(tiny_recipe_file, SMALL), hospitals / "store", tmp_path, hospitals / "ca")
    hospital.forget()
