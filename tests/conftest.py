"""What a test may need and a machine may lack, and three small hospitals for the tests of whole runs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import settings

# Machines that run the tests are shared and slow at times: how long an example takes says nothing.
settings.register_profile("short", deadline=None, max_examples=30)
settings.register_profile("long", deadline=None, max_examples=500)
settings.load_profile("long" if os.environ.get("CHEXFOUND_TESTS") == "long" else "short")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start real processes first: with several workers the others run while these wait."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line how many tests did not run for want of ../shared, and what they would have checked."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "../shared" in str(report.longrepr)]
    if skipped:
        files = sorted({report.nodeid.partition("::")[0].removeprefix("tests/") for report in skipped})
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped without ../shared: values of the public reference implementation, real "
            f"X-rays and layouts of data sets ({', '.join(files)})"
        )


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Put back what `chexfound-client`, called in this process, sets for all of a site's."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


# Programs that some tests need, by the names under which they may be found.
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "hadolint": (str(Path(sys.executable).with_name("hadolint")), "hadolint"),
    "nginx": ("nginx", "/usr/sbin/nginx"),
    "systemd-analyze": ("systemd-analyze",),
}

# Python packages that some tests need.
PACKAGES = ("compose_spec", "kubernetes_validate")


def _find(name: str) -> tuple[Path | None, str]:
    """Where a thing that not every machine has lies, and what to say where it does not."""
    if name == "shared":
        folder = ROOT.parent / "shared"
        return (folder if folder.is_dir() else None), "no folder ../shared beside the repository (real X-rays)"
    if name in PACKAGES:
        spec = importlib.util.find_spec(name)
        return (Path(spec.origin) if spec and spec.origin else None), f"no package {name}: pip install -e '.[deploy]'"
    found = next(filter(None, map(shutil.which, PROGRAMS[name])), None)
    return (Path(found) if found else None), f"no {name} on the PATH"


@pytest.fixture(scope="session")
def require() -> Callable[[str], Path]:
    """require("shared"), or one of PROGRAMS or PACKAGES: its path.

    Where it is absent the test is skipped, or fails if CHEXFOUND_REQUIRE names it.
    """

    def path_of(name: str) -> Path:
        found, reason = _find(name)
        if found is None:
            if name in os.environ.get("CHEXFOUND_REQUIRE", "").split(","):
                pytest.fail(f"{reason}, and CHEXFOUND_REQUIRE asks for {name}")
            pytest.skip(reason)
        return found

    return path_of


@pytest.fixture(scope="session")
def reference(require: Callable[[str], Path]) -> Path:
    """The folder of values that the public implementation computes; skips where it is absent."""
    return require("shared") / "reference"


# ---- three hospitals

# What each declares to label on all its images.  alpha has both classes of both findings; beta labels
# Blob only; gamma labels Bar only and has no positive of it, so it cannot train a row.
LABELLED = {"alpha": ["Blob", "Bar"], "beta": ["Blob"], "gamma": ["Bar"]}
PATIENTS = {"alpha": 24, "beta": 20, "gamma": 20}

# Overrides of the preset: a run of all arms in a few seconds.
TINY = {
    "name": "tiny",
    "image_px": 64,
    "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
    "dino": {"head_n_prototypes": 32, "head_bottleneck_dim": 16, "head_hidden_dim": 32, "head_nlayers": 2},
    "ibot": {"head_n_prototypes": 32, "head_bottleneck_dim": 16, "head_hidden_dim": 32, "head_nlayers": 2},
    "train": {"rounds": 2, "local_steps": 2, "pooled_batch_size": 12},
    "adapt": {
        "rounds": 2,
        "local_steps": 3,
        "pooled_batch_size": 12,
        "min_positives": 3,
        "views": 1,
        "glori_dim": 16,
        "glori_heads": 2,
        "glori_ffn_dim": 16,
        "warmup_steps": 2,
    },
    "evaluate": {"bootstrap_samples": 100},
}


def draw(lots: np.random.Generator, blob: bool, bar: bool) -> np.ndarray:
    """A grey field with noise; a bright disc is the finding Blob, a bright stripe the finding Bar."""
    picture = lots.normal(90, 12, (64, 64))
    if blob:
        cv2.circle(picture, tuple(int(v) for v in lots.integers(18, 46, 2)), 9, 220.0, -1)
    if bar:
        row = int(lots.integers(8, 56))
        picture[row : row + 4] = 230
    return picture.clip(0, 255).astype(np.uint8)


def write_images(
    folder: Path,
    patients: Mapping[str, int] = PATIENTS,
    labelled: Mapping[str, list[str]] = LABELLED,
    change: Callable[[list[dict[str, str]]], Any] | None = None,
) -> Path:
    """A folder with a manifest; `change` edits its rows before they are written."""
    folder.mkdir(parents=True)
    rows = []
    for source, number in patients.items():
        lots = np.random.default_rng(sum(source.encode()))
        for patient in range(number):
            blob = "Blob" in labelled[source] and patient % 2 == 0
            bar = "Bar" in labelled[source] and source != "gamma" and patient % 3 == 0
            for image in range(1 + (patient % 5 == 0)):
                file = f"{source}/{patient:02d}-{image}.png"
                (folder / source).mkdir(exist_ok=True)
                cv2.imwrite(str(folder / file), draw(lots, blob, bar))
                found = ["Blob"] * blob + ["Bar"] * bar
                row = {"file": file, "source": source, "patient_id": f"{source[0]}{patient:02d}"}
                rows.append({**row, "findings": "|".join(found or ["No Finding"]), "view": "PA" if image else "AP"})
    if change is not None:
        change(rows)
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "labelled.json").write_text(json.dumps(labelled))
    return folder


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """`make_images(folder, patients=…, labelled=…, change=…)`; see `write_images`."""
    return write_images


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three hospitals' images with their manifest; not to be changed."""
    return write_images(tmp_path_factory.mktemp("hospitals") / "images")


