"""Student, EMA teacher, and one step's losses (DINOv2's `SSLMetaArch`).

Shapes: B images, L local crops an image, P patches of a global crop, M masked patches of the batch,
K prototypes.  Crops of one view stand together: global (2·B, H, W), local (L·B, h, w).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from chexfound.model import vit
from chexfound.model.heads import DINOHead
from chexfound.parallel import group
from chexfound.pretrain import losses
from chexfound.pretrain.health import measures
from chexfound.recipe.schema import Dino, Ibot, Recipe

SUBMODULES = ("backbone", "dino_head", "ibot_head")
CENTER_MOMENTUM = 0.9


@dataclass(frozen=True)
class Batch:
    """One step's input: crops uint8 (2·B, H, W) and (L·B, h, w), masks bool (2·B, P)."""

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor

    @property
    def size(self) -> int:
        """B."""
        return len(self.global_crops) // 2


def build_student(recipe: Recipe) -> nn.ModuleDict:
    """Backbone and both heads of a stage, with fresh weights from torch's global generator."""
    backbone = vit.build(recipe.student, recipe.input, recipe.crops.global_crops_size)
    backbone.checkpointing = recipe.train.checkpointing

    def head(config: Dino | Ibot) -> DINOHead:
        return DINOHead(
            backbone.embed_dim,
            config.head_n_prototypes,
            config.head_hidden_dim,
            config.head_bottleneck_dim,
            config.head_nlayers,
            config.head_centered,
            config.head_norm_last_layer,
            recipe.student.init,
        )

    return nn.ModuleDict({"backbone": backbone, "dino_head": head(recipe.dino), "ibot_head": head(recipe.ibot)})


def _tokens(model: nn.ModuleDict, crops: Tensor, wanted: Tensor, mask: bool = False) -> tuple[Tensor, Tensor]:
    """CLS tokens (B, D) and the wanted patches' (M, D); wanted is bool (B, P), and with `mask` they are masked."""
    backbone = cast(vit.VisionTransformer, model["backbone"])
    rows = backbone.token_rows(len(crops), wanted)
    tokens = backbone.tokens_at(crops, rows, wanted if mask else None)
    return tokens[: len(crops)], tokens[len(crops) :]


class SSLMetaArch(nn.Module):
    """The self-supervised model of one site, or of the pooled data, in one stage of the curriculum.

    Buffers `dino_center` and `ibot_center` (1, K) are used, and moved, by softmax centering only.
    `queue` (rows, bottleneck) holds the teacher's CLS tokens, as its head's prototypes see them, of the
    last `train.sinkhorn_queue` batches, the oldest first: a small batch of one scanner cannot use K
    prototypes equally, many batches can (Caron et al. 2020, 3.2).  Only for DINO: iBOT has several
    times the rows in a batch.
    """

    queue: Tensor
    dino_center: Tensor
    ibot_center: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = build_student(recipe)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("dino_center", torch.zeros(1, recipe.dino.head_n_prototypes))
        self.register_buffer("ibot_center", torch.zeros(1, recipe.ibot.head_n_prototypes))
        self._means: dict[str, Tensor] = {}  # of the last step's teacher logits, by centre
        self.register_buffer("queue", torch.zeros(0, recipe.dino.head_bottleneck_dim), persistent=False)
        self._seen: Tensor | None = None  # the last step's rows, which the queue takes up once the step is done

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Set the student's mode; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher ← m · teacher + (1 − m) · student; centres and queue take up what the last step saw."""
        torch._foreach_lerp_(
            [group.local(p) for p in self.teacher.parameters()],
            [group.local(p.detach()) for p in self.student.parameters()],
            1 - momentum,
        )
        for name, mean in self._means.items():
            getattr(self, name).lerp_(mean, 1 - CENTER_MOMENTUM)
        self._means.clear()
        if self._seen is not None:
            rows = self.recipe.train.sinkhorn_queue * len(self._seen)
            self.queue, self._seen = torch.cat([self.queue, self._seen])[-rows:], None

    @torch.no_grad()
    def _targets(self, logits: Tensor, center: str, temp: float) -> Tensor:
        if self.recipe.train.centering == "sinkhorn_knopp":
            return losses.sinkhorn_knopp(logits, temp, distributed=self.recipe.train.sinkhorn_distributed)
        if self.training:
            self._means[center] = group.mean_row(logits.float())
        return losses.softmax_center(logits, getattr(self, center), temp)

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, temp: float) -> tuple[Tensor, Tensor]:
        """Assignments of the CLS tokens (2·B, K), the two views swapped, and of the masked patches (M, K)."""
        seen, masked = _tokens(self.teacher, batch.global_crops, batch.masks)
        first, second = seen.chunk(2)
        head, swapped = cast(DINOHead, self.teacher["dino_head"]), torch.cat([second, first])
        if self.recipe.train.sinkhorn_queue:
            rows = head.bottleneck(swapped)
            cls = head.last_layer(torch.cat([self.queue.to(rows.dtype), rows]))
            self._seen = rows.float() if self.training else None
        else:
            cls = head(swapped)
        patches = self.teacher["ibot_head"](masked)
        ibot = self._targets(patches, "ibot_center", temp) if group.total(len(patches)) else patches
        return self._targets(cls, "dino_center", temp)[len(self.queue) :], ibot

    def forward(self, batch: Batch, teacher_temp: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is back-propagated, and for display its parts and the step's health.

        total = w_dino · (global + local) + w_koleo · Σ_view KoLeo + w_ibot · iBOT.  DINO's terms are
        divided by 2 + 2·L (the number of pairs of different views), as in DINOv2.
        """
        recipe = self.recipe
        dino_targets, ibot_targets = self.teacher_targets(batch, teacher_temp)
        global_cls, masked = _tokens(self.student, batch.global_crops, batch.masks, mask=True)  # KoLeo's input, iBOT's
        cls = [global_cls]
        n_local = len(batch.local_crops) // batch.size
        if n_local:
            patches = (batch.local_crops.shape[-1] // recipe.student.patch_size) ** 2
            nothing = batch.masks.new_zeros(len(batch.local_crops), patches)
            cls.append(_tokens(self.student, batch.local_crops, nothing)[0])
        logits = self.student["dino_head"](torch.cat(cls))
        global_logits, local_logits = logits[: 2 * batch.size], logits[2 * batch.size :]
        pairs = 2 + 2 * n_local
        dino = 2 * losses.dino_loss([global_logits], [dino_targets]) / pairs
        if n_local:
            dino = dino + losses.dino_loss(local_logits.chunk(n_local), dino_targets.chunk(2)) / pairs
        parts = {"dino": dino}
        total = recipe.dino.loss_weight * dino
        if recipe.dino.koleo_loss_weight:
            far = recipe.dino.koleo_loss_distributed
            first, second = (losses.koleo_loss(view, far) for view in global_cls.chunk(2))
            parts["koleo"] = first + second
            total = total + recipe.dino.koleo_loss_weight * parts["koleo"]
        if recipe.ibot.loss_weight and group.total(len(ibot_targets)):  # on no row, where others have some
            patches = self.student["ibot_head"](masked)
            per_image = batch.masks.sum(1, keepdim=True).clamp_min(1)
            weights = (1.0 / per_image).expand_as(batch.masks)[batch.masks]
            parts["ibot"] = losses.ibot_loss(patches, ibot_targets, weights, 2 * batch.size)
            total = total + recipe.ibot.loss_weight * parts["ibot"]
        parts |= measures.figures(
            group.gathered(dino_targets), group.gathered(global_cls.detach())
        )  # of the joint batch
        return total, {name: part.detach() for name, part in parts.items()}
