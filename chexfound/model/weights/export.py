"""A release directory: a model as others can use it, in one folder that can be uploaded as it is.

model.safetensors and config.json are timm's where timm has the architecture; the parts in names that
DINOv2's users know stand beside them, with a preprocessor, a card, the recipe and a summary of the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chexfound.durable.files import new_folder, storage, write_json, write_text
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.weights import in_parts, load
from chexfound.model.weights.architecture import filled
from chexfound.model.weights.in_parts import ImportOptions, Weights
from chexfound.model.weights.published.untrusted import at
from chexfound.model.weights.release import folder as folders
from chexfound.model.weights.release import of_run, timm_format
from chexfound.model.weights.release.card import card
from chexfound.recipe import load as recipes

ABOUT = {
    "model.safetensors": "the backbone in timm's names",
    folders.COMPATIBLE: "the backbone in DINOv2's names, with its mask token",
    folders.BACKBONE: "the backbone; its convolutional stem is not DINOv2's",
    "dino_head.safetensors": "the DINO head that it was pretrained with",
    "ibot_head.safetensors": "the iBOT head that it was pretrained with",
    "head.safetensors": "the head of findings",
    "preprocessor_config.json": "what is done to an image first",
    "recipe.yaml": "all values of the run",
    "training_summary.json": "how it was trained",
    "README.md": "this card",
    "config.json": "the architecture, for timm and for chexfound, and the SHA-256 of the files",
}

UNKNOWN = {"note": "not trained by federated CheXFound; ask its source for the data and the training"}


def export(source: Path, out: Path, options: ImportOptions) -> tuple[Weights, str | None, list[str]]:
    """Write a release directory from a run, its model/, or an imported folder.

    Returns:
        What it holds, why timm cannot load it (None if it can, or without a backbone), and the files.

    Raises: CheckpointError, ConfigError if the source cannot be used or `out` is not new; StorageError.
    """
    source = Path(source)
    with at(source):
        if source.is_file():
            raise ConfigError(
                "is a file; take it in first, which asks for what it does not say: "
                f"chexfound weights import {source} --out DIR"
            )
        stated = folders.stated(source)
    if stated is not None and stated.kind == "release":
        raise ConfigError(f"{source}: is a release already; copy it as it is")
    with new_folder(out) as folder:
        weights = load.read(source, options)
        why_not, files = write(folder, weights)
    return weights, why_not, files


def of_finished(run: Path, out: Path, metrics: Mapping[str, Any]) -> None:
    """Write the model of a run that has just ended as a release directory, in the place of what may be there.

    Args:
        run: its folder, or an arm's.
        out: the directory.
        metrics: the run's figures.

    Raises: CheckpointError if a part is absent, damaged, or does not fit the others; StorageError.
    """
    weights = of_run.of_arm(run, metrics=metrics)
    with storage(out):
        if out.exists():
            shutil.rmtree(out)
    with new_folder(out) as folder:
        write(folder, weights)


def write(folder: Path, weights: Weights) -> tuple[str | None, list[str]]:
    """Write a model into an empty folder, as others can use it.

    Returns: why timm cannot load it (None if it can, or without a backbone), and the files.

    Raises: CheckpointError, ConfigError if its parts do not go together; StorageError.
    """
    if not weights.parts:
        raise CheckpointError("holds no part of a model")
    in_parts.check_widths(weights)
    why_not, others = _write_timm(folder, weights)
    folders.write_parts(folder, weights)
    if weights.input is not None:
        write_json(folder / "preprocessor_config.json", preprocessor(weights))
    if weights.recipe is not None:
        write_text(folder / "recipe.yaml", recipes.to_yaml(weights.recipe))
    write_json(folder / "training_summary.json", weights.summary or {"source": weights.source, **UNKNOWN})
    there = {path.name for path in folder.iterdir()} | {"README.md", "config.json"}
    about = {name: what for name, what in ABOUT.items() if name in there}
    write_text(folder / "README.md", card(weights, why_not, about))
    folders.write_config(folder, weights, "release", others)
    return why_not, list(about)


def _write_timm(folder: Path, weights: Weights) -> tuple[str | None, dict[str, Any]]:
    """Write timm's file if timm has the architecture; why not, and what config.json says to timm."""
    if weights.backbone is None or weights.input is None or weights.image_px is None:
        return None, {}
    config, given = weights.backbone.config, weights.input
    why_not = timm_format.obstacle(config, given)
    if why_not:
        return why_not, {}
    module = filled(lambda: config.build(given), weights.backbone.tensors, "backbone")
    tensors, values = timm_format.names(module, weights.image_px), timm_format.config(config, given, weights.image_px)
    timm_format.check(tensors, values)
    checkpoint.save(folder / "model.safetensors", tensors, folders.METADATA)
    return None, values


def preprocessor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json: of transformers' BitImageProcessor, where it can say the normalisation."""
    assert weights.input is not None
    assert weights.backbone is not None
    config, px = weights.input, weights.image_px
    if config.normalization == "zscore":
        return {
            "image_processor_type": None,
            "note": "transformers has no image processor that normalises each image by its own mean and deviation; "
            "chexfound.load_backbone does it to the uint8 images that it is given",
            "normalization": "zscore",
            "formula": "(x - mean(x)) / (std(x) + 1), x the grey levels 0 ... 255 of one image",
            "size": {"height": px, "width": px},
            "in_chans": weights.backbone.config.in_chans,
        }
    mean, std = timm_format.channels(config, weights.backbone.config.in_chans)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": weights.backbone.config.in_chans == 3,
        "do_resize": True,
        "size": {"shortest_edge": px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": px, "width": px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
