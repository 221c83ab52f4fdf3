"""The journal and atomic files: what survives a full disk, a torn line, a second writer and kill -9."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.durable import files, journal
from chexfound.durable.files import new_folder, replace_file, write_json, write_text
from chexfound.durable.journal import GENESIS, Journal, read_journal
from chexfound.errors import CheckpointError, ConfigError, StorageError
from tests.patience import PATIENCE_S

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    SCALARS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "journal.jsonl"


def filled(path: Path, count: int = 3) -> bytes:
    with Journal(path) as log:
        for number in range(count):
            log.append({"round": number})
    return path.read_bytes()


def test_what_was_appended_is_read_back(path):
    with Journal(path) as log:
        assert log.entries == []
        first = log.append({"round": 0})
        second = log.append({"round": 1, "text": "é\r\n\u2028"})
        assert log.entries == [{"round": 0}, {"round": 1, "text": "é\r\n\u2028"}]
    assert read_journal(path) == [{"round": 0}, {"round": 1, "text": "é\r\n\u2028"}]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [0, 1]
    assert [line["prev"] for line in lines] == [GENESIS, first]
    assert lines[1]["sha256"] == second
    with Journal(path) as log:
        log.append({"round": 2})
    assert [entry["round"] for entry in read_journal(path)] == [0, 1, 2]


@given(st.dictionaries(st.text() | st.integers(), JSON, max_size=4))
def test_any_json_survives(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path) as log:
        log.append(data)
        written = log.entries
    assert read_journal(path) == written == [json.loads(json.dumps(data))]


def test_what_is_no_json_leaves_the_journal_as_it_was(path):
    before = filled(path)
    with Journal(path) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("nan")})
    assert path.read_bytes() == before


def test_a_later_change_of_the_caller_s_dict_does_not_reach_the_record(path):
    data = {"sites": ["a"]}
    with Journal(path) as log:
        log.append(data)
        data["sites"].append("b")
        assert log.entries == [{"sites": ["a"]}]


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_cut_off(path, kept):
    before = filled(path)
    line = before.splitlines()[-1]
    path.write_bytes(before + line[:kept])
    assert len(read_journal(path)) == 3
    with Journal(path) as log:
        assert path.read_bytes() == before
        log.append({"round": 3})
    assert [entry["round"] for entry in read_journal(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"round":', b'"Round":'),
        (b'"seq":', b'"seq":1'),
        (b'"prev":"', b'"prev":"f'),
        (b'"sha256":"', b'"sha256":"0'),
        (b'"data":{', b'"more":1,"data":{'),
        (b"{", b""),
        (b"{", b"[" * 100_000),
    ],
)
def test_a_tampered_line_is_named(path, number, old, new):
    lines = filled(path).splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_bytes(b"".join(lines))
    for read in (Journal, read_journal):
        with pytest.raises(CheckpointError, match=f"line {number} does not continue the chain"):
            read(path)


@pytest.mark.parametrize(("order", "line"), [([1, 2], 1), ([0, 2], 2), ([0, 2, 1], 2), ([0, 0, 1], 2)])
def test_lines_that_are_dropped_swapped_or_doubled_are_found(path, order, line):
    lines = filled(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number] for number in order))
    with pytest.raises(CheckpointError, match=f"line {line} "):
        Journal(path)


def test_a_second_writer_is_locked_out_until_the_first_closes(path):
    code = (
        "import sys; from chexfound.durable.journal import Journal\n"
        "from chexfound.errors import ConfigError\n"
        "try: Journal(sys.argv[1])\n"
        "except ConfigError as error: print(error); sys.exit(2)"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=PATIENCE_S)

    with Journal(path):
        with pytest.raises(ConfigError, match="another process is writing"):
            Journal(path)
        result = other()
        assert result.returncode == 2, result.stderr
        assert "another process is writing this journal" in result.stdout
        assert read_journal(path) == []  # reading needs no lock
    assert other().returncode == 0


def test_a_journal_that_cannot_be_opened_keeps_no_lock(path):
    before = filled(path)
    path.write_bytes(before.replace(b'"seq":1', b'"seq":9'))
    with pytest.raises(CheckpointError, match="line 2"):
        Journal(path)
    path.write_bytes(before)
    Journal(path).close()


def fail(code: int):
    def raises(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return raises


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_fsync_leaves_the_old_state(path, monkeypatch, code):
    before = filled(path)
    with Journal(path) as log:
        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "fsync", fail(code))
            with pytest.raises(StorageError, match="no space left"):
                log.append({"round": 3})
        assert path.read_bytes() == before
        assert len(log.entries) == 3
        log.append({"round": 4})
    assert [entry["round"] for entry in read_journal(path)] == [0, 1, 2, 4]


FULL = """
import resource, signal, sys
from pathlib import Path
from chexfound.errors import StorageError
from chexfound.durable.journal import Journal
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = Journal(path)
log.append({"round": 0})
before = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, resource.RLIM_INFINITY))
for size in (200, 200, 50_000):
    try:
        log.append({"round": 1, "text": "x" * size})
    except StorageError as error:
        assert "no space left" in str(error)
    else:
        raise SystemExit("a record larger than the limit was written")
    assert path.read_bytes() == before, "half a record was left"
