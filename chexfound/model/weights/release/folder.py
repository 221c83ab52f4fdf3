"""A folder of weights, imported or released: one safetensors file a part, and a config.json that has their SHA-256.

The config is timm's where timm can load the backbone; what is ours stands under "chexfound" in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from chexfound.durable.files import write_json
from chexfound.errors import CheckpointError
from chexfound.model import checkpoint
from chexfound.model.weights.architecture import STRICT, Backbone, Glori, Linear, Projection, section
from chexfound.model.weights.in_parts import ALL, Part, Weights, checked
from chexfound.model.weights.published import tensor_names
from chexfound.model.weights.published.pth import sha256
from chexfound.parsing.names import shown
from chexfound.recipe.schema import Input

FORMAT = 1
KEY = "chexfound"
COMPATIBLE, BACKBONE = "backbone_compatible.safetensors", "backbone.safetensors"
METADATA = {"format": "pt"}
LARGEST_SIDE = 512  # patches; positions are resized to the images, at a cost of memory that no file has paid for
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FromFile:
    """A published checkpoint."""

    file: str
    format: Literal["pth", "safetensors"]
    sha256: Sha256
    dtypes: list[str] = field(default_factory=list)
    whose: Literal["teacher", "student"] | None = None
    classifier: str | None = None
    says: dict[str, bool | int | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FromFiles:
    """Several of them."""

    files: Annotated[list[FromFile], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FromRun:
    """A run of ours."""

    run: str
    weights_sha256: Sha256
    whose: Literal["teacher", "student"] | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stated:
    """Hold what is ours of config.json."""

    format: Literal[1]
    kind: Literal["imported", "release"]
    backbone: Backbone | None = None
    dino_head: Projection | None = None
    ibot_head: Projection | None = None
    head: Annotated[Glori | Linear, Field(discriminator="kind")] | None = None
    input: Input | None = None
    image_px: Annotated[int, Field(strict=True, gt=0)] | None = None
    findings: tuple[str, ...] = ()
    source: FromFile | FromFiles | FromRun
    assumed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: dict[str, Sha256]

    @model_validator(mode="after")
    def _fits(self) -> Stated:
        if self.backbone is not None:
            if self.input is None or self.image_px is None:
                raise ValueError("a backbone without its input or image_px")
            side, rest = divmod(self.image_px, self.backbone.patch_size)
            largest = max(self.backbone.grid, LARGEST_SIDE)
            if rest or side > largest:
                raise ValueError(f"image_px {self.image_px}: not 1 to {largest} patches of {self.backbone.patch_size}")
        if self.head is not None and self.findings and len(self.findings) != self.head.n_findings:
            raise ValueError(f"{len(self.findings)} findings for a head of {self.head.n_findings}")
        return self


def file_of(name: str, config: Mapping[str, Any]) -> str:
    """The file of a part; a backbone with DINOv2's own stem is called so that those who know DINOv2 know it."""
    if name != "backbone":
        return f"{name}.safetensors"
    return BACKBONE if config.get("stem") == "conv" else COMPATIBLE


def write_parts(folder: Path, weights: Weights) -> None:
    """Write a file for each part; the backbone's in DINOv2's names."""
    for name, part in weights.parts.items():
        tensors = part.tensors
        if name == "backbone":
            tensors = tensor_names.dinov2_names(tensors, part.config.ffn == "swiglu")
        checkpoint.save(folder / file_of(name, plain(part.config)), tensors, METADATA)


def write_config(folder: Path, weights: Weights, kind: str, others: Mapping[str, Any] | None = None) -> None:
    """Write config.json, last of all files of the folder: it has the SHA-256 of each.

    Args:
        folder: with all its other files in it.
        weights: whose parts were written.
        kind: imported | release.
        others: what stands at its top for others to read (timm).
    """
    parts: dict[str, Any] = {name: None for name in ALL}
    parts |= {name: plain(part.config) for name, part in weights.parts.items()}
    ours = {
        "format": FORMAT,
        "kind": kind,
        **parts,
        "input": plain(weights.input) if weights.input else None,
        "image_px": weights.image_px,
        "findings": list(weights.findings),
        "source": weights.source,
        "assumed": weights.assumed,
        "left_out": weights.left_out,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }
    write_json(folder / "config.json", {**(others or {}), KEY: ours})


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON has it."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def stated(folder: Path) -> Stated | None:
    """Give what config.json says, checked; None if there is none, or it is no folder's of ours.

    Raises: CheckpointError.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    ours = config(folder).get(KEY)
    if ours is None:
        return None
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        found = ours.get("format") if isinstance(ours, dict) else None
        raise CheckpointError(f"{path}: weights of format {found!r}; this release reads {FORMAT}")
    result: Stated = section(Stated, ours, str(path))
    return result


def config(folder: Path) -> dict[str, Any]:
    """Give what config.json holds; all texts in it printable.

    Raises: CheckpointError if it is absent or no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        values = _printable(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return values


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {shown(key): _printable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return shown(value) if isinstance(value, str) else value


def read(folder: Path, wanted: Collection[str] = ALL) -> Weights:
    """The wanted parts of a folder of weights; the files that are read are checked against their SHA-256.

    Raises: CheckpointError if one is absent, damaged, changed, or is not what the config says.
    """
    folder = Path(folder)
    said = stated(folder)
    if said is None:
        raise CheckpointError(f"{folder}/config.json: is not there, or says nothing of weights of ours")
    architectures = {name: getattr(said, name) for name in ALL if name in wanted}
    parts = {name: _part(folder, name, found, said) for name, found in architectures.items() if found}
    return Weights(
        backbone=parts.get("backbone"),
        projections={name: parts[name] for name in tensor_names.PROJECTIONS if name in parts},
        head=parts.get("head"),
        findings=said.findings,
        input=said.input,
        image_px=said.image_px,
        source=_without_none(said.source),
        left_out=said.left_out,
        assumed=said.assumed,
    )


def _without_none(source: Any) -> dict[str, Any]:
    values: dict[str, Any] = asdict(source, dict_factory=lambda pairs: {key: value for key, value in pairs if value})
    return values


def _part(folder: Path, name: str, found: Any, said: Stated) -> Part:
    file = file_of(name, plain(found))
    verify(folder, file, said.files)
    tensors = checkpoint.load(folder / file)
    return checked(name, found, tensor_names.backbone_names(tensors) if name == "backbone" else tensors)


def verify(folder: Path, file: str, stated: Mapping[str, Any]) -> None:
    """Check a file against the SHA-256 that the config states.

    Raises: CheckpointError if the file is absent, or another than was written.
    """
    if file not in stated or Path(file).name != file:
        raise CheckpointError(f"{folder}/config.json: states no SHA-256 of {file[:80]!r}")
    try:
        found = sha256(folder / file)
    except OSError as error:
        raise CheckpointError(f"{folder / file}: cannot be read ({error.strerror}); copy the folder anew") from error
    if found != stated[file]:
        raise CheckpointError(
            f"{folder / file}: is not the file that config.json was written for: changed or damaged; copy it anew"
        )
