"""A folder of weights, imported or released: one safetensors file a part, and a config.json that has their SHA-256.

The config is timm's where timm can load the backbone; what is ours stands under "chexfound" in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from chexfound.errors import CheckpointError
from chexfound.journal import write_json
from chexfound.model import checkpoint
from chexfound.model.weights import published
from chexfound.model.weights.architecture import Backbone, Glori, Linear, Projection, section
from chexfound.model.weights.parts import ALL, Part, Weights, sha256
from chexfound.schema import Input

FORMAT = 1
KEY = "chexfound"
COMPATIBLE, BACKBONE = "backbone_compatible.safetensors", "backbone.safetensors"
HEADS = {"glori": Glori, "linear": Linear}
METADATA = {"format": "pt"}


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
            tensors = published.dinov2_names(tensors, part.config.ffn == "swiglu")
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
    from dataclasses import asdict

    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def config(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises: CheckpointError if it is absent or no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return values


def read(folder: Path, wanted: Collection[str] = ALL) -> Weights:
    """The wanted parts of a folder of weights; the files that are read are checked against their SHA-256.

    Raises: CheckpointError if one is absent, damaged, changed, or is not what the config says.
    """
    folder = Path(folder)
    where = f"{folder}/config.json"
    ours = config(folder).get(KEY)
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        found = ours.get("format") if isinstance(ours, dict) else None
        raise CheckpointError(f"{where}: weights of format {found!r}; this release reads {FORMAT}")
    parts = {name: _part(folder, name, ours, where) for name in ALL if name in wanted and ours.get(name)}
    findings = ours.get("findings") or []
    if not isinstance(findings, list) or not all(isinstance(name, str) for name in findings):
        raise CheckpointError(f"{where}: findings: not a list of names")
    head = parts.get("head")
    if head is not None and findings and len(findings) != head.config.n_findings:
        raise CheckpointError(f"{where}: {len(findings)} findings for a head of {head.config.n_findings}")
    image_px = ours.get("image_px")
    return Weights(
        backbone=parts.get("backbone"),
        projections={name: parts[name] for name in published.PROJECTIONS if name in parts},
        head=head,
        findings=tuple(findings),
        input=section(Input, ours["input"], f"{where}: input") if ours.get("input") else None,
        image_px=image_px if isinstance(image_px, int) else None,
        source=dict(_mapping(ours, "source", where)),
        left_out=dict(_mapping(ours, "left_out", where)),
        assumed=dict(_mapping(ours, "assumed", where)),
    )


def _mapping(ours: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = ours.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key}: not a JSON object")
    return value


def _part(folder: Path, name: str, ours: Mapping[str, Any], where: str) -> Part:
    values = ours[name]
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: {name}: not a JSON object")
    kind: Any = {"backbone": Backbone, "head": HEADS.get(str(values.get("kind")))}.get(name, Projection)
    if kind is None:
        raise CheckpointError(f"{where}: a head of the kind {values.get('kind')!r}; there are glori and linear")
    read_config = section(kind, values, f"{where}: {name}")
    file = file_of(name, values)
    verify(folder, file, _mapping(ours, "files", where))
    tensors = checkpoint.load(folder / file)
    return Part(read_config, published.backbone_names(tensors) if name == "backbone" else tensors)


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
