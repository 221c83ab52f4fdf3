"""A backbone as timm has it: names, and the config from which `timm.create_model` builds it.

timm takes DINOv2's vision transformers with the CLS token's position added to the token itself
(`no_embed_class`), registers as `reg_token`, and no mask token.  Any width and depth comes from an
entry of its registry with arguments of ours; the entry for SwiGLU is the giant's, since a config
cannot name a layer's class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.model.vit import VisionTransformer
from chexfound.model.weights.architecture import Backbone
from chexfound.recipe.schema import Input

LOCAL_DIR = "1.0.30"  # the first timm that reads a folder with several safetensors files in it as `local-dir:`
ENTRIES = {"swiglu": "vit_giant_patch14_reg4_dinov2", "mlp": "vit_base_patch14_reg4_dinov2"}


def obstacle(backbone: Backbone, config: Input) -> str | None:
    """Why timm cannot load a backbone; None if it can."""
    if backbone.stem == "conv":
        return "timm has no vision transformer with this convolutional stem"
    if config.normalization == "zscore":
        return "each image is normalised by its own mean and deviation, which no timm transform does"
    return None


def names(module: VisionTransformer, image_px: int) -> dict[str, Tensor]:
    """A backbone's tensors in timm's names, its positions resized (by our rule) to images of `image_px`."""
    side = image_px // module.patch_size
    state = module.state_dict()
    with torch.no_grad():
        positions = module.positions(side, side).detach().clone()
    result = {
        "cls_token": state.pop("cls_token") + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }
    registers = state.pop("register_tokens")
    if registers.numel():
        result["reg_token"] = registers
    del state["pos_embed"], state["mask_token"]
    return result | state


def config(backbone: Backbone, given: Input, image_px: int) -> dict[str, Any]:
    """Give what timm needs of config.json."""
    mean, std = channels(given, backbone.in_chans)
    return {
        "architecture": ENTRIES[backbone.ffn],
        "num_classes": 0,
        "num_features": backbone.dim,
        "global_pool": "token",
        "model_args": {
            "img_size": image_px,
            "patch_size": backbone.patch_size,
            "in_chans": backbone.in_chans,
            "embed_dim": backbone.dim,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": _ratio(backbone),
            "init_values": 1e-5 if backbone.layerscale else 0.0,  # 0: none; the value itself is overwritten
            "reg_tokens": backbone.registers,
            "no_embed_class": True,  # num_classes is 0 by the entry, and transformers passes it itself
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [backbone.in_chans, image_px, image_px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def channels(given: Input, in_chans: int) -> tuple[list[float], list[float]]:
    """Mean and deviation, one of each for every channel."""
    both = [list(value) if isinstance(value, tuple) else [value] * in_chans for value in (given.mean, given.std)]
    return both[0], both[1]


def _ratio(backbone: Backbone) -> float:
    """For timm the hidden width is int(width · ratio), for SwiGLU that of both halves."""
    hidden = backbone.ffn_dim * (2 if backbone.ffn == "swiglu" else 1)
    ratio = hidden / backbone.dim
    return ratio if int(backbone.dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def check(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Check that the installed timm builds, from the config, a model of exactly these tensors.

    Raises: CheckpointError.
    """
    import timm  # only here: whoever trains does without

    with torch.device("meta"):
        model = timm.create_model(values["architecture"], **values["model_args"])
    state = model.state_dict()
    try:
        checkpoint.check_fit(state, tensors, list(state))
    except CheckpointError as error:
        raise CheckpointError(f"timm {timm.__version__} would not load this backbone: {error}") from error
