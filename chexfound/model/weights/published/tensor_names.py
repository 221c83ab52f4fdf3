"""Names of the published CheXFound checkpoints, and of DINOv2's, turned into ours and back.

teacher_checkpoint.pth       {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}
model_checkpoint.pth         {"model": {"student.backbone.…", "teacher.backbone.…", …, "dino_loss.center", …}}
model.safetensors (the hub)  model.…, with ls1.weight for ls1.gamma
<glori>.pth, <linear>.pth    {"model": {"classifiers_dict.NAME.decoder.…" or "….linear.…"}, "iteration": …}

Blocks may stand in chunks, `blocks.CHUNK.INDEX.…`: the index counts over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.weights.published.untrusted import named_once

WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, of torch.compile, of the hub's edition
PARTS = ("backbone.", "dino_head.", "ibot_head.", "classifiers_dict.", "head.")
TRAINING_STATE = (  # what a training run keeps beside the weights
    "dino_loss.",
    "ibot_patch_loss.",
    "koleo_loss.",
    "optimizer.",
    "dino_center",
    "ibot_center",
)
PROJECTIONS = ("dino_head", "ibot_head")


@dataclass(frozen=True, kw_only=True)
class Names:
    """A checkpoint's tensors, sorted by what they belong to, under our names."""

    backbone: dict[str, Tensor] = field(default_factory=dict)
    projections: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # dino_head, ibot_head
    classifiers: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by name, still in the reference's names
    whose: str | None = None  # teacher | student, where the file says so
    left_out: dict[str, str] = field(default_factory=dict)
    ours: bool = False  # written by a run of ours: how it normalises lies elsewhere


def sort(tensors: Mapping[str, Tensor], which: str = "teacher") -> Names:
    """Take a checkpoint's names apart.

    Args:
        tensors: under the checkpoint's names.
        which: teacher or student, of a file that holds both.

    Raises: CheckpointError naming what belongs to nothing that is known; ConfigError if there is no `which`.
    """
    tensors = _unwrapped(tensors)
    left_out, ours = {}, _is_ours(tensors)
    for name in [name for name in tensors if name.startswith(TRAINING_STATE)]:
        group = next(start for start in TRAINING_STATE if name.startswith(start)).rstrip(".")
        left_out[group] = "training state"
        del tensors[name]
    tensors, whose, other = _choose(tensors, which)
    left_out |= other
    if "cls_token" in tensors and "mask_token" not in tensors:
        raise CheckpointError(
            "a vision transformer without a mask token: timm's, or of another library. Of a release of ours, give the "
            "folder, or its backbone_compatible.safetensors"
        )
    if "cls_token" in tensors:
        tensors = checkpoint.add_prefix(tensors, "backbone.")
    elif any(name.startswith(("decoder.", "linear.")) for name in tensors):
        tensors = checkpoint.add_prefix(tensors, "classifiers_dict.unnamed.")
    unknown = sorted(name for name in tensors if not name.startswith(PARTS))
    if unknown or not tensors:
        raise CheckpointError(_unknown(tensors, unknown))
    projections = {part: checkpoint.with_prefix(tensors, f"{part}.") for part in PROJECTIONS}
    return Names(
        backbone=backbone_names(checkpoint.with_prefix(tensors, "backbone.")),
        projections={part: _projection_names(found) for part, found in projections.items() if found},
        classifiers=_classifiers(checkpoint.with_prefix(tensors, "classifiers_dict.")),
        whose=whose,
        left_out=left_out,
        ours=ours,
    )


