"""The reference's heads as ours, against what its formulas give in float64, written out here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.weights.architecture import filled
from chexfound.model.weights.published import classifiers

F, D, N, E, H, FFN, B, P = 3, 5, 2, 8, 2, 12, 4, 6  # findings, width, blocks, GLoRI's width, heads, FFN, batch, patches


def tokens() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return (
        [torch.randn(B, P, D, generator=generator) for _ in range(N)],
        [torch.randn(B, D, generator=generator) for _ in range(N)],
    )


def glori(cls: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_standart.weight": (E, N * D),
        "embed_standart.bias": (E,),
        "query_embed.weight": (F, E),
        "duplicate_pooling": (F, E + cls * N * D, 1),
        "duplicate_pooling_bias": (F,),
        "layers.0.multihead_attn.in_proj_weight": (3 * E, E),
        "layers.0.multihead_attn.in_proj_bias": (3 * E,),
        "layers.0.multihead_attn.out_proj.weight": (E, E),
        "layers.0.multihead_attn.out_proj.bias": (E,),
        "layers.0.linear1.weight": (FFN, E),
        "layers.0.linear1.bias": (FFN,),
        "layers.0.linear2.weight": (E, FFN),
        "layers.0.linear2.bias": (E,),
    }
    shapes |= {f"layers.0.norm{n}.{kind}": (E,) for n in (1, 2, 3) for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def norm(x: Tensor, w: dict[str, Tensor], number: int) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return x * w[f"layers.0.norm{number}.weight"] + w[f"layers.0.norm{number}.bias"]


def by_hand(w: dict[str, Tensor], patches: list[Tensor], cls: list[Tensor], with_cls: bool) -> tuple[Tensor, Tensor]:
    """GLoRI v1 as the paper's code computes it (DESIGN: doubled target, post-norm, CLS tokens before the query's)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    memory = torch.cat(patches, -1).double() @ w["embed_standart.weight"].T + w["embed_standart.bias"]
    memory = memory.clamp_min(0)
    target = norm(2 * w["query_embed.weight"], w, 1)  # (F, E)
    wq, wk, wv = w["layers.0.multihead_attn.in_proj_weight"].chunk(3)
    bq, bk, bv = w["layers.0.multihead_attn.in_proj_bias"].chunk(3)
    q = (target @ wq.T + bq).reshape(F, H, E // H)
    k, v = ((memory @ weight.T + bias).reshape(B, P, H, E // H) for weight, bias in ((wk, bk), (wv, bv)))
    attention = (torch.einsum("fhe,bphe->bhfp", q, k) / math.sqrt(E // H)).softmax(-1)
    x = torch.einsum("bhfp,bphe->bfhe", attention, v).reshape(B, F, E)
    x = x @ w["layers.0.multihead_attn.out_proj.weight"].T + w["layers.0.multihead_attn.out_proj.bias"]
    x = norm(target + x, w, 2)
    inner = (x @ w["layers.0.linear1.weight"].T + w["layers.0.linear1.bias"]).clamp_min(0)
    x = norm(x + inner @ w["layers.0.linear2.weight"].T + w["layers.0.linear2.bias"], w, 3)
    if with_cls:
        x = torch.cat([torch.cat(cls, -1).double()[:, None].expand(-1, F, -1), x], -1)
    return (x * w["duplicate_pooling"].squeeze(-1)).sum(-1) + w["duplicate_pooling_bias"], attention


@pytest.mark.parametrize("with_cls", [False, True])
def test_glori_gives_what_its_formula_gives(with_cls):
    """With the CLS tokens, whose columns the reference has first and we have last."""
    weights = glori(with_cls)
    config, tensors = classifiers.read("linear:blocks=2:avgpool=False:lr=0_1", weights, heads=H)
    assert (config.kind, config.n_findings, config.dim, config.n_blocks) == ("glori", F, D, N)
    assert (config.embed_dim, config.ffn_dim, config.cls) == (E, FFN, with_cls)
    patches, cls = tokens()
    head = filled(config.build, tensors, "head")
    logits, attention = head(patches, cls, return_attention=True)
    expected, expected_attention = by_hand(weights, patches, cls, with_cls)
    assert (logits - expected).abs().max() < 2e-5
    assert (attention - expected_attention).abs().max() < 2e-6


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("name", ["linear:blocks=2:avgpool={}:lr=0_1", "classifier_2_blocks_avgpool_{}_lr_0_00100"])
def test_a_linear_head_gives_what_its_formula_gives(avgpool, name):
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(F, D * (N + avgpool), generator=generator), torch.randn(F, generator=generator)
    config, tensors = classifiers.read(name.format(avgpool), {"linear.weight": weight, "linear.bias": bias})
    assert (config.kind, config.n_findings, config.dim, config.n_blocks) == ("linear", F, D, N)
    patches, cls = tokens()
    features = torch.cat([*cls, *([patches[-1].mean(1)] if avgpool else [])], -1).double()
    head = filled(config.build, tensors, "head")
    assert (head(patches, cls) - (features @ weight.double().T + bias.double())).abs().max() < 2e-5
    joined = head([torch.cat(patches, -1)], [torch.cat(cls, -1)])  # as the adapting phase passes them
    assert torch.equal(joined, head(patches, cls))
    with pytest.raises(ConfigError, match="a linear head has no attention"):
        head(patches, cls, return_attention=True)


def test_options_overrule_the_name_and_the_paper_s_values_stand_where_neither_says():
    weights = {"linear.weight": torch.zeros(1, 12), "linear.bias": torch.zeros(1)}
    assert classifiers.read("unnamed", weights)[0].n_blocks == 4
    assert classifiers.read("unnamed", weights)[0].dim == 3
    assert classifiers.read("x:blocks=3", weights)[0].dim == 4
    assert classifiers.read("x:blocks=3", weights, n_last_blocks=1)[0].dim == 12
    assert classifiers.read("x:blocks=3:avgpool=False", weights, avgpool=True)[0].dim == 3
    wide = {"linear.weight": torch.zeros(1, 13), "linear.bias": torch.zeros(1)}
    with pytest.raises(ConfigError, match="takes 13 channels, which are not 4 equal parts: .* --n-last-blocks"):
        classifiers.read("unnamed", wide)


def test_the_paper_s_attention_heads():
    config, _ = classifiers.read("blocks=2", glori(False))
    assert config.heads == 8
    with pytest.raises(ConfigError, match="--glori-heads 3: must divide the head's width 8"):
        classifiers.read("blocks=2", glori(False), heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duplicate_pooling": torch.zeros(F, E + 1, 1)}, "takes 9 channels: neither the queries' 8"),
        ({"embed_standart.weight": None}, "there is no embed_standart.weight"),
        ({"layers.0.linear1.weight": None}, "there is no layers.0.linear1.weight"),
        ({"layers.0.linear1.weight": torch.zeros(())}, r"linear1.weight has the shape \(\)"),
        ({"duplicate_pooling": torch.zeros(F, E, 2)}, r"duplicate_pooling has the shape"),
        ({"duplicate_pooling": None}, "neither GLoRI nor linear"),
    ],
)
def test_what_is_no_such_head(change, message):
    weights = {name: tensor for name, tensor in {**glori(False), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        classifiers.read("blocks=2", weights, heads=H)


def test_another_layer_is_not_dropped():
    weights = glori(False) | {"layers.1.norm1.weight": torch.zeros(E)}
    config, tensors = classifiers.read("blocks=2", weights, heads=H)
    with pytest.raises(CheckpointError, match=r"1 unexpected \['layers\.1\.norm1\.weight'\]"):
        filled(config.build, tensors, "head")


def test_one_of_several_is_chosen_by_name():
    found = {"linear:lr=0_1": 1, "linear:lr=0_10": 2, "linear:lr=0_2": 3}
    assert classifiers.choose(found, "linear:lr=0_1") == "linear:lr=0_1"  # though it is in another's name too
    assert classifiers.choose(found, "0_2") == "linear:lr=0_2"
    assert classifiers.choose({"only": 1}, None) == "only"
    with pytest.raises(ConfigError, match=r"3 heads are in it.*--classifier(.|\n)*linear:lr=0_1\n  linear:lr=0_10\n"):
        classifiers.choose(found, None)
    with pytest.raises(ConfigError, match=r"--classifier '0_1': 2 of the heads"):
        classifiers.choose(found, "0_1")
    with pytest.raises(ConfigError, match=r"--classifier 'sgd': none of the heads(.|\n)*linear:lr=0_2"):
        classifiers.choose(found, "sgd")
