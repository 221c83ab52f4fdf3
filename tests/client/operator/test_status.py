from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.identity import bundle
from chexfound.identity.roster import Address
from client import cli
from client.answer import refusals
from client.home import approval, ledger
from client.home.paths import store_path
from client.operator import status

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(autouse=True)
def _time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_now", lambda: NOW)


@pytest.fixture
def home(enrolled: Callable[..., Path], authority: Path) -> Path:
    return enrolled(authority, Address("coordinator.invalid", 8443))


@pytest.fixture
def tell(home: Path) -> Callable[..., None]:
    """`tell(state="idle")`: what the node writes; `age=100` makes it that many seconds old."""

    def write(age: float = 0, **changes: Any) -> None:
        moment = (NOW - datetime.timedelta(minutes=5)).isoformat(timespec="seconds")
        values = dict.fromkeys(("run", "phase", "round", "done", "of", "refused"))
        values |= {"schema": 1, "pid": os.getpid(), "state": "idle", "since": moment, "contact": moment} | changes
        (home / "node.json").write_text(json.dumps(values))
        os.utime(home / "node.json", (NOW.timestamp() - age, NOW.timestamp() - age))

    return write


def first(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["status"]) == 0
    return capsys.readouterr().out.splitlines()[0]


def test_a_site_that_was_never_served(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "site NORTH: has not been served yet: chexfound-client --data DIR" in out
    assert "federation    thorax at coordinator.invalid:8443, roster 1: NORTH" in out
    assert "code          none approved yet: chexfound-client approve" in out
    assert "store         none yet" in out
    assert "GB free" in out


@pytest.mark.parametrize("state", sorted(set(status.STATES) - {"stopped"}))
def test_what_it_is_doing(tell: Callable[..., None], capsys: pytest.CaptureFixture[str], state: str) -> None:
    tell(state=state)
    line = first(capsys)
    assert line.startswith(f"site NORTH: {status.STATES[state]}, since {NOW - datetime.timedelta(minutes=5):%Y-%m-%d}")
    assert line.endswith(f"UTC (5 minutes ago) (process {os.getpid()})")


def test_where_in_a_run_it_is(tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(state="working", run="42", phase="pretrain", round=3, done=12, of=100)
    assert "site NORTH: working: pretrain, round 3, 12 of 100, run 42, since" in first(capsys)
    tell(state="idle", run="42", phase="pretrain", done=100, of=100)  # what is left of the last one
    assert "waiting for a run, since" in first(capsys)


def test_a_process_that_is_gone(tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    tell(age=7200, pid=child.pid, state="working")
    line = first(capsys)
    assert f"NOT RUNNING (process {child.pid} is gone); 2 hours ago it was working" in line
    assert "Start it again" in line


def test_a_file_that_is_stale(tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(age=600)
    assert f"process {os.getpid()} has told nothing for 10 minutes" in first(capsys)


def test_one_that_stopped_is_not_missed(tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(age=600, state="stopped")
    assert "site NORTH: stopped 20" in first(capsys)


def test_refusals_contact_and_code(home: Path, tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(state="away", contact=None, refused="another release\x1b[2J")
    approval.approve(home, 64 * "a")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.py", "")
    digest = bundle.read(packed.getvalue()).digest()
    approval.keep(home, digest, packed.getvalue())
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "coordinator   has not answered yet" in out
    assert "refused       the last run: another release\\x1b[2J" in out
    assert f"code          {12 * 'a'}… approved on {NOW:%Y}" in out
    assert f"code          {digest[:12]}… REFUSED: chexfound-client approve {digest[:12]}" in out


def test_where_several_sites_share_the_home_commands_name_the_site(
    home: Path, tell: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (home.parent / "SOUTH WEST" / "keys").mkdir(parents=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.py", "")
    digest = bundle.read(packed.getvalue()).digest()
    approval.keep(home, digest, packed.getvalue())
    for name, option in (("NORTH", "NORTH"), ("SOUTH WEST", "'SOUTH WEST'")):
        assert cli.main(["status", "--name", name]) == 0
        out = capsys.readouterr().out
        assert f"none approved yet: chexfound-client approve --name {option}\n" in out
        if name == "NORTH":
            assert f"REFUSED: chexfound-client approve {digest[:12]} --name NORTH\n" in out
        else:
            assert f"chexfound-client join FILE --name {option}\n" in out
            assert "policy        runs in the clear are accepted or refused by how many sites the roster has\n" in out
        assert f"has not been served yet: chexfound-client --data DIR --name {option}\n" in out
    tell(pid=2**22 + 1)
    assert cli.main(["status", "--name", "NORTH"]) == 0
    assert "Start it again: chexfound-client --data DIR --name NORTH" in capsys.readouterr().out


def test_stores(home: Path, tell: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "0.png"), np.random.default_rng(0).integers(0, 256, (20, 20), np.uint8))
    (images / "manifest.csv").write_text("file,source,patient_id,findings\n0.png,a,p,Nodule")
    for px in (16, 32):
        ingest(images, store_path(home, px), px)
    os.truncate(store_path(home, 32) / "index.sqlite", 100)
    tell()
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "store         1 images of 1 patients, 16 px" in out
    assert f"store         {store_path(home, 32)}" in out


def test_names_that_stay_are_shown_here_with_the_line_that_lets_them_out(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "0.png"), np.random.default_rng(0).integers(0, 256, (20, 20), np.uint8))
    (images / "manifest.csv").write_text("file,source,patient_id,findings\n0.png,a,p,Nodule|Valve replaced|O'Brien")
    ingest(images, store_path(home, 16), 16)
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "stay here: O'Brien (1 images), Valve replaced (1 images)" in out
    assert "Nodule" not in out
    line = next(text for text in out.splitlines() if "site.yaml: findings:" in text)
    (home / "site.yaml").write_text(line.partition("site.yaml: ")[2])
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stores"][0]["withheld"] == {}


def test_the_policy(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert "policy        runs in the clear are accepted" in capsys.readouterr().out
    (home / "site.yaml").write_text("secagg: {required: true}")
    assert cli.main(["status"]) == 0
    assert (
        "policy        runs in the clear are refused (site.yaml says secagg: {required: true})"
        in capsys.readouterr().out
    )
    (home / "site.yaml").write_text("secagg: {required: ture}")
    assert cli.main(["status"]) == 0
    assert f"every run is refused: {home / 'site.yaml'}: secagg.required" in capsys.readouterr().out


def test_runs_of_the_last_thirty_days(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert "runs          0 of 5 begun in 30 days\n" in capsys.readouterr().out
    for run in range(5):
        ledger.asked(home, str(run))
    assert cli.main(["status"]) == 0
    assert "runs          5 of 5 begun in 30 days: another is REFUSED" in capsys.readouterr().out
    (home / "runs.json").write_text("{")
    assert cli.main(["status"]) == 0
    assert f"every run is refused: {home / 'runs.json'}: " in capsys.readouterr().out


def test_for_programs(home: Path, tell: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(state="working", round=3)
    assert cli.main(["status", "--json", "--name", "NORTH"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["site"]) == (1, "NORTH")
    assert (told["node"]["state"], told["node"]["round"]) == ("working", 3)
    assert (told["node"]["running"], told["node"]["stale"]) == (True, False)
    assert told["federation"]["sites"] == ["NORTH"]
    assert told["disk"]["free_bytes"] > 0


@pytest.mark.parametrize("changes", [{"schema": 2}, {"state": "x"}, {"pid": "1"}, {"round": "1"}, {"since": 1}])
def test_a_file_of_another_release(
    tell: Callable[..., None], capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    tell(**changes)
    assert cli.main(["status"]) == 2
    assert "not what this release's node writes" in capsys.readouterr().err


def test_the_last_request_that_was_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusals.note(home, 7, "enrol", "policy.runs")
    assert cli.main(["status"]) == 0
    said = "refused       enrol of run 7: policy.runs, one run more than the site's policy allows in a month; "
    assert said in capsys.readouterr().out
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"]["code"] == "policy.runs"
    (home / "refused.json").write_text('{"run": 7}')
    assert cli.main(["status"]) == 0
    assert "refused  " not in capsys.readouterr().out
