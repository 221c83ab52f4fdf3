from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from chexfound.data.intake import decode as sources_decode
from chexfound.data.intake.ingest import ingest
from chexfound.data.intake.pictures import read_picture
from chexfound.data.store import shards
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import Store
from chexfound.errors import ConfigError, DataError, StorageError

PX = 16
ROOT = Path(__file__).resolve().parents[3]


def rows(count: int) -> list[dict[str, str]]:
    return [{"file": f"{n:02}.png", "patient_id": f"p{n // 2}"} for n in range(count)]


def left_alone(folder: Path) -> bool:
    """Nothing lies in the folder but the input."""
    return sorted(path.name for path in folder.iterdir()) == ["in"]


class TestManifest:
    def test_rows_become_images(self, tmp_path, make_manifest):
        given = [
            {
                "file": "x/1.png",
                "source": "b",
                "patient_id": "p",
                "view": "PA",
                "age": "61.5",
                "sex": "f",
                "site": "Ulm",
                "split": "val",
            },
            {"file": "2.png", "source": "a", "patient_id": "q", "remark": "not read"},
        ]
        summary = ingest(make_manifest(tmp_path / "in", given), tmp_path / "s", PX)
        assert (summary.images, summary.patients, summary.refused, summary.skipped_existing) == (2, 2, [], 0)
        assert (summary.findings, summary.sources) == ([], ["a", "b"])
        store = Store.open(tmp_path / "s")
        row = store.images[1]
        assert (row.source, row.patient, row.view, row.age, row.sex, row.site, row.split, row.file) == (
            ("b", "p", "PA", 61.5, "F", "Ulm", "val", "x/1.png")
        )
        assert store.splits == [None, "val"]

    def test_what_is_negative_and_what_is_unknown(self, tmp_path, make_manifest):
        given = [
            {"file": "0.png", "patient_id": "0", "findings": "Pneumonia|Rare"},
            {"file": "1.png", "patient_id": "1", "findings": "No Finding"},
            {"file": "2.png", "patient_id": "2", "findings": ""},
            {"file": "3.png", "patient_id": "3", "source": "undeclared", "findings": "Pneumonia"},
        ]
        labelled = {"about": "…", "a": ["Pneumonia", "Nodule", "No Finding"]}
        summary = ingest(make_manifest(tmp_path / "in", given, labelled), tmp_path / "s", PX)
        assert summary.findings == ["No Finding", "Nodule", "Pneumonia", "Rare"]
        store = Store.open(tmp_path / "s")
        assert store.labels(store.ids, ["Pneumonia", "Nodule", "No Finding", "Rare", "Mass"]).tolist() == [
            [1, 0, 0, 1, -1],
            [0, 0, 1, -1, -1],
            [-1, -1, -1, -1, -1],
            [1, -1, -1, -1, -1],
        ]

    def test_without_labelled_json_absence_is_unknown(self, tmp_path, make_manifest):
        given = [{"file": "0.png", "findings": " A | B "}, {"file": "1.png", "findings": "A"}]
        ingest(make_manifest(tmp_path / "in", given), tmp_path / "s", PX)
        store = Store.open(tmp_path / "s")
        assert sorted(store.labels(store.ids, ["A", "B"]).tolist()) == [[1, -1], [1, 1]]

    def test_png_jpeg_and_dicom(self, tmp_path, make_manifest, make_dicom, make_picture):
        folder = tmp_path / "in"
        make_dicom(folder / "d.dcm", make_picture(9), PatientID="")
        given = [{"file": name, "patient_id": name} for name in ("a.png", "b.jpg", "c.JPEG", "d.dcm")]
        assert ingest(make_manifest(folder, given), tmp_path / "s", PX).images == 4
        store = Store.open(tmp_path / "s")
        assert store.patients == ["a.png", "b.jpg", "c.JPEG", "d.dcm"]
        assert (store.views[3], store.sexes[3], store.ages[3]) == ("PA", "F", 61)
        expected = cv2.resize(read_picture(folder / "a.png"), (PX, PX), interpolation=cv2.INTER_AREA)
        assert np.array_equal(store.pixels([0])[0], expected)

    def test_threads_change_nothing(self, tmp_path, make_manifest, monkeypatch):
        make_manifest(tmp_path / "in", rows(150))
        ingest(tmp_path / "in", tmp_path / "many", PX)
        monkeypatch.setattr(sources_decode, "_THREADS", 1)
        ingest(tmp_path / "in", tmp_path / "one", PX)
        shard = "shard-00000.npy"
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "many" / shard).read_bytes()
        assert Store.open(tmp_path / "one").digest() == Store.open(tmp_path / "many").digest()

    def test_progress(self, tmp_path, make_manifest):
        seen = []
        ingest(
            make_manifest(tmp_path / "in", rows(5)),
            tmp_path / "s",
            PX,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(n, 5) for n in range(1, 6)]


