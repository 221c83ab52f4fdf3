from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.data.store import shards
from chexfound.data.store.index import SCHEMA, Image
from chexfound.data.store.reader import Store
from chexfound.data.store.shards import npy_header
from chexfound.data.store.writer import writing
from chexfound.errors import DataError, StorageError

PX = 8


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (PX, PX), np.uint8)


def image(number: int, **fields) -> Image:
    patient = f"p{number // 2}"
    return Image(**({"source": "a", "patient": patient, "root": "/in", "file": f"{number:03}.png", "size": 1} | fields))


def fill(path: Path, numbers, **fields) -> Store:
    with writing(path, PX) as writer:
        for number in numbers:
            assert writer.add(image(number, **fields), pixels(number), {"Nodule": number % 2}) is None
    return Store.open(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_IMAGES", 3)
        folder = tmp_path_factory.mktemp("many") / "s"
        fill(folder, range(0, 8))
        return fill(folder, range(8, 20))


class TestContent:
    def test_fields_are_aligned(self, tmp_path):
        rows = [
            image(0, source="b", patient="x", view="PA", age=40.5, sex="F", site="here", split="train"),
            image(1, source="a", patient="y"),
        ]
        with writing(tmp_path / "s", PX) as writer:
            writer.add(rows[0], pixels(0), {"Mass": 1, "Nodule": 0})
            writer.add(rows[1], pixels(1), {})
            writer.refuse(image(7, source="b"), "not a chest")
        store = Store.open(tmp_path / "s")
        assert len(store) == 2
        assert store.px == PX
        assert store.ids.tolist() == [0, 1]
        assert store.ids.dtype == np.int64
        assert (store.sources, store.patients, store.keys) == (["a", "b"], ["y", "x"], ["a/y", "b/x"])
        assert (store.views, store.sexes, store.sites, store.splits) == (
            ["", "PA"],
            ["", "F"],
            ["", "here"],
            [None, "train"],
        )
        assert np.isnan(store.ages[0])
        assert store.ages[1] == 40.5
        assert store.findings == ["Mass", "Nodule"]
        assert store.refused == [("007.png", "not a chest")]

    def test_labels(self, tmp_path):
        store = fill(tmp_path / "s", range(4))
        by_file = [int(row.file[:3]) for row in store.images]
        labels = store.labels([3, 0, 0], ["Mass", "Nodule"])
        assert labels.dtype == np.int8
        assert labels.tolist() == [[-1, by_file[3] % 2], [-1, by_file[0] % 2], [-1, by_file[0] % 2]]

    @given(st.lists(st.integers(0, 19)))
    def test_pixels_in_the_order_asked(self, many_shards, ids):
        expected = [pixels(int(many_shards.images[number].file[:3])) for number in ids]
        assert np.array_equal(many_shards.pixels(ids), np.array(expected, np.uint8).reshape(-1, PX, PX))
        assert np.array_equal(many_shards.pixels(np.array(ids, np.int64)), many_shards.pixels(ids))

    def test_pixels_are_a_copy(self, tmp_path):
        store = fill(tmp_path / "s", range(3))
        store.pixels([0])[:] = 0
        assert store.pixels([0]).any()

    @pytest.mark.parametrize("bad", [-1, 3])
    def test_unknown_id(self, tmp_path, bad):
        store = fill(tmp_path / "s", range(3))
        with pytest.raises(DataError, match=f"no image {bad}; ids are below 3"):
            store.pixels([0, bad])
        with pytest.raises(DataError, match=f"no image {bad}"):
            store.labels([bad], ["Nodule"])

    def test_shards_are_npy_files_of_limited_length(self, many_shards):
        found = [np.load(path) for path in sorted(many_shards.path.glob("shard-*.npy"))]
        assert [len(shard) for shard in found] == [3, 3, 3, 3, 3, 3, 2]
        assert {(shard.dtype.name, shard.shape[1:]) for shard in found} == {("uint8", (PX, PX))}

    @given(st.integers(0, 4096), st.integers(1, 4096))
    def test_header_keeps_its_length(self, rows, px):
        assert len(npy_header(rows, px)) == 128


class TestOrder:
    @settings(max_examples=20)
    @given(st.permutations(range(6)), st.integers(0, 6))
    def test_same_content_same_ids_and_digest(self, tmp_path_factory, order, cut):
        folder = tmp_path_factory.mktemp("order")
        one = fill(folder / "one", range(6))
        fill(folder / "two", order[:cut])
        two = fill(folder / "two", order[cut:])
        assert one.digest() == two.digest()
        assert [row.file for row in one.images] == [row.file for row in two.images]
        assert np.array_equal(one.pixels(one.ids), two.pixels(two.ids))
        assert np.array_equal(one.labels(one.ids, one.findings), two.labels(two.ids, two.findings))

    @pytest.mark.parametrize(
        "change",
        [{"patient": "q"}, {"site": "s"}, {"view": "AP"}, {"age": 1.0}, {"sex": "M"}, {"split": "val"}],
    )
    def test_digest_sees_every_field(self, tmp_path, change):
        assert fill(tmp_path / "one", [1]).digest() != fill(tmp_path / "two", [1], **change).digest()

    def test_digest_sees_pixels_and_labels(self, tmp_path):
        digests = set()
        for number, (seed, labels) in enumerate(
            [(0, {}), (1, {}), (0, {"Mass": 1}), (0, {"Mass": 0}), (0, {"Edema": 1})]
        ):
            with writing(tmp_path / str(number), PX) as writer:
                writer.add(image(0), pixels(seed), labels)
            digests.add(Store.open(tmp_path / str(number)).digest())
        assert len(digests) == 5

    def test_digest_ignores_where_files_lay(self, tmp_path):
        moved = fill(tmp_path / "two", [1], file="other/name.png", root="/elsewhere", mtime_ns=5)
        assert fill(tmp_path / "one", [1]).digest() == moved.digest()


class TestWriter:
    def test_duplicate_in_a_source_names_the_first(self, tmp_path):
        with writing(tmp_path / "s", PX) as writer:
            assert writer.add(image(0), pixels(0), {}) is None
            assert writer.add(image(1), pixels(0), {}) == "000.png"
            assert writer.add(image(2, source="b"), pixels(0), {}) is None
        assert Store.open(tmp_path / "s").sources == ["a", "b"]

    def test_changed_file_replaces_its_image(self, tmp_path):
        fill(tmp_path / "s", range(2))
        with writing(tmp_path / "s", PX) as writer:
            assert writer.add(image(1, size=2), pixels(5), {"Mass": 1}) is None
        store = Store.open(tmp_path / "s")
        place = [row.file for row in store.images].index("001.png")
        assert len(store) == 2
        assert np.array_equal(store.pixels([place])[0], pixels(5))
        assert store.labels([place], ["Mass", "Nodule"]).tolist() == [[1, -1]]

    def test_touched_or_moved_file_takes_no_room(self, tmp_path):
        before = fill(tmp_path / "s", range(2)).digest()
        size = (tmp_path / "s" / "shard-00000.npy").stat().st_size
        fill(tmp_path / "s", range(2), mtime_ns=9)
        assert fill(tmp_path / "s", range(2), root="/moved").digest() == before
        assert (tmp_path / "s" / "shard-00000.npy").stat().st_size == size

    def test_two_roots_may_use_one_name(self, tmp_path):
        with writing(tmp_path / "s", PX) as writer:
            writer.add(image(0, root="/one"), pixels(0), {})
            writer.add(image(0, root="/two"), pixels(1), {})
        assert len(Store.open(tmp_path / "s")) == 2

    def test_patient_in_two_splits(self, tmp_path):
        before = fill(tmp_path / "s", [0], split="train").digest()
        with pytest.raises(DataError, match=r"patients would be in two splits: 'a/p0'; mend the manifests"):
            fill(tmp_path / "s", [1], split="test")
        assert Store.open(tmp_path / "s").digest() == before

    def test_foreign_keys_hold(self, tmp_path):
        fill(tmp_path / "s", range(3))
        with writing(tmp_path / "s", PX) as writer:
            writer.forget("/in", "001.png")
            assert writer.names() == (["Nodule"], ["a"])
        index = sqlite3.connect(tmp_path / "s" / "index.sqlite")
        assert index.execute("SELECT count(*) FROM labels").fetchone() == (2,)
        assert index.execute("PRAGMA foreign_key_check").fetchall() == []
        assert index.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        index.close()


class TestRefusedStores:
    def test_absent(self, tmp_path):
        with pytest.raises(DataError, match=r"no store here \(no index.sqlite\); make one with `chexfound ingest`"):
            Store.open(tmp_path)

    def test_other_schema(self, tmp_path):
        fill(tmp_path / "s", [0])
        index = sqlite3.connect(tmp_path / "s" / "index.sqlite")
        index.execute("PRAGMA user_version = 99")
        index.close()
        with pytest.raises(DataError, match=f"a store of schema 99, not {SCHEMA}"):
            Store.open(tmp_path / "s")

    @pytest.mark.parametrize("kept", [0, 50, 5000])
    def test_damaged_index(self, tmp_path, kept):
        fill(tmp_path / "s", range(9))
        path = tmp_path / "s" / "index.sqlite"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(DataError, match="the store is damaged|a store of schema 0"):
            Store.open(tmp_path / "s")

    def test_not_an_index(self, tmp_path):
        (tmp_path / "index.sqlite").write_bytes(b"nothing" * 1000)
        with pytest.raises(DataError, match=r"the store is damaged \(file is not a database\)"):
            Store.open(tmp_path)

    @pytest.mark.parametrize("damage", ["gone", "short", "header", "empty"])
    def test_damaged_shard(self, tmp_path, damage):
        fill(tmp_path / "s", range(3))
        path = tmp_path / "s" / "shard-00000.npy"
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes({"short": data[:-1], "header": b"x" * 128 + data[128:], "empty": b""}[damage])
        with pytest.raises(DataError, match=r"the store is damaged: shard-00000\.npy.*ingest again"):
            Store.open(tmp_path / "s")

    def test_other_size(self, tmp_path):
        fill(tmp_path / "s", [0])
        before = contents(tmp_path / "s")
        with pytest.raises(DataError, match="holds images of 8 px, not 16; give another folder, or 8 px"):
            with writing(tmp_path / "s", 16):
                pass
        assert contents(tmp_path / "s") == before

    def test_folder_in_use(self, tmp_path):
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "thesis.txt").write_text("mine")
        with pytest.raises(DataError, match="exists and is not a store; give a folder that is new or empty"):
            fill(tmp_path / "s", [0])
        assert contents(tmp_path / "s") == {"thesis.txt": b"mine"}

    def test_empty_folder_is_taken(self, tmp_path):
        (tmp_path / "s").mkdir()
        assert len(fill(tmp_path / "s", [0])) == 1

    @pytest.mark.parametrize("there", [False, True])
    def test_second_writer(self, tmp_path, there):
        if there:
            fill(tmp_path / "s", [0])
        with writing(tmp_path / "s", PX) as first:
            first.add(image(1), pixels(1), {})
            with pytest.raises(DataError, match="another process is filling this store"):
                fill(tmp_path / "s", [2])
        assert len(Store.open(tmp_path / "s")) == 1 + there


