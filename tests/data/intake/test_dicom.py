from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless

from chexfound.data.intake import dicom
from chexfound.data.intake.dicom import frontal, pseudonym, quiet, read, stretch
from chexfound.errors import DataError


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


RAMP = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)


class TestPixels:
    def test_range_is_stretched_to_uint8(self, tmp_path, make_dicom):
        grey, _ = read(make_dicom(tmp_path / "a.dcm", RAMP + 500))
        assert (grey.dtype, grey.shape, grey.min(), grey.max()) == (np.uint8, (64, 48), 0, 255)
        assert np.array_equal(grey, np.floor(RAMP / RAMP.max() * 255 + 0.5).astype(np.uint8))

    def test_monochrome1_is_inverted(self, tmp_path, make_dicom):
        white, _ = read(make_dicom(tmp_path / "a.dcm", RAMP))
        black, _ = read(make_dicom(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1"))
        assert np.array_equal(black, 255 - white)

    def test_window_clips(self, tmp_path, make_dicom):
        grey, _ = read(make_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=1000, WindowWidth=200))
        assert (grey[RAMP <= 899] == 0).all()
        assert (grey[RAMP >= 1100] == 255).all()
        assert 120 < grey[RAMP == 1000].item() < 135

    @pytest.mark.parametrize("width", [0, -5])
    def test_window_without_width_is_no_window(self, tmp_path, make_dicom, width):
        plain, _ = read(make_dicom(tmp_path / "a.dcm", RAMP))
        grey, _ = read(make_dicom(tmp_path / "b.dcm", RAMP, WindowCenter=1000, WindowWidth=width))
        assert np.array_equal(grey, plain)

    def test_rescale_comes_before_the_window(self, tmp_path, make_dicom):
        tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 400}
        rescaled, _ = read(make_dicom(tmp_path / "a.dcm", RAMP, **tags))
        windowed, _ = read(make_dicom(tmp_path / "b.dcm", RAMP, WindowCenter=1000.25, WindowWidth=200.5))
        assert np.abs(rescaled.astype(int) - windowed).max() <= 1

    def test_padding_neither_counts_nor_shines(self, tmp_path, make_dicom):
        padded = RAMP.copy() + 100
        padded[:8] = 65535
        for polarity in ("MONOCHROME1", "MONOCHROME2"):
            tags = {"PixelPaddingValue": 65535, "PhotometricInterpretation": polarity}
            grey, _ = read(make_dicom(tmp_path / "a.dcm", padded, **tags))
            assert (grey[:8] == 0).all()
            assert (grey[8:].min(), grey[8:].max()) == (0, 255)

    def test_signed(self, tmp_path, make_dicom):
        plain, _ = read(make_dicom(tmp_path / "a.dcm", RAMP))
        signed, _ = read(make_dicom(tmp_path / "b.dcm", RAMP.astype(np.int16) - 2000))
        assert np.array_equal(signed, plain)

    @given(arrays(np.int32, (5, 4), elements=st.integers(-70000, 70000)))
    def test_stretch_keeps_order_and_ends(self, values):
        grey = stretch(values)
        if values.min() == values.max():
            assert grey is None
        else:
            assert (grey.min(), grey.max()) == (0, 255)
            order = np.argsort(values, axis=None)
            assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()


