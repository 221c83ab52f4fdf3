"""The phantom hospitals: what each one's scanner does to a picture, and which patients it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from chexfound.rng import numpy_generator


@dataclass(frozen=True)
class Hospital:
    """A hospital with one scanner."""

    name: str
    prefix: str
    """Prefix of its patient ids."""
    institution: str
    modality: str
    """CR or DX."""
    maker: str
    model: str
    bits: int
    inverted: bool
    """MONOCHROME1: low values are bright."""
    field: tuple[float, float]
    """Width and height of the exposed field, cm."""
    noise: float
    """Quantum noise at unit exposure, in units of log exposure."""
    blur: float
    """Detector blur, cm (standard deviation)."""
    scatter: float
    """Scattered light as a part of the primary around it."""
    contrast: float
    """Steepness of the film curve."""
    brightness: float
    """Centre of the film curve, as a part of the range."""
    edges: float
    """Weight of the unsharp mask."""
    code: tuple[float, float]
    """Part of the range of values that the picture takes."""
    border: tuple[float, float]
    """Largest collimated border as a part of the field, and its grey value in [0, 1]."""
    compressed: bool
    """Some of its files come as RLE Lossless rather than Explicit VR Little Endian."""
    marker: str
    """The lead letter: L or R."""
    age: float
    """Mean age of its patients."""
    portable: float
    """Part of well patients taken AP."""
    prevalence: Mapping[str, float]
    labelled: tuple[str, ...]
    """Findings that its readers name; the others are seen by no one."""


ALL = ("Cardiomegaly", "Consolidation", "Effusion", "Nodule", "Pneumothorax", "Tube")


def _prevalence(*values: float) -> dict[str, float]:
    return dict(zip(ALL, values, strict=True))


BASE = (
    Hospital(
        name="northfield", prefix="NF", institution="Northfield General Hospital", modality="DX",
        maker="Phantom Imaging", model="Flat 43", bits=12, inverted=False, field=(37.0, 37.0),
        noise=0.006, blur=0.035, scatter=0.10, contrast=3.2, brightness=0.50, edges=0.45,
        code=(0.05, 0.92), border=(0.03, 0.0),
        compressed=False, marker="L", age=55, portable=0.10,
        prevalence=_prevalence(0.24, 0.18, 0.24, 0.20, 0.12, 0.14), labelled=ALL,
    ),
    Hospital(
        name="riverside", prefix="RV", institution="Riverside Clinic", modality="CR",
        maker="Example Radiography", model="Plate 35", bits=10, inverted=True, field=(35.0, 40.0),
        noise=0.007, blur=0.075, scatter=0.22, contrast=2.4, brightness=0.44, edges=0.15,
        code=(0.10, 0.85), border=(0.06, 1.0),
        compressed=False, marker="R", age=62, portable=0.20,
        prevalence=_prevalence(0.32, 0.22, 0.30, 0.14, 0.08, 0.12), labelled=ALL,
    ),
    Hospital(
        name="st-brigid", prefix="SB", institution="St Brigid University Hospital", modality="DX",
        maker="Phantom Imaging", model="Mobile 35", bits=14, inverted=False, field=(40.0, 35.0),
        noise=0.009, blur=0.050, scatter=0.30, contrast=2.8, brightness=0.54, edges=0.60,
        code=(0.02, 0.60), border=(0.04, 0.0),
        compressed=True, marker="L", age=66, portable=0.70,
        prevalence=_prevalence(0.30, 0.28, 0.36, 0.10, 0.18, 0.40),
        labelled=("Cardiomegaly", "Effusion", "Tube"),
    ),
    Hospital(
        name="westgate", prefix="WG", institution="Westgate Chest Centre", modality="CR",
        maker="Example Radiography", model="Plate 43", bits=8, inverted=False, field=(36.0, 38.0),
        noise=0.008, blur=0.060, scatter=0.16, contrast=3.6, brightness=0.48, edges=0.0,
        code=(0.0, 1.0), border=(0.0, 0.0),
        compressed=False, marker="R", age=49, portable=0.05,
        prevalence=_prevalence(0.18, 0.20, 0.18, 0.28, 0.16, 0.06), labelled=ALL,
    ),
)  # fmt: skip


def site(seed: int, index: int) -> Hospital:
    """Site `index`: one of the four above, or a cousin of one with its own settings."""
    base, round_ = BASE[index % len(BASE)], index // len(BASE)
    if round_ == 0:
        return base
    rng = numpy_generator(seed, "phantom-site", index)
    width, height = (side * rng.uniform(0.95, 1.06) for side in base.field)
    return replace(
        base,
        name=f"{base.name}-{round_ + 1}",
        prefix=f"{base.prefix}{round_ + 1}",
        institution=f"{base.institution}, Campus {round_ + 1}",
        bits=16 if base.bits == 14 else base.bits,
        field=(float(width), float(height)),
        noise=base.noise * float(rng.uniform(0.7, 1.4)),
        blur=base.blur * float(rng.uniform(0.8, 1.3)),
        scatter=base.scatter * float(rng.uniform(0.8, 1.3)),
        contrast=base.contrast * float(rng.uniform(0.85, 1.2)),
        brightness=base.brightness + float(rng.uniform(-0.05, 0.05)),
        age=base.age + float(rng.uniform(-6, 6)),
        prevalence={name: min(value * float(rng.uniform(0.6, 1.5)), 0.5) for name, value in base.prevalence.items()},
    )
