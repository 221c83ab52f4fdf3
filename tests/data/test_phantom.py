from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from chexfound.data.phantom import anatomy, generate, scanner
from chexfound.data.phantom.canvas import SCALE, WIDTH
from chexfound.data.phantom.cases import FINDINGS, Case, Finding, patient
from chexfound.data.phantom.frame import APEX, Frame
from chexfound.data.phantom.projection import attenuation
from chexfound.data.phantom.sites import BASE, site
from chexfound.errors import ConfigError, StorageError

# Type 1 (and the type 1C that apply) of the CR and DX image objects, PS3.3 A.2 and A.26.
TYPE_1 = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality SamplesPerPixel "
    "PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelData"
).split()
TYPE_1_DX = (
    "PresentationIntentType PixelIntensityRelationship PixelIntensityRelationshipSign RescaleIntercept "
    "RescaleSlope RescaleType PresentationLUTShape LossyImageCompression BurnedInAnnotation ImageType "
    "PatientOrientation ImageLaterality AnatomicRegionSequence ViewCodeSequence ImagerPixelSpacing "
    "WindowCenter WindowWidth"
).split()
TYPE_2 = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    "ReferringPhysicianName SeriesNumber InstanceNumber Manufacturer BodyPartExamined ViewPosition"
).split()


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "out"
    generate(out, sites=4, patients=6, seed=3, size_px=128)
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def well(index: int = 0, number: int = 0) -> Case:
    """A patient with no finding and a heart of usual size, PA."""
    case = patient(0, site(0, number), index).visits[0][1]
    return replace(case, body=replace(case.body, heart_ratio=0.44), view="PA", inspiration=1.0, findings=())


def box(x: float, y: float, half: float = 1.0) -> tuple[slice, slice]:
    """The pixels within `half` cm of a place on the canvas."""
    middle = round(y * SCALE), round((x + WIDTH / 2) * SCALE)
    reach = round(half * SCALE)
    return slice(middle[0] - reach, middle[0] + reach), slice(middle[1] - reach, middle[1] + reach)


def test_every_file_is_a_valid_radiograph(hospitals: Path) -> None:
    for folder in sorted(hospitals.iterdir()):
        hospital = next(base for base in BASE if base.name == folder.name)
        for row in rows(folder):
            image = pydicom.dcmread(folder / row["file"])
            wanted = TYPE_1 + TYPE_2 + (TYPE_1_DX if hospital.modality == "DX" else [])
            missing = [name for name in wanted if image.get(name) in (None, "")]
            assert not missing
            assert (image.Modality, image.BitsStored) == (hospital.modality, hospital.bits)
            assert image.PhotometricInterpretation == ("MONOCHROME1" if hospital.inverted else "MONOCHROME2")
            assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
            assert image.pixel_array.shape == (image.Rows, image.Columns)
            assert image.pixel_array.max() < 2**hospital.bits
            assert np.std(image.pixel_array) > 0.05 * 2**hospital.bits
            assert (row["patient_id"], row["view"]) == (image.PatientID, image.ViewPosition)
            assert f"{int(row['age']):03d}Y" == image.PatientAge


def test_uids_are_unique_and_visits_have_their_own_dates(hospitals: Path) -> None:
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in hospitals.rglob("*.dcm")]
    assert len({image.SOPInstanceUID for image in images}) == len(images) >= 24
    assert len({(image.PatientID, image.StudyDate) for image in images}) == len(images)


def test_one_site_compresses_some_of_its_files(tmp_path: Path) -> None:
    hospital = next(number for number, base in enumerate(BASE) if base.compressed)
    generate(tmp_path / "out", sites=hospital + 1, patients=8, size_px=64)
    files = sorted((tmp_path / "out" / BASE[hospital].name).rglob("*.dcm"))
    images = [pydicom.dcmread(path) for path in files]
    compressed = [image for image in images if image.file_meta.TransferSyntaxUID.is_compressed]
    assert 0 < len(compressed) < len(images)
    assert all(image.pixel_array.shape == (image.Rows, image.Columns) for image in compressed)


def test_the_manifest_names_what_was_drawn_and_the_site_labels(hospitals: Path) -> None:
    for number, base in enumerate(BASE):
        folder = hospitals / base.name
        labelled = json.loads((folder / "labelled.json").read_text())[base.name]
        assert labelled == sorted(base.labelled)
        table = rows(folder)
        assert {row["source"] for row in table} == {base.name}
        drawn = [case for index in range(6) for _, case in patient(3, site(3, number), index).visits]
        for row, case in zip(table, drawn, strict=True):
            assert row["findings"] == ("|".join(n for n in case.names if n in labelled) or "No Finding")
        assert {row["file"] for row in table} == {str(p.relative_to(folder)) for p in folder.rglob("*.dcm")}