FAULTS = [
    ([{"file": "no.png"}], r"line 2: no file 'no\.png' \(No such file or directory\)"),
    ([{"file": "../out.png"}], r"line 2: file '\.\./out\.png' must be below the manifest's folder"),
    ([{"file": "/etc/passwd"}], "line 2: file '/etc/passwd' must be below"),
    ([{"file": "link.png"}], r"line 2: file 'link\.png' is a link out of the manifest's folder"),
    ([{"file": "folder.png"}], r"line 2: no file 'folder\.png' \(not a file but a folder, a pipe"),
    ([{"file": "pipe.png"}], r"line 2: no file 'pipe\.png' \(not a file but a folder, a pipe"),
    ([{"file": "x" * 300 + ".png"}], r"line 2: no file 'x{99}… \(File name too long\)"),
    ([{"file": "text.txt"}], r"line 2: file 'text\.txt' is not one of \.png"),
    ([{"file": ""}], "line 2: file is blank"),
    ([{"file": "0.png"}, {"file": "0.png"}], r"file '0\.png' stands twice"),
    ([{"file": "0.png"}, {"file": "./0.png"}], r"file '0\.png' stands twice"),
    (
        [{"file": "0.png", "split": "train"}, {"file": "1.png", "split": "test"}],
        "patient 'p' of 'a' is in two splits, test and train",
    ),
    ([{"file": "0.png", "split": "dev"}], "line 2: split 'dev' is not one of train, val, test"),
    ([{"file": "0.png", "patient_id": ""}], "line 2: patient_id is blank"),
    ([{"file": "0.png", "source": " "}], "line 2: source is blank"),
    ([{"file": "0.png", "source": "a/b"}], "line 2: source 'a/b' must not hold a '/'"),
    ([{"file": "0.png", "source": "a" * 65}], "line 2: source 'a{65}' must be 1 to 64 printable characters"),
    ([{"file": "0.png", "source": "a\nb"}], r"line 3: source 'a\\nb' must be 1 to 64 printable characters"),
    ([{"file": "0.png", "site": "a\tb"}], r"line 2: site 'a\\tb' must be 1 to 64 printable characters"),
    ([{"file": "0.png", "findings": "A|" + "B" * 70}], "line 2: finding 'B{70}' must be 1 to 64 printable"),
    ([{"file": "0.png", "findings": "A\x07|B"}], r"line 2: finding 'A\\x07' must be 1 to 64 printable"),
    ([{"file": "0.png", "age": "old"}], "line 2: age 'old' is not a number of years"),
    ([{"file": "0.png", "age": "nan"}], "line 2: age 'nan' is not a number of years"),
]


