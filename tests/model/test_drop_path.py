from __future__ import annotations

import pytest
import torch

from chexfound.model.vit import Block, VisionTransformer, drop_path_rates
from chexfound.recipe.schema import Input, Student


def block(rate: float) -> Block:
    torch.manual_seed(0)
    return Block(8, 2, "swiglu", layerscale=1.0, drop_path=rate)


def test_at_evaluation_or_rate_0_it_is_the_plain_block():
    x = torch.randn(5, 3, 8)
    plain = block(0.0)
    half = x + plain.attn(plain.norm1(x))
    expected = half + plain.mlp(plain.norm2(half))
    assert torch.allclose(block(0.0)(x), expected, atol=1e-6)
    assert torch.equal(block(0.4).eval()(x), block(0.0)(x))


@pytest.mark.parametrize(("n", "rate", "kept"), [(10, 0.4, 6), (5, 0.4, 3), (7, 0.1, 6), (2, 0.9, 1), (1, 0.5, 1)])
def test_only_the_images_kept_get_the_residual_scaled_up(n, rate, kept, monkeypatch):
    one = block(rate)
    x = torch.randn(n, 3, 8)
    seen = []
    monkeypatch.setattr(one.attn, "forward", lambda y: seen.append(len(y)) or torch.ones_like(y))
    monkeypatch.setattr(one.mlp, "forward", lambda y: seen.append(len(y)) or torch.zeros_like(y))
    added = (one(x) - x)[:, 0, 0]
    assert seen == [kept, kept]  # the others are not computed: that is the speed-up
    assert torch.allclose(
        added.sort(descending=True).values, torch.tensor([n / kept] * kept + [0.0] * (n - kept)), atol=1e-6
    )


def test_the_mean_over_the_choices_is_the_residual_itself(monkeypatch):
    one = block(0.5)
    monkeypatch.setattr(one.attn, "forward", torch.ones_like)
    monkeypatch.setattr(one.mlp, "forward", torch.zeros_like)
    torch.manual_seed(1)
    x = torch.zeros(8, 1, 8)
    mean = sum(one(x)[:, 0, 0] for _ in range(2000)) / 2000
    assert (mean - 1).abs().max().item() < 5 * (1 / 2000) ** 0.5  # 5 σ: each draw is 0 or 2


def test_rates_are_uniform_or_rise():
    assert drop_path_rates(Student(drop_path_rate=0.4), 3) == [0.4] * 3
    assert drop_path_rates(Student(drop_path_rate=0.4, drop_path_uniform=False), 3) == [0.0, 0.2, 0.4]
    rising = VisionTransformer(Student(drop_path_rate=0.3, drop_path_uniform=False), Input(), grid=2)
    assert [b.drop_path_rate for b in rising.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_checkpointing_changes_memory_and_nothing_else(rate):
    torch.manual_seed(0)
    model = VisionTransformer(Student(drop_path_rate=rate), Input(), grid=2).train()
    images = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(7)
        model.forward_features(images)["x_norm_clstoken"].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_some_tokens_are_those_of_all(rate, masked):
    torch.manual_seed(0)
    model = VisionTransformer(Student(drop_path_rate=rate, layerscale=1.0), Input(), grid=2).train()
    images = torch.randint(0, 256, (5, 32, 32), dtype=torch.uint8)
    patches = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    masks = patches if masked else None
    results = []
    for some in (False, True):
        model.zero_grad()
        torch.manual_seed(3)  # the same images are dropped
        if some:
            tokens = model.tokens_at(images, model.token_rows(5, patches), masks)
        else:
            every = model.forward_features(images, masks)
            tokens = torch.cat([every["x_norm_clstoken"], every["x_norm_patchtokens"][patches]])
        (tokens.sigmoid() * torch.arange(tokens.numel()).view_as(tokens)).sum().backward()
        results.append((tokens.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (one, gradients), (other, others) = results
    assert one.shape == (5 + 7, 96)
    assert torch.allclose(one, other, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], rtol=1e-4, atol=1e-3 * gradient.abs().max().item()), name
