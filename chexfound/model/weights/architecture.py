"""Architectures that weights are made for, as values that a file can carry: read off the shapes, or off a recipe.

Shapes: D width, R registers, G side of the position grid, p side of a patch, C channels, F findings,
M = n · D width of the tokens of the last n blocks together, E width of GLoRI.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.glori import GLoRI, head_options
from chexfound.model.heads import DINOHead, LinearHead
from chexfound.model.vit import VisionTransformer, swiglu_width
from chexfound.parsing.names import shown
from chexfound.recipe.schema import ARCHS, Input, Prototypes, Recipe, Student, TokenNorm, Width

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Module = TypeVar("Module", bound=nn.Module)
Section = TypeVar("Section")
Blocks = Annotated[int, Field(gt=0, le=1000)]
AttentionHeads = Annotated[int, Field(gt=0, le=1024)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Backbone:
    """A vision transformer."""

    dim: Width
    depth: Blocks
    heads: AttentionHeads
    patch_size: Annotated[int, Field(gt=0, le=1024)]
    in_chans: Literal[1, 3]
    registers: Annotated[int, Field(ge=0, le=1024)]
    ffn: Literal["mlp", "swiglu"]
    layerscale: bool
    grid: Annotated[int, Field(gt=0, le=4096)]
    stem: Literal["linear", "conv"] = "linear"

    @model_validator(mode="after")
    def _heads_divide(self) -> Backbone:
        return _divisible(self, self.dim)

    @property
    def arch(self) -> str | None:
        """Its name, if it has one."""
        return next((name for name, dims in ARCHS.items() if dims == (self.dim, self.depth, self.heads)), None)

    @property
    def ffn_dim(self) -> int:
        """Hidden width of a block's feed-forward part."""
        return _ffn_dim(self.dim, self.ffn)

    @property
    def position_px(self) -> int:
        """Side of the images that the position embeddings are made for."""
        return self.grid * self.patch_size

    def build(self, config: Input) -> VisionTransformer:
        """The module, with fresh weights."""
        values = dict(
            arch=self.arch or "vit_demo",
            stem=self.stem,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_register_tokens=self.registers,
            ffn_layer=self.ffn,
            layerscale=float(self.layerscale),
        )
        student: Student = section(Student, values, "the backbone")
        return VisionTransformer(student, config, self.grid, dims=(self.dim, self.depth, self.heads))

    @staticmethod
    def of_recipe(recipe: Recipe, grid: int) -> Backbone:
        """The backbone of a run."""
        dim, depth, heads = ARCHS[recipe.student.arch]
        return Backbone(
            dim=dim,
            depth=depth,
            heads=heads,
            patch_size=recipe.student.patch_size,
            in_chans=recipe.student.in_chans,
            registers=recipe.student.num_register_tokens,
            ffn="mlp" if recipe.student.ffn_layer == "mlp" else "swiglu",
            layerscale=recipe.student.layerscale > 0,
            grid=grid,
            stem=recipe.student.stem,
        )

    @staticmethod
    def of_shapes(tensors: Mapping[str, Tensor], heads: int | None = None) -> Backbone:
        """The backbone that tensors (under our names) are made for.

        Args:
            tensors: all of them, on any device.
            heads: attention heads, which no shape tells; without it, those of the named architecture of this
                width and depth, else width / 64.

        Raises: CheckpointError if they are no such backbone's; ConfigError if `heads` must be given, or cannot be so.
        """
        dim = shape(tensors, "cls_token", 3)[2]
        positions = shape(tensors, "pos_embed", 3)[1] - 1
        grid = math.isqrt(max(positions, 0))
        if not grid or grid * grid != positions:
            raise CheckpointError(f"pos_embed has {positions} places beside the CLS token's: not a square grid")
        conv = "patch_embed.convs.0.weight" in tensors
        _, in_chans, patch_size, _ = shape(tensors, "patch_embed.proj.weight", 4)
        if conv:
            in_chans, patch_size = shape(tensors, "patch_embed.convs.0.weight", 4)[1], 16
        depth = len({found[1] for name in tensors if (found := re.match(r"blocks\.([^.]+)\.", name))})
        width_in, width_out = (
            shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
            shape(tensors, "blocks.0.mlp.fc2.weight", 2)[1],
        )
        ffn = {width_out: "mlp", 2 * width_out: "swiglu"}.get(width_in)
        if ffn is None or width_out != _ffn_dim(dim, ffn):
            raise CheckpointError(
                f"the feed-forward part goes {dim} → {width_in} → {width_out} → {dim}: neither DINOv2's MLP "
                f"(hidden {_ffn_dim(dim, 'mlp')}) nor its SwiGLU (hidden {_ffn_dim(dim, 'swiglu')})"
            )
        return section(
            Backbone,
            dict(
                dim=dim,
                depth=depth,
                heads=attention_heads(dim, depth, heads),
                patch_size=patch_size,
                in_chans=in_chans,
                registers=shape(tensors, "register_tokens", 3)[1],
                ffn=ffn,
                layerscale="blocks.0.ls1.gamma" in tensors,
                grid=grid,
                stem="conv" if conv else "linear",
            ),
            "the shapes",
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Projection:
    """A DINO or iBOT head."""

    dim: Width
    n_prototypes: Prototypes
    hidden_dim: Width
    bottleneck_dim: Width
    nlayers: Annotated[int, Field(gt=0, le=64)]
    centered: bool = False

    def build(self) -> DINOHead:
        """The module, with fresh weights."""
        return DINOHead(self.dim, self.n_prototypes, self.hidden_dim, self.bottleneck_dim, self.nlayers, self.centered)

    @property
    def widths(self) -> list[int]:
        """Width of the input, of the hidden layers, and of the bottleneck."""
        return [self.dim] + [self.hidden_dim] * (self.nlayers - 1) + [self.bottleneck_dim]

    @staticmethod
    def of_shapes(tensors: Mapping[str, Tensor], centered: bool = False) -> Projection:
        """The head that tensors are made for.

        Raises: CheckpointError.
        """
        layers = [name for name in tensors if re.fullmatch(r"mlp\.\d+\.weight", name)]
        first = shape(tensors, "mlp.0.weight", 2)
        n_prototypes, bottleneck = shape(tensors, "last_layer.weight_v", 2)
        values = dict(
            dim=first[1],
            n_prototypes=n_prototypes,
            hidden_dim=first[0],
            bottleneck_dim=bottleneck,
            nlayers=len(layers),
            centered=centered,
        )
        return section(Projection, values, "the shapes")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Glori:
    """A GLoRI head; `cls`, `stats`, `grid`, `positions`, `token_norm` as in `chexfound.model.glori`."""

    kind: Literal["glori"] = "glori"
    n_findings: Annotated[int, Field(gt=0, le=100_000)]
    dim: Width
    n_blocks: Blocks
    embed_dim: Width = 768
    heads: AttentionHeads = 8
    ffn_dim: Annotated[int, Field(gt=0, le=262_144)] = 2048
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    cls: bool = False
    stats: bool = False
    grid: Annotated[int, Field(ge=0, le=256)] = 0
    positions: Annotated[int, Field(ge=0, le=16_777_216)] = 0
    token_norm: TokenNorm = "none"  # noqa: S105 (tokens of an image)

    @model_validator(mode="after")
    def _heads_divide(self) -> Glori:
        return _divisible(self, self.embed_dim)

    def build(self) -> GLoRI:
        """The module, with fresh weights."""
        return GLoRI(
            self.n_findings,
            self.dim,
            self.n_blocks,
            embed_dim=self.embed_dim,
            heads=self.heads,
            ffn_dim=self.ffn_dim,
            dropout=self.dropout,
            cls=self.cls,
            stats=self.stats,
            grid=self.grid,
            positions=self.positions,
            token_norm=self.token_norm,
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Linear:
    """A linear head; `stats`, `grid`, `avgpool`, `token_norm` as in `chexfound.model.heads`."""

    kind: Literal["linear"] = "linear"
    n_findings: Annotated[int, Field(gt=0, le=100_000)]
    dim: Width
    n_blocks: Blocks
    stats: bool = False
    grid: Annotated[int, Field(ge=0, le=256)] = 0
    avgpool: bool = False
    token_norm: TokenNorm = "none"  # noqa: S105 (tokens of an image)

    def build(self) -> LinearHead:
        """The module, with fresh weights."""
        return LinearHead(
            self.n_findings,
            self.dim,
            self.n_blocks,
            stats=self.stats,
            grid=self.grid,
            avgpool=self.avgpool,
            token_norm=self.token_norm,
        )


Head = Glori | Linear


def head_of_recipe(recipe: Recipe, n_findings: int) -> Head:
    """The head that a run trains: `glori.build_head`'s, as values."""
    options = head_options(recipe, n_findings)
    return Linear(**options) if recipe.adapt.head == "linear" else Glori(**options)


def section(kind: Callable[..., Section], values: Mapping[str, Any], where: str) -> Section:
    """Check plain values (of a file, say) and make them one of the classes above.

    Raises: CheckpointError naming the first that cannot be.
    """
    try:
        return kind(**values)
    except (ValidationError, TypeError) as error:
        if not isinstance(error, ValidationError):
            raise CheckpointError(f"{where}: {shown(error)}") from error
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        if first["type"] == "value_error":  # of a validator of ours, which says all itself
            raise CheckpointError(f"{where}: {shown(key)}{first['ctx']['error']}") from error
        raise CheckpointError(f"{where}: {shown(key)}{first['msg']} (got {str(first['input'])[:80]!r})") from error


def check(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are those of a module, none missing and none unexpected, without taking memory for it.

    Raises: CheckpointError naming what is missing, unexpected, of another shape or not finite.
    """
    try:
        with torch.device("meta"):
            state = build().state_dict()
    except (ValueError, RuntimeError) as error:  # torch's, of widths that a layer cannot have
        raise CheckpointError(f"{what}: no such module can be built: {error}") from error
    try:
        checkpoint.check_fit(state, tensors, list(state))
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error


def filled(build: Callable[[], Module], tensors: Mapping[str, Tensor], what: str) -> Module:
    """Build a module and give it weights; in evaluation mode.

    Raises: CheckpointError, as `check`, before a config that lies about the shapes has cost any memory.
    """
    check(build, tensors, what)
    with torch.device("meta"):
        module = build()
    names = list(module.state_dict())
    if {name for name, _ in module.named_buffers()} - set(names):  # one that no file carries: it needs its value
        module = build()
    else:
        module = module.to_empty(device="cpu")
    checkpoint.load_tensors(module, dict(tensors), names)
    return module.eval()


def attention_heads(dim: int, depth: int, heads: int | None) -> int:
    """Attention heads of a backbone: as told, else as the architecture of this name has, else width / 64.

    Raises: ConfigError.
    """
    if heads is not None:
        if heads < 1 or dim % heads:
            raise ConfigError(f"heads {heads!r}: must divide the width {dim}")
        return heads
    named = [value[2] for value in ARCHS.values() if value[:2] == (dim, depth)]
    if not named and dim % 64:
        raise ConfigError(
            f"the backbone's width {dim} is no multiple of 64, so its number of attention heads cannot be guessed, "
            "and the shapes do not tell it: say it with --heads N (in Python heads=N)"
        )
    return named[0] if named else dim // 64


def _divisible(config: Section, width: int) -> Section:
    if width % config.heads:  # type: ignore[attr-defined]
        raise ValueError(f"{config.heads} attention heads do not divide the width {width}")  # type: ignore[attr-defined]
    return config


def _ffn_dim(dim: int, ffn: str) -> int:
    return 4 * dim if ffn == "mlp" else swiglu_width(dim)


def shape(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Raises: CheckpointError if it is not, or has not `ndim` dimensions.
    """
    if name not in tensors:
        raise CheckpointError(f"there is no {name}")
    if tensors[name].ndim != ndim:
        raise CheckpointError(f"{name} has the shape {tuple(tensors[name].shape)}, not one of {ndim} dimensions")
    return tuple(tensors[name].shape)
