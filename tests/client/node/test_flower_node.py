"""node.json: what the site's SuperNode does, for who asks."""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound.durable.files import write_shown
from client.home import approval
from client.node import flower_node, flwr_private
from client.operator import status


class Moment:
    """In place of datetime in client.node.flower_node: a clock that stands until it is moved."""

    UTC = datetime.UTC

    def __init__(self) -> None:
        self.at = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
        self.datetime = self

    def now(self, zone: Any) -> datetime.datetime:
        return self.at

    def pass_by(self, seconds: float) -> None:
        self.at += datetime.timedelta(seconds=seconds)


class Beats:
    """In place of threading in client.node.flower_node: its thread waits here, and goes round when a test says so."""

    Lock = threading.Lock

    def __init__(self) -> None:
        self.waited: list[float] = []

    def Thread(self, target: Callable[[], None], daemon: bool) -> Beats:  # noqa: N802 (as threading has it)
        assert daemon  # or the SuperNode would never end
        self.target = target
        return self

    def start(self) -> None:
        pass

    def Event(self) -> Beats:  # noqa: N802
        return self

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        if len(self.waited) > self.rounds:
            raise StopIteration

    def beat(self) -> None:
        """Once round."""
        self.rounds = len(self.waited) + 1
        with pytest.raises(StopIteration):
            self.target()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Moment:
    result = Moment()
    monkeypatch.setattr(flower_node, "datetime", result)
    return result


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Beats:
    result = Beats()
    monkeypatch.setattr(flower_node, "threading", result)
    return result


def shown(home: Path) -> dict[str, Any]:
    values = json.loads((home / "node.json").read_text())
    assert [path.name for path in home.glob("*.tmp")] == []
    return values


def test_it_begins_by_connecting(tmp_path: Path, clock: Moment, beats: Beats) -> None:
    flower_node.Status(tmp_path)
    assert shown(tmp_path) == {
        "schema": 1, "pid": os.getpid(), "state": "connecting", "since": "2026-01-02T03:04:05+00:00", "contact": None,
        "run": None, "phase": None, "round": None, "done": None, "of": None, "refused": None,
    }  # fmt: skip


def test_each_state_with_since_when(tmp_path: Path, clock: Moment, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    about: dict[str, dict[str, Any]] = {"receiving": {"run": "7", "phase": "train.pretrain", "round": "3"}}
    for state in ("idle", "receiving", "working", "sending", "draining"):
        clock.pass_by(1)
        told.state(state, **about.get(state, {}))
        values = shown(tmp_path)
        assert values["state"] == state
        assert values["since"] == clock.at.isoformat()
        clock.pass_by(1)
        told.state(state)  # no news
        assert shown(tmp_path) == values
    assert (values["run"], values["phase"], values["round"]) == ("7", "train.pretrain", 3)


def test_a_refusal_is_shown_until_a_run_is_not_refused(tmp_path: Path, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    for reason in ("not approved", None):
        told.state("receiving", refused=reason)
        assert shown(tmp_path)["refused"] == reason


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("", None), ("-1", None), ("x", None), ("9" * 5000, None)])
def test_a_round_that_is_no_number(tmp_path: Path, beats: Beats, text: str, number: int | None) -> None:
    """The coordinator says what it likes there."""
    flower_node.Status(tmp_path).state("receiving", round=text)
    assert shown(tmp_path)["round"] == number