def _is_ours(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a run of ours wrote them: moments of its optimizer, its stem, its head, its name of SwiGLU's layers.

    A backbone alone with an MLP looks like DINOv2's, and is taken for it.
    """
    for name, tensor in tensors.items():
        if name.startswith(("optimizer.", "head.")) or ".patch_embed.convs." in f".{name}":
            return True
        if name.endswith(".mlp.fc1.weight"):
            second = tensors.get(name.replace(".fc1.", ".fc2."))
            if second is not None and second.ndim == tensor.ndim == 2 and tensor.shape[0] != second.shape[1]:
                return True
    return False


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before all names."""
    if any("_flat_param" in name for name in tensors):
        raise CheckpointError(
            "this is one GPU's shard of a training state (flat parameters of FSDP), not a model: take "
            "eval/training_N/teacher_checkpoint.pth of that run"
        )
    result = named_once((name.replace("_fsdp_wrapped_module.", ""), tensor) for name, tensor in tensors.items())
    while found := next((w for w in WRAPPERS if result and all(name.startswith(w) for name in result)), None):
        result = checkpoint.with_prefix(result, found)
    return result


def _choose(tensors: dict[str, Tensor], which: str) -> tuple[dict[str, Tensor], str | None, dict[str, str]]:
    """The teacher's or the student's part of a file that says whose its tensors are."""
    counts = {whose: len(checkpoint.with_prefix(tensors, f"{whose}.")) for whose in ("teacher", "student")}
    if not any(counts.values()):
        if which == "student":
            raise ConfigError("this file does not say whose its weights are, so there is no student to take of it")
        return tensors, None, {}
    if not counts[which]:
        other = "student" if which == "teacher" else "teacher"
        raise ConfigError(f"this file holds no {which}, only a {other}: take it with --which {other}")
    left_out = {
        whose: f"{count} tensors; take it with --which {whose}"
        for whose, count in counts.items()
        if count and whose != which
    }
    rest = [(name, tensor) for name, tensor in tensors.items() if not name.startswith(("teacher.", "student."))]
    chosen = _unwrapped(checkpoint.with_prefix(tensors, f"{which}."))
    return named_once([*chosen.items(), *rest]), which, left_out


def _unknown(tensors: Mapping[str, Tensor], unknown: list[str]) -> str:
    if not tensors:
        return "holds no tensor of a model"
    return (
        f"weights of another architecture: {len(unknown)} of {len(tensors)} tensors belong to nothing that is known "
        f"here, such as {', '.join(name[:80] for name in unknown[:3])}"
    )


def backbone_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's tensors under our names; without registers, the empty tensor that stands for them.

    Raises: CheckpointError if two tensors come to the same name, or a block is lacking.
    """
    result = named_once((_backbone_name(name), tensor) for name, tensor in tensors.items())
    if "register_tokens" not in result and "cls_token" in result:
        width = result["cls_token"].shape[-1:]  # none of a scalar, which is refused with its shape later
        result["register_tokens"] = torch.zeros(1, 0, *width)
    blocks = {found[1] for name in result if (found := re.match(r"blocks\.([^.]+)\.", name))}
    lacking = next((number for number in range(len(blocks)) if str(number) not in blocks), None)
    if lacking is not None:
        raise CheckpointError(f"block {lacking} is lacking (there are {len(blocks)})")
    return result


def _backbone_name(name: str) -> str:
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    name = re.sub(r"\.(ls[12])\.weight$", r".\1.gamma", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def _projection_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DINO or iBOT head's; a single layer has no number there."""
    return named_once((re.sub(r"^mlp\.(weight|bias)$", r"mlp.0.\1", name), tensor) for name, tensor in tensors.items())


def _classifiers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By the name of each: GLoRI's after `decoder.`, a linear head's as `linear.…`."""
    result: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        classifier, _, rest = name.partition(".")
        result.setdefault(classifier, []).append((rest.removeprefix("decoder."), tensor))
    return {classifier: named_once(pairs) for classifier, pairs in result.items()}


def dinov2_names(tensors: Mapping[str, Tensor], swiglu: bool) -> dict[str, Tensor]:
    """The inverse of `backbone_names`, in one chunk: what DINOv2's own code loads."""
    result = {}
    for name, tensor in tensors.items():
        if swiglu:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        if tensor.numel() or name != "register_tokens":
            result[name] = tensor
    return result