class TestManifestFaults:
    @pytest.fixture
    def folder(self, tmp_path, make_picture) -> Path:
        folder = tmp_path / "in"
        (folder / "folder.png").mkdir(parents=True)
        (folder / "text.txt").write_text("x")
        cv2.imwrite(str(folder / "0.png"), make_picture(0))
        cv2.imwrite(str(folder / "1.png"), make_picture(1))
        (folder / "link.png").symlink_to("/etc/passwd")
        os.mkfifo(folder / "pipe.png")
        return folder

    def write(self, folder: Path, given: list[dict[str, str]]) -> None:
        given = [{"source": "a", "patient_id": "p", "findings": ""} | row for row in given]
        with open(folder / "manifest.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(given[0]))
            writer.writeheader()
            writer.writerows(given)

    @pytest.mark.parametrize(("given", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
    def test_fault(self, tmp_path, folder, given, message):
        self.write(folder, given)
        with pytest.raises(DataError, match=rf"manifest\.csv: {message}"):
            ingest(folder, tmp_path / "s", PX)
        assert left_alone(tmp_path)

    @pytest.mark.parametrize("name", ["manifest.csv", "labelled.json"])
    def test_a_pipe_in_place_of_its_files(self, tmp_path, folder, name):
        self.write(folder, [{"file": "0.png"}])
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match=f"{name}: cannot be read: not a file but a folder, a pipe"):
            ingest(folder, tmp_path / "s", PX)

    def test_existing_store_is_as_it_was(self, tmp_path, folder):
        self.write(folder, [{"file": "0.png"}])
        ingest(folder, tmp_path / "s", PX)
        before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
        self.write(folder, [{"file": "1.png"}, {"file": "no.png"}])
        with pytest.raises(DataError, match="no file"):
            ingest(folder, tmp_path / "s", PX)
        assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before

    def test_all_are_told_at_once(self, tmp_path, folder):
        self.write(folder, [{"file": "no.png"}, {"file": "0.png", "patient_id": ""}])
        with pytest.raises(
            DataError, match=r"2 problems:\n  - line 2: no file 'no\.png' \(.*\)\n  - line 3: patient_id is blank"
        ):
            ingest(folder, tmp_path / "s", PX)

    def test_many_are_counted(self, tmp_path, folder):
        self.write(folder, [{"file": f"no-{n}.png"} for n in range(100)])
        with pytest.raises(DataError, match="and 80 more$"):
            ingest(folder, tmp_path / "s", PX)

    @pytest.mark.parametrize("column", ["file", "source", "patient_id", "findings"])
    def test_missing_column(self, tmp_path, folder, column):
        names = [name for name in ("file", "source", "patient_id", "findings") if name != column]
        (folder / "manifest.csv").write_text(",".join(names) + "\n0.png,x,y\n")
        with pytest.raises(
            DataError,
            match=rf"manifest\.csv: no column '{column}'; it must have .* \(found: {', '.join(names)}\)",
        ):
            ingest(folder, tmp_path / "s", PX)
        assert left_alone(tmp_path)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", r"4 problems:.*\n.*no column 'file'.*found: nothing"),
            (b"file,source,patient_id,findings\n0.png,a,p\n", "line 2: 3 cells under 4 columns"),
            (b"file,source,patient_id,findings,file\n", "column 'file' stands twice"),
            (b"file,source,patient_id,findings\n\xff.png,a,p,\n", "cannot be read as CSV in UTF-8"),
            (b'file,source,patient_id,findings\n"0.png,a,p,\n', "cannot be read as CSV"),
            (b"file,source,patient_id,findings\n", "no images"),
        ],
    )
    def test_not_a_table(self, tmp_path, folder, data, message):
        (folder / "manifest.csv").write_bytes(data)
        with pytest.raises(DataError, match=message):
            ingest(folder, tmp_path / "s", PX)
        assert left_alone(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", "must be an object of source -> list of findings, not list"),
            ('{"a": "Nodule"}', "'a': must be a list of findings"),
            ('{"a": [1]}', "'a': must be a list of findings"),
            ('{"a": ["A | B"]}', r"""'a': finding 'A \| B' must not hold a '\|'; did you mean \["A", "B"\]\?"""),
            ('{"a": [" "]}', "'a': finding ' ' must be 1 to 64 printable characters"),
            ('{"a": ["\\ud800"]}', r"'a': finding '\\ud800' must be 1 to 64 printable characters"),
            ('{"a\\ud800": []}', r"source 'a\\ud800' must be 1 to 64 printable characters"),
            (
                '{"a": 1, "": ["\\n"]}',
                r"3 problems:\n  - 'a': must be a list.*\n  - source '' must be .*\n  - '': finding",
            ),
        ],
    )
    def test_labelled_json(self, tmp_path, folder, text, message):
        self.write(folder, [{"file": "0.png"}])
        (folder / "labelled.json").write_text(text)
        with pytest.raises(DataError, match=rf"labelled\.json: {message}"):
            ingest(folder, tmp_path / "s", PX)
        assert left_alone(tmp_path)

    @pytest.mark.parametrize(
        ("source", "hint"), [("HOSPITAL_A", "did you mean 'hospital-a'"), ("ulm", "take it out, or name 'hospital-a'")]
    )
    def test_labelled_json_names_a_source_that_no_row_has(self, tmp_path, make_manifest, source, hint):
        folder = make_manifest(tmp_path / "in", rows(2), {source: ["Nodule"]}, source="hospital-a")
        with pytest.raises(DataError, match=rf"labelled\.json names a source '{source}' that no row has; {hint}"):
            ingest(folder, tmp_path / "s", PX)

    def test_labelled_json_may_say_more_than_is_needed(self, tmp_path, make_manifest):
        labelled = {"a": ["Nodule"], "b": ["Nodule"]}
        summary = ingest(make_manifest(tmp_path / "in", rows(2), labelled, findings="Mass"), tmp_path / "s", PX)
        assert summary.findings == ["Mass", "Nodule"]

    def test_what_a_missing_column_does_not_hide(self, tmp_path, folder):
        text = "file,source,findings,split\nno.png,a/b,,dev\n1.png,a,A\x07,\n0.png,a,,\n0.png,a,,\n"
        (folder / "manifest.csv").write_text(text)
        with pytest.raises(DataError, match="6 problems") as raised:
            ingest(folder, tmp_path / "s", PX)
        wanted = ("no column 'patient_id'", "no file 'no.png'", "must not hold a '/'", "split 'dev'", "finding 'A")
        assert [text for text in wanted if text not in str(raised.value)] == []

    def test_byte_order_mark_quotes_and_blank_lines(self, tmp_path, folder):
        text = '\ufefffile,source,patient_id,findings,site\n0.png,a,p,,"Ulm, Germany"\n\n'
        (folder / "manifest.csv").write_text(text, encoding="utf-8")
        ingest(folder, tmp_path / "s", PX)
        assert Store.open(tmp_path / "s").sites == ["Ulm, Germany"]


