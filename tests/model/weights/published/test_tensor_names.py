"""Names of published checkpoints: sorted, turned into ours, and refused where they are of something else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.checkpoint import add_prefix
from chexfound.model.weights.published import tensor_names


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", [0, 1, 2, 4])
@pytest.mark.parametrize(("prefix", "ls"), [("backbone.", "gamma"), ("model.", "weight"), ("", "gamma")])
def test_a_backbone_comes_back_under_our_names(make_backbone, as_published, ffn, registers, chunks, prefix, ls):
    _, tensors = make_backbone(ffn=ffn, registers=registers)
    names = tensor_names.sort(add_prefix(as_published(tensors, chunks, ls), prefix))
    assert same(names.backbone, tensors)
    assert (names.projections, names.classifiers, names.left_out, names.whose) == ({}, {}, {}, None)


def test_the_index_counts_and_not_the_chunk(make_backbone, as_published):
    """Two chunks of two: block 3 stands in chunk 1."""
    _, tensors = make_backbone()
    given = as_published(tensors, chunks=2)
    assert "blocks.1.3.norm1.weight" in given
    assert torch.equal(tensor_names.sort(given).backbone["blocks.3.norm1.weight"], tensors["blocks.3.norm1.weight"])


def test_dinov2_s_names_are_the_inverse(make_backbone, as_published):
    for values in ({}, {"ffn": "mlp"}, {"registers": 0}, {"layerscale": False}):
        config, tensors = make_backbone(**values)
        given = tensor_names.dinov2_names(tensors, config.ffn == "swiglu")
        assert same(given, as_published(tensors))
        assert same(tensor_names.backbone_names(given), tensors)


@pytest.fixture
def model_checkpoint(make_backbone, make_projection, as_published) -> dict[str, Tensor]:
    """Student, teacher, and the centres of the losses, as model_checkpoint.pth has them."""
    backbone = as_published(make_backbone()[1], chunks=4)
    head = make_projection()[1]
    result: dict[str, Tensor] = {"dino_loss.center": torch.zeros(1, 20), "ibot_patch_loss.center": torch.zeros(1, 20)}
    for number, whose in enumerate(("student", "teacher")):
        parts = add_prefix(backbone, "backbone.") | add_prefix(head, "dino_head.") | add_prefix(head, "ibot_head.")
        result |= {f"{whose}.{name}": tensor + number for name, tensor in parts.items()}
    return result


@pytest.mark.parametrize(("which", "added"), [("student", 0), ("teacher", 1)])
def test_of_student_and_teacher_one_is_taken_and_the_rest_is_named(model_checkpoint, make_backbone, which, added):
    names = tensor_names.sort(model_checkpoint, which)
    expected = make_backbone()[1]
    assert torch.equal(names.backbone["cls_token"], expected["cls_token"] + added)
    assert set(names.projections) == {"dino_head", "ibot_head"}
    assert names.whose == which
    other = "teacher" if which == "student" else "student"
    assert set(names.left_out) == {other, "dino_loss", "ibot_patch_loss"}
    assert names.left_out[other] == f"{64 + 2 * 8} tensors; take it with --which {other}"


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_wrappers_are_taken_off(make_backbone, as_published, wrapper):
    _, tensors = make_backbone()
    given = add_prefix(add_prefix(as_published(tensors), "backbone."), wrapper)
    assert same(tensor_names.sort(given).backbone, tensors)
    assert same(tensor_names.sort(add_prefix(given, "teacher.")).backbone, tensors)


def test_a_head_of_one_layer_has_a_number_with_us():
    given = {"mlp.weight": torch.ones(2, 3), "mlp.bias": torch.ones(2), "last_layer.weight_v": torch.ones(4, 2)}
    names = tensor_names.sort(add_prefix(given, "teacher.dino_head."))
    assert set(names.projections["dino_head"]) == {"mlp.0.weight", "mlp.0.bias", "last_layer.weight_v"}


def test_classifiers_are_told_apart_by_name():
    given = {
        "classifiers_dict.linear:blocks=4:lr=0_1.linear.weight": torch.ones(1),
        "classifiers_dict.linear:blocks=4:lr=0_2.linear.weight": torch.zeros(1),
        "classifiers_dict.glori.decoder.query_embed.weight": torch.zeros(1),
    }
    names = tensor_names.sort(given)
    assert {name: set(tensors) for name, tensors in names.classifiers.items()} == {
        "linear:blocks=4:lr=0_1": {"linear.weight"},
        "linear:blocks=4:lr=0_2": {"linear.weight"},
        "glori": {"query_embed.weight"},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["conv1.weight", "fc.bias"], r"another architecture: 2 of 2 tensors .* such as conv1\.weight, fc\.bias"),
        (["embeddings.cls_token", "encoder.layer.0.norm1.weight"], "another architecture: 2 of 2"),
        (["backbone.cls_token", "classifier.weight"], "another architecture: 1 of 2 .* such as classifier.weight"),
        (["cls_token", "reg_token", "pos_embed"], "without a mask token: timm's"),
        (["teacher.backbone._flat_param"], "one GPU's shard of a training state"),
        ([], "holds no tensor of a model"),
        (["optimizer.a"], "holds no tensor of a model"),
    ],
)
def test_what_is_another_architecture_is_refused(given, message):
    with pytest.raises(CheckpointError, match=message):
        tensor_names.sort({name: torch.zeros(1) for name in given})


@pytest.mark.parametrize(
    ("given", "which", "message"),
    [
        (["teacher.backbone.cls_token"], "student", "holds no student, only a teacher: take it with --which teacher"),
        (["student.backbone.cls_token"], "teacher", "holds no teacher, only a student: take it with --which student"),
        (["backbone.cls_token"], "student", "does not say whose its weights are"),
    ],
)
def test_which_is_asked_for_must_be_there(given, which, message):
    with pytest.raises(ConfigError, match=message):
        tensor_names.sort({name: torch.zeros(1) for name in given}, which)


def test_a_lacking_block_and_a_name_twice(make_backbone, as_published):
    given = as_published(make_backbone()[1], chunks=2)
    with pytest.raises(CheckpointError, match=r"block 2 is lacking \(there are 3\)"):
        tensor_names.sort({name: tensor for name, tensor in given.items() if ".2." not in name})
    with pytest.raises(CheckpointError, match=r"two tensors are called blocks\.3\.norm1\.weight"):
        tensor_names.sort({**given, "blocks.0.3.norm1.weight": torch.zeros(1)})


def test_what_a_run_of_ours_wrote_is_known(make_backbone, as_published):
    swiglu, mlp = make_backbone()[1], make_backbone(ffn="mlp")[1]
    conv = make_backbone(stem="conv", patch_size=16, dim=48)[1]
    assert tensor_names.sort(swiglu).ours
    assert tensor_names.sort(conv).ours
    assert not tensor_names.sort(mlp).ours  # DINOv2 has the same names there
    assert not tensor_names.sort(as_published(swiglu)).ours
    assert tensor_names.sort(as_published(swiglu) | {"optimizer.cls_token.exp_avg": torch.zeros(1)}).ours
