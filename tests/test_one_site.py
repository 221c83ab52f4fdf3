"""A federation of one site is centralized training, bit for bit: rounds, wire, fold and state add nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.adapt import features
from chexfound.adapt.fit import HeadTrainer, trainable_findings
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.model import checkpoint, vit
from chexfound.model.checkpoint import load_tensors
from chexfound.model.glori import build_head
from chexfound.pretrain.train import Pretrainer
from server.rounds.start import run_of


def centralized(
    recipe: Any, store: Store, ids: np.ndarray, findings: tuple[str, ...], folder: Path
) -> dict[str, torch.Tensor]:
    """R·S steps in one go: no rounds, no server, no messages."""
    trainer = Pretrainer(recipe, lambda places: store.pixels(ids[places]), len(ids), 0)
    trainer.run(0, recipe.pretrain_steps, recipe.train.pooled_batch_size)
    weights = checkpoint.with_prefix(trainer.global_tensors(teacher=False), "student.backbone.")
    backbone = vit.build(recipe.student, recipe.input, recipe.crops.global_crops_size)
    load_tensors(backbone, weights, list(backbone.state_dict()))

    labels = store.labels(ids, findings)
    labelled = ids[(labels >= 0).any(1)]
    kept = features.extract(recipe, backbone, lambda places: store.pixels(labelled[places]), len(labelled), 0, folder)
    labels = np.where(trainable_findings(labels), labels, np.int8(-1)).astype(np.int8)[(labels >= 0).any(1)]
    head = HeadTrainer(recipe, kept, labels, 0)
    head.load_global(build_head(recipe, len(findings)).state_dict())
    head.run(0, recipe.adapt.total_steps, recipe.adapt.pooled_batch_size)
    return checkpoint.add_prefix(weights, "backbone.") | checkpoint.add_prefix(head.global_tensors(), "head.")


@pytest.mark.parametrize("head", ["glori", "linear"])
def test_one_site_federated_is_centralized(
    make_exchange: Callable[..., Any], tiny_recipe: Any, tiny_store_path: Path, tmp_path: Path, head: str
) -> None:
    recipe = replace(
        tiny_recipe,
        phases=("pretrain", "adapt"),
        train=replace(tiny_recipe.train, rounds=3),
        teacher=replace(tiny_recipe.teacher, policy="local"),
        adapt=replace(tiny_recipe.adapt, head=head),
        federation=replace(tiny_recipe.federation, min_sites=1),
    )
    outcome = run_of(recipe, make_exchange(recipe, ["all"]), tmp_path / "run").run()
    store = Store.open(tiny_store_path)
    assert outcome.findings == ("Bar", "Blob")

    torch.set_num_threads(recipe.threads)
    ids = View(store, store.ids, "all").split(Membership.of(recipe), "train")
    plain = centralized(recipe, store, ids, outcome.findings, tmp_path / "plain")

    assert set(outcome.tensors) == set(plain)
    for name, tensor in plain.items():
        assert outcome.tensors[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert outcome.model_sha256 == checkpoint.digest(plain)
