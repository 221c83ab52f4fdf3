"""A bundle is what is in it: paths and contents; what comes from outside cannot be more than that."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk  # private: what `flwr build` and `flwr run` call
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ProtocolError
from chexfound.identity import bundle
from chexfound.identity.bundle import Bundle
from client.node import flwr_private

ROOT = Path(__file__).resolve().parents[2]
ZIPPED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def packed(files: Iterable[tuple[str, bytes]], how: int = zipfile.ZIP_STORED, level: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how, compresslevel=level) as archive:
        for path, content in files:
            archive.writestr(path, content)
    return buffer.getvalue()


# ---- the digest

# Few letters and short files, so that parts of one set are often parts of another.
paths = st.text("ab/.", min_size=1, max_size=3)
file_sets = st.dictionaries(paths, st.binary(max_size=2), max_size=3)


@given(file_sets, st.data())
def test_the_digest_is_of_paths_and_contents_alone(files: dict[str, bytes], data: st.DataObject) -> None:
    """Not of how they were packed, nor in which order."""
    straight = bundle.read(packed(files.items()))
    order = data.draw(st.permutations(list(files.items())))
    how, level = data.draw(st.sampled_from(ZIPPED)), data.draw(st.sampled_from([1, 9]))
    assert bundle.read(packed(order, how, level)).digest() == straight.digest()
    assert straight.files == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


@given(file_sets, file_sets)
def test_no_two_sets_of_files_have_one_digest(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    digests = {bundle.read(packed(files.items())).digest() for files in (one, other)}
    assert len(digests) == (1 if one == other else 2)


def test_a_digest_by_hand() -> None:
    sha256 = hashlib.sha256(b"x").digest()
    statement = b"\0\0\0\0\0\0\0\1a" + b"\0\0\0\0\0\0\0\x20" + sha256
    assert Bundle({"a": sha256.hex()}).digest() == hashlib.sha256(statement).hexdigest()


def test_where_a_path_ends_and_the_next_begins_is_said() -> None:
    """Without lengths these two would be the same bytes."""
    first, second = b"A" * 32, b"B" * 32
    apart = Bundle({"a": first.hex(), "b": second.hex()})
    assert apart.digest() != Bundle({f"a{first.decode()}b": second.hex()}).digest()


def test_differences() -> None:
    release = Bundle({"same": "00", "changed": "01", "gone": "02"})
    came = Bundle({"same": "00", "changed": "ff", "new\n": "03"})
    assert came.differences(release) == [
        "'changed': differs",
        "'gone': missing",
        r"'new\n': not in the installed release",
    ]
    assert release.differences(release) == []


# ---- what is hostile


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", packed([("a", b"x" * 99)])[:-30], bytes(100)], ids=len)
def test_what_is_no_archive(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a readable archive"):
        bundle.read(content)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_changed_bytes_give_a_bundle_or_our_error(noise: bytes, place: int) -> None:
    whole = packed([("a", b"one"), ("b", b"two")], zipfile.ZIP_DEFLATED)
    for content in (noise, whole[:place], whole[:place] + noise + whole[place + len(noise) :]):
        try:
            assert len(bundle.read(content).digest()) == 64
        except ProtocolError:
            pass


def test_contents_that_do_not_fit_their_checksum() -> None:
    whole = packed([("a", b"sound")])
    with pytest.raises(ProtocolError, match="not a readable archive"):
        bundle.read(whole.replace(b"sound", b"other"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_twice() -> None:
    with pytest.raises(ProtocolError, match="names 'a' twice"):
        bundle.read(packed([("a", b"1"), ("b", b""), ("a", b"1")]))


def test_what_unpacks_to_more_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file or in all; what is over the limit is not unpacked to its end."""
    monkeypatch.setattr(bundle, "BYTES_MAX", 5000)
    assert bundle.read(packed([("a", bytes(2500)), ("b", bytes(2500))], zipfile.ZIP_DEFLATED)).files
    for sizes in ([5001], [2500, 2501], [10**6]):
        bomb = packed(((str(n), bytes(size)) for n, size in enumerate(sizes)), zipfile.ZIP_DEFLATED)
        with pytest.raises(ProtocolError, match="more than 5000 bytes"):
            bundle.read(bomb)


def test_an_archive_with_a_load_beside_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip file may begin with anything; what is refused is kept on the disk, and must not fill it."""
    monkeypatch.setattr(bundle, "BYTES_MAX", 5000)
    with pytest.raises(ProtocolError, match="more than 5000 bytes"):
        bundle.read(bytes(5000) + packed([("a", b"")]))


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_whose_unpacking_has_no_bound(how: int) -> None:
    with pytest.raises(ProtocolError, match="'a' is not packed as Flower packs"):
        bundle.read(packed([("a", b"x")], how))


def test_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FILES_MAX", 3)
    assert len(bundle.read(packed((str(n), b"") for n in range(3))).files) == 3
    with pytest.raises(ProtocolError, match="more than 3 files"):
        bundle.read(packed((str(n), b"") for n in range(4)))


def test_paths_are_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(tmp_path / "absolute"), "../above", "a/../../b", "~/x", "C:\\x", "folder/"]
    assert set(bundle.read(packed((name, b"") for name in names)).files) == set(names)
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "above").exists()


# ---- the release


def test_the_release_is_what_flower_builds_from_the_checkout() -> None:
    """A file of a kind that `release_files` leaves out, or Flower does, shows here."""
    built = bundle.read(build_fab_from_disk(ROOT))
    release = flwr_private.release_bundle()
    assert built.differences(release) == []
    assert built.digest() == release.digest()
    assert set(built.files) - {".info/CONTENT"} == set(bundle.release_files())
    assert {"chexfound/identity/bundle.py", "client/app.py", "server/app.py", "pyproject.toml"} <= set(built.files)
    assert any(path.startswith("chexfound/presets/") for path in built.files)


def test_many_entries_are_refused_before_they_are_listed() -> None:
    """A list of 1.3 million took 27 s and 1.3 GB, in the SuperNode's own process."""
    entry = b"PK\x01\x02" + bytes(24) + b"\x01\x00" + bytes(16) + b"a"
    whole = entry * 1_300_000
    content = whole + b"PK\x05\x06" + bytes(8) + len(whole).to_bytes(4, "little") + bytes(6)
    assert len(content) < bundle.BYTES_MAX
    start = time.monotonic()
    with pytest.raises(ProtocolError, match="more than 2000 files"):
        bundle.read(content)
    assert time.monotonic() - start < 2