def test_one_site_labels_only_some_findings() -> None:
    partial = [base for base in BASE if set(base.labelled) < set(FINDINGS)]
    assert [base.name for base in partial] == ["st-brigid"]
    unnamed = [name for k in range(40) for _, case in patient(0, partial[0], k).visits for name in case.names]
    assert set(unnamed) - set(partial[0].labelled)  # they are drawn there, and nobody names them


def test_same_seed_same_bytes_and_another_seed_others(hospitals: Path, tmp_path: Path) -> None:
    again = digests(generate(tmp_path / "again", sites=1, patients=6, seed=3, size_px=128).folder)
    first = {name: value for name, value in digests(hospitals).items() if name.startswith("northfield")}
    assert again == first
    other = digests(generate(tmp_path / "other", sites=1, patients=6, seed=4, size_px=128).folder)
    assert not set(other.values()) & set(first.values()) - {first["northfield/labelled.json"]}


def test_a_patient_is_the_same_whatever_else_is_generated(hospitals: Path, tmp_path: Path) -> None:
    few = digests(generate(tmp_path / "few", sites=2, patients=2, seed=3, size_px=128).folder)
    images = {name: value for name, value in few.items() if name.endswith(".dcm")}
    all_ = digests(hospitals)
    assert len(images) >= 4
    assert images == {name: all_[name] for name in images}


def test_sites_beyond_four_are_cousins_with_their_own_names() -> None:
    ten = [site(0, number) for number in range(10)]
    assert len({one.name for one in ten}) == len({one.prefix for one in ten}) == 10
    assert ten[4].noise != ten[0].noise
    assert ten[4] == site(0, 4)
    assert {one.bits for one in ten} == {8, 10, 12, 14, 16}
    assert all(set(one.prevalence) == set(FINDINGS) for one in ten)


