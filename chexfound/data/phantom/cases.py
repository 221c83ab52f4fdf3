"""Phantom patients: bodies, visits and findings, each drawn from its own stream.

Everything about patient k of a site comes from (seed, site, k) alone, so the patient is the same
however many others are generated.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np

from chexfound.data.phantom.sites import Hospital
from chexfound.rng import derive, numpy_generator

FINDINGS = ("Cardiomegaly", "Consolidation", "Effusion", "Nodule", "Pneumothorax", "Tube")
CHRONIC = ("Cardiomegaly", "Nodule")
"""Findings that a patient keeps from one visit to the next; the others come and go."""

FAMILY = (
    "Abara Aydin Bakker Brandt Castell Dvorak Eriksen Falk Garnier Haddad Ibarra Jansen Kaya Lindqvist "
    "Moreau Nakai Okafor Petrov Quispe Rossi Santos Tanaka Ueda Varga Weber Xu Yilmaz Zielinski"
).split()
GIVEN = {
    "F": "Ada Bianca Clara Dilek Elif Freya Grace Hana Ines Julia Karin Leila Mina Nora Olga Priya".split(),
    "M": "Anton Bilal Cem David Emil Felix Goran Hugo Ivan Jonas Kenji Luis Marek Nils Omar Paul".split(),
}


@dataclass(frozen=True)
class Body:
    """The anatomy that a patient keeps. Lengths in cm at the detector (as magnified)."""

    sex: str
    half_width: float
    """Half the widest inner width of the rib cage."""
    lung_height: float
    """From apex to right costophrenic angle on full inspiration."""
    half_depth: float
    wall: float
    """Soft tissue outside the ribs."""
    heart_ratio: float
    """Cardiothoracic ratio on a PA view."""
    bone: float
    """Bone density, 1 for a young man."""
    aorta: float
    """Size of the aortic knob, 1 usual; it unfolds with age."""
    breast: float
    """Breast thickness; 0 for men."""
    gas: float
    """Radius of the stomach bubble; 0 for none seen."""


@dataclass(frozen=True)
class Finding:
    """One finding as it will be drawn.

    `side` is -1 for the patient's right (left on the image) and 1 for the left; `size` in [0, 1]
    runs from subtle to gross; `place` is a point in the unit square that the drawing interprets.
    """

    name: str
    side: int
    size: float
    place: tuple[float, float]
    kind: str = ""


@dataclass(frozen=True)
class Case:
    """One radiograph: everything that its drawing depends on."""

    stream: tuple[int | str, ...]
    """The patient's stream; textures and vessels derive from it and stay over visits."""
    image: int
    body: Body
    view: str
    inspiration: float
    """1 at full inspiration."""
    findings: tuple[Finding, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The findings' names, sorted, each once."""
        return tuple(sorted({finding.name for finding in self.findings}))


@dataclass(frozen=True)
class Patient:
    """An invented person, with the radiographs taken of them."""

    id: str
    name: str
    sex: str
    born: datetime.date
    visits: tuple[tuple[datetime.date, Case], ...]


def patient(seed: int, site: Hospital, index: int) -> Patient:
    """Patient `index` of a site, the same whatever else is generated."""
    stream: tuple[int | str, ...] = (seed, "phantom", site.name, index)
    rng = numpy_generator(*stream, "patient")
    sex = "F" if rng.random() < 0.47 else "M"
    age = float(np.clip(rng.normal(site.age, 15), 18, 92))
    first = datetime.date(2015, 1, 1) + datetime.timedelta(days=int(rng.integers(0, 1800)))
    born = first - datetime.timedelta(days=int(age * 365.25) + int(rng.integers(0, 300)))
    chronic = _chronic(rng, site)
    body = _body(rng, sex, age, any(finding.name == "Cardiomegaly" for finding in chronic))
    visits, date = [], first
    for image in range(1 + int(rng.choice(3, p=(0.5, 0.3, 0.2)))):
        visits.append((date, _visit(stream, image, site, body, chronic)))
        date += datetime.timedelta(days=int(rng.integers(1, 400)))
    name = f"{FAMILY[rng.integers(len(FAMILY))]}^{GIVEN[sex][rng.integers(len(GIVEN[sex]))]}"
    number = derive(*stream, "id") % 900_000 + 100_000
    return Patient(f"{site.prefix}{index:04d}{number}", name, sex, born, tuple(visits))


def _body(rng: np.random.Generator, sex: str, age: float, large_heart: bool) -> Body:
    man = sex == "M"
    old = (age - 20) / 70
    half_width = rng.normal(14.3 if man else 12.9, 0.6)
    ratio = rng.uniform(0.53, 0.65) if large_heart else np.clip(rng.normal(0.435 + 0.03 * old, 0.022), 0.38, 0.485)
    return Body(
        sex=sex,
        half_width=float(half_width),
        lung_height=float(half_width * rng.normal(1.86, 0.07)),
        half_depth=float(half_width * rng.normal(0.64 + 0.06 * old, 0.03)),
        wall=float(np.clip(rng.gamma(5.0, 0.5), 1.2, 5.0)),
        heart_ratio=float(ratio),
        bone=float((1.0 if man else 0.88) * (1 - 0.3 * max(old - 0.3, 0)) * rng.normal(1, 0.05)),
        aorta=float(0.92 + 0.24 * old + rng.normal(0, 0.04)),
        breast=0.0 if man else float(np.clip(rng.gamma(3.0, 0.8), 0.6, 4.0)),
        gas=float(rng.uniform(1.6, 3.3)) if rng.random() < 0.75 else 0.0,
    )


def _chronic(rng: np.random.Generator, site: Hospital) -> tuple[Finding, ...]:
    found = []
    for name in CHRONIC:
        draws = rng.random(4)
        if draws[0] < site.prevalence[name]:
            found.append(
                Finding(
                    name,
                    -1 if draws[1] < 0.55 else 1,
                    float(rng.random()),
                    (float(draws[2]), float(draws[3])),
                )
            )
    return tuple(found)


def _visit(stream: tuple[int | str, ...], image: int, site: Hospital, body: Body, chronic: tuple[Finding, ...]) -> Case:
    rng = numpy_generator(*stream, "visit", image)
    acute = []
    for name in FINDINGS:
        draws, size = rng.random(4), float(rng.random())
        if name in CHRONIC or draws[0] >= site.prevalence[name]:
            continue
        side = -1 if draws[1] < 0.55 else 1
        kind = ("endotracheal", "central")[int(draws[3] > 0.5)] if name == "Tube" else ""
        acute.append(Finding(name, side, size, (float(draws[2]), float(draws[3])), kind))
        if name == "Effusion" and draws[2] < 0.25:
            acute.append(Finding(name, -side, size * float(draws[3]), (float(draws[2]), float(draws[3])), kind))
    sick = sum(finding.name in ("Tube", "Effusion", "Consolidation") for finding in acute)
    portable = rng.random() < min(site.portable + 0.12 * sick, 0.95)
    breath = rng.normal(0.93, 0.03) if portable else rng.normal(0.985, 0.02)
    order = {name: place for place, name in enumerate(FINDINGS)}
    found = sorted((*chronic, *acute), key=lambda finding: (order[finding.name], finding.side))
    return Case(stream, image, body, "AP" if portable else "PA", float(np.clip(breath, 0.86, 1.02)), tuple(found))
