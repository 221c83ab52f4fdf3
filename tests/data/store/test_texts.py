"""A keyed index has no words, be it new or of an earlier release, and all that stood on them still does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.data.store import texts
from chexfound.data.store.index import INDEX, KEYED, key_id
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import Store
from chexfound.errors import DataError

PX = 16
NAMING = Naming(key_id="k", key=bytes(32), texts=bytes(31) + b"t")
LABEL = "MUELLER Hans 12.3.1954 HIV"
WORDS = [
    b"MUELLER",
    b"19540312",
    b"registry",
    b"manifest",
    b"Nodule",
    b"wing",
    b"Nobody",
    b".dcm",
    b".png",
    b"duplicate of",
]


@pytest.fixture
def images(tmp_path: Path, make_dicom: Callable[..., Path], make_picture: Callable, make_manifest: Callable) -> Path:
    """As a PACS writes folders: one patient each; beside them a registrar's manifest, and what is refused."""
    root = tmp_path / "pacs"
    for number in range(3):
        folder = root / f"MUELLER^Hans_{number}_19540312" / "study"
        make_dicom(folder / "MUELLER.dcm", make_picture(number), PatientID=str(number))
    make_dicom(root / "MUELLER^Hans_9" / "again.dcm", make_picture(0), PatientID="0")  # pixels of another folder
    make_dicom(root / "MUELLER^Hans_9" / "side.dcm", make_picture(4), ViewPosition="LL MUELLER")
    rows = [
        {"file": "MUELLER_0.png", "patient_id": "Nobody 1", "findings": LABEL, "sex": "MUELLER", "view": "PA MUELLER"},
        {"file": "MUELLER_1.png", "patient_id": "Nobody 2", "findings": "Nodule", "site": "wing MUELLER"},
    ]
    make_manifest(root / "manifest-folder", rows, {"registry": ["Nodule"]}, source="registry")
    return root


def raw(store: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(store.glob(f"{INDEX}*")))


def there(store: Path) -> list[bytes]:
    found, index = [], raw(store)
    found += [word for word in WORDS if word in index]
    return found


def files(store: Store) -> list[str]:
    return sorted(store.file(place) for place in range(len(store)))


def test_a_keyed_index_has_no_words_and_the_store_says_what_it_said(images: Path, tmp_path: Path) -> None:
    plain, keyed = tmp_path / "plain", tmp_path / "keyed"
    ingest(images, plain, PX, site="north")
    summary = ingest(images, keyed, PX, naming=NAMING, site="north")
    assert there(plain)
    assert there(keyed) == []
    one, two = Store.open(plain), Store.open(keyed)
    assert sorted(one.sources) == two.sources == ["north"] * 3 + ["registry"] * 2
    assert two.findings == one.findings == [LABEL, "Nodule"] == summary.findings
    assert summary.sources == ["north", "registry"]
    assert files(two) == files(one)
    assert two.refused == one.refused == sorted(summary.refused)
    assert ("MUELLER^Hans_9/side.dcm", "not frontal: ViewPosition 'LL MUELLER'") in two.refused
    for name in ("views", "sexes", "sites"):
        assert sorted(getattr(two, name)) == sorted(getattr(one, name))
    by_file = {two.file(place): place for place in range(len(two))}
    labels = two.labels(
        [by_file["manifest-folder/MUELLER_0.png"], by_file["manifest-folder/MUELLER_1.png"]], two.findings
    )
    assert labels.tolist() == [[1, 0], [-1, 1]]
    assert stat.S_IMODE((keyed / texts.TEXTS).stat().st_mode) == 0o600


