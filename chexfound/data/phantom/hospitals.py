"""Phantom hospitals on the disk: one folder a site, ready to be ingested."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chexfound.data.phantom import scanner, write
from chexfound.data.phantom.cases import Case, Patient, patient
from chexfound.data.phantom.projection import attenuation
from chexfound.data.phantom.sites import Hospital, site
from chexfound.durable.files import storage
from chexfound.errors import ConfigError, Problems
from chexfound.parsing.names import utf8, written

COLUMNS = ("file", "source", "patient_id", "view", "age", "sex", "findings", "site")
NONE = "No Finding"


@dataclass(frozen=True)
class PhantomSummary:
    """Hold what was written."""

    folder: Path
    patients: int
    images: dict[str, int]
    """Site name to images."""
    findings: dict[str, dict[str, int]]
    """Site name to findings drawn (labelled or not) to images that show them."""


def generate(
    out: Path,
    *,
    sites: int = 4,
    patients: int = 200,
    seed: int = 0,
    size_px: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> PhantomSummary:
    """Write phantom chest radiographs of several hospitals as DICOM files.

    Each site gets a folder `out/NAME/` with `PATIENT/DATE-N.dcm`, a `manifest.csv` and a
    `labelled.json`.  The same arguments give the same bytes (on one machine and one build of NumPy
    and OpenCV), and patient k of a site is the same whatever `patients` and `sites` are.

    Args:
        out: a folder that does not exist or is empty.
        sites: hospitals; from the fifth on they are cousins of the first four.
        patients: patients at each site, 1 to 3 radiographs each.
        seed: of everything drawn.
        size_px: longer side of a radiograph, pixels.
        progress: called with (patients done, patients in all).

    Returns:
        What was written.

    Raises:
        ConfigError: a number out of range, or `out` is in use.
        StorageError: the disk is full or refuses. Nothing is half-written: the files are made in a
            folder beside `out` that takes its name at the end.
    """
    with storage(out):
        _check(Path(out), sites, patients, size_px)
    out, _held = Path(out).resolve(), _hold_heap()
    hospitals = [site(seed, index) for index in range(sites)]
    images: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
        try:
            work.mkdir()
            for number, hospital in enumerate(hospitals):
                counts: Counter[str] = Counter()
                rows = []
                for index in range(patients):
                    person = patient(seed, hospital, index)
                    rows += _radiographs(work / hospital.name, hospital, person, size_px)
                    counts.update(name for _, case in person.visits for name in case.names)
                    if progress:
                        progress(number * patients + index + 1, sites * patients)
                _labels(work / hospital.name, hospital, rows)
                images[hospital.name], found[hospital.name] = len(rows), dict(sorted(counts.items()))
            os.replace(work, out)  # onto a missing folder or an empty one
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return PhantomSummary(out, sites * patients, images, found)


def _hold_heap() -> np.ndarray:
    """A block on top of 48 MB of free heap, while it is held.

    A drawing frees many planes of 1 MB; glibc would give each back to the system and fault its
    pages in again for the next, a third of the time (31 ms an image against 20).
    """
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(48)]
    return blocks[-1]


def _check(out: Path, sites: int, patients: int, size_px: int) -> None:
    problems = Problems(ConfigError, "phantom")
    if not 1 <= sites <= 64:
        problems.add(f"sites is {sites!r}; give 1 to 64")
    if not 1 <= patients <= 9999:
        problems.add(f"patients is {patients!r}; give 1 to 9999 for each site")
    if not 64 <= size_px <= 4096:
        problems.add(f"size_px is {size_px!r}; give 64 to 4096")
    if not utf8(out.absolute()):
        problems.add(f"the path {written(out)} is not UTF-8; choose another")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        problems.add(f"{str(out)!r} is not a folder; choose another name")
    elif out.is_dir() and any(out.iterdir()):
        problems.add(f"the folder {str(out)!r} is not empty; choose a new one, or empty it first")
    problems.check()


def _radiographs(folder: Path, hospital: Hospital, person: Patient, size_px: int) -> list[dict[str, str]]:
    """Draw and write one patient's radiographs; their rows of the manifest."""
    rows = []
    (folder / person.id).mkdir(parents=True)
    for date, case in person.visits:
        file = f"{person.id}/{date:%Y%m%d}-{case.image + 1}.dcm"
        exposure = scanner.expose(attenuation(case), case, hospital, size_px)
        write.write(folder / file, hospital, person, date, case, exposure)
        values = (
            file,
            hospital.name,
            person.id,
            case.view,
            str(write.age(person, date)),
            person.sex,
            _named(hospital, case),
        )
        rows.append(dict(zip(COLUMNS, (*values, hospital.name), strict=True)))
    return rows


def _named(hospital: Hospital, case: Case) -> str:
    """The findings that this site's readers name; nothing named is No Finding, as in a report."""
    return "|".join(name for name in case.names if name in hospital.labelled) or NONE


def _labels(folder: Path, hospital: Hospital, rows: list[dict[str, str]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "manifest.csv").write_text(table.getvalue(), encoding="utf-8")
    about = (
        "Findings that a source labels on every image: there, absence is a negative. Anything else is "
        f"unknown. {NONE} means none of the findings that this site labels. Computed phantoms, not patients."
    )
    labelled = {"about": about, hospital.name: sorted(hospital.labelled)}
    (folder / "labelled.json").write_text(json.dumps(labelled, indent=1) + "\n", encoding="utf-8")