assert log.entries == [{"round": 0}]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append({"round": 2})
log.close()
"""


def test_a_write_that_the_kernel_refuses_half_way_leaves_the_old_state(path):
    result = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_journal(path) == [{"round": 0}, {"round": 2}]


def test_a_torn_line_that_could_not_be_cut_at_once_is_cut_before_the_next_append(path):
    before = filled(path)
    with Journal(path) as log:
        with open(path, "ab") as file:
            file.write(b'{"torn')
        log.append({"round": 3})
    assert path.read_bytes().startswith(before)
    assert len(read_journal(path)) == 4


def test_file_and_folder_are_synced(path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(journal.os, "fsync", fsync)
    with Journal(path) as log:
        assert synced == [True]
        log.append({})
    assert synced == [True, False]
    write_text(path.parent / "file", "x")
    assert synced == [True, False, False, True]


LOOP = """
import sys
from chexfound.durable.files import write_json
from chexfound.durable.journal import Journal
from pathlib import Path
path = Path(sys.argv[1])
with Journal(path) as log:
    number = len(log.entries)
    while True:
        log.append({"number": number, "text": "x" * 3000})
        write_json(path.parent / "last.json", {"number": number, "text": "y" * 3000})
        print(number, flush=True)
        number += 1
"""


def test_kill_9_loses_nothing_that_was_acknowledged(path):
    acknowledged = -1
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            with process.stdout:  # not communicate(), which misses what readline() has read ahead
                rest = process.stdout.read().split()
            process.wait()
        acknowledged = max([acknowledged, *map(int, rest)])
        with Journal(path) as log:  # verifies the chain
            numbers = [entry["number"] for entry in log.entries]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) in (acknowledged + 1, acknowledged + 2)
        last = json.loads((path.parent / "last.json").read_text())
        assert last["number"] in (acknowledged, acknowledged + 1)


# --- files that are replaced


def test_replacing_leaves_the_new_file_with_usual_rights_and_nothing_else(tmp_path):
    target = tmp_path / "new" / "file.json"
    write_json(target, {"a": 1})
    write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 2}
    assert os.listdir(target.parent) == ["file.json"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")

    def write_half() -> None:
        with replace_file(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", {"auroc": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EROFS, "may not be written"), (errno.EACCES, "owner and mode")],
)
def test_a_disk_that_refuses_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, function, code, message):
    target = tmp_path / "file"
    write_text(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, function, fail(code))
        with pytest.raises(StorageError, match=message):
            write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_at_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_text(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail(errno.ENOSPC))
        with pytest.raises(
            StorageError, match=r"no space left .*; \d+\.\d GB are free on the disk of /.*; free some space"
        ):
            write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["file/x", "file/x/y", "folder", "round/x", "x" * 300])
def test_a_path_that_no_file_can_have(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match=r"cannot be written there: .*; give another path"):
        write_text(tmp_path / name, "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "round"]


def test_a_folder_that_cannot_be_made():
    with pytest.raises(StorageError, match=r"^/proc/x/y: cannot be written \(No such file or directory\); check"):
        write_text(Path("/proc/x/y"), "new")


def test_other_errors_of_the_system_keep_their_word(tmp_path, monkeypatch):
    monkeypatch.setattr(journal.os, "fsync", fail(errno.EIO))
    with pytest.raises(StorageError, match=r"cannot be written \(Input/output error\); check the disk"):
        write_text(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == []


# ---- a folder at once


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        write_text(folder / "a" / "b.txt", "text")
        assert not out.exists()
    assert (out / "a" / "b.txt").read_text() == "text"
    assert os.listdir(out.parent) == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~files._umask()


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            write_text(folder / "a.txt", "text")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        write_text(folder / "a.txt", "text")
    for path, message in ((tmp_path / "out", "the folder is not empty"), (tmp_path / "out" / "a.txt", "is a file")):
        with pytest.raises(ConfigError, match=message), new_folder(path):
            raise AssertionError("not reached")
    assert (tmp_path / "out" / "a.txt").read_text() == "text"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_through_a_link_is_made_where_it_leads(tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        write_text(folder / "a.txt", "text")
    assert (tmp_path / "real" / "a.txt").read_text() == "text"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_on_a_full_disk_is_our_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal.os, "replace", full)
    with pytest.raises(StorageError, match="no space left"), new_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []
