"""DICOM files of the phantoms: plausible CR and DX headers with invented people in them.

What a site must strip is there on purpose: names, ids, birth dates, institution, physicians.  UIDs
are hashes of the patient's stream, and dates are drawn, so that the same seed gives the same bytes.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    RLELossless,
)

from chexfound.data.phantom.cases import FAMILY, Case, Patient
from chexfound.data.phantom.scanner import Exposure
from chexfound.data.phantom.sites import Hospital
from chexfound.rng import derive

IMPLEMENTATION = UID("2.25.138450621390762584209347155128466003")
"""A fixed implementation class, so that files do not change with pydicom's version."""


def uid(*name: int | str) -> UID:
    """A UID under 2.25 (the arc for UUIDs) that depends on the name alone."""
    return UID(f"2.25.{derive(*name, 'high') << 63 | derive(*name, 'low')}")


def write(path: Path, site: Hospital, person: Patient, date: datetime.date, case: Case, exposure: Exposure) -> None:
    """Write one radiograph. The caller makes the folder."""
    kind = DigitalXRayImageStorageForPresentation if site.modality == "DX" else ComputedRadiographyImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = uid(*case.stream, "instance", case.image)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION
    meta.ImplementationVersionName = "CHEXFOUND"
    image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPClassUID, image.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    _person(image, person, date)
    _study(image, site, date, case)
    _equipment(image, site)
    _pixels(image, site, exposure)
    if site.modality == "DX":
        _digital(image, site, case)
    if site.compressed and not derive(*case.stream, "compressed", case.image) % 6:
        image.compress(RLELossless, generate_instance_uid=False)
    image.save_as(path, enforce_file_format=True)


def _person(image: Dataset, person: Patient, date: datetime.date) -> None:
    image.PatientName, image.PatientID = person.name, person.id
    image.PatientBirthDate, image.PatientSex = person.born.strftime("%Y%m%d"), person.sex
    image.PatientAge = f"{age(person, date):03d}Y"


def age(person: Patient, date: datetime.date) -> int:
    """Full years on the day of the examination."""
    return date.year - person.born.year - ((date.month, date.day) < (person.born.month, person.born.day))


def _study(image: Dataset, site: Hospital, date: datetime.date, case: Case) -> None:
    number = derive(*case.stream, "accession", case.image)
    image.StudyInstanceUID = uid(*case.stream, "study", case.image)
    image.SeriesInstanceUID = uid(*case.stream, "series", case.image)
    image.StudyDate = image.SeriesDate = image.AcquisitionDate = image.ContentDate = date.strftime("%Y%m%d")
    time = f"{8 + number % 10:02d}{number // 10 % 60:02d}{number // 600 % 60:02d}"
    image.StudyTime = image.SeriesTime = image.AcquisitionTime = image.ContentTime = time
    image.StudyID, image.AccessionNumber = str(number % 10_000), f"{site.prefix}{number % 10_000_000:07d}"
    image.ReferringPhysicianName = f"{FAMILY[number % len(FAMILY)]}^Referring"
    image.OperatorsName = f"{FAMILY[number // 97 % len(FAMILY)]}^Operator"
    image.StudyDescription, image.SeriesDescription = "Chest", f"Chest {case.view}"
    image.SeriesNumber, image.InstanceNumber = 1, 1
    image.Modality, image.BodyPartExamined, image.ViewPosition = site.modality, "CHEST", case.view
    image.PatientOrientation = ["L", "F"]
    image.ImageComments = "Computed phantom, not a patient"


def _equipment(image: Dataset, site: Hospital) -> None:
    image.Manufacturer, image.ManufacturerModelName = site.maker, site.model
    image.InstitutionName = site.institution
    image.InstitutionAddress = f"1 Example Road, {site.name.title()}"
    image.StationName = f"{site.prefix}-XR1"
    image.DeviceSerialNumber = str(derive(site.name, "serial") % 100_000)
    image.SoftwareVersions = "1.0"
    image.KVP = 120
    if site.modality == "CR":
        image.Laterality = ""
        image.CassetteID, image.PlateType = "35X43", "Storage phosphor"


def _pixels(image: Dataset, site: Hospital, exposure: Exposure) -> None:
    allocated = 8 if site.bits == 8 else 16
    image.ImageType = ["ORIGINAL", "PRIMARY", ""]
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME1" if site.inverted else "MONOCHROME2"
    image.Rows, image.Columns = exposure.pixels.shape
    image.BitsAllocated, image.BitsStored, image.HighBit = allocated, site.bits, site.bits - 1
    image.PixelRepresentation = 0
    image.ImagerPixelSpacing = [f"{exposure.spacing:.4f}"] * 2
    image.WindowCenter, image.WindowWidth = (f"{value:.1f}" for value in exposure.window)
    image.LossyImageCompression = "00"
    image.BurnedInAnnotation = "NO"
    image.PixelData = exposure.pixels.tobytes() + b"\0" * (exposure.pixels.nbytes % 2)
    image["PixelData"].VR = "OB" if allocated == 8 else "OW"


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _digital(image: Dataset, site: Hospital, case: Case) -> None:
    """Fill in what the DX object asks for beyond CR (PS3.3 A.26)."""
    values: dict[str, Any] = {
        "PresentationIntentType": "FOR PRESENTATION",
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": 1 if site.inverted else -1,
        "RescaleIntercept": "0",
        "RescaleSlope": "1",
        "RescaleType": "US",
        "PresentationLUTShape": "INVERSE" if site.inverted else "IDENTITY",
        "DetectorType": "DIRECT",
        "ImageLaterality": "U",
    }
    for name, value in values.items():
        setattr(image, name, value)
    image.AnatomicRegionSequence = Sequence([_code("51185008", "SCT", "Thorax")])
    view = ("399348003", "antero-posterior") if case.view == "AP" else ("272479007", "postero-anterior")
    image.ViewCodeSequence = Sequence([_code(view[0], "SCT", view[1])])
    image.AcquisitionContextSequence = Sequence([])
