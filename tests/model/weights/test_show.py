"""`weights show`: what files and folders hold, known and unknown."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from chexfound.errors import CheckpointError
from chexfound.model.checkpoint import add_prefix
from chexfound.model.weights.in_parts import ImportOptions, of_file
from chexfound.model.weights.release import folder as folders
from chexfound.model.weights.show import look, text


@pytest.fixture
def path(make_backbone, make_projection, as_published, tmp_path):
    teacher = add_prefix(as_published(make_backbone()[1], 2), "backbone.") | add_prefix(
        make_projection()[1], "dino_head."
    )
    torch.save({"teacher": teacher, "iteration": 12}, tmp_path / "teacher_checkpoint.pth")
    return tmp_path / "teacher_checkpoint.pth"


def test_a_checkpoint(path):
    seen = look(path, ImportOptions(heads=4))
    values = json.loads(json.dumps(seen.values))
    assert values["kind"] == "a published checkpoint"
    assert values["says"] == {"iteration": 12}
    assert set(values["parts"]) == {"backbone", "dino_head"}
    assert {name: values["parts"]["backbone"][name] for name in ("dim", "depth", "heads", "tensors")} == {
        **dict(dim=64, depth=4, heads=4, tensors=64)
    }
    assert [group["name"] for group in values["groups"]] == [
        "teacher.backbone",
        "teacher.backbone.patch_embed.proj",
        "teacher.backbone.blocks",
        "teacher.backbone.norm",
        "teacher.dino_head",
    ]
    assert sum(group["tensors"] for group in values["groups"]) == 64 + 8
    lines = "\n".join(text(seen))
    for words in (
        "iteration: 12",
        "width 64, depth 4, heads 4",
        "64-12-12-6, 20 prototypes",
        "0 missing, 0 unexpected",
    ):
        assert words in lines


def test_a_folder_and_a_file_of_it_that_was_changed(path, tmp_path):
    (tmp_path / "folder").mkdir()
    weights = of_file(path, ImportOptions())
    folders.write_parts(tmp_path / "folder", weights)
    folders.write_config(tmp_path / "folder", weights, "imported")
    seen = look(tmp_path / "folder", ImportOptions())
    assert seen.values["kind"] == "an imported folder"
    assert set(seen.values["files"]) == {"backbone_compatible.safetensors", "dino_head.safetensors"}
    assert "each has the SHA-256 that config.json states" in "\n".join(text(seen))
    save_file({"a": torch.zeros(1)}, tmp_path / "folder" / "dino_head.safetensors")
    with pytest.raises(CheckpointError, match="is not the file that config.json was written for"):
        look(tmp_path / "folder", ImportOptions())


def test_a_file_outside_the_folder_is_not_looked_at(path, tmp_path):
    (tmp_path / "folder").mkdir()
    weights = of_file(path, ImportOptions())
    folders.write_parts(tmp_path / "folder", weights)
    folders.write_config(tmp_path / "folder", weights, "imported")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["chexfound"]["files"]["../teacher_checkpoint.pth"] = "0" * 64
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"states no SHA-256 of '\.\./teacher"):
        look(tmp_path / "folder", ImportOptions())


def test_tensors_of_something_else_are_told_by_their_names(tmp_path):
    save_file({"layer1.0.conv.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(4)}, tmp_path / "resnet.safetensors")
    seen = look(tmp_path / "resnet.safetensors", ImportOptions())
    assert seen.values["kind"] == "tensors, not a checkpoint that can be taken in"
    assert seen.found is None
    assert "another architecture" in seen.values["why"]
    lines = "\n".join(text(seen))
    assert "layer1.conv" in lines
    assert "2×3" in lines


def test_a_run(make_run):
    out = make_run()
    seen = look(out, ImportOptions())
    assert seen.values["kind"] == "a run's model"
    stated = json.loads((out / "metrics.json").read_text())["model_sha256"]["federated"]
    assert f"  SHA-256   {stated}, over the weights" in text(seen)
    assert f"weights {stated[:16]}…" in "\n".join(text(look(out / "model", ImportOptions())))
    assert seen.values["findings"] == ["Effusion", "Mass"]
    assert "teacher" in "\n".join(text(seen))
