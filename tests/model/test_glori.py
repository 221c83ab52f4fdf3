from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chexfound.adapt.fit import masked_bce
from chexfound.model.glori import GLoRI

TOLERANCE = 1e-5

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def io(reference: Path) -> dict[str, Tensor]:
    with np.load(reference / "glori_io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def head(reference: Path) -> GLoRI:
    """The paper's head: nothing but queries and patch tokens."""
    head = GLoRI(5, 64, 4, embed_dim=128, heads=8, ffn_dim=2048, dropout=0.1)
    weights = torch.load(reference / "glori_v1.pth", weights_only=True)["model"]
    tensors = {name.split(".decoder.", 1)[1]: tensor for name, tensor in weights.items()}
    tensors["duplicate_pooling"] = tensors["duplicate_pooling"].squeeze(-1)  # theirs is (F, channels, 1)
    head.load_state_dict(tensors, strict=True)
    return head.eval()


def inputs(io: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [io[f"rnd_patch{i}"] for i in range(4)], [io[f"rnd_cls{i}"] for i in range(4)]


def off(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return (result.detach() - expected).abs().max().item()


def test_logits_and_attention(head, io):
    logits, attention = head(*inputs(io), return_attention=True)
    assert off(logits, io["rnd_logits_catcls0"]) < TOLERANCE
    assert off(attention, io["rnd_attn_catcls0"]) < TOLERANCE
    assert off(head(*inputs(io)), io["rnd_logits_catcls0"]) < TOLERANCE
    assert (attention.sum(-1) - 1).abs().max() < 1e-5


def test_masked_bce_and_gradients(head, io):
    assert (io["labels"] < 0).any()
    logits, labels = head(*inputs(io)), io["labels"]
    known = (labels >= 0).sum(1)  # the reference adds up all labels; ours is a mean over an image's
    loss = sum(masked_bce(logits[i : i + 1], labels[i : i + 1]) * known[i] for i in range(len(labels)))
    loss.backward()
    assert off(loss, io["bce_sum_catcls0"]) < 1e-4
    parameters = dict(head.named_parameters())
    gradients = [name for name in io if name.startswith("grad_")]
    assert len(gradients) == 5
    for name in gradients:
        expected = io[name].squeeze(-1) if name.endswith("duplicate_pooling") else io[name]
        gradient = parameters[name.split("decoder.", 1)[1]].grad
        assert gradient is not None
        # Absolute as stated; a sum of gradients of size 10 has no more digits than that in float32.
        assert off(gradient, expected) < TOLERANCE * max(1.0, expected.abs().max().item()), name


def test_the_paper_s_head_has_its_number_of_parameters():
    with torch.device("meta"):
        head = GLoRI(40, 1024, 4)
        with_cls = GLoRI(40, 1024, 4, cls=True)
    # Theirs counts the frozen queries, as does this sum.
    assert sum(parameter.numel() for parameter in head.parameters()) == 8_723_496
    assert sum(parameter.numel() for parameter in with_cls.parameters()) == 8_887_336


def build(**values: object) -> GLoRI:
    torch.manual_seed(0)
    return GLoRI(3, 8, 2, embed_dim=16, heads=4, ffn_dim=12, **values).eval()  # type: ignore[arg-type]


def tokens(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(5, 9, 8, generator=generator) for _ in range(2)],
        [torch.randn(5, 8, generator=generator) for _ in range(2)],
    )


def test_queries_are_frozen_and_travel():
    head = build()
    assert not head.query_embed.weight.requires_grad
    assert "query_embed.weight" in head.state_dict()
    assert set(head.row_parameters) <= set(head.state_dict())
    assert all(head.state_dict()[name].shape[0] == 3 for name in head.row_parameters)


def test_without_positions_the_order_of_patches_does_not_matter():
    patches, cls = tokens()
    turned = [tensor.flip(1) for tensor in patches]
    plain = build(stats=True)
    assert torch.allclose(plain(patches, cls), plain(turned, cls), atol=1e-5)
    placed = build(positions=9)
    with torch.no_grad():
        placed.position_embed.normal_()  # type: ignore[union-attr]
    assert not torch.allclose(placed(patches, cls), placed(turned, cls), atol=1e-3)


def test_a_finding_s_logit_hangs_on_its_own_rows_only():
    """So that rows may be averaged by finding."""
    head, (patches, cls) = build(cls=True, stats=True), tokens()
    before = head(patches, cls)
    with torch.no_grad():
        for name in head.row_parameters:
            head.get_parameter(name)[1] += 1.0
    after = head(patches, cls)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1], atol=1e-3)


@pytest.mark.parametrize("grid", [0, 1])
def test_global_tokens_and_statistics_are_concatenated(grid):
    """The product in two parts equals the product with what the paper concatenates."""
    head, (patches, cls) = build(cls=True, stats=True, grid=grid), tokens()
    joined = torch.cat(patches, -1)
    memory = torch.relu(head.embed_standart(joined))
    x, _ = head.layers[0](head.query_embed.weight.expand(5, -1, -1), memory, False)
    cells = [joined.mean(1)] * grid
    pooled = torch.cat([*cls, joined.mean(1), joined.std(1, correction=0), joined.amax(1), *cells], -1)
    channels = torch.cat([x, pooled[:, None].expand(-1, 3, -1)], -1)
    expected = (channels * head.duplicate_pooling).sum(-1) + head.duplicate_pooling_bias
    assert torch.allclose(head(patches, cls), expected, atol=1e-5)


@pytest.mark.parametrize("cls", [False, True])
def test_all_that_is_learned_bears_on_the_logits(cls):
    """Nothing is trained, and averaged, that nothing hangs on."""
    head, (patches, tokens_cls) = build(cls=cls, stats=True, grid=1, positions=9, token_norm="learned"), tokens()
    names = {name for name, _ in head.named_parameters() if "_norm." in name}
    assert names == {f"{norm}.{key}" for norm in ("token_norm", "cls_norm")[: 1 + cls] for key in ("weight", "bias")}
    head(patches, tokens_cls).square().sum().backward()
    trained = [p for p in head.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("kind", ["none", "image", "learned"])
def test_a_head_holds_what_it_learned_and_its_queries(kind):
    """No buffer, so no running mean and no other sum over images."""
    head = build(cls=True, stats=True, token_norm=kind)
    learned = {name for name, p in head.named_parameters() if p.requires_grad}
    assert set(head.state_dict()) == learned | {"query_embed.weight"}


def test_an_image_s_own_standardisation_takes_a_channel_s_gain_away():
    """Of what the queries look at; of the statistics, which are as they come, not."""
    (patches, cls), scale = tokens(), torch.tensor([3.0] * 4 + [0.5] * 4)
    scaled = [tensor * scale for tensor in patches]
    assert torch.allclose(build(token_norm="image")(patches, cls), build(token_norm="image")(scaled, cls), atol=1e-3)
    assert not torch.allclose(build()(patches, cls), build()(scaled, cls), atol=1e-2)


def test_the_norms_have_eps_1e_5():
    assert {m.eps for m in build().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
