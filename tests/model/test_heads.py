from __future__ import annotations

import pytest
import torch

from chexfound.model.heads import DINOHead, LinearHead, Prototypes, grid_means, token_norms, token_statistics

torch.set_num_threads(1)


def test_prototypes_are_normalised():
    layer = Prototypes(4, 3)
    x = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    before = layer(x)
    assert before.abs().max() <= 1 + 1e-6  # cosines
    with torch.no_grad():
        layer.weight_v *= torch.tensor([[2.0], [30.0], [0.1]])
    assert torch.allclose(layer(x), before, atol=1e-6)
    with torch.no_grad():
        layer.weight_v.copy_(torch.tensor([[3.0, 4.0, 0.0, 0.0]]).expand(3, -1))
    assert torch.allclose(layer(torch.eye(4)), torch.tensor([0.6, 0.8, 0.0, 0.0])[:, None].expand(-1, 3))


def test_prototypes_equal_torch_s_weight_norm():
    layer = Prototypes(4, 3)
    other = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        other.parametrizations.weight.original0.copy_(layer.weight_g)
        other.parametrizations.weight.original1.copy_(layer.weight_v)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), other(x), atol=1e-6)


def test_the_gain_is_not_trained():
    assert [name for name, p in Prototypes(4, 3).named_parameters() if p.requires_grad] == ["weight_v"]


def head(**values: object) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(6, 10, 12, 5, **{"nlayers": 3, **values})  # type: ignore[arg-type]


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_a_dino_head_ends_in_cosines(nlayers):
    model = head(nlayers=nlayers)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.mlp) == nlayers
    assert not isinstance(model.mlp[-1], torch.nn.GELU)
    logits = model(X)
    assert logits.shape == (7, 10)
    assert logits.abs().max() <= 1 + 1e-6


def test_centring_takes_out_what_the_batch_shares():
    centered, plain = head(centered=True), head()
    shift = torch.zeros(5)
    bottleneck = plain.mlp(X)
    expected = centered.last_layer(torch.nn.functional.normalize(bottleneck - bottleneck.mean(0), dim=-1))
    assert torch.allclose(centered(X), expected, atol=1e-6)
    before = centered(X), plain(X)
    with torch.no_grad():
        shift += 3.0
        centered.mlp[-1].bias += shift
        plain.mlp[-1].bias += shift
    assert torch.allclose(centered(X), before[0], atol=1e-4)
    assert not torch.allclose(plain(X), before[1], atol=1e-2)


def test_centring_leaves_a_lone_row_alone():
    centered, plain = head(centered=True), head()
    assert torch.equal(centered(X[:1]), plain(X[:1]))


def test_without_centring_rows_do_not_know_of_each_other():
    assert torch.allclose(head()(X)[:3], head()(X[:3]), atol=1e-6)
    assert not torch.allclose(head(centered=True)(X)[:3], head(centered=True)(X[:3]), atol=1e-3)


def test_statistics_by_hand():
    patches = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
    assert torch.equal(token_statistics(patches), torch.tensor([[2.0, -1.0, 1.0, 1.0, 3.0, 0.0]]))


TOKENS = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(2)) * 5 + 2
CLS = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)) * 5 + 2


@pytest.mark.parametrize("kind", ["none", "learned"])
def test_tokens_are_at_first_as_they_come(kind):
    of_patches, of_cls = token_norms(kind, 4)
    assert torch.equal(of_patches(TOKENS), TOKENS)
    assert torch.equal(of_cls(CLS), CLS)
    assert bool(list(of_patches.parameters())) == (kind == "learned")


def test_what_is_learned_is_a_gain_and_a_shift_for_each_channel():
    of_patches, _ = token_norms("learned", 4)
    with torch.no_grad():
        of_patches.weight.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
        of_patches.bias.copy_(torch.tensor([0.0, 0.0, 3.0, 1.0]))
    changed = of_patches(TOKENS)
    assert torch.allclose(changed[..., 1], 2 * TOKENS[..., 1])
    assert (changed[..., 2] == 3).all()
    assert torch.allclose(changed[..., 3], 1 - TOKENS[..., 3])


def test_an_image_is_standardised_by_itself():
    """Channel by channel over its patches, the CLS tokens over their channels; another image changes nothing."""
    of_patches, of_cls = token_norms("image", 4)
    assert not [*of_patches.state_dict(), *of_cls.state_dict()]
    seen = of_patches(TOKENS)
    assert seen.mean(1).abs().max() < 1e-6
    assert (seen.std(1, correction=0) - 1).abs().max() < 1e-5
    assert of_cls(CLS).mean(1).abs().max() < 1e-6
    others = torch.cat([TOKENS[:1], 100 * TOKENS[1:]]), torch.cat([CLS[:1], 100 * CLS[1:]])
    assert torch.equal(of_patches(others[0])[0], seen[0])
    assert torch.equal(of_cls(others[1])[0], of_cls(CLS)[0])
    assert torch.isfinite(of_patches(torch.ones(1, 9, 4))).all()


@pytest.mark.parametrize("kind", ["none", "image", "learned"])
def test_statistics_and_mean_are_of_tokens_as_they_come(kind):
    """An image's standardised tokens have the mean 0 and the deviation 1, whatever it shows."""
    model = LinearHead(1, 2, 2, stats=True, avgpool=True, token_norm=kind)
    with torch.no_grad():
        model.weight[:, 4:] = 1.0
    plain = LinearHead(1, 2, 2, stats=True, avgpool=True)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    assert torch.equal(model([TOKENS], [CLS]), plain([TOKENS], [CLS]))


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("grid", [0, 2])
def test_all_that_is_learned_of_a_linear_head_bears_on_its_logits(stats, grid):
    model = LinearHead(2, 2, 2, stats=stats, grid=grid, token_norm="learned")
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(0))
    model([TOKENS], [CLS]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_grid_means_keep_the_place():
    """4 × 4 patches in 2 × 2 cells: each the mean of its quarter, channel by channel."""
    quarters = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    patches = torch.stack([quarters.flatten(), 10 * quarters.flatten()], dim=-1)[None]  # (1, 16, 2)
    assert torch.equal(grid_means(patches, 2), torch.tensor([[1.0, 2, 3, 4, 10, 20, 30, 40]]))
    assert torch.equal(grid_means(patches, 1), patches.mean(1))
    assert grid_means(patches, 3).shape == (1, 18)  # cells overlap where they do not divide


@pytest.mark.parametrize(("stats", "grid"), [(True, 0), (False, 0), (True, 2)])
def test_a_linear_head_by_hand(stats, grid):
    model = LinearHead(2, 3, 2, stats=stats, grid=grid)
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randn(4, 4, 3, generator=generator) for _ in range(2)]
    cls = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    assert not model(patches, cls).any()  # starts at probability one half
    with torch.no_grad():
        model.weight.normal_(generator=generator)
        model.bias.normal_(generator=generator)
    joined = torch.cat(patches, -1)
    parts = [*cls, joined.mean(1), joined.std(1, correction=0), joined.amax(1)] if stats else [*cls]
    if grid:
        parts.append(joined.transpose(1, 2).flatten(1))  # a cell is a patch here
    expected = torch.cat(parts, -1) @ model.weight.T + model.bias
    assert torch.allclose(model(patches, cls), expected, atol=1e-5)
    assert all(model.state_dict()[name].shape[0] == 2 for name in model.row_parameters)
