"""A site's secret: made once, told apart, refused where it is gone; and a store of before takes its names."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.index import KEYED, SCHEMA, key_id
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import Store
from chexfound.errors import DataError
from client import cli
from client.home import secret
from client.home.paths import close, site_home, store_path

PX = 16


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    close(site_home("A"))
    return site_home("A")


@pytest.fixture
def images(make_images: Callable[..., Path], tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", {"alpha": 8})


def test_it_is_made_once_and_for_this_account_only(home: Path) -> None:
    assert secret.present(home) is None
    assert cli.main(["enrol", "--name", "A"]) == 0
    held = secret.path_of(home).read_bytes()
    assert len(held) == 32
    assert stat.S_IMODE(secret.path_of(home).stat().st_mode) == 0o600
    assert cli.main(["enrol", "--name", "A"]) == 0
    assert secret.path_of(home).read_bytes() == held
    assert secret.of_site(home) == secret.present(home) == secret.Secret.of(held)


def test_its_keys_are_those_of_rfc_5869() -> None:
    """By the hash functions alone: extract with a salt of zeros, expand by one block."""
    import hmac

    held = bytes(range(32))
    extracted = hmac.digest(bytes(32), held, "sha256")
    own = secret.Secret.of(held)
    expected = {"split": own.split, "pseudonym": own.naming.key, "texts": own.naming.texts, "store": own.digest}
    for name, key in expected.items():
        assert key == hmac.digest(extracted, f"chexfound {name} v1".encode() + b"\x01", "sha256")


@given(st.binary(min_size=32, max_size=32), st.text(max_size=20))
def test_a_name_is_a_function_of_key_and_patient(key: bytes, patient: str) -> None:
    own, other = secret.Secret.of(key), secret.Secret.of(key[::-1] + b"x")
    assert own.naming.name(patient) == secret.Secret.of(key).naming.name(patient) != other.naming.name(patient)
    assert len(own.naming.name(patient)) == 32


def test_a_store_of_before_takes_its_names_and_new_images_those_of_their_patients(home: Path, images: Path) -> None:
    path = store_path(home, PX)
    ingest(images, path, PX)
    before = Store.open(path)
    own = secret.of_site(home)
    assert (key_id(path), before.key_id) == ("", "")
    ingest(images, path, PX, naming=own.naming)
    after = Store.open(path)
    assert (key_id(path), after.key_id) == (own.naming.key_id,) * 2
    pairs = {image.file: image.patient for image in before.images}
    assert {after.file(place): image.patient for place, image in enumerate(after.images)} == {
        file: own.naming.name(patient) for file, patient in pairs.items()
    }
    stored = (path / "index.sqlite").read_bytes()
    assert not [text for text in ("alpha", "Blob", ".png", str(images)) if text.encode() in stored]
    new = images / "alpha" / "00-0.png"
    (images / "alpha" / "00-9.png").write_bytes((images / "alpha" / "07-0.png").read_bytes())
    new.write_bytes(new.read_bytes())  # the same pixels, another time: its row is written anew
    os.utime(new, (1, 1))
    ingest(images, path, PX, naming=own.naming)
    assert set(Store.open(path).patients) == set(after.patients)
    with sqlite3.connect(path / "index.sqlite") as index:
        assert index.execute("PRAGMA user_version").fetchone() == (KEYED,) != (SCHEMA,)


def killed(path: Path, images: Path, own: Naming, after: int) -> None:
    """A process that is killed while it names its patients: those of the store first, then those of the manifest."""
    named: list[str] = []

    class Deadly(Naming):
        def name(self, patient: str) -> str:
            named.append(patient)
            if len(named) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().name(patient)

    ingest(images, path, PX, naming=Deadly(key_id=own.key_id, key=own.key, texts=own.texts))


@pytest.mark.parametrize("after", [1, 5, 10, 11, 20])
def test_killed_while_it_takes_names_it_has_all_of_them_or_none(home: Path, images: Path, after: int) -> None:
    path, own = store_path(home, PX), secret.of_site(home)
    ingest(images, path, PX)
    before = Store.open(path).patients
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path, images, own.naming, after))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert Store.open(path).patients == before
    assert key_id(path) == ""
    ingest(images, path, PX, naming=own.naming)
    assert sorted(Store.open(path).patients) == sorted(own.naming.name(patient) for patient in before)


@pytest.mark.parametrize("length", [0, 1, 31, 33])
def test_a_secret_of_another_length_is_none_though_no_store_was_made_with_it(home: Path, length: int) -> None:
    secret.of_site(home)
    secret.path_of(home).write_bytes(b"\1" * length)
    for read in (secret.of_site, secret.present):
        with pytest.raises(DataError, match=f"holds {length} bytes, not 32"):
            read(home)
    assert secret.path_of(home).read_bytes() == b"\1" * length


def served(images: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("client.node.supernode.keep_running", lambda *_: 15)
    options = ["--data", str(images), "--name", "A", "--superlink", "127.0.0.1:1", "--insecure", "--image-px", str(PX)]
    return cli.main(options)


@pytest.mark.parametrize("fate", ["lost", "another", "short"])
def test_without_the_secret_that_its_stores_were_made_with_a_site_does_nothing(
    home: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fate: str
) -> None:
    assert served(images, monkeypatch) == 0
    path, held = secret.path_of(home), secret.path_of(home).read_bytes()
    if fate == "lost":
        path.unlink()
    else:
        path.write_bytes({"another": held[::-1], "short": held[:-1]}[fate])
    capsys.readouterr()
    assert served(images, monkeypatch) == DataError.exit_code
    said = capsys.readouterr().err
    for word in ("secret.key", "backup of keys/", f"remove {store_path(home, PX)}", "patients change parts"):
        assert word in said
    assert path.exists() == (fate != "lost")  # no new one is made over it
    path.write_bytes(held)
    assert served(images, monkeypatch) == 0


@pytest.mark.parametrize("odd", [16, 32])
def test_each_of_its_stores_is_of_its_secret(home: Path, images: Path, odd: int) -> None:
    """A site has one for each size of images, and a run takes any."""
    own = secret.of_site(home)
    for px in (16, 32):
        naming = secret.Secret.of(bytes(32)).naming if px == odd else own.naming
        ingest(images, store_path(home, px), px, naming=naming)
    with pytest.raises(DataError, match=f"{store_path(home, odd)} was made with another secret"):
        secret.present(home)


def test_taken_in_anew_patients_have_other_names(home: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the refusal says."""
    import shutil

    assert served(images, monkeypatch) == 0
    before = set(Store.open(store_path(home, PX)).patients)
    secret.path_of(home).unlink()
    shutil.rmtree(store_path(home, PX))
    assert served(images, monkeypatch) == 0
    assert not before & set(Store.open(store_path(home, PX)).patients)


def test_nobody_without_its_key_adds_to_a_keyed_store(home: Path, images: Path) -> None:
    path, own = store_path(home, PX), secret.of_site(home)
    ingest(images, path, PX, naming=own.naming)
    before = Store.open(path).digest()
    for naming in (None, secret.Secret.of(bytes(32)).naming):
        with pytest.raises(DataError, match="names its patients by a(nother)? key"):
            ingest(images, path, PX, naming=naming)
    assert Store.open(path).digest() == before
