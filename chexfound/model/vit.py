"""The backbone: a vision transformer with registers, from uint8 grey images to tokens.

Shapes: B images, C channels, H × W pixels, P = (H/p)·(W/p) patches of side p, R registers, D width.
Facts kept from DINOv2 (Oquab et al. 2023; Darcet et al. 2023): LayerNorm eps 1e-6, SwiGLU of hidden
width 2/3 · 4D rounded up to 8, LayerScale, registers after CLS, positions resized by scale factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chexfound.model.heads import init_linear
from chexfound.recipe.schema import ARCHS, Input, Student


class Normalize(nn.Module):
    """uint8 (B, H, W) or (B, C, H, W) to float32 (B, in_chans, H, W), by the model's own input config.

    What is floating point already passes as it is: it was normalised by whoever made it.
    """

    def __init__(self, config: Input, in_chans: int) -> None:
        super().__init__()
        self.config = config
        self.in_chans = in_chans

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; a grey image is repeated over the channels."""
        if images.ndim == 3:
            images = images[:, None]
        if images.is_floating_point():
            return images.expand(-1, self.in_chans, -1, -1)
        x = images.float()
        if self.config.normalization == "zscore":
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            std = x.std(dim=(1, 2, 3), keepdim=True, correction=0)
            x = (x - mean) / (std + 1.0)  # + one grey level: a flat image stays finite
        else:
            mean, std = (
                torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
                for value in (self.config.mean, self.config.std)
            )
            x = (x / 255 - mean) / std
        return x.expand(-1, self.in_chans, -1, -1)


class LinearStem(nn.Module):
    """The paper's patch embedding: (B, C, H, W) to (B, H/p, W/p, D)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed."""
        x = self.proj(x)
        return x.permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Four stride-2 convolutions and a 1 × 1 in place of the patch projection (Xiao et al. 2021).

    (B, C, H, W) to (B, H/16, W/16, D).  Widths D/4, D/2, D, D.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        widths = [in_chans, dim // 4, dim // 2, dim, dim]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(max(1, width_out // 12), width_out),
                nn.ReLU(),
            ]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Embed."""
        x = self.proj(self.convs(x))
        return x.permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        result: Tensor = self.proj(self.mix(x))
        return result

    def mix(self, x: Tensor) -> Tensor:
        """Give what the heads gather, before the projection: (B, N, D) to the same shape."""
        n, length, dim = x.shape
        query, key, value = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(query, key, value).transpose(1, 2).reshape(n, length, dim)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (B, h, N, d) each, scaled by 1 / √d.

    By PyTorch's fused kernel, but for half precision on a processor: there the backward pass of the
    kernel takes 1.4 to 7 times as long as three matrix products (`benchmarks/attention.py`).
    """
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-2, -1))
    return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)