def test_the_heart_points_to_the_patients_left_and_the_liver_stands_higher() -> None:
    frame = Frame(well())
    heart = anatomy.mediastinum(frame) > 2
    rows_ = slice(round((frame.heart[2] - 3) * SCALE), round(frame.heart[2] * SCALE))
    columns = np.flatnonzero(heart[rows_].any(0)) / SCALE - WIDTH / 2
    assert columns.max() > 1.5 * -columns.min()  # the image's right is the patient's left
    assert frame.dome(-1) < frame.dome(1)
    lungs = np.maximum(anatomy.lungs(frame) - anatomy.mediastinum(frame), 0)
    assert lungs[:, : lungs.shape[1] // 2].sum() > lungs[:, lungs.shape[1] // 2 :].sum()


@pytest.mark.parametrize("index", [0, 1])
def test_cardiomegaly_is_a_wide_heart(index: int) -> None:
    def ratio(case: Case) -> float:
        frame = Frame(case)
        rows_ = slice(round(frame.carina * SCALE), round(frame.dome(1) * SCALE))
        heart = np.flatnonzero((anatomy.mediastinum(frame)[rows_] > 2).any(0))
        chest = np.flatnonzero((frame.cavity[rows_] > 0.5).any(0))
        return float(np.ptp(heart) / np.ptp(chest))

    usual = well(index)
    large = replace(usual, body=replace(usual.body, heart_ratio=0.6))
    assert ratio(usual) == pytest.approx(0.44, abs=0.03)
    assert ratio(large) == pytest.approx(0.60, abs=0.03)
    drawn = [case for k in range(80) for _, case in patient(0, BASE[0], k).visits]
    for case in drawn:
        assert (case.body.heart_ratio > 0.5) == ("Cardiomegaly" in case.names)


@pytest.mark.parametrize("side", [-1, 1])
def test_an_effusion_whitens_the_angle_of_its_side(side: int) -> None:
    case = well()
    frame = Frame(case)
    change = attenuation(replace(case, findings=(Finding("Effusion", side, 0.5, (0.5, 0.5)),))) - attenuation(case)
    angle = box(side * 0.8 * frame.half_width, frame.angle - 4.5)
    other = box(-side * 0.8 * frame.half_width, frame.angle - 4.5)
    apex = box(side * 0.35 * frame.half_width, APEX + 4)
    assert change[angle].mean() > 0.8
    assert np.abs(change[other]).max() < 1e-5
    assert np.abs(change[apex]).max() < 0.02
    level = [np.argmax(change[:, round((side * u * frame.half_width + WIDTH / 2) * SCALE)] > 0.5) for u in (0.6, 0.9)]
    assert level[1] < level[0]  # the meniscus climbs the chest wall


@pytest.mark.parametrize("side", [-1, 1])
def test_a_pneumothorax_is_air_without_vessels_beyond_a_line(side: int) -> None:
    case = well()
    frame = Frame(case)
    change = attenuation(replace(case, findings=(Finding("Pneumothorax", side, 0.6, (0.5, 0.5)),))) - attenuation(case)
    y = APEX + 0.3 * frame.height
    wall = float(frame.cage_soft(np.array([y]))[0]) * (1 if side < 0 else 0.97)
    assert change[box(side * (wall - 0.9), y, 0.4)].mean() < -0.05
    line = change[round(y * SCALE), round((side * (wall / 2) + WIDTH / 2) * SCALE) :: side]
    assert line.max() > 0.12
    edge = int(np.argmax(line))
    assert (line[edge + 3 : edge + 12] < 0).all()  # only air from the line to the wall
    assert np.abs(change[box(-side * 0.6 * wall, y)]).max() < 1e-5


def test_a_nodule_and_a_consolidation_are_dense_and_small() -> None:
    case = well()
    plain = attenuation(case)
    for name, least, widest in (("Nodule", 0.3, 12.0), ("Consolidation", 0.3, 160.0)):
        change = attenuation(replace(case, findings=(Finding(name, -1, 0.5, (0.5, 0.5)),))) - plain
        assert change.max() > least
        assert 2.0 < (change > 0.1).sum() / SCALE**2 < widest  # cm²
        assert (change[:, change.shape[1] // 2 :] <= 1e-5).all()


@pytest.mark.parametrize("kind", ["endotracheal", "central"])
def test_a_tube_is_a_thin_dense_line_that_ends_where_it_should(kind: str) -> None:
    case = well()
    change = attenuation(replace(case, findings=(Finding("Tube", -1, 0.5, (0.5, 0.5), kind),))) - attenuation(case)
    seen = np.flatnonzero((change > 0.1).any(1)) / SCALE
    carina = Frame(case).carina
    low, high = (carina - 6, carina - 2) if kind == "endotracheal" else (carina + 1.5, carina + 5.5)
    assert low < seen.max() < high
    assert ((change > 0.1).sum(1) / SCALE).max() < 1.2


def test_findings_survive_the_scanner() -> None:
    case = well()
    for number, hospital in enumerate(BASE):
        shown = []
        for findings in ((), (Finding("Effusion", 1, 0.7, (0.5, 0.5)),)):
            drawn = attenuation(replace(case, findings=findings))
            pixels = scanner.expose(drawn, case, hospital, 128).pixels.astype(float)
            low, high = np.percentile(pixels, (2, 98))
            grey = (pixels - low) / (high - low)
            shown.append(1 - grey if hospital.inverted else grey)
        rows_, columns = shown[0].shape
        change = shown[1] - shown[0]
        lower_left = change[int(0.55 * rows_) : int(0.75 * rows_), int(0.65 * columns) : int(0.85 * columns)]
        upper_right = change[int(0.2 * rows_) : int(0.4 * rows_), int(0.2 * columns) : int(0.4 * columns)]
        assert lower_left.mean() > 0.15 + upper_right.mean(), BASE[number].name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": 0}, "sites is 0; give 1 to 64"),
        ({"patients": 0}, "patients is 0; give 1 to 9999"),
        ({"size_px": 8}, "size_px is 8; give 64 to 4096"),
        ({"sites": -1, "patients": -1}, "2 problems"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        generate(tmp_path / "out", sites=1, patients=1)
    with pytest.raises(ConfigError, match="is not a folder"):
        generate(tmp_path / "out" / "thesis.txt", sites=1, patients=1)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/x", "a part of its path is a file"),
        ("x" * 300, "a name in it is too long"),
        (os.fsdecode(b"\xe9"), r"\\xe9 is not"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / name, sites=1, patients=1, size_px=64)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_filled_and_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told: list[tuple[int, int]] = []
    summary = generate(tmp_path / "out", sites=1, patients=2, size_px=64, progress=lambda *step: told.append(step))
    assert told == [(1, 2), (2, 2)]
    assert summary.patients == 2
    assert summary.images == {"northfield": len(list((tmp_path / "out").rglob("*.dcm")))}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("chexfound.data.phantom.hospitals._labels", full)
    with pytest.raises(StorageError, match="no space left"):
        generate(tmp_path / "out", sites=1, patients=1, size_px=64)
    assert not list(tmp_path.iterdir())
