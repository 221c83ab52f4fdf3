"""DINO + iBOT + KoLeo in straightforward PyTorch: what `ssl_step.py` holds our step against without `--rival`.

Written from the papers, as somebody would who follows them with torchvision's augmentations on RGB
tensors, fused attention, a multi-tensor AdamW, one forward pass a resolution and the iBOT head on the
masked tokens alone; nothing is made slow on purpose, and nothing is tuned.

Sources: Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Oquab et al. 2023 (DINOv2), Darcet et al.
2023 (registers), Sablayrolles et al. 2019 (KoLeo), Caron et al. 2020 (Sinkhorn-Knopp), Bao et al. 2022
(block masks).  Shapes: B images, L local crops an image, N tokens, D width, K prototypes.
"""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from ssl_engine import Engine, autocast
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import InterpolationMode, v2

from chexfound.recipe.schema import ARCHS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SwiGLU(nn.Module):
    """silu(x·W1) ⊙ (x·W2), then W3 (Shazeer 2020); hidden width 2/3 · 4D, rounded up to 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3, B, heads, N, D/heads
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A gain a channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm block with LayerScale and stochastic depth, an image at a time (Huang et al. 2016)."""

    def __init__(self, dim: int, heads: int, layerscale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.attn, self.ls1 = (
            nn.LayerNorm(dim, eps=1e-6),
            Attention(dim, heads),
            LayerScale(dim, layerscale),
        )
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), SwiGLU(dim), LayerScale(dim, layerscale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        x = x + self._kept(self.ls1(self.attn(self.norm1(x))))
        return x + self._kept(self.ls2(self.mlp(self.norm2(x))))

    def _kept(self, residual: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return residual
        keep = torch.rand(len(residual), 1, 1, device=residual.device) >= self.drop_path
        return residual * keep / (1 - self.drop_path)


class VisionTransformer(nn.Module):
    """Registers after CLS; positions resized by the factor (n + 0.1) / M, as DINOv2 does."""

    def __init__(self, config: dict[str, Any], drop_path: float) -> None:
        super().__init__()
        student = config["student"]
        dim, depth, heads = ARCHS[student["arch"]]
        patch = student["patch_size"]
        self.grid, self.registers = config["crops"]["global_crops_size"] // patch, student["num_register_tokens"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.register_tokens = nn.Parameter(torch.randn(1, self.registers, dim) * 1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + self.grid**2, dim), std=0.02))
        self.blocks = nn.ModuleList(Block(dim, heads, student["layerscale"], drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(_initialise)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """CLS (B, D) and patch tokens (B, P, D) of images (B, 3, H, W); masks (B, P), True = masked."""
        x = self.patch_embed.proj(images)
        rows = x.shape[2]
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token[None], x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(rows)
        x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers :]

    def _positions(self, rows: int) -> Tensor:
        if rows == self.grid:
            return self.pos_embed
        patch = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = (rows + 0.1) / self.grid
        patch = F.interpolate(patch, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], patch.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    """MLP, bottleneck on the sphere, weight-normalised prototypes."""

    def __init__(self, dim: int, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, bottleneck = config["head_hidden_dim"], config["head_bottleneck_dim"]
        widths = [dim] + [hidden] * (config["head_nlayers"] - 1) + [bottleneck]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1]).apply(_initialise)
        self.last_layer = weight_norm(nn.Linear(bottleneck, config["head_n_prototypes"], bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, K)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """Three rounds of: each prototype 1/K of the mass, each of the n rows 1/n."""
    q = torch.exp(logits.float() / temperature)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0, keepdim=True) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row, at student temperature 0.1."""
    return -(targets * F.log_softmax(logits.float() / 0.1, dim=-1)).sum(-1)


def koleo(x: Tensor) -> Tensor:
    """−mean log distance to the nearest neighbour on the sphere."""
    x = F.normalize(x.float(), dim=-1, eps=1e-8)
    nearest = (x @ x.T - 3 * torch.eye(len(x), device=x.device)).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def block_mask(grid: int, wanted: int) -> Tensor:
    """About `wanted` masked patches in random rectangles: bool (grid²,)."""
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    for _ in range(100):
        missing = wanted - int(mask.sum())
        if missing <= 0:
            break
        area, aspect = random.uniform(1, missing), math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h <= grid and 0 < w <= grid:
            top, left = random.randint(0, grid - h), random.randint(0, grid - w)
            mask[top : top + h, left : left + w] = True
    return mask.flatten()


def augmentation(size: int, scale: list[float], blur: float, solarize: float) -> v2.Transform:
    """DINOv2's, on a uint8 RGB tensor."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class Plain(Engine):
    """The whole step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        config, crops = self.config, self.config["crops"]
        random.seed(settings["seed"])
        torch.manual_seed(settings["seed"])
        dim = ARCHS[config["student"]["arch"]][0]
        backbone = VisionTransformer(config, config["student"]["drop_path_rate"])
        heads = {"dino_head": Head(dim, config["dino"]), "ibot_head": Head(dim, config["ibot"])}
        self.device = settings.get("device", "cpu")
        self.student = nn.ModuleDict({"backbone": backbone, **heads}).train().to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        optim = config["optim"]
        betas = (optim["adamw_beta1"], optim["adamw_beta2"])
        self.optimizer = torch.optim.AdamW(self._groups(), betas=betas, foreach=True)
        big = crops["global_crops_size"], crops["global_crops_scale"]
        small = augmentation(crops["local_crops_size"], crops["local_crops_scale"], 0.5, 0.0)
        self.augmentations = [augmentation(*big, 1.0, 0.0), augmentation(*big, 0.1, 0.2)]
        self.augmentations += [small] * crops["local_crops_number"]

    def _groups(self) -> list[dict[str, Any]]:
        """By layer decay, weight decay and whether it is a prototype."""
        optim, depth = self.config["optim"], len(self.student["backbone"].blocks)
        groups = []
        for name, parameter in self.student.named_parameters():
            layer = depth + 1
            if ".blocks." in name:
                layer = int(name.split(".")[2]) + 1
            elif name.startswith("backbone.") and "norm" not in name:
                layer = 0
            rate = optim["layerwise_decay"] ** (depth + 1 - layer)
            rate *= optim["patch_embed_lr_mult"] if "patch_embed" in name else 1.0
            decay = float(parameter.ndim > 1)
            last = "last_layer" in name
            groups.append({"params": [parameter], "lr_mult": rate, "wd_mult": decay, "last": last})
        return groups

    def weights(self) -> dict[str, Tensor]:
        """With the prototypes' parameters under their published names."""
        names = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
        result = {}
        for who, model in (("student", self.student), ("teacher", self.teacher)):
            for name, tensor in model.state_dict().items():
                for ours, published in names:
                    name = name.replace(ours, published)
                result[f"{who}.{name}"] = tensor
        return result

    def sample(self, file: str) -> Any:
        """Crops: two global, then the local ones."""
        image = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
        return [augment(image) for augment in self.augmentations]

    def collate(self, samples: list[Any]) -> Any:
        """View by view; a share of the global crops is masked, by ratios spread over the range."""
        views = [torch.stack(crops) for crops in zip(*samples, strict=True)]
        grid, ibot = self.student["backbone"].grid, self.config["ibot"]
        images = 2 * len(samples)
        low, high = ibot["mask_ratio_min_max"]
        masked = int(images * ibot["mask_sample_probability"])
        ratios = [low + (high - low) * (number + random.random()) / masked for number in range(masked)]
        masks = [block_mask(grid, int(grid**2 * ratio)) for ratio in [*ratios, *[0.0] * (images - masked)]]
        random.shuffle(masks)
        return torch.cat(views[:2]), torch.cat(views[2:]), torch.stack(masks)

    def crops(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As they are."""
        return batch

    def step(self, batch: Any, values: dict[str, float], precision: str) -> float:
        """Schedules, loss, clipping a submodule, AdamW, EMA."""
        for group in self.optimizer.param_groups:
            group["lr"] = (values["last_layer_lr"] if group["last"] else values["lr"]) * group["lr_mult"]
            group["weight_decay"] = values["weight_decay"] * group["wd_mult"]
        self.optimizer.zero_grad()
        with autocast(precision, self.device):
            loss = self.loss(*batch, values["teacher_temp"])
        loss.backward()
        for module in self.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), self.config["optim"]["clip_grad"])
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(values["momentum"]).add_(theirs, alpha=1 - values["momentum"])
        return loss.item()

    def loss(self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, temperature: float) -> Tensor:
        """What is back-propagated: DINO over all pairs of different views, iBOT, KoLeo."""
        images = len(global_crops) // 2
        with torch.no_grad():
            cls, patches = self.teacher["backbone"](global_crops)
            targets = sinkhorn_knopp(self.teacher["dino_head"](cls), temperature).chunk(2)
            patch_targets = sinkhorn_knopp(self.teacher["ibot_head"](patches[masks]), temperature)
        global_cls, patches = self.student["backbone"](global_crops, masks)
        local_cls, _ = self.student["backbone"](local_crops)
        views = self.student["dino_head"](torch.cat([global_cls, local_cls])).split(images)
        pairs = [(s, t) for s in range(len(views)) for t in range(2) if s != t]
        dino = sum(cross_entropy(views[s], targets[t]).mean() for s, t in pairs) / len(pairs)
        weights = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
        ibot = (cross_entropy(self.student["ibot_head"](patches[masks]), patch_targets) * weights).sum() / len(masks)
        spread = koleo(global_cls[:images]) + koleo(global_cls[images:])
        config = self.config
        return (
            config["dino"]["loss_weight"] * dino
            + config["ibot"]["loss_weight"] * ibot
            + config["dino"]["koleo_loss_weight"] * spread
        )
