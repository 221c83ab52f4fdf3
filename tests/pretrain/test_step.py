"""One whole training step against the papers' formulas, in float64 and in one place.

Losses, gradients and their norms before clipping, weights after AdamW, teacher after the EMA, for several steps in
a row.  Nothing of the model's code is used but its parameters' names and initial values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chexfound.pretrain import optimizer, schedules
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.meta_arch import SUBMODULES, Batch
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe.schema import ARCHS, Recipe

Weights = dict[str, Tensor]
STEPS = 3


class ByHand:
    """Student, teacher, Adam's moments and centres as plain float64 tensors."""

    def __init__(self, trainer: Pretrainer) -> None:
        self.recipe = trainer.recipe
        self.dim, self.depth, self.heads = ARCHS[self.recipe.student.arch]
        state = {name: tensor.double() for name, tensor in trainer.model.state_dict().items()}
        self.student = {name[8:]: tensor for name, tensor in state.items() if name.startswith("student.")}
        self.teacher = {name[8:]: tensor for name, tensor in state.items() if name.startswith("teacher.")}
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.student.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.student.items()}
        self.centers = {"dino": torch.zeros(()), "ibot": torch.zeros(())}
        self.grads: Weights = {}
        self.steps = 0

    # ---- model

    def tokens(self, w: Weights, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Dosovitskiy et al. 2021, with registers, SwiGLU and LayerScale; (B, 1 + R + P, D) after the last norm."""
        x = images[:, None].double()
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) / (((x - mean) ** 2).mean((1, 2, 3), keepdim=True).sqrt() + 1)
        side, patch = x.shape[-1] // 16, w["backbone.patch_embed.proj.weight"]
        x = x.unfold(2, 16, 16).unfold(3, 16, 16).reshape(len(x), side * side, -1)  # B, P, pixels
        x = x @ patch.flatten(1).T + w["backbone.patch_embed.proj.bias"]
        if masks is not None:
            x = torch.where(masks[..., None], w["backbone.mask_token"], x)
        places = w["backbone.pos_embed"]
        grid = math.isqrt(places.shape[1] - 1)
        if side != grid:
            square = places[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
            square = F.interpolate(square, scale_factor=((side + 0.1) / grid,) * 2, mode="bicubic")
            places = torch.cat([places[:, :1], square.flatten(2).transpose(1, 2)], 1)
        x = torch.cat([w["backbone.cls_token"].expand(len(x), -1, -1), x], 1) + places
        x = torch.cat([x[:, :1], w["backbone.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
        for number in range(self.depth):
            x = self.block({k: v for k, v in w.items() if f"blocks.{number}." in k}, f"backbone.blocks.{number}.", x)
        return norm(x, w["backbone.norm.weight"], w["backbone.norm.bias"])

    def block(self, w: Weights, at: str, x: Tensor) -> Tensor:
        y = norm(x, w[at + "norm1.weight"], w[at + "norm1.bias"])
        q, k, v = (y @ w[at + "attn.qkv.weight"].T + w[at + "attn.qkv.bias"]).chunk(3, -1)
        width, outputs = self.dim // self.heads, []
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            outputs.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[..., part])
        y = torch.cat(outputs, -1) @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"]
        x = x + w[at + "ls1.gamma"] * y
        y = norm(x, w[at + "norm2.weight"], w[at + "norm2.bias"])
        gate, value = (y @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"]).chunk(2, -1)
        y = (gate / (1 + (-gate).exp()) * value) @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"]
        return x + w[at + "ls2.gamma"] * y

    def logits(self, w: Weights, head: str, x: Tensor) -> Tensor:
        """Three layers, the sphere, weight-normalised prototypes."""
        for number in (0, 2, 4):
            x = x @ w[f"{head}.mlp.{number}.weight"].T + w[f"{head}.mlp.{number}.bias"]
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2 if number < 4 else x
        x = x / (x * x).sum(-1, keepdim=True).sqrt()
        g, v = w[f"{head}.last_layer.weight_g"], w[f"{head}.last_layer.weight_v"]
        return x @ (g * v / (v * v).sum(-1, keepdim=True).sqrt()).T

    # ---- losses

    def targets(self, logits: Tensor, head: str, temp: float) -> Tensor:
        if self.recipe.train.centering == "sinkhorn_knopp":
            q = (logits / temp).exp()
            for _ in range(3):
                q = q / q.sum(0) / q.shape[1]
                q = q / q.sum(1, keepdim=True) / q.shape[0]
            return q * q.shape[0]
        target = ((logits - self.centers[head]) / temp).softmax(-1)
        self.centers[head] = 0.9 * self.centers[head] + 0.1 * logits.mean(0)  # for the next step
        return target

    def losses(self, w: Weights, batch: Batch, temp: float) -> dict[str, Tensor]:
        b, first = batch.size, 1 + self.recipe.student.num_register_tokens
        with torch.no_grad():
            seen = self.tokens(self.teacher, batch.global_crops)
            targets = self.targets(self.logits(self.teacher, "dino_head", seen[:, 0]), "dino", temp).chunk(2)
            patches = self.logits(self.teacher, "ibot_head", seen[:, first:][batch.masks])
            patch_targets = self.targets(patches, "ibot", temp)
        seen = self.tokens(w, batch.global_crops, batch.masks)
        cls = torch.cat([seen[:, 0], self.tokens(w, batch.local_crops)[:, 0]])
        views = self.logits(w, "dino_head", cls).split(b)
        pairs = [(view, target) for view in range(len(views)) for target in range(2) if view != target]
        dino = sum(entropy(views[view], targets[target]).mean() for view, target in pairs) / len(pairs)
        entropies = entropy(self.logits(w, "ibot_head", seen[:, first:][batch.masks]), patch_targets)
        images = batch.masks.nonzero()[:, 0]  # of each masked patch
        counts = batch.masks.sum(1)
        ibot = sum(e / counts[image] for e, image in zip(entropies, images, strict=True)) / (2 * b)
        return {"dino": dino, "ibot": ibot, "koleo": koleo(cls[:b]) + koleo(cls[b : 2 * b])}

    # ---- update

    def step(self, batch: Batch, number: int) -> tuple[dict[str, float], dict[str, float]]:
        """(losses, gradient norms before clipping); the weights move, and `grads` holds the clipped gradients."""
        recipe, values = self.recipe, schedules.at(self.recipe, number)
        w = {name: tensor.clone().requires_grad_() for name, tensor in self.student.items()}
        parts = self.losses(w, batch, values.teacher_temp)
        weights = {
            "dino": recipe.dino.loss_weight,
            "ibot": recipe.ibot.loss_weight,
            "koleo": recipe.dino.koleo_loss_weight,
        }
        total = sum(weights[name] * part for name, part in parts.items())
        grads = dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))
        norms = {}
        for module in SUBMODULES:
            mine = [name for name in grads if name.startswith(module + ".")]
            norms[module] = math.sqrt(sum(float((grads[name] ** 2).sum()) for name in mine))
            for name in mine:
                grads[name] = grads[name] * min(1.0, recipe.optim.clip_grad / (norms[module] + 1e-6))
        self.steps, self.grads = self.steps + 1, grads
        for name, grad in grads.items():
            self.adamw(name, grad, values)
            kept = self.teacher[name] * values.momentum
            self.teacher[name] = kept + self.student[name] * (1 - values.momentum)
        return {"loss": total.item(), **{name: part.item() for name, part in parts.items()}}, norms

    def adamw(self, name: str, grad: Tensor, values: schedules.Schedule) -> None:
        """Loshchilov and Hutter 2019, algorithm 2, with DINOv2's rates a parameter."""
        optim = self.recipe.optim
        below_top = 0  # blocks between it and the heads
        if ".blocks." in name:
            below_top = self.depth - int(name.split(".")[2])
        elif any(part in name for part in ("patch_embed", "token", "pos_embed")):
            below_top = self.depth + 1
        lr = values.last_layer_lr if "last_layer" in name else values.lr
        lr *= optim.layerwise_decay**below_top * (optim.patch_embed_lr_mult if "patch_embed" in name else 1)
        undecayed = name.endswith("bias") or "norm" in name or "gamma" in name
        b1, b2 = optim.adamw_beta1, optim.adamw_beta2
        self.first[name] = b1 * self.first[name] + (1 - b1) * grad
        self.second[name] = b2 * self.second[name] + (1 - b2) * grad**2
        m, v = self.first[name] / (1 - b1**self.steps), self.second[name] / (1 - b2**self.steps)
        decay = 0.0 if undecayed else values.weight_decay
        self.student[name] = self.student[name] * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    scaled = logits / 0.1
    return -(targets * (scaled - scaled.exp().sum(-1, keepdim=True).log())).sum(-1)


def koleo(x: Tensor) -> Tensor:
    x = x / (x * x).sum(-1, keepdim=True).sqrt()
    total = 0.0
    for row in range(len(x)):
        others = torch.stack([x[other] for other in range(len(x)) if other != row])
        total = total - ((others - x[row]) ** 2).sum(-1).sqrt().min().log() / len(x)
    return total


@pytest.fixture
def trainer(small: Callable[..., Recipe], images: np.ndarray, request: Any) -> Pretrainer:
    recipe = small(
        student__stem="linear",
        dino__head_centered=False,
        ibot__head_centered=False,
        dino__head_norm_last_layer=False,
        ibot__head_norm_last_layer=False,
        dino__head_nlayers=3,
        ibot__loss_weight=3.0,
        optim__layerwise_decay=0.9,
        optim__patch_embed_lr_mult=0.2,
        optim__weight_decay_end=0.2,
        optim__freeze_last_layer_epochs=0.25,  # one step
        optim__warmup_epochs=0,
        **request.param,
    )
    result = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # nothing stays at 0 or 1, and the teacher is another than the student
        for name, parameter in result.model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 or "token" in name else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    result.model.train()
    return result


def true_gradients(tensor: Tensor, name: str) -> Tensor:
    """Without the keys' bias: softmax does not see it, and Adam makes steps of the rounding there."""
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize(
    "trainer",
    [{}, {"train__centering": "centering"}, {"optim__clip_grad": 0.05}],
    indirect=True,
    ids=["sinkhorn", "centering", "clipped"],
)
def test_steps_equal_the_formulas(trainer, images, monkeypatch):
    by_hand, norms = ByHand(trainer), []
    clip = optimizer.clip
    monkeypatch.setattr(optimizer, "clip", lambda *arguments: norms.append(clip(*arguments)) or norms[-1])
    before = dict(by_hand.student)
    for number in range(STEPS):
        batch = make_batch(trainer.recipe, images[number : number + 4], number, 0)
        assert batch.masks.any()
        expected, expected_norms = by_hand.step(batch, number)
        norms.clear()
        row = trainer.step(batch, number)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-5)
        assert dict(zip(SUBMODULES, map(float, norms), strict=True)) == pytest.approx(expected_norms, rel=2e-4)
        for name, parameter in trainer.model.student.named_parameters():
            off = (parameter.grad - by_hand.grads[name]).abs().max()
            assert off < 2e-4 * by_hand.grads[name].abs().max() + 1e-7, (number, name)
        state = trainer.model.state_dict()
        lr = schedules.at(trainer.recipe, number).lr
        for name, expected_weight in by_hand.student.items():
            off = true_gradients(state[f"student.{name}"].double() - expected_weight, name).abs().max()
            assert off < 0.02 * lr, (number, name)  # a step moves a weight by about lr
            off = true_gradients(state[f"teacher.{name}"].double() - by_hand.teacher[name], name).abs().max()
            assert off < 1e-6, (number, name)
            frozen = "last_layer" in name and number == 0
            assert torch.equal(by_hand.student[name], before[name]) == frozen, (number, name)
