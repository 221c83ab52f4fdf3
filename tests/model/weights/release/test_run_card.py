"""The model card: what it tells, and that its snippet runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from chexfound.model import checkpoint, vit
from chexfound.model.glori import build_head
from chexfound.model.weights.release import run_model
from chexfound.model.weights.release.run_card import card
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS

ROW = {"arm": "federated", "tested_on": "A", "finding": "Mass", "n": 9, "positives": 3, "reason": None}
METRICS = {
    "sites": ["A", "B"],
    "findings": ["Effusion", "Mass"],
    "seconds": {"federated": 3.5},
    "model_sha256": {"federated": "ab12"},
    "results": [
        ROW | {"auroc": 0.75, "auroc_ci": [0.5, 0.9]},
        ROW | {"finding": "Effusion", "auroc": None, "auroc_ci": None, "reason": "one class only"},
        ROW | {"arm": "random", "auroc": 0.123, "auroc_ci": None},
    ],
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))
    recipe = recipes.load("demo", {"adapt.glori_dim": 8, "adapt.glori_heads": 2})
    backbone = vit.build(recipe.student, recipe.input, recipe.crops.global_crops_size)
    tensors = checkpoint.add_prefix(backbone.state_dict(), "backbone.")
    tensors |= checkpoint.add_prefix(build_head(recipe, 2).state_dict(), "head.")
    run_model.save(tmp_path, recipe, METRICS["findings"], tensors, card(recipe, "federated", tensors, METRICS, 17))
    return tmp_path


def test_it_tells_the_arm_s_figures_and_no_other_s(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "A, B (17 patients)" in text
    assert "| A | Mass | 9 | 3 | 0.750 [0.500, 0.900] |" in text
    assert "| A | Effusion | 9 | 3 | – (one class only) |" in text
    assert "0.123" not in text
    assert "`ab12`" in text
    assert not re.search(r"[{}]|None", text)


def test_its_snippet_runs(folder: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(snippet.replace("this folder", str(folder)), names)  # noqa: S102
    assert names["probabilities"].shape == (1, 2)  # type: ignore[attr-defined]
    assert names["findings"] == ("Effusion", "Mass")
