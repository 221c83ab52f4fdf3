"""What the SuperExec's task process runs, and what not; tests/hostile/test_local_process.py has the real one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from chexfound.identity import bundle
from server.services import task


@pytest.fixture(scope="module")
def release() -> bytes:
    return build_fab_from_files(bundle.release_files())[0]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def with_file(content: bytes, name: str, text: str) -> bytes:
    """A bundle with another file in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            if entry != name:
                new.writestr(entry, old.read(entry))
        new.writestr(name, text)
    return buffer.getvalue()


def test_the_release_is_run_from_a_runs_folder(release: bytes, runs: Path) -> None:
    for given in ({}, {"run-dir": ""}, {"run-dir": str(runs / "first")}):
        assert task.refusal(release, given) == ""


@pytest.mark.parametrize("name", ["server/app.py", "sitecustomize.py", "server/__init__.py"])
def test_a_file_more_or_another_is_refused_by_name(release: bytes, runs: Path, name: str) -> None:
    why = task.refusal(with_file(release, name, "print('here')\n"), {})
    assert "1 files differ" in why
    assert name in why
    assert "chexfound-server run" in why


@pytest.mark.parametrize("content", [b"", b"PK", bytes(1000)])
def test_what_is_no_bundle_is_refused(runs: Path, content: bytes) -> None:
    assert "not a readable archive" in task.refusal(content, {})


@pytest.mark.parametrize("where", ["/tmp", "{runs}", "{runs}/../flower", "{runs}/first/deeper", "{runs}/link"])
def test_a_run_writes_nowhere_but_in_its_own_folder(release: bytes, runs: Path, where: str) -> None:
    (runs / "link").symlink_to("/tmp")
    assert "is no folder of" in task.refusal(release, {"run-dir": where.format(runs=runs)})


def test_what_is_refused_is_in_the_log(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert task.logged(b"", {})
    assert "event=refused" in caplog.text