@pytest.fixture(scope="session")
def tiny_store_path(tiny_images: Path) -> Path:
    """A store of all three."""
    from chexfound.data.intake.ingest import ingest

    path = tiny_images.parent / "store"
    ingest(tiny_images, path, TINY["image_px"])
    return path


@pytest.fixture(scope="session")
def tiny_recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe as a user would write it."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(json.dumps(TINY))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_recipe_file: Path) -> Any:
    """The small recipe."""
    from chexfound.recipe import load

    return load.load(tiny_recipe_file)


@pytest.fixture
def make_site(tiny_store_path: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make_site("alpha")`: one of the hospitals with a disk of its own; `make_site("all", None)`: all images."""
    from chexfound.data.store.reader import Store
    from chexfound.data.store.split import View
    from chexfound.phases.site_state import Site

    def make(name: str, source: str | None = "", **options: Any) -> Site:
        store = Store.open(tiny_store_path)
        patients = None
        if source is not None:
            patients = [key for key in dict.fromkeys(store.keys) if key.startswith(f"{source or name}/")]
        home = options.pop("home", tmp_path / "homes" / name)
        return Site(view=View.of(store, name, patients), home=home, **options)

    return make


@pytest.fixture
def with_findings(tiny_recipe: Any) -> Any:
    """The small recipe with the head's findings named."""
    return replace(tiny_recipe, adapt=replace(tiny_recipe.adapt, findings=("Bar", "Blob")))


@pytest.fixture
def make_message() -> Callable[..., Any]:
    """`make_message(content, "train.pretrain")`: a message as the coordinator sends it."""
    from flwr.app import Message

    from server.exchange.flwr_private import set_identity

    def make(content: Any, message_type: str = "query.enrol") -> Message:
        set_identity(1)
        return Message(content, dst_node_id=1, message_type=message_type, group_id="0", ttl=60.0)

    return make


@pytest.fixture(scope="session")
def make_exchange(tiny_store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`make_exchange(recipe, ["alpha", "beta"], homes)`: these hospitals behind the in-process grid.

    `more`: of a node's configuration.
    """
    from chexfound.data.store.reader import Store
    from chexfound.recipe import load as recipes
    from server.exchange.grid import GridExchange
    from sim.engine.in_process import InProcessGrid
    from sim.engine.pool import Pool

    keys = sorted(set(Store.open(tiny_store_path).keys))

    shards = tmp_path_factory.mktemp("shards")

    def make(recipe: Any, names: list[str], homes: Path | None = None, **more: Any) -> GridExchange:
        nodes, homes = [], homes or tmp_path_factory.mktemp("homes")
        for name in names:
            node = {"site": name, "data": str(tiny_store_path), "home": str(homes / name), **more}
            if name != "all":
                shard = shards / f"{name}.json"
                shard.write_text(json.dumps([key for key in keys if key.startswith(f"{name}/")]))
                node["patients"] = str(shard)
            nodes.append(node)
        return GridExchange(InProcessGrid(Pool(1), nodes, {"recipe": recipes.to_json(recipe)}))

    return make
