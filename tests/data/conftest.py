"""Small images and DICOM files, made where a test asks for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid


def picture(number: int, height: int = 40, width: int = 30) -> np.ndarray:
    """A picture that differs from that of any other number after resizing, too."""
    return np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)


def dicom_file(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """Write a CR chest; a tag given as None is left out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[ascii(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(ascii(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values: dict[str, Any] = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CR",
        "PatientID": "1234567",
        "PatientName": "Doe^Jane",
        "PatientSex": "F",
        "PatientAge": "061Y",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "HighBit": pixels.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(np.issubdtype(pixels.dtype, np.signedinteger)),
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in (values | tags).items():
        if value is not None:
            setattr(dataset, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset)
    return path


def manifest_folder(
    folder: Path, rows: Iterable[Mapping[str, str]], labelled: Mapping[str, Any] | None = None, **columns: str
) -> Path:
    """Write manifest.csv, labelled.json and a PNG for each row whose file is not there yet.

    `columns` are put into every row that does not have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"source": "a", "patient_id": "p", "findings": ""} | columns | dict(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    for number, row in enumerate(rows):
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            cv2.imwrite(str(path), picture(number))
    if labelled is not None:
        (folder / "labelled.json").write_text(json.dumps(labelled))
    return folder


@pytest.fixture
def make_picture() -> Callable[..., np.ndarray]:
    return picture


@pytest.fixture
def make_dicom() -> Callable[..., Path]:
    return dicom_file


@pytest.fixture
def make_manifest() -> Callable[..., Path]:
    return manifest_folder
