"""Makes what the examples run on where nothing else is given: phantom radiographs, and a small model.

The images are drawn, the weights are random: the examples show how things are called, not what a model can do.
"""

from __future__ import annotations

from pathlib import Path

from chexfound.data.phantom import generate
from chexfound.model import checkpoint, vit
from chexfound.model.weights.published.tensor_names import dinov2_names
from chexfound.recipe.schema import Input, Student

PX = 112  # of the small model's images; patches have 16


def radiographs(folder: Path, sites: int = 2, patients: int = 24) -> Path:
    """Draw DICOM radiographs of several hospitals, each in a folder of its own with a manifest."""
    generate(folder, sites=sites, patients=patients, size_px=128)
    return folder


def backbone_file(folder: Path) -> Path:
    """Write a vision transformer (12 blocks of width 192) that was never trained, by the names that DINOv2 gives."""
    model = vit.build(Student(arch="vit_tiny", stem="linear"), Input(normalization="mean_std"), PX)
    checkpoint.save(folder / "model.safetensors", dinov2_names(model.state_dict(), swiglu=True))
    return folder / "model.safetensors"
