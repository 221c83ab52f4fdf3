"""The backbone: a vision transformer with registers, from uint8 grey images to tokens.

Shapes: B images, C channels, H × W pixels, P = (H/p)·(W/p) patches of side p, R registers, D width.
Facts kept from DINOv2 (Oquab et al. 2023; Darcet et al. 2023): LayerNorm eps 1e-6, SwiGLU of hidden
width 2/3 · 4D rounded up to 8, LayerScale, registers after CLS, positions resized by scale factor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from chexfound.schema import ARCHS, Input, Student


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


def _swiglu(in_features: int, hidden_features: int, **_: object) -> nn.Module:
    hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
    return SwiGLUPacked(in_features, 2 * hidden)


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
            Block(
                dim,
                heads,
                mlp_ratio=4.0,
                qkv_bias=True,
                init_values=config.layerscale or None,
                drop_path=config.drop_path_rate,
                norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
                mlp_layer=_swiglu if config.ffn_layer == "swiglu" else Mlp,  # type: ignore[arg-type]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.config.init == "xavier":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of a grid of patches: (1, 1 + rows·columns, D), CLS first.

        Resized by the scale factor (n + 0.1) / M, bicubic, without antialiasing: DINOv2's rule, and
        not the same as resizing to the size.
        """
        if rows == columns == self.grid:
            return self.pos_embed
        patch = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patch = F.interpolate(patch, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], patch.flatten(2).transpose(1, 2)], dim=1)

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

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Tokens after the last block.

        Args:
            images: uint8 (B, H, W) or (B, C, H, W), H and W multiples of the patch size.
            masks: bool (B, P), True where the patch is replaced by the mask token.

        Returns:
            x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, P, D),
            x_prenorm (B, 1 + R + P, D).
        """
        x = self.embed(images, masks)
        for block in self.blocks:
            x = block(x)
        normed = self.norm(x)
        first = 1 + self.config.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
        }

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, return_class_token: bool = False, norm: bool = True
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Patch tokens (B, P, D) of the last n blocks (or of the blocks numbered), oldest first.

        All go through the one final norm.  With return_class_token, pairs (patch tokens, CLS (B, D)).
        """
        wanted = set(range(self.depth - n, self.depth) if isinstance(n, int) else n)
        x = self.embed(images)
        outputs: list[Tensor | tuple[Tensor, Tensor]] = []
        first = 1 + self.config.num_register_tokens
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in wanted:
                tokens = self.norm(x) if norm else x
                outputs.append((tokens[:, first:], tokens[:, 0]) if return_class_token else tokens[:, first:])
        return tuple(outputs)


def build(config: Student, input_config: Input, global_crops_size: int) -> VisionTransformer:
    """The backbone of a recipe; its position grid is that of the global crops."""
    return VisionTransformer(config, input_config, grid=global_crops_size // config.patch_size)
