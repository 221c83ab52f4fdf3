"""Honest runs pass a site's checks of its weights, whatever the recipe; what is kept of them is little, and private."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound.model.glori import build_head
from chexfound.pretrain import positions
from chexfound.pretrain.beginning import taken_backbone
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from client.answer import acceptance
from client.answer import hospital as client_site
from server.rounds.record import Record
from server.rounds.start import run_of
from tests.client.test_hostile_coordinator import featuring, pretraining
from tests.secagg.federation import Federation

pytest_plugins = ("tests.secagg.fixtures",)
SITES = ["alpha", "beta"]
STAGE = {"rounds": 2, "global_crops_size": 48, "local_crops_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "all travels": {},
    "teacher and moments stay": {"teacher.policy": "local", "train.optimizer_state": "local"},
    "teacher derived": {"teacher.policy": "rederive", "train.optimizer_state": "local", "train.rounds": 3},
    "two stages": {"curriculum": [STAGE], "teacher.policy": "rederive"},
    "two stages, all travels": {"curriculum": [STAGE], "optim.layerwise_decay": 0.9, "optim.weight_decay_end": 0.4},
    "sgd": {"optim.optimizer": "sgd", "optim.lr": 0.1},
    "no pretraining": {"phases": ["adapt", "evaluate"], "adapt.optimizer_state": "local"},
    "gains trained": {"dino.head_norm_last_layer": False, "optim.freeze_last_layer_epochs": 0.2},
}


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    client_site.forget()


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_run_passes_and_its_model_is_the_same(
    kind: str, make_exchange: Callable[..., Any], tiny_recipe_file: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(tiny_recipe_file, KINDS[kind])
    hashes = []
    for checked in (True, False):
        exchange = make_exchange(recipe, SITES, tmp_path / f"homes-{checked}", lineage=checked)
        hashes.append(run_of(recipe, exchange, tmp_path / f"run-{checked}").run().model_sha256)
    assert hashes[0] == hashes[1]
    for name in SITES:
        home = tmp_path / "homes-True" / name
        (folder,) = (home / "weights").iterdir()
        assert len(list(folder.iterdir())) == 2
        assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o600"}
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not (tmp_path / "homes-False" / name / "weights").exists()


@pytest.mark.parametrize("ring", [32, 16])
def test_an_honest_masked_run_passes(fed: Federation, tmp_path: Path, ring: int) -> None:
    train = curriculum.changed(fed.recipe.train, local_steps=2)
    fed.recipe = curriculum.changed(fed.recipe, train=train, secagg=curriculum.changed(fed.recipe.secagg, ring=ring))
    for node in fed.nodes.values():
        node["lineage"] = True
    assert run_of(fed.recipe, fed.exchange(), tmp_path / f"run-{ring}").run().model_sha256


def test_first_weights_that_differ_in_the_last_place_are_one_set_of_weights(fed: Federation) -> None:
    """Named by what the site derives: else a coordinator would open a second sum on them, over other sites."""
    for node in fed.nodes.values():
        node["lineage"] = True
    pretraining(fed).finish()
    nudged = {n: t + 3e-8 if n.endswith("cls_token") else t for n, t in pretraining(fed).request.tensors.items()}
    others = ("alpha", "beta", "gamma")
    again = pretraining(fed, run=2, tensors=nudged).until("unmask", others)
    assert again.ask("unmask", "alpha") == "secagg.differencing"


def test_a_first_backbone_that_differs_in_the_last_place_is_one_backbone(fed: Federation) -> None:
    """Of a run that begins with its features: likewise."""
    for node in fed.nodes.values():
        node["lineage"] = True
    fed.recipe = curriculum.changed(fed.recipe, phases=("adapt", "evaluate"))
    grid = fed.recipe.position_px // fed.recipe.student.patch_size
    backbone = taken_backbone(positions.with_grid(initial_weights(fed.recipe), grid))
    head = {f"head.{name}": value for name, value in build_head(fed.recipe, 2).state_dict().items()}
    featuring(fed, tensors=backbone)
    fed.attempt("evaluate", tensors=head).finish()
    featuring(fed, run=2, tensors=backbone | {"cls_token": backbone["cls_token"] + 3e-8})
    again = fed.attempt("evaluate", run=2, tensors=head).until("unmask", ("alpha", "beta", "gamma"))
    assert again.ask("unmask", "alpha") == "secagg.differencing"


def test_a_run_that_is_resumed_goes_on(
    make_exchange: Callable[..., Any], tiny_recipe_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The coordinator dies between a site's reply and its own checkpoint: the round is asked for again."""
    recipe = recipes.load(tiny_recipe_file, {"teacher.policy": "rederive", "train.rounds": 3})
    whole = run_of(recipe, make_exchange(recipe, SITES, tmp_path / "a"), tmp_path / "whole").run().model_sha256
    for phase, number in (("pretrain", 0), ("pretrain", 2), ("adapt", 1)):
        folder = tmp_path / f"{phase}-{number}"

        def dies(self: Any, *given: Any, phase: str = phase, number: int = number, commit: Any = Record.commit) -> None:
            if given[:2] == (phase, number):
                raise KeyboardInterrupt
            commit(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Record, "commit", dies)
            with pytest.raises(KeyboardInterrupt):
                run_of(recipe, make_exchange(recipe, SITES, folder / "homes", lineage=True), folder / "run").run()
        client_site.forget()
        exchange = make_exchange(recipe, SITES, folder / "homes", lineage=True)
        assert run_of(recipe, exchange, folder / "run").run().model_sha256 == whole
        assert len(list((folder / "homes" / "alpha" / "weights").iterdir())) == 1


def test_what_is_damaged_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "run"
    folder.mkdir(parents=True)
    for text in ("", "{", "[]", '{"format": 1}', json.dumps({"format": 2, "phase": "pretrain"})):
        (folder / "accepted.json").write_text(text)
        assert acceptance.read(folder) is None