class LayerScale(nn.Module):
    """A gain a channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same shape."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with GELU between them, in timm's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same shape."""
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class SwiGLU(nn.Module):
    """SwiGLU (Shazeer 2020), gate and values packed into one layer, the gate first, in timm's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same shape."""
        gate, values = self.fc1(x).chunk(2, dim=-1)
        result: Tensor = self.fc2(F.silu(gate) * values)
        return result


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale, and DINOv2's drop path.

    Of B images ⌊B · (1 − rate)⌋, at least one, chosen at random, get the residual, times B over their
    number; so its mean over the choice is the residual itself, and the others' is not computed
    (Huang et al. 2016; Oquab et al. 2023).
    """

    def __init__(self, dim: int, heads: int, ffn_layer: str, layerscale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: nn.Module = Mlp(dim, 4 * dim) if ffn_layer == "mlp" else SwiGLU(dim, swiglu_width(dim))
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        x = self._add(x, lambda kept: self.ls1(self.attn(self.norm1(kept))))
        return self._add(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))))

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """The block's output at some tokens only, so that what nobody reads is not computed.

        Args:
            x: (B, N, D).
            rows: (R,) of the B · N tokens.

        Returns: (R, D).
        """
        images = rows // x.shape[1]
        result: Tensor = x.flatten(0, 1).index_select(0, rows)
        kept = self._kept(x)
        if kept is None:
            mixed = self.attn.mix(self.norm1(x)).flatten(0, 1).index_select(0, rows)
            result = result + self.ls1(self.attn.proj(mixed))
            result = result + self.ls2(self.mlp(self.norm2(result)))
            return result
        place = torch.full((len(x),), -1, device=x.device).index_copy(0, kept, torch.arange(len(kept), device=x.device))
        chosen = (place[images] >= 0).nonzero().squeeze(1)
        there = place[images[chosen]] * x.shape[1] + rows[chosen] % x.shape[1]
        mixed = self.attn.mix(self.norm1(x[kept])).flatten(0, 1).index_select(0, there)
        alpha = len(x) / len(kept)
        result = result.index_add(0, chosen, self.ls1(self.attn.proj(mixed)).to(x.dtype), alpha=alpha)
        kept = self._kept(x)
        chosen = torch.isin(images, cast(Tensor, kept)).nonzero().squeeze(1)
        residual = self.ls2(self.mlp(self.norm2(result.index_select(0, chosen))))
        return result.index_add(0, chosen, residual.to(x.dtype), alpha=alpha)

    def _add(self, x: Tensor, residual: Callable[[Tensor], Tensor]) -> Tensor:
        kept = self._kept(x)
        if kept is None:
            return x + residual(x)
        return x.index_add(0, kept, residual(x[kept]).to(x.dtype), alpha=len(x) / len(kept))

    def _kept(self, x: Tensor) -> Tensor | None:
        """The images that keep their residual; None where all do."""
        if not (self.training and self.drop_path_rate):
            return None
        return torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - self.drop_path_rate)), 1)]


def swiglu_width(dim: int) -> int:
    """Hidden width of SwiGLU in place of an MLP of 4 · `dim` (Shazeer 2020): two thirds of it, in eights."""
    return (int(4 * dim * 2 / 3) + 7) // 8 * 8


def resize_positions(pos_embed: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings (1, 1 + M², D) of a square grid for another: (1, 1 + rows·columns, D), CLS first.

    By the scale factor (n + 0.1) / M, bicubic, without antialiasing: DINOv2's rule, and not the same
    as resizing to the size.
    """
    grid = math.isqrt(pos_embed.shape[1] - 1)
    if rows == columns == grid:
        return pos_embed
    patch = pos_embed[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    patch = F.interpolate(patch.float(), scale_factor=scale, mode="bicubic", antialias=False).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patch.flatten(2).transpose(1, 2)], dim=1)


