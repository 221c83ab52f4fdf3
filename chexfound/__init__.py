"""Federated chest X-ray pretraining.  Here: what a user of weights needs; nothing heavy is imported before use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from chexfound.model.glori import GLoRI
    from chexfound.model.heads import LinearHead
    from chexfound.model.vit import VisionTransformer

__version__ = "0.1.0"
__all__ = ["load_backbone", "load_head"]


def load_backbone(
    path: str | Path,
    heads: int | None = None,
    *,
    which: str = "teacher",
    mean: float | tuple[float, float, float] | None = None,
    std: float | tuple[float, float, float] | None = None,
) -> VisionTransformer:
    """A backbone, in evaluation mode, with DINOv2's `forward_features` and `get_intermediate_layers`.

    It takes uint8 grey images (B, H, W), which it normalises itself, or float32 (B, C, H, W) that are
    normalised already.

    Args:
        path: a published checkpoint (teacher_checkpoint.pth, model_checkpoint.pth, model.safetensors) as it
            is, a folder of `chexfound weights import` or `export`, or a run's folder or its model/.
        heads: attention heads, where neither shapes nor folder tell; without it width / 64.
        which: teacher or student, of a file that holds both.
        mean: of pixels scaled to [0, 1]; without it what the folder says, else ImageNet's.
        std: likewise.

    Raises: CheckpointError if it is damaged, holds code, or another architecture; ConfigError.
    """
    from chexfound.model.weights import load

    return load.load_backbone(path, heads, which=which, mean=mean, std=std)


def load_head(
    path: str | Path,
    *,
    classifier: str | None = None,
    heads: int | None = None,
    n_last_blocks: int | None = None,
    avgpool: bool | None = None,
) -> GLoRI | LinearHead:
    """A head of findings, in evaluation mode: from (patch tokens of the last n blocks, their CLS) to logits (B, F).

    A GLoRI head takes `return_attention=True` and then gives (logits, attention (B, heads, F, P)).  Of the
    head, `n_blocks` is n and `findings` are the names of the findings, if they are known.

    Args:
        path: a published <glori>.pth or <linear>.pth as it is, or a folder as for `load_backbone`.
        classifier: name, or a part of it, of one of several heads in a file.
        heads: attention heads of GLoRI; without it the paper's 8.
        n_last_blocks: n; without it what the head's name says, else the paper's 4.
        avgpool: of a linear head, whether it takes the last block's mean patch token too; without it what the
            head's name says.

    Raises: CheckpointError, ConfigError, as `load_backbone`.
    """
    from chexfound.model.weights import load

    return load.load_head(path, classifier=classifier, heads=heads, n_last_blocks=n_last_blocks, avgpool=avgpool)
