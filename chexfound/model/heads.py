"""Heads of pretraining (DINO, iBOT) and the linear head of adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound.errors import ConfigError
from chexfound.parallel import group

EPS = 1e-5  # of a variance, as torch's


def init_linear(layer: nn.Linear, init: str) -> None:
    """Draw a layer's weights from torch's global generator: "xavier", or "trunc_normal" of 0.02 as DINOv2's."""
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """A weight-normalised linear layer without bias: (…, bottleneck) to (…, K) logits.

    With `norm_last_layer` the gain `weight_g` stays at 1 (Caron et al. 2021).  DINOv2 trains it; but
    then averaging (g, v) over sites does not average the effective weights.
    """

    def __init__(self, bottleneck: int, n_prototypes: int, norm_last_layer: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, bottleneck))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits against the normalised prototypes."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=-1))


class DINOHead(nn.Module):
    """MLP, bottleneck, L2 normalisation, prototypes (Caron et al. 2021).

    Args:
        centered: subtract the mean over the tokens of the call (of all GPUs of a site) before normalising.
            A batch from one scanner shares a large common component; without it the CLS loss can rest at log K.
    """

    def __init__(
        self,
        dim: int,
        n_prototypes: int,
        hidden_dim: int,
        bottleneck_dim: int,
        nlayers: int,
        centered: bool = False,
        norm_last_layer: bool = True,
        init: str = "xavier",
    ) -> None:
        super().__init__()
        self.centered = centered
        widths = [dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                init_linear(layer, init)
        self.last_layer = Prototypes(bottleneck_dim, n_prototypes, norm_last_layer)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(N, D) to (N, bottleneck) of length 1: what the prototypes are compared with."""
        x = self.mlp(x)
        if self.centered and group.total(len(x)) > 1:
            x = x - group.mean_row(x)
        return F.normalize(x, dim=-1, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, K) logits in [-1, 1]."""
        logits: Tensor = self.last_layer(self.bottleneck(x))
        return logits


def token_statistics(patches: Tensor) -> Tensor:
    """Mean, deviation and maximum over the patches: (B, P, D) to (B, 3·D)."""
    return torch.cat([patches.mean(1), patches.std(1, correction=0), patches.amax(1)], dim=-1)


def grid_means(patches: Tensor, side: int) -> Tensor:
    """Mean over each of side × side cells of a square image, channel by channel: (B, P, D) to (B, D·side²)."""
    rows = math.isqrt(patches.shape[1])
    places = patches.transpose(1, 2).reshape(len(patches), -1, rows, rows)
    return F.adaptive_avg_pool2d(places, side).flatten(1)


class Affine(nn.Module):
    """A gain and a shift for each channel, learned with the head; at first they change nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) to the same shape."""
        return x * self.weight + self.bias


class OwnPatches(nn.Module):
    """Standardise each channel of an image over that image's own patches: nothing of another image is in it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, channels) to the same shape."""
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS)


class OwnChannels(nn.Module):
    """Standardise an image's CLS tokens over their channels: an image has one of each, and no patches to go over."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels) to the same shape."""
        return F.layer_norm(x, x.shape[-1:], eps=EPS)


def token_norms(kind: str, channels: int) -> tuple[nn.Module, nn.Module]:
    """Give what a head does to patch tokens (B, P, channels) and to CLS tokens (B, channels) before all else.

    Args:
        kind: "none"; "image", by the image's own tokens; or "learned", with the head.
        channels: of the blocks' tokens side by side.
    """
    if kind == "learned":
        return Affine(channels), Affine(channels)
    if kind == "image":
        return OwnPatches(), OwnChannels()
    return nn.Identity(), nn.Identity()


class LinearHead(nn.Module):
    """Logistic regression on the CLS tokens (and, if asked, patch statistics and a grid of means) of the last blocks.

    Per-finding parameters: `weight` (F, channels) and `bias` (F).

    Args:
        avgpool: concatenate the mean patch token of the last block, as DINOv2's linear evaluation may.
        token_norm: as of `token_norms`; statistics and mean are of the patch tokens as they come, since an image's
            standardised ones have none.
    """

    row_parameters = ("weight", "bias")
    findings: tuple[str, ...] = ()  # their names, where whoever loads the head knows them

    def __init__(
        self,
        n_findings: int,
        dim: int,
        n_blocks: int,
        *,
        stats: bool = True,
        grid: int = 0,
        avgpool: bool = False,
        token_norm: str = "none",  # noqa: S107 (tokens of an image)
    ) -> None:
        super().__init__()
        channels = dim * n_blocks * (1 + 3 * int(stats) + grid**2) + dim * int(avgpool)
        self.dim, self.n_blocks = dim, n_blocks
        self.stats, self.grid, self.avgpool = stats, grid, avgpool
        self.token_norm, self.cls_norm = token_norms(token_norm, dim * n_blocks)
        if not grid:
            self.token_norm = nn.Identity()  # or a weight that nothing hangs on would be trained
        self.weight = nn.Parameter(torch.zeros(n_findings, channels))
        self.bias = nn.Parameter(torch.zeros(n_findings))

    def forward(self, patches: Sequence[Tensor], cls: Sequence[Tensor], return_attention: bool = False) -> Tensor:
        """Patch tokens n × (B, P, D) and CLS n × (B, D) of the last blocks to logits (B, F).

        Raises: ConfigError if attention is asked for: there is none.
        """
        if return_attention:
            raise ConfigError("a linear head has no attention: leave return_attention out, or take a GLoRI head")
        features = [self.cls_norm(torch.cat(list(cls), dim=-1))]
        tokens = torch.cat(list(patches), dim=-1)
        if self.avgpool:
            features.append(tokens[..., -self.dim :].mean(1))
        if self.stats:
            features.append(token_statistics(tokens))
        if self.grid:
            features.append(grid_means(self.token_norm(tokens), self.grid))
        return F.linear(torch.cat(features, dim=-1), self.weight, self.bias)