def test_it_is_written_again_and_again_with_the_last_contact(tmp_path: Path, clock: Moment, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    told.state("idle")
    clock.pass_by(3)
    told.contact()
    clock.pass_by(flower_node.EVERY_S)
    beats.beat()
    assert shown(tmp_path)["contact"] == "2026-01-02T03:04:08+00:00"
    assert beats.waited[0] == flower_node.EVERY_S <= 30
    (tmp_path / "node.json").unlink()
    beats.beat()
    assert shown(tmp_path)["state"] == "idle"


def test_a_coordinator_that_does_not_answer_is_away(tmp_path: Path, clock: Moment, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    told.state("idle")
    told.contact()
    clock.pass_by(flower_node.AWAY_S)
    beats.beat()
    assert shown(tmp_path)["state"] == "idle"
    clock.pass_by(1)
    beats.beat()
    assert (shown(tmp_path)["state"], shown(tmp_path)["since"]) == ("away", clock.at.isoformat())
    told.contact()
    told.state("idle")
    assert shown(tmp_path)["state"] == "idle"
    beats.beat()
    assert shown(tmp_path)["state"] == "idle"


@pytest.mark.parametrize("state", ["working", "sending", "draining"])
def test_nobody_is_away_while_there_is_work(tmp_path: Path, clock: Moment, beats: Beats, state: str) -> None:
    told = flower_node.Status(tmp_path)
    told.state(state)
    clock.pass_by(10 * flower_node.AWAY_S)
    beats.beat()
    assert shown(tmp_path)["state"] == state


def test_the_workers_progress_is_merged(tmp_path: Path, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    write_shown(tmp_path / "work.json", {"phase": "pretrain", "done": 3, "of": 9, "pid": 1})
    told.state("working")
    values = shown(tmp_path)
    assert (values["phase"], values["done"], values["of"]) == ("pretrain", 3, 9)
    assert values["pid"] == os.getpid()
    (tmp_path / "work.json").unlink()
    beats.beat()
    assert (shown(tmp_path)["done"], shown(tmp_path)["of"]) == (None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"phase"', '{"phase": "x"}'])
def test_progress_that_was_damaged_is_left_out(tmp_path: Path, beats: Beats, text: str) -> None:
    (tmp_path / "work.json").write_text(text)
    flower_node.Status(tmp_path).state("working")
    values = shown(tmp_path)
    assert (values["state"], values["phase"], values["done"]) == ("working", None, None)


def test_a_disk_that_takes_nothing_costs_the_display_alone(tmp_path: Path, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    before = shown(tmp_path)
    (tmp_path / ".node.json.tmp").mkdir()
    told.state("working")
    beats.beat()
    assert json.loads((tmp_path / "node.json").read_text()) == before


def test_nobody_reads_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shown(tmp_path / "node.json", {"state": "idle"})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
    write_shown(tmp_path / "node.json", {"state": "working"})
    assert json.loads((tmp_path / "node.json").read_text()) == {"state": "idle"}


def test_stopped(tmp_path: Path, clock: Moment, beats: Beats) -> None:
    flower_node.Status.stopped(tmp_path)  # it never ran
    assert not (tmp_path / "node.json").exists()
    flower_node.Status(tmp_path).state("working", run="7")
    clock.pass_by(9)
    flower_node.Status.stopped(tmp_path)
    values = shown(tmp_path)
    assert (values["state"], values["since"], values["run"]) == ("stopped", clock.at.isoformat(), "7")
    (tmp_path / "node.json").write_text("[")
    flower_node.Status.stopped(tmp_path)


def test_what_it_writes_is_what_status_reads(tmp_path: Path, beats: Beats) -> None:
    told = flower_node.Status(tmp_path)
    for state in ("connecting", "idle", "receiving", "working", "sending", "away", "draining"):
        told.state(state, run="7", phase="train.pretrain", round="1")
        found = status.read("A", tmp_path)
        assert found["node"]["state"] == state
        assert "7" in "\n".join(status.lines(found)) or state not in status.IN_A_RUN


def test_the_process_holds_bundles_against_what_was_approved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: Beats
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(flwr_private, "run_supernode", lambda *got: given.extend(got))
    monkeypatch.setattr(approval, "check", lambda home, content: f"{home} {content!r}")
    monkeypatch.setattr(sys, "argv", ["node", str(tmp_path), "--superlink", "x:1"])
    flower_node.main()
    arguments, refusal, told = given
    assert arguments == ["--superlink", "x:1"]
    assert refusal(b"FAB") == f"{tmp_path} b'FAB'"
    assert isinstance(told, flower_node.Status)


def test_that_nobody_waits_is_of_the_message_in_hand(tmp_path: Path) -> None:
    told = flower_node.Status(tmp_path)
    told.state("receiving", run="1", phase="train.pretrain", round="1")
    told.over()
    told.state("working")
    assert (tmp_path / flower_node.OVER).exists()
    told.state("receiving", refused=None)
    assert (tmp_path / flower_node.OVER).exists()
    told.state("receiving", run="2", phase="train.pretrain", round="1")
    assert not (tmp_path / flower_node.OVER).exists()
