from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm.layers.mlp
import torch
from torch import Tensor, nn

from chexfound.model import vit
from chexfound.model.vit import VisionTransformer
from chexfound.recipe.schema import ARCHS, Input, Student

TOLERANCE = 3e-5
TAGS = ["64", "rect"]

torch.set_num_threads(1)


def ours(name: str) -> str:
    """backbone.blocks.CHUNK.INDEX.… as we name it: the index counts, not the chunk."""
    name = name.removeprefix("backbone.")
    if name.startswith("blocks."):
        _, _chunk, index, rest = name.split(".", 3)
        name = f"blocks.{index}.{rest}"
    return name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")


@pytest.fixture(scope="module")
def model(reference: Path) -> VisionTransformer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_demo", (64, 4, 4))
        model = VisionTransformer(Student(stem="linear", in_chans=3, layerscale=1e-5), Input(), grid=4)
    weights = safetensors.torch.load_file(reference / "vit_tiny.safetensors")
    model.load_state_dict({ours(name): tensor for name, tensor in weights.items()}, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def io(reference: Path) -> dict[str, Tensor]:
    with np.load(reference / "vit_tiny_io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def off(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return (result.detach() - expected).abs().max().item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tag", TAGS)
def test_features(model, io, tag, masked):
    result = model.forward_features(io[f"x_{tag}"], io[f"mask_{tag}"] if masked else None)
    assert set(result) == {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"}
    for name, tensor in result.items():
        assert off(tensor, io[f"{name}_{tag}{'_masked' if masked else ''}"]) < TOLERANCE, name


@pytest.mark.parametrize(("tag", "norm"), [("64", True), ("64", False), ("rect", True)])
def test_intermediate_layers(model, io, tag, norm):
    layers = model.get_intermediate_layers(io[f"x_{tag}"], 4, return_class_token=True, norm=norm)
    for number, (patches, cls) in enumerate(layers):
        end = f"{tag}{'' if norm else '_nonorm'}"
        assert off(patches, io[f"inter{number}_patch_{end}"]) < TOLERANCE
        assert off(cls, io[f"inter{number}_cls_{end}"]) < TOLERANCE
    last_two = model.get_intermediate_layers(io[f"x_{tag}"], 2, norm=norm)
    assert all(torch.equal(a, b) for a, (b, _) in zip(last_two, layers[2:], strict=True))
    chosen = model.get_intermediate_layers(io[f"x_{tag}"], [0, 3], norm=norm)
    assert all(torch.equal(a, layers[number][0]) for a, number in zip(chosen, (0, 3), strict=True))


def test_patches_stand_row_by_row(model, io):
    (last,) = model.get_intermediate_layers(io["x_rect"], 1)
    as_map = last.transpose(1, 2).reshape(2, 64, 3, 6)
    assert off(as_map, io["inter_reshape_last_rect"]) < TOLERANCE


@pytest.mark.parametrize(("tag", "grid"), [("64", (4, 4)), ("rect", (3, 6))])
def test_positions_are_resized_by_the_scale_factor(model, io, tag, grid):
    assert off(model.positions(*grid), io[f"pos_embed_used_{tag}"]) < 1e-6


def test_positions_by_size_would_be_another_thing(model, io):
    patch = model.pos_embed[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    by_size = nn.functional.interpolate(patch, size=(3, 6), mode="bicubic").flatten(2).transpose(1, 2)
    assert off(by_size, io["pos_embed_used_rect"][:, 1:]) > 0.1


def test_vit_large_has_the_names_and_shapes_of_the_paper(reference):
    lines = (reference / "vitl_keys.txt").read_text().splitlines()
    expected = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    with torch.device("meta"):
        model = VisionTransformer(Student(arch="vit_large", stem="linear", in_chans=3, layerscale=1e-5), Input(), 32)
    state = {name: "x".join(map(str, tensor.shape)) for name, tensor in model.state_dict().items()}
    assert state == {ours(name): shape for name, shape in expected.items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 304_630_016


# --- without the reference


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ARCHS, "vit_demo", (24, 2, 2))

    def build(**values: object) -> VisionTransformer:
        torch.manual_seed(0)
        return vit.build(Student(**values), Input(), 32).eval()

    return build


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_shapes(small, stem, ffn, registers):
    model = small(stem=stem, ffn_layer=ffn, num_register_tokens=registers, layerscale=0.0)
    result = model.forward_features(IMAGES)
    assert result["x_norm_clstoken"].shape == (3, 24)
    assert result["x_norm_regtokens"].shape == (3, registers, 24)
    assert result["x_norm_patchtokens"].shape == (3, 4, 24)
    assert result["x_prenorm"].shape == (3, 5 + registers, 24)
    wide = model.forward_features(torch.zeros(1, 48, 80, dtype=torch.uint8))
    assert wide["x_norm_patchtokens"].shape == (1, 15, 24)
    assert torch.isfinite(wide["x_prenorm"]).all()  # a flat image too


def test_z_score_forgets_brightness_and_contrast(small):
    model = small()
    dim = (IMAGES.float() * 0.4 + 30).round().to(torch.uint8)
    x, y = model.normalize(IMAGES), model.normalize(dim)
    assert x.shape == (3, 1, 32, 32)
    assert x.mean((1, 2, 3)).abs().max() < 1e-5
    assert (x.std((1, 2, 3), correction=0) - 1).abs().max() < 0.03  # one grey level is added to the deviation
    assert (x - y).abs().max() < 0.1


def test_mean_and_std_by_hand():
    normalize = vit.Normalize(Input(normalization="mean_std", mean=0.5, std=0.25), 3)
    result = normalize(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert result.shape == (1, 3, 1, 2)
    assert torch.equal(result, torch.tensor([-2.0, 2.0]).expand(1, 3, 1, 2))


def test_a_masked_patch_tells_nothing_of_its_pixels(small):
    model = small(stem="linear")
    mask = torch.tensor([[False, True, False, False]]).expand(3, -1)
    model.normalize = nn.Identity()
    images = IMAGES[:, None].float()
    other = images.clone()
    other[..., :16, 16:] += 50
    assert torch.equal(
        model.forward_features(images, mask)["x_prenorm"], model.forward_features(other, mask)["x_prenorm"]
    )
    assert not torch.equal(model.forward_features(images)["x_prenorm"], model.forward_features(other)["x_prenorm"])


def test_every_parameter_is_initialised_and_gets_a_gradient(small):
    model = small().train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    masks = torch.tensor([[False, True, False, False]]).expand(3, -1)
    model.forward_features(IMAGES, masks)["x_norm_patchtokens"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("own", "theirs"),
    [(vit.Mlp(96, 384), timm.layers.mlp.Mlp(96, 384)), (vit.SwiGLU(96, 256), timm.layers.mlp.SwiGLUPacked(96, 512))],
    ids=["mlp", "swiglu"],
)
def test_the_feed_forward_layers_are_timms_to_the_bit(own: nn.Module, theirs: nn.Module) -> None:
    own.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0))
    results = [module(x) for module in (own, theirs)]
    assert torch.equal(*results)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(results, (own, theirs), strict=True)
    ]
    assert all(map(torch.equal, *gradients))


def test_the_final_norm_has_eps_1e_6(small):
    assert {module.eps for module in small().modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
