"""A coordinator that begins a run with somebody's weights: a file that each site's operator approved, or no run at all.

Whole runs at four hospitals as they are deployed, in the clear and under masks, in one message and in parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound.contract.request import Request
from chexfound.data.store.reader import Store
from chexfound.errors import SiteError
from chexfound.model import checkpoint
from chexfound.pretrain.beginning import FILE, file_tensor, load_backbone, taken_backbone
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from client.home import approval
from client.home.paths import site_home
from server.rounds.start import run_of
from tests.hostile.weights_door import SMALL, demand
from tests.secagg.federation import NAMES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
POLICY = f"""{SMALL}
min_patients: 0
min_images: 0
cells: {{patients: 2}}
plain: accepted
"""
KINDS: dict[str, dict[str, Any]] = {
    "in the clear, in parts": {"aggregation": "fedavg", "part_mb": 0.05},
    "under masks, in parts": {"part_mb": 0.05},
    "under masks, without pretraining": {"phases": ("adapt", "evaluate")},
    "in the clear, in parts, without pretraining": {
        "aggregation": "fedavg", "part_mb": 0.05, "phases": ("adapt", "evaluate"),
    },
}  # fmt: skip


@pytest.fixture
def deployed(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> Federation:
    (fed.folder / "deployed").mkdir()
    (fed.folder / "deployed" / "sites").symlink_to(fed.folder / "homes")
    monkeypatch.setenv("CHEXFOUND_HOME", str(fed.folder / "deployed"))
    for name, node in fed.nodes.items():
        del node["home"]
        demand(fed.homes[name], POLICY)
    train, adapt = curriculum.changed(fed.recipe.train, local_steps=2), curriculum.changed(fed.recipe.adapt, rounds=1)
    fed.recipe = curriculum.changed(fed.recipe, train=train, adapt=adapt)
    return fed


@pytest.fixture
def file(deployed: Federation) -> Path:
    """A backbone that somebody trained elsewhere."""
    path = deployed.folder / "elsewhere.safetensors"
    checkpoint.save(path, taken_backbone(initial_weights(curriculum.changed(deployed.recipe, seed=5))))
    return path


@pytest.fixture
def begin(deployed: Federation, file: Path) -> Callable[..., Any]:
    """`begin(kind)`: the run that begins with the file, from its start or from where it was refused."""

    def run(kind: str) -> Any:
        changes = dict(KINDS[kind])
        federation = curriculum.changed(deployed.recipe.federation, part_mb=changes.pop("part_mb", 32.0))
        deployed.recipe = curriculum.changed(deployed.recipe, federation=federation, **changes)
        folder = deployed.folder / "run"
        spool = folder / "spool" if "in parts" in kind else None
        return run_of(deployed.recipe, deployed.exchange(spool), folder, backbone=file).run()

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_a_file_that_its_operators_approved_and_with_no_other(
    kind: str, begin: Callable[..., Any], deployed: Federation, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "pixels", lambda *_: pytest.fail("an image was looked at"))
        with pytest.raises(SiteError, match=r"weights\.file"):
            begin(kind)
    for home in deployed.homes.values():
        assert set(approval.refused_weights(home).values()) <= {"weights.file"}
        assert not (home / "backbone.safetensors").exists()
        assert not (home / "weights").exists()
        approval.approve_weights(home, digest)
    assert digest in {found for home in deployed.homes.values() for found in approval.approved_weights(home)}
    assert begin(kind).model_sha256


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "pixels", lambda *_: pytest.fail("an image was looked at"))


def test_under_masks_nothing_is_done_with_a_file_that_was_not_approved(
    deployed: Federation, file: Path, untouched: None
) -> None:
    """No image is touched before the weights were held against the site's own."""
    weights = initial_weights(deployed.recipe)
    load_backbone(weights, file)
    sent = weights | file_tensor(file, weights)
    one = deployed.attempt("pretrain", steps=2, batch_size=2, tensors=sent).until("masked")
    assert one.ask("masked", NAMES[0]) == "weights.file"
    two = deployed.attempt("pretrain", 2, steps=2, batch_size=2, tensors=sent).until("masked")
    assert two.ask("masked", NAMES[0], tensors={n: t for n, t in sent.items() if n != FILE}) == "secagg.weights"
    recipe = curriculum.changed(deployed.recipe, phases=("adapt", "evaluate"))
    backbone = taken_backbone(weights) | file_tensor(file, taken_backbone(weights))
    features = Request(phase="features", findings=("Bar", "Blob"), tensors=backbone)
    assert deployed.ask(NAMES[0], features, recipe=recipe) == "weights.file"
    assert not (site_home(NAMES[0]) / "backbone.safetensors").exists()
