"""Architectures read off shapes, and modules filled with tensors, all or none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.glori import build_head
from chexfound.model.vit import build
from chexfound.model.weights.architecture import (
    Backbone,
    Glori,
    Linear,
    Projection,
    attention_heads,
    check,
    filled,
    head_of_recipe,
    section,
)
from chexfound.model.weights.published import tensor_names
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Input


@settings(max_examples=40)
@given(
    heads=st.integers(1, 4),
    per_head=st.integers(1, 5),
    depth=st.integers(1, 3),
    patch_size=st.integers(1, 6),
    in_chans=st.sampled_from([1, 3]),
    registers=st.integers(0, 5),
    ffn=st.sampled_from(["mlp", "swiglu"]),
    layerscale=st.booleans(),
    grid=st.integers(1, 5),
)
def test_all_but_the_heads_is_read_off_the_shapes(heads, per_head, **values):
    config = Backbone(dim=12 * heads * per_head, heads=heads, **values)
    with torch.device("meta"):
        tensors = config.build(Input()).state_dict()
    assert Backbone.of_shapes(tensors, heads) == config


def test_the_conv_stem_is_read_off_too(make_backbone):
    config, tensors = make_backbone(stem="conv", patch_size=16, in_chans=1, dim=48)
    assert Backbone.of_shapes(tensors, 4) == config


def test_widths_that_a_layer_cannot_have():
    config = Backbone(
        dim=64,
        depth=1,
        heads=4,
        patch_size=16,
        in_chans=1,
        registers=0,
        ffn="mlp",
        layerscale=False,
        grid=2,
        stem="conv",
    )
    with pytest.raises(CheckpointError, match="backbone: no such module can be built: num_channels"):
        check(lambda: config.build(Input()), {}, "backbone")
    for kind, values in ((Glori, dict(n_findings=1, dim=8, n_blocks=1, embed_dim=12, heads=5)),):
        with pytest.raises(CheckpointError, match="here: 5 attention heads do not divide the width 12"):
            section(kind, values, "here")


def test_the_paper_s_backbone_is_recognised(reference):
    tensors = {}
    for line in (reference / "vitl_keys.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, shape = line.rsplit(" ", 1)
            tensors[name.removeprefix("backbone.")] = torch.empty([int(n) for n in shape.split("x")], device="meta")
    config = Backbone.of_shapes(tensor_names.backbone_names(tensors))
    assert config.arch == "vit_large"
    assert (config.dim, config.depth, config.heads, config.ffn_dim) == (1024, 24, 16, 2736)
    assert (config.patch_size, config.registers, config.position_px, config.layerscale) == (16, 4, 512, True)
    with torch.device("meta"):
        module = config.build(Input())
    assert {name: t.shape for name, t in module.state_dict().items()} == {
        name: t.shape for name, t in tensor_names.backbone_names(tensors).items()
    }


@pytest.mark.parametrize(("dim", "depth", "heads"), ARCHS.values())
def test_the_named_architectures_have_their_heads(dim, depth, heads):
    assert attention_heads(dim, depth, None) == heads


def test_heads_that_no_shape_tells():
    assert attention_heads(64, 4, None) == 1
    assert attention_heads(256, 5, None) == 4
    assert attention_heads(64, 4, 4) == 4
    with pytest.raises(ConfigError, match="width 80 is no multiple of 64.* --heads N"):
        attention_heads(80, 4, None)
    for heads in (0, -1, 5):
        with pytest.raises(ConfigError, match=f"heads {heads}: must divide the width 64"):
            attention_heads(64, 4, heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 14, 64)}, "13 places beside the CLS token's: not a square grid"),
        ({"pos_embed": torch.zeros(1, 1, 64)}, "not a square grid"),
        ({"pos_embed": torch.zeros(17, 64)}, r"pos_embed has the shape \(17, 64\), not one of 3"),
        ({"cls_token": None}, "there is no cls_token"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(128, 64)}, "64 → 128 → 176 → 64: neither DINOv2's MLP"),
        ({"blocks.0.mlp.fc2.weight": None}, r"there is no blocks\.0\.mlp\.fc2\.weight"),
        ({"patch_embed.proj.weight": torch.zeros(64, 2, 8, 8)}, "in_chans: Input should be 1 or 3"),
    ],
)
def test_shapes_that_are_no_such_backbone_s(make_backbone, change, message):
    tensors = {name: tensor for name, tensor in {**make_backbone()[1], **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        Backbone.of_shapes(tensors, 4)


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_a_projection_head_is_read_off_its_shapes(make_projection, nlayers):
    config, tensors = make_projection(nlayers=nlayers)
    read = Projection.of_shapes(tensors)
    check(read.build, tensors, "head")
    assert read.widths == ([64] + [12] * (nlayers - 1) + [6])
    assert (read.n_prototypes, read.centered) == (20, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, r"0 missing \[\], 1 unexpected \['extra'\]"),
        ({"mask_token": None}, r"1 missing \['mask_token'\], 0 unexpected"),
        ({"norm.weight": torch.zeros(3)}, r"norm\.weight is torch\.float32 \(3,\), not torch\.float32 \(64,\)"),
        ({"norm.weight": torch.full((64,), torch.nan)}, "norm.weight holds a value that is not finite"),
    ],
)
def test_a_module_is_filled_all_or_none(make_backbone, change, message):
    config, good = make_backbone()
    tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
    for call in (check, filled):
        with pytest.raises(CheckpointError, match=f"backbone: weights do not fit: .*{message}"):
            call(lambda: config.build(Input()), tensors, "backbone")


def test_a_filled_module_holds_copies_and_evaluates(make_backbone):
    config, tensors = make_backbone()
    before = torch.random.get_rng_state()
    module = filled(lambda: config.build(Input()), tensors, "backbone")
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is drawn for weights that are overwritten
    assert not module.training
    assert all(torch.equal(value, tensors[name]) for name, value in module.state_dict().items())
    module.cls_token.data.add_(1)
    assert not torch.equal(module.cls_token.data, tensors["cls_token"])
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in module.parameters())


def test_a_config_that_lies_costs_no_memory():
    """65,536 wide it would take terabytes; it is refused by its shapes."""
    config = Glori(n_findings=100_000, dim=65_536, n_blocks=1000, embed_dim=65_536)
    with pytest.raises(CheckpointError, match="weights do not fit"):
        filled(config.build, {}, "head")


def test_values_from_a_file_are_checked():
    good = dict(n_findings=3, dim=8, n_blocks=2)
    assert section(Linear, good, "here") == Linear(**good)
    for values, message in (
        ({**good, "dim": 0}, "here: dim: Input should be greater than 0"),
        ({**good, "dim": 10**9}, "here: dim: Input should be less than or equal to"),
        ({**good, "dim": "wide"}, "here: dim: .* valid integer"),
        ({**good, "code": 1}, "here: code: Unexpected keyword argument"),
        ({"dim": 8}, "here: n_findings: "),
    ):
        with pytest.raises(CheckpointError, match=message):
            section(Linear, values, "here")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"adapt.head": "linear"},
        {"adapt.glori_cls": False, "adapt.glori_stats": False, "adapt.glori_grid": 0, "adapt.glori_positions": False},
        {"student.stem": "linear", "student.ffn_layer": "mlp", "student.layerscale": 0, "student.in_chans": 3},
    ],
)
def test_a_recipe_s_modules_are_those_that_its_run_builds(overrides):
    recipe = recipes.load("demo", overrides)
    config = Backbone.of_recipe(recipe, recipe.position_px // recipe.student.patch_size)
    with torch.device("meta"):
        built, ours = build(recipe.student, recipe.input, recipe.position_px), config.build(recipe.input)
        built_head, our_head = build_head(recipe, 3), head_of_recipe(recipe, 3).build()
    for one, other in ((built, ours), (built_head, our_head)):
        assert str(one) == str(other)
        assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
    assert {name: getattr(built_head, name, None) for name in ("use_cls", "use_stats", "stats", "grid")} == {
        name: getattr(our_head, name, None) for name in ("use_cls", "use_stats", "stats", "grid")
    }
