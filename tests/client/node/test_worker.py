"""The worker answers one message after the other, and goes on whatever becomes of a reply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Context, RecordDict

from chexfound.errors import ConfigError, SiteError
from client.answer import hospital
from client.node import flower_node, worker

KEEP_WARM_S = 60.0


class Ended(Exception):
    """The test has seen enough."""


class Tasks:
    """What waits for the worker: tokens, None where there is nothing yet, and what can be called."""

    def __init__(self, *waiting: Any) -> None:
        self.waiting, self.handled = list(waiting), []

    def take(self) -> str | None:
        if not self.waiting:
            raise Ended
        got = self.waiting.pop(0)
        return got() if callable(got) else got

    def answer(self, token: str, handle: Callable[..., Any]) -> None:
        self.handled.append((token, handle))
        if token == "lost":
            raise httpx.ConnectError("the SuperNode is gone")
        if token == "unreadable":
            raise ValueError("as Flower says of a message that cannot be inflated")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(worker, "time", result)
    monkeypatch.setattr(hospital, "on_progress", None)
    return result


def work(home: Path, *waiting: Any) -> Tasks:
    tasks = Tasks(*waiting)
    with pytest.raises(Ended):
        worker.work(home, tasks, KEEP_WARM_S)
    return tasks


def test_a_reply_that_was_not_delivered_does_not_end_it(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = work(tmp_path, None, "lost", "next")
    assert [token for token, _ in tasks.handled] == ["lost", "next"]
    assert "event=undelivered reason='ConnectError'" in caplog.text


def test_a_message_that_cannot_be_read_does_not_end_it(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its models would be lost, and it would be away for 5 to 60 s each time: at the coordinator's will."""
    tasks = work(tmp_path, "unreadable", "next")
    assert [token for token, _ in tasks.handled] == ["unreadable", "next"]
    assert "event=undelivered reason='ValueError'" in caplog.text
    assert "inflated" not in caplog.text


def test_a_message_of_a_type_that_nobody_knows_is_answered(tmp_path: Path, clock: Clock, make_message: Any) -> None:
    ((_, handle),) = work(tmp_path, "one").handled
    context = Context(run_id=1, node_id=1, node_config={"home": "x"}, state=RecordDict(), run_config={})
    assert handle(make_message(RecordDict(), "train.nonsense"), context).error.reason == "protocol"


def test_it_asks_often_after_a_message_and_once_a_second_later(tmp_path: Path, clock: Clock) -> None:
    work(tmp_path, *[None] * 200, "one", None)
    *idle, last = clock.slept
    assert idle == sorted(idle)
    assert (idle[0], idle[-1], last) == (0.05, 1, 0.05)


def test_memory_is_given_back_once_after_a_while_without_a_message(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[float] = []
    monkeypatch.setattr(worker, "release", lambda: released.append(clock.now))

    def later(seconds: float) -> Callable[[], None]:
        return lambda: clock.pass_by(seconds)

    work(tmp_path, later(999))  # nothing is held
    assert released == []
    clock.now = 0
    work(tmp_path, "one", later(59), "two", later(59), later(2), None, later(999), "three", later(61))
    assert len(released) == 2
    assert 120 < released[0] < 125  # after the second message, with the pauses between questions


def test_secrets_of_an_attempt_whose_time_is_over_go_without_a_message(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[float] = []

    def sweep(home: Path) -> None:
        assert home == tmp_path
        swept.append(clock.now)
        raise ConfigError("its operator is releasing a sum")

    monkeypatch.setattr(worker.stages, "sweep", sweep)
    work(tmp_path, *[None] * 200)
    assert len(swept) == (clock.now - 1000) // worker.SWEEP_S + 1 > 1
    assert swept == sorted(swept)


def test_release_frees_the_sites_that_are_open() -> None:
    hospital._open[("x", 1),] = object()  # type: ignore[assignment]
    worker.release()
    assert hospital._open == {}


def test_progress_is_written_and_a_new_message_begins_without(tmp_path: Path, clock: Clock) -> None:
    seen: list[Any] = []

    def progress(done: int) -> Callable[[], None]:
        def told() -> None:
            assert hospital.on_progress is not None
            hospital.on_progress("A", "pretrain", done, 9)
            seen.append(flower_node.progress(tmp_path))

        return told

    work(
        tmp_path,
        progress(1),
        lambda: clock.pass_by(2),
        progress(2),
        progress(3),
        "one",
        lambda: seen.append(flower_node.progress(tmp_path)),
    )
    first, second, third, after = seen
    assert first["done"] == 1
    assert second == third == {"phase": "pretrain", "done": 2, "of": 9}  # at most once a second
    assert after == {}


def test_what_it_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(worker, "die_with_parent", lambda: given.append("dies with its parent"))
    monkeypatch.setattr(worker.logs, "show", given.append)
    monkeypatch.setattr(worker, "Tasks", lambda address, secret: (address, secret))
    monkeypatch.setattr(worker, "work", lambda *got: given.append(got))
    monkeypatch.setattr("sys.argv", ["worker", str(tmp_path), "127.0.0.1:1", str(tmp_path / "secret"), "0.5"])
    worker.main()
    assert given == [
        "dies with its parent",
        tmp_path / "reasons.log",
        (tmp_path, ("127.0.0.1:1", tmp_path / "secret"), 0.5),
    ]


def test_it_takes_no_step_more_once_nobody_waits(tmp_path: Path, clock: Clock) -> None:
    work(tmp_path, "one")
    step = hospital.on_progress
    assert step is not None
    step("A", "pretrain", 1, 9)
    (tmp_path / flower_node.OVER).touch()
    with pytest.raises(SiteError, match="the run has ended at the coordinator"):
        step("A", "pretrain", 2, 9)