class TestNothingUsable:
    def test_absent_folder(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            ingest(tmp_path / "in", tmp_path / "s", PX)

    def test_empty_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        with pytest.raises(DataError, match=r"no images: neither DICOM files nor a manifest\.csv$"):
            ingest(tmp_path / "in", tmp_path / "s", PX)
        assert left_alone(tmp_path)

    def test_pictures_without_a_manifest(self, tmp_path, make_picture):
        (tmp_path / "in").mkdir()
        cv2.imwrite(str(tmp_path / "in" / "a.png"), make_picture(0))
        with pytest.raises(DataError, match=r"1 PNG or JPEG files lie there, and need a manifest\.csv"):
            ingest(tmp_path / "in", tmp_path / "s", PX)

    def test_all_refused(self, tmp_path, make_dicom, make_picture):
        make_dicom(tmp_path / "in" / "a.dcm", make_picture(0), Modality="CT")
        with pytest.raises(
            DataError, match=r"no usable image among 1 files:\n  - a\.dcm: modality 'CT' is not CR or DX"
        ):
            ingest(tmp_path / "in", tmp_path / "s", PX)
        assert left_alone(tmp_path)

    @pytest.mark.parametrize("px", [-1, 0, 4097, 200_000])
    def test_size(self, tmp_path, px):
        with pytest.raises(ConfigError, match=rf"image_px: must be 1 to 4096 \(got {px}\)"):
            ingest(tmp_path, tmp_path / "s", px)

    def test_source_whose_name_is_too_long(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            ingest(tmp_path / ("x" * 300), tmp_path / "s", PX)

    @pytest.mark.parametrize(
        ("store", "error", "message"),
        [
            ("in/00.png/store", ConfigError, r"cannot be written there: a part of its path is a file"),
            ("x" * 300, ConfigError, r"cannot be written there: a name in it is too long"),
            ("x" * 250, ConfigError, r"cannot be written there: a name in it is too long"),  # .NAME.building is
            ("round/s", ConfigError, r"cannot be written there: its links lead in a circle"),
            ("/proc/x", StorageError, r"cannot be written \(No such file or directory\)"),
        ],
    )
    def test_store_that_cannot_be_made(self, tmp_path, make_manifest, store, error, message):
        make_manifest(tmp_path / "in", rows(2))
        (tmp_path / "round").symlink_to("round")
        with pytest.raises(error, match=message):
            ingest(tmp_path / "in", tmp_path / store, PX)
        (tmp_path / "round").unlink()
        assert left_alone(tmp_path)


class TestRefusedFiles:
    def test_one_unreadable_among_many(self, tmp_path, make_manifest):
        folder = make_manifest(tmp_path / "in", rows(9))
        (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:500])
        (folder / "05.png").write_bytes(b"")
        summary = ingest(folder, tmp_path / "s", PX)
        assert summary.images == 7
        assert [file for file, _ in summary.refused] == ["03.png", "05.png"]
        assert all("cannot be decoded" in reason for _, reason in summary.refused)
        store = Store.open(tmp_path / "s")
        assert len(store) == 7
        assert store.refused == summary.refused
        assert str(tmp_path) not in str(store.refused)

    def test_truncated_jpeg(self, tmp_path, make_picture):
        cv2.imwrite(str(tmp_path / "a.jpg"), make_picture(0, 200, 200))
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-3000])
        with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
            read_picture(tmp_path / "a.jpg")

    def test_reasons(self, tmp_path, make_manifest, make_picture):
        folder = tmp_path / "in"
        folder.mkdir()
        cv2.imwrite(str(folder / "flat.png"), np.full((20, 20), 9, np.uint8))
        for name in ("good.png", "same.png"):
            cv2.imwrite(str(folder / name), make_picture(1))
        given = [
            {"file": "side.png", "view": "Lateral"},
            *({"file": name} for name in ("flat.png", "good.png", "same.png")),
        ]
        summary = ingest(make_manifest(folder, given), tmp_path / "s", PX)
        assert summary.refused == [
            ("flat.png", "constant pixels"),
            ("same.png", "duplicate of good.png"),
            ("side.png", "not frontal: view 'Lateral'"),
        ]

    def test_same_picture_at_two_sources_is_kept(self, tmp_path, make_manifest, make_picture):
        (tmp_path / "in").mkdir()
        for name in ("0.png", "1.png"):
            cv2.imwrite(str(tmp_path / "in" / name), make_picture(1))
        folder = make_manifest(tmp_path / "in", [{"file": "0.png"}, {"file": "1.png", "source": "b"}])
        assert ingest(folder, tmp_path / "s", PX).images == 2

    def test_unreadable_folder(self, tmp_path, make_dicom, make_picture, monkeypatch):
        make_dicom(tmp_path / "in" / "a.dcm", make_picture(0))
        (tmp_path / "in" / "closed").mkdir()
        scan = os.scandir

        def closed(path):
            if str(path).endswith("closed"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", closed)
        assert ingest(tmp_path / "in", tmp_path / "s", PX).refused == [("closed", "the folder may not be read")]


class TestWhatLiesThere:
    """Loose DICOM files among what a hospital's disk may hold."""

    @pytest.fixture
    def root(self, tmp_path, make_dicom, make_picture) -> Path:
        make_dicom(tmp_path / "in" / "ulm" / "a.dcm", make_picture(0))
        return tmp_path / "in"

    def taken(self, root: Path, store: Path) -> tuple[list[str], dict[str, str]]:
        summary = ingest(root, store, PX)
        return sorted(row.file for row in Store.open(store).images), dict(summary.refused)

    def test_not_files(self, tmp_path, root):
        os.mkfifo(root / "ulm" / "pipe")
        os.mkfifo(root / "ulm" / "pipe.dcm")
        (root / "gone").symlink_to("/nowhere")
        (root / "round").symlink_to("round")
        files, refused = self.taken(root, tmp_path / "s")
        assert files == ["ulm/a.dcm"]
        assert refused == {
            "gone": "a link that leads nowhere",
            "round": "Too many levels of symbolic links",
            "ulm/pipe": "not a file but a folder, a pipe, a socket or a device",
            "ulm/pipe.dcm": "not a file but a folder, a pipe, a socket or a device",
        }
        assert ingest(root, tmp_path / "s", PX).skipped_existing == 5

    def test_links_to_folders_are_followed_once(self, tmp_path, root, make_dicom, make_picture):
        make_dicom(tmp_path / "disk" / "2023" / "b.dcm", make_picture(1))
        make_dicom(root / ".versions" / "c.dcm", make_picture(2))
        for name, target in {
            "archive": tmp_path / "disk",
            "archive-again": tmp_path / "disk",
            "alias": root / "ulm",
            "latest": root / ".versions",
            "ulm/loop": root / "ulm",
            "up": tmp_path,
        }.items():
            (root / name).symlink_to(target)
        (tmp_path / "disk" / "back").symlink_to(root)
        (tmp_path / "disk" / "2023" / "loop").symlink_to(tmp_path / "disk")
        (tmp_path / "link").symlink_to(root)
        files, refused = self.taken(tmp_path / "link", tmp_path / "s")
        assert files == ["archive/2023/b.dcm", "latest/c.dcm", "ulm/a.dcm"]
        assert refused == {"up": "a link to a folder that holds this one is not followed"}
        assert Store.open(tmp_path / "s").sources == ["archive", "latest", "ulm"]

    def test_names_that_are_not_utf8(self, tmp_path, root, make_dicom, make_picture):
        bad = os.fsdecode(b"caf\xe9")
        make_dicom(root / "ulm" / f"{bad}.dcm", make_picture(1))
        make_dicom(root / bad / "c.dcm", make_picture(2))
        files, refused = self.taken(root, tmp_path / "s")
        assert files == ["ulm/a.dcm"]
        reason = "its name is not UTF-8; rename it"
        assert refused == {"caf\\xe9": reason, "ulm/caf\\xe9.dcm": reason}

    @pytest.mark.parametrize("link", [False, True])
    def test_source_or_store_that_is_not_utf8(self, tmp_path, root, link):
        bad = tmp_path / os.fsdecode(b"caf\xe9")
        root.rename(bad)
        (tmp_path / "in").symlink_to(bad)
        with pytest.raises(ConfigError, match=r"(in|caf\\xe9): the path is not UTF-8"):
            ingest(tmp_path / "in" if link else bad, tmp_path / "s", PX)
        with pytest.raises(ConfigError, match=r"caf\\xe9/s: the path is not UTF-8"):
            ingest(tmp_path, bad / "s", PX)  # refused before the source is looked at

    @pytest.mark.parametrize("name", ["x" * 65, "a\nb"])
    def test_folders_that_cannot_name_a_source(self, tmp_path, root, make_dicom, make_picture, name):
        make_dicom(root / name / "b.dcm", make_picture(1))
        files, refused = self.taken(root, tmp_path / "s")
        assert files == ["ulm/a.dcm"]
        assert refused == {
            f"{name}/b.dcm": f"its source would be {name!r}, not 1 to 64 printable characters; rename the folder"
        }


class TestPictures:
    def test_sixteen_bits_are_stretched(self, tmp_path):
        values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 7 + 1000
        cv2.imwrite(str(tmp_path / "a.png"), values)
        grey = read_picture(tmp_path / "a.png")
        assert np.array_equal(grey, np.floor((values - 1000) / 4193 * 255 + 0.5).astype(np.uint8))

    def test_colour_becomes_grey(self, tmp_path, make_picture):
        cv2.imwrite(str(tmp_path / "a.png"), np.stack([make_picture(0)] * 3, -1))
        assert np.array_equal(read_picture(tmp_path / "a.png"), make_picture(0))

    @pytest.mark.parametrize("side", [10001, 60000])  # below and above where Pillow itself refuses
    def test_too_many_pixels(self, tmp_path, make_manifest, side):
        folder = make_manifest(tmp_path / "in", rows(3))
        data = (folder / "01.png").read_bytes()
        header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
        (folder / "01.png").write_bytes(data)
        assert ingest(folder, tmp_path / "s", PX).refused == [("01.png", "more than 100,000,000 pixels")]

    def test_constant(self, tmp_path):
        cv2.imwrite(str(tmp_path / "a.png"), np.full((9, 9), 300, np.uint16))
        with pytest.raises(DataError, match="constant pixels"):
            read_picture(tmp_path / "a.png")


class TestLooseDicom:
    def test_source_patient_and_no_labels(self, tmp_path, make_dicom, make_picture):
        root = tmp_path / "in"
        make_dicom(root / "ulm" / "x" / "1.dcm", make_picture(0))
        make_dicom(root / "ulm" / "2", make_picture(1), ViewPosition="AP")
        make_dicom(root / "3.DICOM", make_picture(2))
        make_dicom(root / "ulm" / ".hidden.dcm", make_picture(3))
        make_dicom(root / "ulm" / "DICOMDIR", make_picture(4))
        (root / "ulm" / "notes.txt").write_text("x" * 200)
        summary = ingest(root, tmp_path / "s", PX)
        assert (summary.images, summary.patients, summary.refused, summary.findings) == (3, 2, [], [])
        store = Store.open(tmp_path / "s")
        assert store.sources == ["in", "ulm", "ulm"]
        assert sorted(store.views) == ["AP", "PA", "PA"]
        assert set(store.patients) == {"8bb0cf6eb9b17d0f"}  # sha256(b"1234567")
        stored = (tmp_path / "s" / "index.sqlite").read_bytes()
        assert b"1234567" not in stored
        assert b"Doe" not in stored

    def test_a_key_names_who_was_named_by_the_number(self, tmp_path, make_dicom, make_picture):
        make_dicom(tmp_path / "in" / "1.dcm", make_picture(0))
        naming = Naming(key_id="k", key=bytes(32), texts=bytes(32))
        ingest(tmp_path / "in", tmp_path / "s", PX, naming=naming)
        assert Store.open(tmp_path / "s").patients == [naming.name("8bb0cf6eb9b17d0f")]

    def test_reasons(self, tmp_path, make_dicom, make_picture):
        root = tmp_path / "in"
        make_dicom(root / "0.dcm", make_picture(0))
        make_dicom(root / "1.dcm", make_picture(1), PatientID=" ")
        make_dicom(root / "2.dcm", make_picture(2), ViewPosition="LL")
        (root / "3.dcm").write_bytes(b"no")
        summary = ingest(root, tmp_path / "s", PX)
        assert dict(summary.refused) == {
            "1.dcm": "no PatientID, so its patient cannot be kept in one split; list it in a manifest.csv",
            "2.dcm": "not frontal: ViewPosition 'LL'",
            "3.dcm": "not a DICOM file (no DICM preamble)",
        }
        again = ingest(root, tmp_path / "s", PX)
        assert (again.images, again.refused, again.skipped_existing) == (0, [], 4)

    def test_a_manifest_speaks_for_its_folder_only(self, tmp_path, make_dicom, make_manifest, make_picture):
        make_manifest(tmp_path / "in" / "listed", rows(2))
        make_dicom(tmp_path / "in" / "listed" / "x" / "unlisted.dcm", make_picture(7))
        make_dicom(tmp_path / "in" / "loose" / "1.dcm", make_picture(8))
        ingest(tmp_path / "in", tmp_path / "s", PX)
        files = sorted(row.file for row in Store.open(tmp_path / "s").images)
        assert files == ["listed/00.png", "listed/01.png", "loose/1.dcm"]

    def test_store_inside_the_source(self, tmp_path, make_dicom, make_picture):
        make_dicom(tmp_path / "1.dcm", make_picture(0))
        for _ in range(2):
            ingest(tmp_path, tmp_path / "s", PX)
        assert len(Store.open(tmp_path / "s")) == 1


class TestAgain:
    def test_only_new_files_are_decoded(self, tmp_path, make_manifest, monkeypatch):
        folder = make_manifest(tmp_path / "in", rows(6))
        ingest(folder, tmp_path / "s", PX)
        make_manifest(folder, rows(8))
        decoded = []
        decode = sources_decode._decode
        monkeypatch.setattr(
            sources_decode, "_decode", lambda entry, *rest: decoded.append(entry.image.file) or decode(entry, *rest)
        )
        summary = ingest(folder, tmp_path / "s", PX)
        assert sorted(decoded) == ["06.png", "07.png"]
        assert (summary.images, summary.skipped_existing) == (2, 6)
        ingest(folder, tmp_path / "once", PX)
        assert Store.open(tmp_path / "s").digest() == Store.open(tmp_path / "once").digest()

    def test_nothing_new(self, tmp_path, make_manifest):
        folder = make_manifest(tmp_path / "in", rows(4))
        ingest(folder, tmp_path / "s", PX)
        summary = ingest(folder, tmp_path / "s", PX)
        assert (summary.images, summary.patients, summary.skipped_existing) == (0, 0, 4)

    def test_labels_and_views_are_mended(self, tmp_path, make_manifest):
        first = [*rows(2), {"file": "02.png", "view": "LL"}]
        folder = make_manifest(tmp_path / "in", first, findings="Nodule")
        assert len(ingest(folder, tmp_path / "s", PX).refused) == 1
        mended = [{"file": f"0{n}.png", "source": "z", "view": "AP", "patient_id": "q"} for n in range(2)]
        make_manifest(folder, [*mended, {"file": "02.png", "view": "PA"}], {"a": ["Edema"]}, findings="Mass")
        ingest(folder, tmp_path / "s", PX)
        ingest(folder, tmp_path / "once", PX)
        store = Store.open(tmp_path / "s")
        assert store.keys == ["a/p", "z/q", "z/q"]
        assert store.labels(store.ids, ["Edema", "Mass", "Nodule"]).tolist() == [
            [0, 1, -1],
            [-1, 1, -1],
            [-1, 1, -1],
        ]
        assert store.digest() == Store.open(tmp_path / "once").digest()
        assert store.refused == []

    def test_changed_file(self, tmp_path, make_manifest, make_picture):
        folder = make_manifest(tmp_path / "in", rows(3))
        ingest(folder, tmp_path / "s", PX)
        cv2.imwrite(str(folder / "01.png"), make_picture(77, 50, 50))
        assert ingest(folder, tmp_path / "s", PX).images == 1
        ingest(folder, tmp_path / "once", PX)
        assert Store.open(tmp_path / "s").digest() == Store.open(tmp_path / "once").digest()

    @pytest.mark.parametrize("bad", ["a", "z"])  # before and after its duplicates in the order of names
    def test_a_duplicate_stands_in_for_its_twin(self, tmp_path, make_dicom, make_picture, bad):
        root = tmp_path / "in"
        make_dicom(root / f"{bad}.dcm", make_picture(0))
        make_dicom(root / "other.dcm", make_picture(1))
        ingest(root, tmp_path / "s", PX)
        make_dicom(root / "b.dcm", make_picture(0))
        make_dicom(root / "c.dcm", make_picture(0))
        assert ingest(root, tmp_path / "s", PX).refused == [
            ("b.dcm", f"duplicate of {bad}.dcm"),
            ("c.dcm", f"duplicate of {bad}.dcm"),
        ]
        assert ingest(root, tmp_path / "s", PX).skipped_existing == 4
        (root / f"{bad}.dcm").write_bytes(b"no")
        summary = ingest(root, tmp_path / "s", PX)
        assert sorted(summary.refused) == [
            *([("a.dcm", "not a DICOM file (no DICM preamble)")] if bad == "a" else []),
            ("c.dcm", "duplicate of b.dcm"),
            *([("z.dcm", "not a DICOM file (no DICM preamble)")] if bad == "z" else []),
        ]
        assert (summary.images, summary.skipped_existing) == (1, 1)
        ingest(root, tmp_path / "once", PX)
        assert Store.open(tmp_path / "s").digest() == Store.open(tmp_path / "once").digest()

    def test_a_duplicate_of_another_folder_whose_image_changed(self, tmp_path, make_dicom, make_picture):
        for folder in ("1", "2"):
            make_dicom(tmp_path / folder / "x" / f"{folder}.dcm", make_picture(0))
            make_dicom(tmp_path / folder / "x" / f"{folder}-other.dcm", make_picture(int(folder)))
            ingest(tmp_path / folder, tmp_path / "s", PX)
        make_dicom(tmp_path / "1" / "x" / "1.dcm", make_picture(7))
        ingest(tmp_path / "1", tmp_path / "s", PX)
        assert len(Store.open(tmp_path / "s")) == 3
        assert ingest(tmp_path / "2", tmp_path / "s", PX).images == 1
        assert len(Store.open(tmp_path / "s")) == 4

    def test_duplicates_of_a_store_from_before_their_pixels_were_noted(self, tmp_path, make_dicom, make_picture):
        for name in ("a.dcm", "b.dcm"):
            make_dicom(tmp_path / "in" / name, make_picture(0))
        ingest(tmp_path / "in", tmp_path / "s", PX)
        with contextlib.closing(sqlite3.connect(tmp_path / "s" / "index.sqlite")) as index:
            index.execute("DROP TABLE duplicates")
        (tmp_path / "in" / "a.dcm").write_bytes(b"no")
        ingest(tmp_path / "in", tmp_path / "s", PX)
        assert [row.file for row in Store.open(tmp_path / "s").images] == ["b.dcm"]

    def test_other_size(self, tmp_path, make_manifest):
        folder = make_manifest(tmp_path / "in", rows(2))
        ingest(folder, tmp_path / "s", PX)
        with pytest.raises(DataError, match="holds images of 16 px, not 32"):
            ingest(folder, tmp_path / "s", 32)


KILL = """
import os, sys
from pathlib import Path
from chexfound.data.store import shards
from chexfound.data.intake.ingest import ingest

def die(*args):
    os.kill(os.getpid(), 9)

if sys.argv[3] == "while-decoding":
    append = shards.Shards.append
    def dies(self, pixels):
        if self.rows.get(0, 0) >= 7:
            self._file.flush()
            die()
        return append(self, pixels)
    shards.Shards.append = dies
else:  # between the pixels' way to the disk and the commit of the index
    sync = shards.Shards.sync
    shards.Shards.sync = lambda self: (sync(self), die())
ingest(Path(sys.argv[1]), Path(sys.argv[2]), 16)
"""


class TestKilled:
    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("when", ["while-decoding", "before-the-commit"])
    def test_again_ends_as_if_undisturbed(self, tmp_path, make_manifest, there, when):
        folder = make_manifest(tmp_path / "in", rows(12))
        ingest(folder, tmp_path / "whole", PX)
        if there:
            make_manifest(folder, rows(4))
            ingest(folder, tmp_path / "s", PX)
            before = Store.open(tmp_path / "s").digest()
            make_manifest(folder, rows(12))
        command = [sys.executable, "-c", KILL, str(folder), str(tmp_path / "s"), when]
        died = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        if there:
            assert Store.open(tmp_path / "s").digest() == before
            assert (tmp_path / "s" / "shard-00000.npy").stat().st_size > shards.shard_bytes(4, PX)
        else:
            assert not (tmp_path / "s").exists()
            assert (tmp_path / ".s.building").exists()
        ingest(folder, tmp_path / "s", PX)
        assert Store.open(tmp_path / "s").digest() == Store.open(tmp_path / "whole").digest()
        assert np.load(tmp_path / "s" / "shard-00000.npy").shape == (12, PX, PX)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "s", "whole"]

    def test_disk_full(self, tmp_path, make_manifest, monkeypatch):
        folder = make_manifest(tmp_path / "in", rows(6))

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shards, "sync", full)
        with pytest.raises(StorageError, match=r"s: no space left to write .*; nothing was half-written"):
            ingest(folder, tmp_path / "s", PX)
        assert left_alone(tmp_path)