class TestBombs:
    """Files that are small, and would not be in memory."""

    @pytest.fixture(autouse=True)
    def _never_decoded(self, monkeypatch):
        monkeypatch.setattr(dicom, "_grey", lambda dataset: pytest.fail("decoded"))

    def test_deflated(self, tmp_path, make_dicom, monkeypatch):
        path = make_dicom(tmp_path / "a.dcm", np.zeros((1000, 1000), np.uint8))
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)
        assert path.stat().st_size < 5000
        monkeypatch.setattr(dicom, "_LARGEST_BYTES", 10**6)  # the pixels' own; the tags make it more
        monkeypatch.setattr(pydicom, "dcmread", lambda path: pytest.fail("read"))
        with pytest.raises(DataError, match=r"a\.dcm: more than 1,000,000 bytes$"):
            read(path)

    def test_inflating_ends_at_the_cap(self, tmp_path, make_dicom, monkeypatch):
        path = make_dicom(tmp_path / "a.dcm", np.zeros((3000, 3000), np.uint8))
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)
        for pad in (b"", b"\0", b"\0"):
            path.write_bytes(path.read_bytes() + pad)
            assert 9 * 10**6 < dicom._inflated(path) < 9 * 10**6 + 2000
        monkeypatch.setattr(dicom, "_LARGEST_BYTES", 10**6)
        assert 10**6 < dicom._inflated(path) <= 10**6 + (1 << 20)

    def test_long_file(self, tmp_path, make_dicom, monkeypatch):
        path = make_dicom(tmp_path / "a.dcm", RAMP)
        monkeypatch.setattr(dicom, "_LARGEST_BYTES", 5000)
        with pytest.raises(DataError, match="more than 5,000 bytes"):
            read(path)

    @pytest.mark.parametrize("sides", [(10001, 10000), (65535, 65535)])
    def test_pixels_of_the_header(self, tmp_path, make_dicom, sides):
        path = make_dicom(tmp_path / "a.dcm", RAMP, Rows=sides[0], Columns=sides[1])
        with pytest.raises(DataError, match=r"a\.dcm: more than 100,000,000 pixels$"):
            read(path)

    def test_pixels_of_a_jpeg_2000_codestream(self, tmp_path, make_dicom):
        path = make_dicom(tmp_path / "a.dcm", RAMP)
        dataset = pydicom.dcmread(path)
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        good = dataset.PixelData
        at = good.index(b"\xff\x4f\xff\x51") + 8
        dataset.PixelData = good[:at] + struct.pack(">II", 60000, 60000) + good[at + 8 :]
        dataset.save_as(path)
        with pytest.raises(DataError, match="its header and its codestream differ in rows or columns"):
            read(path)


def test_jpeg_2000(tmp_path, make_dicom):
    plain, _ = read(path := make_dicom(tmp_path / "a.dcm", RAMP))
    dataset = pydicom.dcmread(path)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path)
    assert np.array_equal(read(path)[0], plain)


def test_deflated(tmp_path, make_dicom):
    plain, _ = read(path := make_dicom(tmp_path / "a.dcm", RAMP))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    assert np.array_equal(read(path)[0], plain)


class TestHeader:
    def test_holds_a_pseudonym_and_no_identifier(self, tmp_path, make_dicom):
        _, header = read(make_dicom(tmp_path / "a.dcm", RAMP))
        assert header.patient == hashlib.sha256(b"1234567").hexdigest()[:16] == pseudonym("1234567")
        assert (header.view, header.sex, header.age, header.modality) == ("PA", "F", 61.0, "CR")
        assert "1234567" not in repr(header)
        assert "Doe" not in repr(header)

    def test_without_patient(self, tmp_path, make_dicom):
        assert read(make_dicom(tmp_path / "a.dcm", RAMP, PatientID=""))[1].patient == ""

    @pytest.mark.parametrize(
        ("tags", "years"),
        [
            ({"PatientAge": "006M"}, 0.5),
            ({"PatientAge": "010D"}, 10 / 365.25),
            ({"PatientAge": "52"}, 52),
            ({"PatientAge": None, "PatientBirthDate": "19500101", "StudyDate": "20000101"}, 50),
            ({"PatientAge": None, "PatientBirthDate": "20500101", "StudyDate": "20000101"}, math.nan),
            ({"PatientAge": "old"}, math.nan),
        ],
    )
    def test_age(self, tmp_path, make_dicom, tags, years):
        assert read(make_dicom(tmp_path / "a.dcm", RAMP, **tags))[1].age == pytest.approx(years, abs=0.01, nan_ok=True)

    def test_view_from_the_description(self, tmp_path, make_dicom):
        file = make_dicom(tmp_path / "a.dcm", RAMP, ViewPosition="", SeriesDescription="Chest AP portable")
        assert read(file)[1].view == "AP"


REFUSALS = [
    ({"Modality": "CT"}, "modality 'CT' is not CR or DX"),
    ({"Modality": None}, "modality '' is not CR or DX"),
    (
        {"Modality": "SC", "BodyPartExamined": ""},
        "modality 'SC', and neither BodyPartExamined nor a description",
    ),
    ({"BodyPartExamined": "EXTREMITY"}, "not a chest: BodyPartExamined 'EXTREMITY'"),
    (
        {"BodyPartExamined": "TSPINE", "StudyDescription": "CHEST AND SPINE"},
        "not a chest: BodyPartExamined 'TSPINE'",
    ),
    ({"BodyPartExamined": "", "StudyDescription": "Knee, left"}, "not a chest: its description says 'KNEE'"),
    ({"ViewPosition": "LL"}, "not frontal: ViewPosition 'LL'"),
    ({"ViewPosition": "AP_OBLIQUE"}, "not frontal: ViewPosition 'AP OBLIQUE'"),
    ({"ViewPosition": "", "SeriesDescription": "W033 Chest Lat."}, "not frontal: its description says so"),
    ({"ViewPosition": "", "PatientOrientation": ["A", "F"]}, "not frontal: PatientOrientation 'A'"),
    ({"NumberOfFrames": 2, "Rows": 32}, r"multi-frame \(2 frames\)"),
    ({"PixelData": None}, "holds no pixels"),
    ({"PhotometricInterpretation": "RGB"}, "not greyscale: PhotometricInterpretation 'RGB'"),
]


