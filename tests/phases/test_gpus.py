"""A site's round on two GPUs, played by two processes on a processor."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from chexfound.contract.request import Request
from chexfound.errors import CheckpointError, ConfigError, DataError, SiteError, StoppedError
from chexfound.phases import dispatch, gpus
from chexfound.phases.site_state import Decision, Site
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Split

SETTINGS = [
    "train.local_steps=2",
    "optim.optimizer=sgd",
    "optim.warmup_epochs=0",
    "teacher.policy=local",
    "health.eval_period_iterations=2",
]


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> recipes.Recipe:
    return recipes.load(tiny_recipe_file, recipes.parse_overrides(SETTINGS))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHEXFOUND_DEVICE", "cpu")
    for name in ("RANK", "WORLD_SIZE", "CHEXFOUND_GPUS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.e2e
def test_rounds_are_those_of_one_gpu(make_site, recipe):
    """One that goes well, then one whose weights diverge."""
    one, two = make_site("one", None), make_site("two", None)
    two.gpus, told = "2", []
    two.progress = lambda *what: told.append(what)
    request = Request(phase="pretrain", steps=2, batch_size=4, tensors=initial_weights(recipe))
    expected, reply = (dispatch.run(site, recipe, request) for site in (one, two))
    assert reply.values.keys() == expected.values.keys()
    assert "rankme" in expected.values["history"][-1]
    for ours, theirs in zip(reply.values["history"], expected.values["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert reply.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.allclose(reply.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert told == [("pretrain", done, recipe.pretrain_steps) for done in (1, 2)]
    huge = {name: 1e25 * tensor for name, tensor in expected.tensors.items()}
    errors = []
    for site in (one, two):
        with pytest.raises(DataError) as error:
            dispatch.run(site, recipe, replace(request, round=1, step=2, tensors=huge))
        errors.append(str(error.value).replace(str(site.home), ""))
    assert errors[0] == errors[1]
    assert errors[0].startswith("pretraining step 2: the loss is nan")
    files = [next((site.home / "diverged").glob("*.json")).read_text() for site in (one, two)]
    assert files[0] == files[1]
    assert not (two.home / "ranks").exists()


def test_a_batch_that_cannot_be_shared_out_is_told_before_anything_starts(make_site, recipe):
    site = make_site("all", None, gpus="2")
    request = Request(phase="pretrain", steps=2, batch_size=5, tensors=initial_weights(recipe))
    with pytest.raises(ConfigError, match="a batch of 5 images cannot be divided equally among the 2 GPUs"):
        dispatch.run(site, recipe, request)


NOT_OF_A_STEP = {"view", "progress", "stop", "gpus", "digest_key", "limits", "least", "lineage", "remembered"}


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"cells": 10, "words": frozenset({"Blob"}), "split_key": bytes(range(32)), "fractions": Split(train=0.5)},
    ],
)
def test_each_gpu_s_process_has_what_the_site_may_tell_and_of_whom(make_site, recipe, tmp_path, policy):
    """Else the probe of a site with two GPUs would judge names, and cells, that the site keeps to itself."""
    site, sent = replace(make_site("all", None), **policy), {"w": torch.ones(2)}
    decision = Decision(excluded=("knn_auroc",))
    gpus._write(tmp_path / "ranks", site, recipe, Request(phase="pretrain", tensors=sent), decision)
    found, read_recipe, request, decided = gpus._read(tmp_path / "ranks")
    assert read_recipe == recipe
    assert decided == decision
    assert found.view.ids.tolist() == site.view.ids.tolist()
    kept = {field.name for field in fields(Site)} - NOT_OF_A_STEP
    assert {name: getattr(found, name) for name in kept} == {name: getattr(site, name) for name in kept}
    assert found.training_ids(recipe).tolist() == site.training_ids(recipe).tolist()


def test_whose_failure_it_was(tmp_path):
    assert isinstance(gpus._failure(tmp_path, [0, -9]), SiteError)
    assert "GPU 1 (of 2) died (killed by signal 9" in str(gpus._failure(tmp_path, [0, -9]))
    (tmp_path / "error-1.json").write_text(json.dumps({"code": "checkpoint", "text": "no room"}))
    told = gpus._failure(tmp_path, [0, 4])
    assert (type(told), str(told)) == (CheckpointError, "GPU 1 (of 2): no room")
    (tmp_path / "error-0.json").write_text(json.dumps({"code": "data", "text": "of all"}))
    told = gpus._failure(tmp_path, [3, 3])
    assert (type(told), str(told)) == (DataError, "of all")


def test_that_they_were_asked_to_stop_is_no_failure(tmp_path):
    assert isinstance(gpus._failure(tmp_path, [0, -15], asked=True), StoppedError)
    assert isinstance(gpus._failure(tmp_path, [0, 0], asked=True), StoppedError)  # ended after their time was up
    (tmp_path / "error-0.json").write_text(json.dumps({"code": "storage", "text": "no room"}))
    assert str(gpus._failure(tmp_path, [8, 0], asked=True)) == "no room"
