"""A DICOM file to 8-bit grey pixels, and the little of its header that training may know.

Modality LUT, VOI LUT or window, polarity and padding by the standard (PS3.3 C.7.6.3, C.11.1, C.11.2);
then the range that is left is stretched to 0..255.  What is not a frontal chest radiograph is
refused with a reason.  No name, number or date leaves this module: the patient is a pseudonym.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000TransferSyntaxes

from chexfound.errors import DataError

_CHEST = re.compile(r"CHEST|THORAX|T[OÓ]RAX|LUNG|\bCXR\b")
_ELSEWHERE = re.compile(
    r"\b(ABDOMEN|ABD|KUB|[CTL]?SPINE|PELVIS|HIP|KNEE|FOOT|ANKLE|HAND|WRIST|ELBOW|SHOULDER|SKULL|HEAD|NECK|LEG|ARM"
    r"|FEMUR|TIBIA|FIBULA|HUMERUS|FOREARM|FINGER|THUMB|TOE|BREAST|JAW|TEETH|EXTREMITY)\b"
)
_NOT_FRONTAL = re.compile(r"\b(LL|RL|LAT|LATERAL|LLD|RLD|LLO|RLO|RAO|LAO|RPO|LPO|OBLIQUE|DECUBITUS|DECUB)\b")
_FRONTAL = re.compile(r"\b(PA|AP|FRONTAL)\b")
LARGEST_PIXELS = 10**8  # of an image: five times the largest radiograph; a file of a few MB can claim any number
_LARGEST_BYTES = 4 * LARGEST_PIXELS  # of a file, inflated
_UNSTATED = {"", "UNKNOWN", "OTHER", "NONE", "UNSPECIFIED"}
_IMAGE_TEXT = (
    "SeriesDescription",
    "ProtocolName",
    "AcquisitionDeviceProcessingDescription",
    "PerformedProcedureStepDescription",
)
_STUDY_TEXT = ("StudyDescription", "RequestedProcedureDescription")
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


@dataclass(frozen=True)
class Header:
    """Hold what is kept of a header: a pseudonym ("" if the file names no patient), and no identifier."""

    patient: str
    view: str  # PA, AP or ""
    sex: str  # M, F, O or ""
    age: float  # years; nan if unknown
    modality: str


def pseudonym(patient_id: str) -> str:
    """The name of a patient in a store without a key: 16 hex digits of the SHA-256 of PatientID.

    Hides the number from a reader, not from one who can try all numbers: a hospital's own store has names by its
    key in the place of these (`naming.Naming`).
    """
    return hashlib.sha256(patient_id.encode()).hexdigest()[:16]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the decoders' warnings about headers; enter once, outside threads (filters are global)."""
    with warnings.catch_warnings():
        for module in (r"pydicom(\..*)?", r"PIL(\..*)?", r"openjpeg(\..*)?"):
            warnings.filterwarnings("ignore", module=module)
        yield


def read(path: Path) -> tuple[np.ndarray, Header]:
    """Decode a frontal chest radiograph to uint8 (height, width), white = dense, and its header.

    Raises: DataError "PATH: REASON" for anything else; no reason holds what could tell who it is.
    """
    path = Path(path)
    syntax = "unknown"
    try:
        meta = read_file_meta_info(path)
        syntax = meta.TransferSyntaxUID.name
        reason = _too_long(path, meta)
        if reason is None:
            dataset = pydicom.dcmread(path)
            reason = _refusal(dataset)
        if reason is None:
            header, grey = _header(dataset), _grey(dataset)
            reason = None if grey is not None else "constant pixels"
    except InvalidDicomError as error:
        raise DataError(f"{path}: not a DICOM file (no DICM preamble)") from error
    except Exception as error:  # a damaged file may fail anywhere in the parser or a codec, with any exception
        raise DataError(f"{path}: cannot be decoded ({type(error).__name__}, transfer syntax {syntax})") from error
    if reason is not None:
        raise DataError(f"{path}: {reason}")
    assert grey is not None
    return grey, header


def too_many(pixels: int) -> str:
    """Why an image of so many pixels is not decoded; "" if it is."""
    return "" if pixels <= LARGEST_PIXELS else f"more than {LARGEST_PIXELS:,} pixels"


def _too_long(path: Path, meta: Any) -> str | None:
    """Why a file is not read at all, or None; what is deflated can be a thousand times its file."""
    size = path.stat().st_size
    if size <= _LARGEST_BYTES and meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        size = _inflated(path)
    return None if size <= _LARGEST_BYTES else f"more than {_LARGEST_BYTES:,} bytes"


def _inflated(path: Path) -> int:
    """The length of a deflated data set, counted to just beyond the most that is read."""
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(path, "rb") as file:
        file.seek(132)
        read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)  # up to the deflated part
        for chunk in iter(lambda: file.read(1 << 16), b""):
            # At the end of the stream, what follows it (a pad byte) may stand in the tail for ever.
            while chunk and not inflate.eof and size <= _LARGEST_BYTES:
                size += len(inflate.decompress(chunk, 1 << 20))
                chunk = inflate.unconsumed_tail
    return size


def stretch(values: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray | None:
    """Map the range of `values` (of those `kept`) linearly to uint8 0..255; None if there is no range."""
    values = values.astype(np.float32, copy=False)
    within = values if kept is None else values[kept]
    if not within.size:
        return None
    low, high = float(within.min()), float(within.max())
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return None
    return np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)


def frontal(view: str) -> bool:
    """Whether a stated view is not known to be something else than frontal ("" is not)."""
    return _NOT_FRONTAL.search(view.upper().replace("_", " ")) is None