def test_files_are_known_again_by_their_keys(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(images, store, PX, naming=NAMING, site="north")
    before = Store.open(store)
    again = ingest(images, store, PX, naming=NAMING, site="north")
    assert (again.images, again.refused, again.skipped_existing) == (0, [], 7)
    moved = images.rename(tmp_path / "MUELLER moved")
    size = (store / "shard-00000.npy").stat().st_size
    ingest(moved, store, PX, naming=NAMING, site="north")
    after = Store.open(store)
    assert (after.digest(), files(after)) == (before.digest(), files(before))
    assert {image.root for image in after.images} == {NAMING.hide(str(moved))}
    assert (store / "shard-00000.npy").stat().st_size == size
    # The duplicate takes its twin's place once that has changed.
    first = moved / "MUELLER^Hans_0_19540312" / "study" / "MUELLER.dcm"
    first.write_bytes(b"no more")
    ingest(moved, store, PX, naming=NAMING, site="north")
    assert "MUELLER^Hans_9/again.dcm" in files(Store.open(store))
    assert there(store) == []


@pytest.mark.parametrize("before", [True, False], ids=["a store of before", "a new one"])
def test_no_key_is_without_its_text(images: Path, tmp_path: Path, before: bool) -> None:
    """Of every column: where a file lies is looked up by its operator, whichever letter a path begins with."""
    store, rest = tmp_path / "s", images
    if before:
        ingest(images, store, PX)
        rest = tmp_path / "rest"  # which alone is taken in with keys: what was left where it lay has its own too
        rest.mkdir()
        (images / "manifest-folder").rename(rest / "manifest-folder")
    ingest(rest, store, PX, naming=NAMING, site="north")
    with sqlite3.connect(f"file:{store / INDEX}?mode=ro", uri=True) as index:
        texts.attach(index, store, "ro")
        for table, columns in texts.COLUMNS.items():
            for column in columns:
                keys = {key for (key,) in index.execute(f"SELECT {column} FROM {table} WHERE {column} <> ''")}
                found = texts.told(index, f"SELECT {column} FROM {table}")
                assert found.keys() == keys, f"{table}.{column}"
                assert all(NAMING.hide(text) == key for key, text in found.items())
    index.close()


def test_a_store_of_before_loses_its_words(images: Path, tmp_path: Path) -> None:
    """Sources of loose DICOM files were their folders: two of them had the same pixels, which one source has once."""
    store, fresh = tmp_path / "s", tmp_path / "fresh"
    ingest(images, store, PX)
    with sqlite3.connect(store / INDEX) as index:  # as an earlier release may have left it: freed, and not zeroed
        index.execute("PRAGMA secure_delete = OFF")
        index.execute("INSERT INTO refused VALUES ('a', 'MUELLER', ?, 1, 1, '')", ("MUELLER" * 3000,))
        index.execute("DELETE FROM refused WHERE root = 'MUELLER'")
    index.close()
    assert (len(Store.open(store)), key_id(store)) == (6, "")
    size = (store / "shard-00000.npy").stat().st_size
    gone = images / "MUELLER^Hans_2_19540312"
    gone.rename(tmp_path / "gone")  # what has gone from the folder stays, without its name
    ingest(images, store, PX, naming=NAMING, site="north")
    ingest(tmp_path / "gone", tmp_path / "other", PX)
    assert there(store) == []
    assert (store / "shard-00000.npy").stat().st_size == size
    (tmp_path / "gone").rename(gone)
    ingest(images, fresh, PX, naming=NAMING, site="north")
    after, expected = Store.open(store), Store.open(fresh)
    assert after.sources == expected.sources == ["north"] * 3 + ["registry"] * 2
    assert after.digest() == expected.digest()
    assert sorted(file for file, _ in after.refused) == sorted(file for file, _ in expected.refused)


def killed(store: Path, images: Path, after: int) -> None:
    count = 0

    class Deadly(Naming):
        def hide(self, text: str) -> str:
            nonlocal count
            count += 1
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().hide(text)

    ingest(images, store, PX, naming=Deadly(key_id="k", key=NAMING.key, texts=NAMING.texts), site="north")


@pytest.mark.parametrize("after", [1, 20, 60])
def test_killed_while_it_loses_its_words_it_has_all_of_them_or_none(images: Path, tmp_path: Path, after: int) -> None:
    store = tmp_path / "s"
    ingest(images, store, PX)
    before = Store.open(store)
    process = multiprocessing.get_context("fork").Process(target=killed, args=(store, images, after))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = Store.open(store)
    assert (left.digest(), left.key_id, files(left)) == (before.digest(), "", files(before))
    ingest(images, store, PX, naming=NAMING, site="north")
    assert there(store) == []


def test_killed_within_a_commit_of_both_files_it_is_as_it_was(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(images, store, PX, naming=NAMING, site="north")
    before = Store.open(store)
    code = (
        "import sqlite3, os, sys; index = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "index.execute('ATTACH ? AS apart', (sys.argv[2],));"
        "index.executescript('PRAGMA main.cache_size = 1; PRAGMA apart.cache_size = 1; BEGIN;"
        "UPDATE images SET view = hex(randomblob(5000)); UPDATE apart.texts SET text = hex(randomblob(5000))');"
        "os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(store / INDEX), str(store / texts.TEXTS)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert all((store / f"{name}-journal").stat().st_size for name in (INDEX, texts.TEXTS))
    left = Store.open(store)
    assert (left.digest(), files(left), left.refused) == (before.digest(), files(before), before.refused)


def test_without_its_texts_a_store_is_damaged(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(images, store, PX, naming=NAMING, site="north")
    (store / texts.TEXTS).unlink()
    with pytest.raises(DataError, match=r"the store is damaged .*texts.* remove it and ingest again"):
        Store.open(store)


def test_a_copy_of_a_store_opens(images: Path, tmp_path: Path) -> None:
    ingest(images, tmp_path / "s", PX, naming=NAMING, site="north")
    shutil.copytree(tmp_path / "s", tmp_path / "it's a copy?")
    assert Store.open(tmp_path / "it's a copy?").digest() == Store.open(tmp_path / "s").digest()
    with sqlite3.connect(tmp_path / "s" / INDEX) as index:
        assert index.execute("PRAGMA user_version").fetchone() == (KEYED,)
