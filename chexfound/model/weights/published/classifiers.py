"""The reference's GLoRI and linear heads as ours: their tensors, and what the shapes and the names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.weights.architecture import Glori, Head, Linear, section, shape
from chexfound.model.weights.published.untrusted import named_once

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
    n_last_blocks = next(n for n in (n_last_blocks, blocks_of(name), BLOCKS) if n is not None)
    if "duplicate_pooling" in tensors:
        return _glori(tensors, ATTENTION_HEADS if heads is None else heads, n_last_blocks)
    if "linear.weight" in tensors:
        if avgpool is None:
            avgpool = bool(re.search(r"avgpool[=_]True", name))
        return _linear(tensors, n_last_blocks, avgpool)
    raise CheckpointError(
        f"the head {name!r} is neither GLoRI nor linear: it holds {', '.join(sorted(tensors)[:3])[:200]}"
    )


def blocks_of(name: str) -> int | None:
    """How many last blocks a head takes, if its name says so."""
    found = re.search(r"blocks=(\d{1,4})(?!\d)|classifier_(\d{1,4})_blocks", name)
    return int(found[1] or found[2]) if found else None


def _glori(tensors: Mapping[str, Tensor], heads: int, n_blocks: int) -> tuple[Head, dict[str, Tensor]]:
    pooling = tensors["duplicate_pooling"]
    if pooling.ndim == 3 and pooling.shape[2] == 1:  # the reference's
        pooling = pooling.squeeze(2)
    n_findings, channels = shape({"duplicate_pooling": pooling}, "duplicate_pooling", 2)
    embed_dim, memory = shape(tensors, "embed_standart.weight", 2)
    ffn_dim = shape(tensors, "layers.0.linear1.weight", 2)[0]
    if channels not in (embed_dim, embed_dim + memory):
        raise CheckpointError(
            f"duplicate_pooling takes {channels} channels: neither the queries' {embed_dim}, nor those with the CLS "
            f"tokens' {memory}"
        )
    if embed_dim % heads:
        raise ConfigError(f"--glori-heads {heads}: must divide the head's width {embed_dim}")
    cls = channels == embed_dim + memory
    values = dict(
        n_findings=n_findings,
        dim=_width(memory, n_blocks),
        n_blocks=n_blocks,
        embed_dim=embed_dim,
        heads=heads,
        ffn_dim=ffn_dim,
        cls=cls,
    )
    config = section(Glori, values, "the head's shapes")  # before a shape of 0 × 2⁴⁰ has cost any memory
    if cls:  # the reference has the CLS tokens first, we have them last
        pooling = torch.cat([pooling[:, memory:], pooling[:, :memory]], dim=1)
    theirs = [(name, tensor) for name, tensor in tensors.items() if name != "duplicate_pooling"]
    return config, named_once([*theirs, ("duplicate_pooling", pooling)])


def _linear(tensors: Mapping[str, Tensor], n_blocks: int, avgpool: bool) -> tuple[Head, dict[str, Tensor]]:
    n_findings, channels = shape(tensors, "linear.weight", 2)
    dim = _width(channels, n_blocks + int(avgpool))
    values = dict(n_findings=n_findings, dim=dim, n_blocks=n_blocks, avgpool=avgpool)
    config = section(Linear, values, "the head's shapes")
    theirs = [(name.removeprefix("linear."), tensor) for name, tensor in tensors.items()]
    return config, named_once(theirs)


def _width(channels: int, parts: int) -> int:
    if parts < 1 or channels % parts:
        raise ConfigError(
            f"the head takes {channels} channels, which are not {parts} equal parts: "
            "say of how many last blocks they are with --n-last-blocks, and --avgpool if a mean patch token is in them"
        )
    return channels // parts
