"""Reads `manifest.csv` (one row an image) and `labelled.json` (what each source labels on all of them).

A manifest lists positives.  Absence is a negative only for findings that `labelled.json` declares
for that source, and only on a row that lists anything; all else is unknown.  What is wrong with the
two files is told at once, before any image is read.
"""

from __future__ import annotations

import csv
import difflib
import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chexfound.data.intake.pictures import READERS
from chexfound.data.store.index import Image
from chexfound.errors import DataError, Problems
from chexfound.parsing import strict_json
from chexfound.parsing.names import RULE, is_name

MANIFEST = "manifest.csv"
LABELLED = "labelled.json"
DICOM_SUFFIXES = (".dcm", ".dicom")
REQUIRED = ("file", "source", "patient_id", "findings")
OPTIONAL = ("view", "age", "sex", "site", "split")
SPLITS = ("train", "val", "test")
_TOLD = 20  # problems told one by one; a wrong column would else give one a row


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file to ingest and what is known of it before it is read."""

    path: Path
    image: Image
    labels: Mapping[str, int]  # finding -> 1 or 0
    listed: bool = False  # by a manifest
    refusal: str = ""  # why it is left out, if its row already tells


def unreadable_file(path: Path) -> str:
    """Why there is no file to read at `path`: reading a pipe, say, would wait for ever; "" if there is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        leads_nowhere = error.errno == errno.ENOENT and path.is_symlink()
        return "a link that leads nowhere" if leads_nowhere else os.strerror(error.errno or 0)
    return "" if stat.S_ISREG(mode) else "not a file but a folder, a pipe, a socket or a device"


class _Faults(Problems):
    """Tells the first problems and counts the rest."""

    def check(self) -> None:
        if len(self.found) > _TOLD:
            self.found[_TOLD:] = [f"and {len(self.found) - _TOLD} more"]
        super().check()


def read_manifest(folder: Path, root: Path) -> list[Entry]:
    """Read the manifest in `folder`; files are named relative to `root`.

    Raises: DataError naming every fault: a missing column, a file that does not exist, leaves the folder
    or stands twice, a patient in two splits, a value that cannot be what it should.
    """
    path = folder / MANIFEST
    _check_file(path)
    labelled = read_labelled(folder / LABELLED)
    faults = _Faults(DataError, str(path))
    entries: list[Entry] = []
    sources: set[str] = set()
    for line, row in _rows(path, faults):
        sources.add(row.get("source", ""))
        entry = _entry(folder, root, row, labelled, faults, line)
        if entry is not None:
            entries.append(entry)
    _check_twice(entries, faults)
    _check_splits(entries, faults)
    _check_labelled(labelled, sources, faults)
    faults.check()
    return entries


def read_labelled(path: Path) -> dict[str, list[str]]:
    """Source -> the findings that it labels on all its labelled images; empty if there is no such file.

    Raises: DataError.
    """
    if not os.path.lexists(path):
        return {}
    _check_file(path)
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be an object of source -> list of findings, not {type(value).__name__}")
    value.pop("about", None)
    faults = _Faults(DataError, str(path))
    for source, findings in value.items():
        if not is_name(source):
            faults.add(f"source {_shown(source)} must be {RULE}")
        if not isinstance(findings, list) or not all(isinstance(finding, str) for finding in findings):
            faults.add(f"{_shown(source)}: must be a list of findings (got {_shown(findings)})")
            continue
        for finding in findings:
            if "|" in finding:
                parts = json.dumps(_findings(finding), ensure_ascii=False)
                faults.add(f"{_shown(source)}: finding {_shown(finding)} must not hold a '|'; did you mean {parts}?")
            elif not is_name(finding.strip()):
                faults.add(f"{_shown(source)}: finding {_shown(finding)} must be {RULE}")
    faults.check()
    return {source: [finding.strip() for finding in findings] for source, findings in value.items()}


