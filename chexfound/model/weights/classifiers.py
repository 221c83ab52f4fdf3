"""The reference's GLoRI and linear heads as ours: their tensors, and what the shapes and the names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.weights.architecture import Glori, Head, Linear, section

BLOCKS, ATTENTION_HEADS = 4, 8  # the paper's, where neither an option nor the name says another


def choose(classifiers: Mapping[str, Any], wanted: str | None) -> str:
    """The one that is wanted, by its name or a part of it that only one has.

    Raises: ConfigError that lists them if it is none or several.
    """
    found = [name for name in classifiers if wanted is None or wanted in name]
    if wanted in classifiers:
        return str(wanted)
    if len(found) == 1:
        return found[0]
    listing = "".join(f"\n  {name}" for name in found or classifiers)
    if wanted is None:
        raise ConfigError(
            f"{len(found)} heads are in it, one for each setting that was tried; choose one by its name, or by a part "
            f"of it, with --classifier (in Python classifier=){listing}"
        )
    raise ConfigError(f"--classifier {wanted!r}: {len(found) or 'none'} of the heads is called so{listing}")


def read(
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    n_last_blocks: int | None = None,
    avgpool: bool | None = None,
) -> tuple[Head, dict[str, Tensor]]:
    """A head of the reference, under our names.

    Args:
        name: as in the checkpoint; `blocks=4:avgpool=False` in it is believed where no option says another.
        tensors: without the head's name before theirs.
        heads: GLoRI's attention heads.
        n_last_blocks: blocks whose tokens it takes.
        avgpool: of a linear head, whether it takes the last block's mean patch token too.

    Raises: CheckpointError if they are no such head's; ConfigError if an option does not fit the shapes.
    """
    n_last_blocks = n_last_blocks or blocks_of(name) or BLOCKS
    if "duplicate_pooling" in tensors:
        return _glori(tensors, heads or ATTENTION_HEADS, n_last_blocks)
    if "linear.weight" in tensors:
        if avgpool is None:
            avgpool = bool(re.search(r"avgpool[=_]True", name))
        return _linear(tensors, n_last_blocks, avgpool)
    raise CheckpointError(
        f"the head {name!r} is neither GLoRI nor linear: it holds {', '.join(sorted(tensors)[:3])[:200]}"
    )


def blocks_of(name: str) -> int | None:
    """How many last blocks a head takes, if its name says so."""
    found = re.search(r"blocks=(\d+)|classifier_(\d+)_blocks", name)
    return int(found[1] or found[2]) if found else None


def _glori(tensors: Mapping[str, Tensor], heads: int, n_blocks: int) -> tuple[Head, dict[str, Tensor]]:
    try:
        embed_dim, memory = tensors["embed_standart.weight"].shape
        n_findings, channels = tensors["duplicate_pooling"].shape[:2]
        ffn_dim = tensors["layers.0.linear1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"not a GLoRI head of one layer: {error} is lacking or of another shape") from error
    if channels not in (embed_dim, embed_dim + memory):
        raise CheckpointError(
            f"duplicate_pooling takes {channels} channels: neither the queries' {embed_dim}, nor those with the CLS "
            f"tokens' {memory}"
        )
    if embed_dim % heads:
        raise ConfigError(f"--glori-heads {heads}: must divide the head's width {embed_dim}")
    cls = channels == embed_dim + memory
    result = dict(tensors)
    pooling = result["duplicate_pooling"].reshape(n_findings, channels)
    if cls:  # the reference has the CLS tokens first, we have them last
        pooling = torch.cat([pooling[:, memory:], pooling[:, :memory]], dim=1)
    result["duplicate_pooling"] = pooling
    values = dict(
        n_findings=n_findings,
        dim=_width(memory, n_blocks),
        n_blocks=n_blocks,
        embed_dim=embed_dim,
        heads=heads,
        ffn_dim=ffn_dim,
        cls=cls,
    )
    return section(Glori, values, "the head's shapes"), result | _no_standardisation(memory)


def _linear(tensors: Mapping[str, Tensor], n_blocks: int, avgpool: bool) -> tuple[Head, dict[str, Tensor]]:
    weight = tensors["linear.weight"]
    if weight.ndim != 2:
        raise CheckpointError(f"linear.weight has the shape {tuple(weight.shape)}")
    dim = _width(weight.shape[1], n_blocks + int(avgpool))
    result = {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}
    values = dict(n_findings=weight.shape[0], dim=dim, n_blocks=n_blocks, avgpool=avgpool)
    return section(Linear, values, "the head's shapes"), result | _no_standardisation(dim * n_blocks)


def _width(channels: int, parts: int) -> int:
    if parts < 1 or channels % parts:
        raise ConfigError(
            f"the head takes {channels} channels, which are not {parts} equal parts: "
            "say of how many last blocks they are with --n-last-blocks, and --avgpool if a mean patch token is in them"
        )
    return channels // parts


def _no_standardisation(channels: int) -> dict[str, Tensor]:
    """Ours standardise the tokens by given moments; the reference's do not: mean 0, deviation 1."""
    return {
        f"{norm}.{name}": value
        for norm in ("token_norm", "cls_norm")
        for name, value in (("mean", torch.zeros(channels)), ("std", torch.ones(channels)))
    }
