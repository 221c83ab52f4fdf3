"""Parameter groups and the optimizer of pretraining."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from chexfound.contract.request import MOMENTS
from chexfound.errors import CheckpointError
from chexfound.parallel import group as ranks
from chexfound.pretrain.schedules import Schedule
from chexfound.recipe.schema import Optim

Moments = dict[nn.Parameter, dict[str, Tensor]]


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


def is_decayed(name: str) -> bool:
    """Tell whether weight decay holds for a parameter of a head of findings, by its name there."""
    return not (name.endswith("bias") or "norm" in name or name == "position_embed")


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


def moments(optimizer: torch.optim.Optimizer, module: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Copies of the optimizer's state, by parameter: `optimizer.<parameter>.<key>`; on the first rank."""
    found = (
        (f"{MOMENTS}{name}.{key}", torch.as_tensor(value))
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    )
    return ranks.collected(found, copy=copy)


def clip(module: nn.Module, most: float) -> Tensor:
    """Scale a module's gradients to a norm (over all ranks' shards) of `most`, if it is above; returns what it was."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = ranks.whole(torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters]))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def zero_moments(module: nn.Module) -> dict[str, Tensor]:
    """The moments that AdamW begins with, for the module's trainable parameters."""
    result = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            result[f"{MOMENTS}{name}.step"] = torch.zeros(())
            result[f"{MOMENTS}{name}.exp_avg"] = torch.zeros_like(parameter)
            result[f"{MOMENTS}{name}.exp_avg_sq"] = torch.zeros_like(parameter)
    return result


def checked_moments(module: nn.Module, tensors: Mapping[str, Tensor]) -> Moments:
    """Moments by parameter, from their names; a parameter without any will start afresh.

    Raises: CheckpointError if one belongs to no parameter, has another shape, cannot be a moment, or
        some parameters lack one that others have.
    """
    parameters = dict(module.named_parameters())
    result: Moments = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.removeprefix(MOMENTS).rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"optimizer state does not fit: {full_name} belongs to no parameter")
        shape = torch.Size() if key == "step" else parameters[name].shape
        if value.shape != shape:
            raise CheckpointError(
                f"optimizer state does not fit: {full_name} is of shape {tuple(value.shape)}, not {tuple(shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"optimizer state does not fit: {full_name} holds a value that is not finite")
        if key in ("step", "exp_avg_sq") and bool((value < 0).any()):
            raise CheckpointError(f"optimizer state does not fit: {full_name} is negative")
        target = parameters[name]
        moment = value.to(target.device, copy=True) if key == "step" else ranks.placed(value, target.detach())
        result.setdefault(target, {})[key] = moment
    if len({frozenset(state) for state in result.values()}) > 1:
        raise CheckpointError("optimizer state does not fit: some parameters lack a moment that others have")
    return result


def set_moments(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Put an optimizer into the state that `checked_moments` gave."""
    optimizer.state.clear()
    for parameter, state in moments.items():
        optimizer.state[parameter] = state