def _shown(value: object) -> str:
    """A value as in Python, cut to what is read at a glance."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _check_file(path: Path) -> None:
    if reason := unreadable_file(path):
        raise DataError(f"{path}: cannot be read: {reason}")


def _rows(path: Path, faults: Problems) -> Iterable[tuple[int, dict[str, str]]]:
    """The rows with the line that each ends on."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, faults)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    faults.add(
                        f"line {reader.line_num}: {len(cells)} cells under {len(header)} columns;"
                        " quote a value that holds a comma"
                    )
                else:
                    yield (
                        reader.line_num,
                        {name: cell.strip() for name, cell in zip(header, cells, strict=True)},
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error


def _check_header(header: list[str], faults: Problems) -> None:
    for name in REQUIRED:
        if name not in header:
            faults.add(
                f"no column {name!r}; it must have {', '.join(REQUIRED)} (found: {', '.join(header) or 'nothing'})"
            )
    for name in sorted({name for name in header if header.count(name) > 1 and name in REQUIRED + OPTIONAL}):
        faults.add(f"column {name!r} stands twice")


def _entry(
    folder: Path,
    root: Path,
    row: Mapping[str, str],
    labelled: Mapping[str, list[str]],
    faults: Problems,
    line: int,
) -> Entry | None:
    """The entry of a row without faults (other than columns that the table lacks)."""
    before = len(faults.found)
    path = _listed_file(folder, row["file"], faults, line) if "file" in row else None
    for column in ("source", "patient_id"):
        if row.get(column) == "":
            faults.add(f"line {line}: {column} is blank")
    source, findings = row.get("source", ""), _findings(row.get("findings", ""))
    if "/" in source:
        faults.add(f"line {line}: source {_shown(source)} must not hold a '/'")
    named = [("source", source), ("site", row.get("site", "")), *(("finding", finding) for finding in findings)]
    for what, name in named:
        if name and not is_name(name):
            faults.add(f"line {line}: {what} {_shown(name)} must be {RULE}")
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        faults.add(
            f"line {line}: split {_shown(split)} is not one of {', '.join(SPLITS)}; leave it blank if there is none"
        )
    age = _age(row.get("age", ""), faults, line)
    if path is None or len(faults.found) > before:
        return None
    image = Image(
        source=source,
        patient=row.get("patient_id", ""),
        root=str(root.resolve()),
        file=path.relative_to(root).as_posix(),
        site=row.get("site", ""),
        view=row.get("view", ""),
        age=age,
        sex=row.get("sex", "").upper(),
        split=split,
    )
    labels = _labels(findings, labelled.get(source, []))
    return Entry(path=path, image=image, labels=labels, listed=True, refusal=_refusal(image.view))


def _listed_file(folder: Path, name: str, faults: Problems, line: int) -> Path | None:
    """The file of a row, if it is one that the row may name."""
    relative = Path(name)
    if not name:
        faults.add(f"line {line}: file is blank")
        return None
    if "\0" in name or relative.is_absolute() or ".." in relative.parts:
        faults.add(f"line {line}: file {_shown(name)} must be below the manifest's folder")
        return None
    path = folder / relative
    if reason := unreadable_file(path):
        faults.add(f"line {line}: no file {_shown(name)} ({reason})")
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        faults.add(f"line {line}: file {_shown(name)} is a link out of the manifest's folder")
        return None
    suffixes = (*READERS, *DICOM_SUFFIXES)
    if path.suffix.lower() not in suffixes:
        faults.add(f"line {line}: file {_shown(name)} is not one of {', '.join(suffixes)}")
        return None
    return path


def _age(text: str, faults: Problems, line: int) -> float | None:
    if not text:
        return None
    try:
        age = float(text)
    except ValueError:
        age = -1.0
    if not 0 <= age <= 150:
        faults.add(f"line {line}: age {_shown(text)} is not a number of years; leave it blank where it is unknown")
        return None
    return age


def _findings(text: str) -> list[str]:
    return sorted({finding.strip() for finding in text.split("|")} - {""})


def _labels(positives: list[str], declared: Iterable[str]) -> dict[str, int]:
    if not positives:
        return {}
    return {finding: 0 for finding in declared} | {finding: 1 for finding in positives}


def _refusal(view: str) -> str:
    from chexfound.data.intake.dicom import frontal

    return "" if frontal(view) else f"not frontal: view {view!r}"


def _check_labelled(labelled: Iterable[str], sources: set[str], faults: Problems) -> None:
    """A name that no row has, where rows have one that is not there: a slip, or their absences are unknown unasked.

    A file that says more than is needed, as of all sources beside the rows of one, is no fault.
    """
    undeclared = sorted(sources - set(labelled) - {""})
    folded = {source.casefold(): source for source in undeclared}
    for source in sorted(set(labelled) - sources) if undeclared else []:
        near = difflib.get_close_matches(source.casefold(), folded, n=1)
        hint = (
            f"did you mean {folded[near[0]]!r}?"
            if near
            else f"take it out, or name {undeclared[0]!r}, which is not there"
        )
        faults.add(f"{LABELLED} names a source {_shown(source)} that no row has; {hint}")


def _check_twice(entries: list[Entry], faults: Problems) -> None:
    seen: set[Path] = set()
    for entry in entries:
        real = entry.path.resolve()
        if real in seen:
            faults.add(f"file {entry.image.file!r} stands twice")
        seen.add(real)


def _check_splits(entries: list[Entry], faults: Problems) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        if entry.image.split is not None and entry.image.source and entry.image.patient:
            splits.setdefault((entry.image.source, entry.image.patient), set()).add(entry.image.split)
    for (source, patient), found in sorted(splits.items()):
        if len(found) > 1:
            faults.add(f"patient {patient!r} of {source!r} is in two splits, {' and '.join(sorted(found))}")