class TestRealImages:
    def test_slice_of_the_four_sources(self, tmp_path, require):
        shared = require("shared") / "data" / "cxr"
        with open(shared / "manifest.csv", newline="") as file:
            every = list(csv.DictReader(file))
        chosen = every[::40]
        for row in chosen:
            (tmp_path / "in" / row["file"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared / row["file"], tmp_path / "in" / row["file"])
        with open(tmp_path / "in" / "manifest.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(every[0]))
            writer.writeheader()
            writer.writerows(chosen)
        shutil.copy(shared / "labelled.json", tmp_path / "in")
        summary = ingest(tmp_path / "in", tmp_path / "s", 128)
        assert (summary.images, summary.refused, len(summary.sources)) == (len(chosen), [], 4)
        store = Store.open(tmp_path / "s")
        declared = json.loads((shared / "labelled.json").read_text())
        findings = {row["file"]: set(row["findings"].split("|")) - {""} for row in chosen}
        for row, labels in zip(store.images, store.labels(store.ids, store.findings).tolist(), strict=True):
            listed = findings[row.file]
            for finding, value in zip(store.findings, labels, strict=True):
                known = bool(listed) and (finding in listed or finding in declared[row.source])
                assert value == (int(finding in listed) if known else -1)
        assert 40 < store.pixels(store.ids).mean() < 200

    def test_dicom_folder(self, tmp_path, require):
        summary = ingest(require("shared") / "data" / "dicom", tmp_path / "s", 128)
        assert (summary.images, summary.patients) == (2, 2)
        assert dict(summary.refused) == {
            "not_chest/RG3_J2KI.dcm": "not a chest: BodyPartExamined 'EXTREMITY'",
            "not_chest/mlut_18.dcm": "modality 'OT' is not CR or DX",
            "not_chest/vlut_04.dcm": "modality 'OT' is not CR or DX",
        }