class VisionTransformer(nn.Module):
    """A ViT whose input is what the store holds.

    Args:
        config: architecture.
        input_config: normalisation of the input.
        grid: side of the position grid, in patches, that the parameters are made for.
        dims: width, depth, attention heads, where they are not those of `config.arch` (weights from elsewhere).

    Source: Dosovitskiy et al. 2021; parameters named as in DINOv2, inside blocks as in timm.
    """

    def __init__(
        self, config: Student, input_config: Input, grid: int, dims: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        dim, depth, heads = dims or ARCHS[config.arch]
        self.config, self.input_config, self.grid = config, input_config, grid
        self.embed_dim, self.depth, self.patch_size = dim, depth, config.patch_size
        self.normalize = Normalize(input_config, config.in_chans)
        self.patch_embed: nn.Module
        if config.stem == "conv":
            self.patch_embed = ConvStem(config.in_chans, dim)
        else:
            self.patch_embed = LinearStem(config.in_chans, dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.full((1, 1, dim), math.nan))
        self.pos_embed = nn.Parameter(torch.full((1, 1 + grid * grid, dim), math.nan))
        self.register_tokens = nn.Parameter(torch.full((1, config.num_register_tokens, dim), math.nan))
        self.mask_token = nn.Parameter(torch.full((1, dim), math.nan))
        self.blocks = nn.ModuleList(
            Block(dim, heads, config.ffn_layer, config.layerscale, rate) for rate in drop_path_rates(config, depth)
        )
        self.checkpointing = False  # recompute blocks in the backward pass
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.config.init)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of a grid of patches: (1, 1 + rows·columns, D), CLS first."""
        return resize_positions(self.pos_embed, rows, columns)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images to the input of the first block: (B, 1 + R + P, D); masks (B, P), True = masked."""
        x = self.patch_embed(self.normalize(images))
        rows, columns = x.shape[1:3]
        x = x.flatten(1, 2)  # (B, P, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype)[None], x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(rows, columns)
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            result: Tensor = checkpoint(block, x, use_reentrant=False)
            return result
        return block(x)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Tokens after the last block.

        Args:
            x: images, uint8 (B, H, W) or (B, C, H, W), or float as DINOv2 takes them; H and W multiples of
                the patch size.
            masks: bool (B, P), True where the patch is replaced by the mask token.

        Returns:
            x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, P, D),
            x_prenorm (B, 1 + R + P, D).
        """
        x = self.embed(x, masks)
        for block in self.blocks:
            x = self._through(block, x)
        normed = self.norm(x)
        first = 1 + self.config.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
        }

    def tokens_at(self, images: Tensor, rows: Tensor, masks: Tensor | None = None) -> Tensor:
        """Some of the normed tokens after the last block, as `forward_features` gives them.

        In the last block only these tokens are computed: pretraining reads the CLS tokens and the masked patches.

        Args:
            images: as there.
            rows: (R,) of the B · (1 + R + P) tokens, image by image; `token_rows` gives them.
            masks: as there.

        Returns: (R, D).
        """
        x = self.embed(images, masks)
        *blocks, last = cast(list[Block], list(self.blocks))
        for block in blocks:
            x = self._through(block, x)
        if self.checkpointing and torch.is_grad_enabled():
            x = checkpoint(last.at, x, rows, use_reentrant=False)
        else:
            x = last.at(x, rows)
        result: Tensor = self.norm(x)
        return result

    def token_rows(self, n_images: int, patches: Tensor) -> Tensor:
        """Rows of the CLS tokens of B images, then of patches given as bool (B, P), image by image."""
        first = 1 + self.config.num_register_tokens
        length = first + patches.shape[1]
        image, patch = patches.nonzero(as_tuple=True)
        cls = torch.arange(n_images, device=patches.device) * length
        return torch.cat([cls, image * length + first + patch])

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, return_class_token: bool = False, norm: bool = True
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Patch tokens (B, P, D) of the last n blocks (or of the blocks numbered), oldest first.

        All go through the one final norm.  With return_class_token, pairs (patch tokens, CLS (B, D)).
        """
        wanted = set(range(self.depth - n, self.depth) if isinstance(n, int) else n)
        x = self.embed(x)
        outputs: list[Tensor | tuple[Tensor, Tensor]] = []
        first = 1 + self.config.num_register_tokens
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in wanted:
                tokens = self.norm(x) if norm else x
                outputs.append((tokens[:, first:], tokens[:, 0]) if return_class_token else tokens[:, first:])
        return tuple(outputs)


def drop_path_rates(config: Student, depth: int) -> list[float]:
    """The rate of each block."""
    if config.drop_path_uniform or depth == 1:
        return [config.drop_path_rate] * depth
    return [config.drop_path_rate * number / (depth - 1) for number in range(depth)]


def build(config: Student, input_config: Input, position_px: int) -> VisionTransformer:
    """The backbone of a recipe; its position grid is that of images of `position_px` pixels."""
    return VisionTransformer(config, input_config, grid=position_px // config.patch_size)