class TestReaders:
    def test_several_processes(self, tmp_path):
        store = fill(tmp_path / "s", range(9))
        assert pickle.loads(pickle.dumps(store)).path == store.path
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            digests = [pool.submit(Store.digest, store) for _ in range(4)]
            found = pool.submit(Store.pixels, store, [4, 2])
            assert {digest.result() for digest in digests} == {store.digest()}
            assert np.array_equal(found.result(), store.pixels([4, 2]))

    def test_reader_during_and_after_writing(self, tmp_path):
        old = fill(tmp_path / "s", range(4))
        pixels_before, digest = old.pixels(old.ids), old.digest()
        with writing(tmp_path / "s", PX) as writer:
            for number in range(4, 40):
                writer.add(image(number), pixels(number), {"Nodule": 1})
            assert Store.open(tmp_path / "s").digest() == digest
        assert len(Store.open(tmp_path / "s")) == 40
        assert np.array_equal(old.pixels(old.ids), pixels_before)
        assert len(old) == 4


class TestFailure:
    """Whatever ends an ingestion, the store is as it was, and the next one ends as if nothing had been."""

    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
    def test_exception_in_the_block(self, tmp_path, there, error):
        if there:
            fill(tmp_path / "s", range(3))
        before = {path.name: contents(path) for path in tmp_path.iterdir()}

        def numbers():
            yield 5
            raise error

        with pytest.raises(type(error)):
            fill(tmp_path / "s", numbers())
        assert {path.name: contents(path) for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("there", [False, True])
    def test_disk_full_in_a_shard(self, tmp_path, there):
        import resource

        if there:
            fill(tmp_path / "s", range(3))
        before = {path.name: contents(path) for path in tmp_path.iterdir()}
        # A real limit of the system: the write itself fails, half-way through a buffer.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
        try:
            with pytest.raises(StorageError, match="no space left to write"):
                fill(tmp_path / "s", range(10, 3000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: contents(path) for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("there", [False, True])
    def test_disk_full_at_the_commit(self, tmp_path, monkeypatch, there):
        from chexfound.data.store import writer

        if there:
            fill(tmp_path / "s", range(3))
        before = {path.name: contents(path) for path in tmp_path.iterdir()}
        connect = writer.connect

        def small(path: Path, mode: str = "ro") -> sqlite3.Connection:
            index = connect(path, mode)
            if mode == "rw":
                pages = index.execute("PRAGMA page_count").fetchone()[0]
                index.execute(f"PRAGMA max_page_count = {pages}")
            return index

        monkeypatch.setattr(writer, "connect", small)
        with pytest.raises(StorageError, match="no space left to write"):
            fill(tmp_path / "s", range(10, 200))
        assert {path.name: contents(path) for path in tmp_path.iterdir()} == before

    def test_index_that_may_not_be_written(self, tmp_path, monkeypatch):
        from chexfound.data.store import writer

        fill(tmp_path / "s", range(3))
        connect = writer.connect

        def closed(path, mode="ro"):
            index = connect(path, mode)
            index.execute("PRAGMA query_only = ON")  # as on a read-only mount, where root may write, too
            return index

        monkeypatch.setattr(writer, "connect", closed)
        with pytest.raises(StorageError, match="may not be written"):
            fill(tmp_path / "s", range(3, 5))

    def test_what_lies_beyond_the_index_is_cut_off(self, tmp_path):
        expected = fill(tmp_path / "whole", range(5)).digest()
        fill(tmp_path / "s", range(3))
        shard = tmp_path / "s" / "shard-00000.npy"
        good = shard.read_bytes()
        shard.write_bytes(npy_header(5, PX) + good[128:] + b"\7" * 100)
        (tmp_path / "s" / "shard-00001.npy").write_bytes(b"torn")
        assert len(Store.open(tmp_path / "s")) == 3
        assert fill(tmp_path / "s", range(3, 5)).digest() == expected
        assert np.load(shard).shape == (5, PX, PX)
        assert not (tmp_path / "s" / "shard-00001.npy").exists()

    def test_killed_within_the_commit_of_the_index(self, tmp_path):
        """The journal that SQLite leaves is rolled back by whoever opens next, reader or writer."""
        store = fill(tmp_path / "s", range(40))
        code = (
            "import sqlite3, os, sys; index = sqlite3.connect(sys.argv[1], isolation_level=None);"
            "index.executescript('PRAGMA cache_size = 1; BEGIN;"
            "UPDATE images SET view = hex(randomblob(500))');"
            "os.kill(os.getpid(), 9)"
        )
        died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s" / "index.sqlite")])
        assert died.returncode == -signal.SIGKILL
        assert (tmp_path / "s" / "index.sqlite-journal").stat().st_size > 0
        assert Store.open(tmp_path / "s").digest() == store.digest()
        assert os.listdir(tmp_path) == ["s"]
