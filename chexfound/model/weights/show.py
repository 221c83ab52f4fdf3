"""Contents of a file or a folder of weights, as plain values and as lines of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.weights import describe, in_parts, load
from chexfound.model.weights.in_parts import ImportOptions, Weights
from chexfound.model.weights.published import pth, tensor_names
from chexfound.model.weights.published.untrusted import at
from chexfound.model.weights.release import folder as folders
from chexfound.parsing.names import shown

RUN = "a run's model"


@dataclass(frozen=True, kw_only=True)
class Look:
    """Hold what was found: plain values for JSON, and the model in parts if it is one."""

    values: dict[str, Any]
    found: Weights | None


def look(path: Path, options: ImportOptions) -> Look:
    """Kind, parts with their architectures, what was assumed and left out, every file's SHA-256.

    A file of tensors that belong to no model that is known is told of too, by its names.

    Raises: CheckpointError if it cannot be read, holds code, or a file is not what the folder's config says.
    """
    path = Path(path)
    with at(path):
        return _folder(path, options) if path.is_dir() else _file(path, options)


def _folder(path: Path, options: ImportOptions) -> Look:
    found = load.read(path, options)
    kind, files = RUN, {}
    stated = folders.stated(path)
    if stated is not None:
        kind, files = "a release" if stated.kind == "release" else "an imported folder", stated.files
        for name in files:
            folders.verify(path, name, files)
    values = {"path": shown(path.name or path), "kind": kind, **_values(found), "files": files}
    return Look(values=values | {"timm": found.backbone is not None and "model.safetensors" in files}, found=found)


def _file(path: Path, options: ImportOptions) -> Look:
    file = pth.read(path)
    values: dict[str, Any] = {
        "path": shown(path.name),
        "kind": "a published checkpoint",
        "format": file.format,
        "bytes": path.stat().st_size,
        "sha256": file.sha256,
        "dtypes": in_parts.dtypes(file),
        "says": in_parts.said(file),
        "groups": _groups(file.tensors),
        "left_out": file.left_out,
    }
    try:
        found = in_parts.of_tensors(file, options)
    except (CheckpointError, ConfigError) as error:
        why = str(error).removeprefix(f"{path}: ")
        return Look(values=values | {"kind": "tensors, not a checkpoint that can be taken in", "why": why}, found=None)
    return Look(values=values | _values(found), found=found)


def _values(found: Weights) -> dict[str, Any]:
    """The parts of a model."""
    return {
        "parts": {
            name: {"is": describe.part(part), **describe.size(part.tensors), **folders.plain(part.config)}
            for name, part in found.parts.items()
        },
        "findings": list(found.findings),
        "input": {**folders.plain(found.input), "image_px": found.image_px} if found.input else None,
        "source": found.source,
        "assumed": found.assumed,
        "left_out": found.left_out,
    }


def _groups(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Tensors by the beginning of their names, numbers aside."""
    result: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        start = _group(name)
        group = result.setdefault(start, {"name": start, "tensors": 0, "parameters": 0, "shapes": []})
        group["tensors"] += 1
        group["parameters"] += tensor.numel()
        if len(group["shapes"]) < 4 and list(tensor.shape) not in group["shapes"]:
            group["shapes"].append(list(tensor.shape))
    return list(result.values())


def _group(name: str) -> str:
    """`teacher.backbone.blocks.0.3.attn.qkv.weight` to `teacher.backbone.blocks`; a head by the name it has."""
    words = name.split(".")
    if "classifiers_dict" in words:
        return ".".join(words[: words.index("classifiers_dict") + 2])
    kept = [word for word in words if not re.fullmatch(r"\d+", word)]
    here = next((place for place, word in enumerate(kept) if word in (*tensor_names.PROJECTIONS, "blocks")), None)
    return ".".join(kept[: here + 1]) if here is not None else ".".join(kept[:-1] or kept)


def text(seen: Look) -> list[str]:
    """The same as lines for a terminal."""
    values = seen.values
    rows: list[tuple[str, str]] = [("kind", values["kind"])]
    if "why" in values:
        rows.append(("because", values["why"]))
    if "sha256" in values:
        size = f"{values['format']}, {values['bytes']:,} bytes, {', '.join(values['dtypes'])}"
        rows += [("file", size), ("SHA-256", values["sha256"])]
        rows += [("says", f"{key}: {value}") for key, value in values["says"].items()]
    else:
        rows += [("source", line) for line in describe.sources(values["source"])]
    if values["kind"] == RUN:  # whose reader has held the tensors here against it
        rows.append(("SHA-256", f"{values['source']['weights_sha256']}, over the weights"))
    lines = [values["path"], *describe.table(rows)]
    if seen.found is not None:
        lines += describe.lines(seen.found, hints="sha256" in values)
    if values.get("files"):
        loads = "loads it" if values["timm"] else "has no file here (export writes one where timm has the architecture)"
        files = [("files", f"{name}  {value[:16]}…") for name, value in values["files"].items()]
        lines += describe.table([("timm", loads), *files, ("", "each has the SHA-256 that config.json states")])
    return lines + _table(values.get("groups") or [])


def _table(groups: list[dict[str, Any]]) -> list[str]:
    if not groups:
        return []
    width = max(len(group["name"]) for group in groups)
    lines = ["", f"  {'names beginning with':<{max(width, 20)}}  tensors   parameters  shapes"]
    for group in groups:
        shapes = ", ".join("×".join(map(str, shape)) or "one" for shape in group["shapes"])
        lines.append(
            f"  {group['name']:<{max(width, 20)}}  {group['tensors']:>7}  {group['parameters']:>11,}  {shapes}"
        )
    return lines