class TestRefusal:
    @pytest.mark.parametrize(("tags", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
    def test_reason(self, tmp_path, make_dicom, tags, reason):
        with pytest.raises(DataError, match=rf"a\.dcm: {reason}"):
            read(make_dicom(tmp_path / "a.dcm", RAMP, **tags))

    @pytest.mark.parametrize(
        "tags",
        [
            {"Modality": "DX", "BodyPartExamined": None, "ViewPosition": None},
            {"Modality": "SC"},
            {"Modality": "SC", "BodyPartExamined": "", "StudyDescription": "XR Thorax"},
            {"ViewPosition": "", "StudyDescription": "Chest PA and lateral"},
            {"ViewPosition": "", "PatientOrientation": ["L", "F"]},
        ],
    )
    def test_accepted(self, tmp_path, make_dicom, tags):
        assert read(make_dicom(tmp_path / "a.dcm", RAMP, **tags))[0].shape == RAMP.shape

    def test_constant(self, tmp_path, make_dicom):
        with pytest.raises(DataError, match="constant pixels"):
            read(make_dicom(tmp_path / "a.dcm", np.full((9, 9), 7, np.uint8)))

    def test_not_dicom(self, tmp_path):
        (tmp_path / "a.dcm").write_bytes(b"plain text" * 50)
        with pytest.raises(DataError, match="not a DICOM file"):
            read(tmp_path / "a.dcm")

    @pytest.mark.parametrize("kept", [0, 100, 140, 300, 700, 2000, 6000])
    def test_truncated(self, tmp_path, make_dicom, kept):
        path = make_dicom(tmp_path / "a.dcm", RAMP)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(
            DataError, match=r"a\.dcm: (cannot be decoded|not a DICOM file|modality ''|holds no pixels)"
        ):
            read(path)

    def test_reason_tells_no_name(self, tmp_path, make_dicom):
        path = make_dicom(tmp_path / "a.dcm", RAMP)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match="cannot be decoded") as caught:
            read(path)
        assert "Doe" not in str(caught.value)
        assert "1234567" not in str(caught.value)

    def test_mutated_files_raise_only_our_error(self, tmp_path, make_dicom):
        good = make_dicom(tmp_path / "a.dcm", RAMP[:16]).read_bytes()
        lots = np.random.default_rng(0)
        outcomes = set()
        for _ in range(200):
            data = np.frombuffer(good, np.uint8).copy()
            data[lots.integers(128, 800, 6)] = lots.integers(0, 256, 6, np.uint8)
            (tmp_path / "b.dcm").write_bytes(data.tobytes())
            try:
                outcomes.add(read(tmp_path / "b.dcm")[0].dtype.name)
            except DataError:
                outcomes.add("refused")
        assert outcomes == {"uint8", "refused"}


@pytest.mark.parametrize(
    ("view", "expected"), [("", True), ("AP Supine", True), ("PA", True), ("Lateral", False), ("ll", False)]
)
def test_frontal(view, expected):
    assert frontal(view) is expected


class TestRealFiles:
    def test_chests(self, require):
        folder = require("shared") / "data" / "dicom"
        grey, header = read(folder / "RG1_J2KI.dcm")
        assert (grey.shape, grey.min(), grey.max()) == ((1955, 1841), 0, 255)
        assert (header.view, header.sex, header.modality) == ("PA", "F", "CR")
        assert header.age == pytest.approx(64.5, abs=0.1)
        # Polarity: the mediastinum is brighter than the lung beside it.
        assert grey[900:1100, 880:960].mean() > grey[500:700, 350:500].mean() + 40
        grey, header = read(folder / "nih_dx_implicit_le.dcm")
        assert (grey.shape, header.age, header.sex, header.view) == ((1024, 1024), 81, "M", "")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("RG3_J2KI", "BodyPartExamined 'EXTREMITY'"),
            ("mlut_18", "modality 'OT'"),
            ("vlut_04", "modality 'OT'"),
        ],
    )
    def test_others_are_refused(self, require, name, reason):
        with pytest.raises(DataError, match=reason):
            read(require("shared") / "data" / "dicom" / "not_chest" / f"{name}.dcm")
