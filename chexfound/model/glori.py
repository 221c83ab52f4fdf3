"""GLoRI v1: one frozen random query a finding looks at the patch tokens (CheXFound, section 3).

Shapes: B images, n last blocks, P patches, D width, E head width, F findings, h attention heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chexfound import rng
from chexfound.model.heads import LinearHead, grid_means, token_norms, token_statistics
from chexfound.recipe.schema import ARCHS, Recipe


class DecoderLayer(nn.Module):
    """A post-norm transformer decoder layer without self-attention; the target is doubled first.

    LayerNorm eps is 1e-5 here (in the ViT it is 1e-6).
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, memory: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Queries (B, F, E) against memory (B, P, E): (B, F, E) and attention (B, h, F, P)."""
        x = self.norm1(target + self.dropout(target))
        attended, weights = self.multihead_attn(
            x, memory, memory, need_weights=need_weights, average_attn_weights=False
        )
        x = self.norm2(x + self.dropout(attended))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return x, weights


class GLoRI(nn.Module):
    """Global and local representations integration.

    The queries are random and never trained, so they must be the same at every site: they come
    from the coordinator's first weights and travel with the head.  `cls`, `stats`, `grid`,
    `positions` and `token_norm` (as of `heads.token_norms`) are ours, for small backbones; all off is the paper's
    head.  The statistics are of the patch tokens as they come: an image's standardised ones have none.

    Per-finding parameters: `query_embed.weight` (F, E), `duplicate_pooling` (F, channels) and
    `duplicate_pooling_bias` (F); a finding's rows are averaged over the sites that label it.
    """

    row_parameters = ("query_embed.weight", "duplicate_pooling", "duplicate_pooling_bias")
    findings: tuple[str, ...] = ()  # their names, where whoever loads the head knows them

    def __init__(
        self,
        n_findings: int,
        dim: int,
        n_blocks: int,
        *,
        embed_dim: int = 768,
        heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        cls: bool = False,
        stats: bool = False,
        grid: int = 0,
        positions: int = 0,
        token_norm: str = "none",  # noqa: S107 (tokens of an image)
    ) -> None:
        super().__init__()
        memory = dim * n_blocks
        self.dim, self.n_blocks = dim, n_blocks
        self.use_cls, self.use_stats, self.grid = cls, stats, grid
        self.token_norm, self.cls_norm = token_norms(token_norm, memory)
        if not cls:
            self.cls_norm = nn.Identity()  # or a weight that nothing hangs on would be trained
        self.embed_standart = nn.Linear(memory, embed_dim)
        self.position_embed = nn.Parameter(torch.zeros(1, positions, embed_dim)) if positions else None
        self.query_embed = nn.Embedding(n_findings, embed_dim)
        self.query_embed.weight.requires_grad_(False)
        self.layers = nn.ModuleList([DecoderLayer(embed_dim, heads, ffn_dim, dropout)])
        channels = embed_dim + memory * (int(cls) + 3 * int(stats) + grid**2)
        self.drop = nn.Dropout(dropout) if channels > embed_dim else nn.Identity()
        self.duplicate_pooling = nn.Parameter(torch.empty(n_findings, channels))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(n_findings))
        nn.init.xavier_normal_(self.duplicate_pooling)

    def forward(self, patches: Sequence[Tensor], cls: Sequence[Tensor], return_attention: bool = False) -> Any:
        """Patch tokens n × (B, P, D) and CLS n × (B, D) of the last blocks to logits (B, F).

        With return_attention, a pair (logits, attention (B, h, F, P)).
        """
        as_they_come = torch.cat(list(patches), dim=-1)  # (B, P, n·D)
        tokens = self.token_norm(as_they_come)
        memory = F.relu(self.embed_standart(tokens))
        if self.position_embed is not None:
            memory = memory + self.position_embed
        queries = self.query_embed.weight.expand(len(tokens), -1, -1)
        x, attention = self.layers[0](queries, memory, return_attention)  # (B, F, E)
        pooled = []
        if self.use_cls:
            pooled.append(self.cls_norm(torch.cat(list(cls), dim=-1)))
        if self.use_stats:
            pooled.append(token_statistics(as_they_come))
        if self.grid:
            pooled.append(grid_means(tokens, self.grid))
        weight = self.duplicate_pooling
        logits = (x * weight[:, : x.shape[-1]]).sum(-1) + self.duplicate_pooling_bias
        if pooled:  # the same for every finding: multiply once instead of repeating it F times
            logits = logits + F.linear(self.drop(torch.cat(pooled, dim=-1)), weight[:, x.shape[-1] :])
        return (logits, attention) if return_attention else logits


def head_options(recipe: Recipe, n_findings: int) -> dict[str, Any]:
    """The recipe's head as arguments: of `LinearHead` if `adapt.head` is "linear", else of `GLoRI`."""
    config = recipe.adapt
    options = {
        "n_findings": n_findings,
        "dim": ARCHS[recipe.student.arch][0],
        "n_blocks": config.n_last_blocks,
        "stats": config.glori_stats,
        "grid": config.glori_grid,
        "token_norm": config.token_norm,
    }
    if config.head == "linear":
        return options
    return options | {
        "embed_dim": config.glori_dim,
        "heads": config.glori_heads,
        "ffn_dim": config.glori_ffn_dim,
        "dropout": config.dropout,
        "cls": config.glori_cls,
        "positions": (recipe.image_px // recipe.student.patch_size) ** 2 if config.glori_positions else 0,
    }


def build_head(recipe: Recipe, n_findings: int) -> GLoRI | LinearHead:
    """The recipe's head, with fresh weights that depend on the seed alone."""
    options = head_options(recipe, n_findings)
    with rng.torch_stream(recipe.seed, "init", "adapt"):
        return LinearHead(**options) if recipe.adapt.head == "linear" else GLoRI(**options)