def _text(dataset: Any, *keywords: str) -> str:
    return " ".join(str(dataset.get(keyword, "") or "") for keyword in keywords).upper().replace("_", " ").strip()


def _refusal(dataset: Any) -> str | None:
    """Why this is not a frontal chest radiograph that we can read, or None."""
    modality = _text(dataset, "Modality")
    body_part = _text(dataset, "BodyPartExamined")
    described = _text(dataset, *_IMAGE_TEXT, *_STUDY_TEXT)
    claims_chest = bool(_CHEST.search(body_part) or (body_part in _UNSTATED and _CHEST.search(described)))
    if modality not in ("CR", "DX", "SC"):
        return f"modality {modality!r} is not CR or DX"
    if body_part not in _UNSTATED and not claims_chest:
        return f"not a chest: BodyPartExamined {body_part!r}"
    if not claims_chest and (found := _ELSEWHERE.search(described)):
        return f"not a chest: its description says {found[0]!r}"
    if modality == "SC" and not claims_chest:
        return "modality 'SC', and neither BodyPartExamined nor a description says that it is a chest"
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        return f"multi-frame ({int(dataset.NumberOfFrames)} frames)"
    if "PixelData" not in dataset:
        return "holds no pixels"
    if dataset.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        return f"not greyscale: PhotometricInterpretation {dataset.get('PhotometricInterpretation', '')!r}"
    if reason := _too_many(dataset):
        return reason
    return _not_frontal(dataset)


def _too_many(dataset: Any) -> str:
    """Why its pixels are not decoded: the header says that they are too many, or a codestream says other sides."""
    sides = int(dataset.Rows), int(dataset.Columns)
    reason = too_many(sides[0] * sides[1] * int(dataset.get("SamplesPerPixel", 1) or 1))
    if reason or dataset.file_meta.TransferSyntaxUID not in JPEG2000TransferSyntaxes:
        return reason
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    at = frame.find(b"\xff\x4f\xff\x51")  # start of codestream and of its SIZ segment (ISO/IEC 15444-1, A.5.1)
    right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
    return "" if sides == (bottom - top, right - left) else "its header and its codestream differ in rows or columns"


def _not_frontal(dataset: Any) -> str | None:
    view = _text(dataset, "ViewPosition")
    if view:
        return None if frontal(view) else f"not frontal: ViewPosition {view!r}"
    meanings = _code_meanings(dataset)
    # A study's description often names both views ("PA and lateral"), so only this image's own text counts.
    for where, text in (("ViewCodeSequence", meanings), ("its description", _text(dataset, *_IMAGE_TEXT))):
        if not frontal(text) and not _FRONTAL.search(text):
            return f"not frontal: {where} says so"
    orientation = [str(axis) for axis in dataset.get("PatientOrientation", None) or []]
    if orientation and orientation[0][:1] in ("A", "P"):  # rows run from back to front
        return f"not frontal: PatientOrientation {orientation[0]!r}"
    return None


def _code_meanings(dataset: Any) -> str:
    codes = dataset.get("ViewCodeSequence", None) or []
    return " ".join(str(code.get("CodeMeaning", "")) for code in codes).upper()


def _header(dataset: Any) -> Header:
    patient_id = str(dataset.get("PatientID", "") or "").strip()
    sex = _text(dataset, "PatientSex")
    return Header(
        patient=pseudonym(patient_id) if patient_id else "",
        view=_view(dataset),
        sex=sex if sex in ("M", "F", "O") else "",
        age=_age(dataset),
        modality=_text(dataset, "Modality"),
    )


def _view(dataset: Any) -> str:
    meanings = _code_meanings(dataset).replace("POSTERO-ANTERIOR", "PA").replace("ANTERO-POSTERIOR", "AP")
    for text in (_text(dataset, "ViewPosition"), meanings, _text(dataset, *_IMAGE_TEXT)):
        if found := re.search(r"\b(PA|AP)\b", text):
            return found[0]
    return ""


def _age(dataset: Any) -> float:
    """Years from PatientAge (`081Y`, `006M`, or a number without its unit), else from the dates."""
    if stated := re.fullmatch(r"(\d{1,3})([YMWD]?)", _text(dataset, "PatientAge")):
        return int(stated[1]) * _YEARS[stated[2] or "Y"]
    try:
        born, taken = (datetime.strptime(_text(dataset, key), "%Y%m%d") for key in ("PatientBirthDate", "StudyDate"))
    except ValueError:
        return math.nan
    years = (taken - born).days / 365.25
    return years if 0 <= years <= 150 else math.nan


def _grey(dataset: Any) -> np.ndarray | None:
    """The pixels as a viewer would show them; None if they are all the same."""
    stored = dataset.pixel_array
    kept = None
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        limits = sorted((int(padding), int(dataset.get("PixelPaddingRangeLimit", padding))))
        kept = (stored < limits[0]) | (stored > limits[1])
    values = apply_modality_lut(stored, dataset)
    if _has_window(dataset):
        values = apply_voi_lut(values, dataset)
    grey = stretch(values, kept)
    if grey is None:
        return None
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    if kept is not None:
        grey[~kept] = 0
    return grey


def _has_window(dataset: Any) -> bool:
    """Whether there is a VOI LUT, or a window that is one (a width of 0 is common, and means nothing)."""
    if dataset.get("VOILUTSequence"):
        return True
    width = dataset.get("WindowWidth")
    if width is None or dataset.get("WindowCenter") is None:
        return False
    width = width if isinstance(width, (int, float)) else next(iter(width), 0)
    return float(width) >= 1 or (float(width) > 0 and dataset.get("VOILUTFunction", "LINEAR") != "LINEAR")
