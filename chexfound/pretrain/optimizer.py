"""Parameter groups and the optimizer of pretraining."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from chexfound.pretrain.schedules import Schedule
from chexfound.recipe import Optim


def multipliers(name: str, ndim: int, depth: int, config: Optim) -> tuple[float, float, bool]:
    """(lr multiplier, weight-decay multiplier, is last layer) of a parameter, as DINOv2 sets them.

    Parameters of one dimension (biases, norms, LayerScale) are not decayed; tokens and positions
    are.  With layer-wise decay a block's rate falls with its distance from the top, and the stem's
    most.
    """
    layer = depth + 1
    if name.startswith("backbone."):
        if any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")):
            layer = 0
        elif ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
    lr = config.layerwise_decay ** (depth + 1 - layer)
    decay = 1.0 if ndim > 1 else 0.0
    if "patch_embed" in name:
        lr *= config.patch_embed_lr_mult
    return lr, decay, "last_layer" in name


def build(student: nn.Module, depth: int, config: Optim) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over the student's trainable parameters, grouped by multipliers."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[multipliers(name, parameter.ndim, depth, config)].append(parameter)
    options = [
        {"params": parameters, "lr_mult": lr, "wd_mult": decay, "is_last_layer": last}
        for (lr, decay, last), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(options, lr=0.0)
    return torch.optim.AdamW(options, lr=0.0, betas=(config.adamw_beta1, config.adamw_beta2), fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, values: Schedule) -> None:
    """Set this step's rates."""
    for group in optimizer.param_groups:
        group["lr"] = (values.last_layer_lr if group["is_last_layer"] else values.lr) * group["lr_mult"]
        group["weight_decay"] = values.weight_decay * group["wd_mult"]
