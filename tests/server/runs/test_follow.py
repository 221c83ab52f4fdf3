from __future__ import annotations

from typing import Any

import pytest

from chexfound.errors import ConfigError, SiteError
from server.runs import follow, standing, submit
from server.runs.folders import RunFolder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens while the follower sleeps, one a sleep."""
    waiting: list[Any] = []

    def sleep(seconds: float) -> None:
        if not waiting:
            pytest.fail("it waits for ever")
        waiting.pop(0)()

    monkeypatch.setattr(follow.time, "sleep", sleep)
    return waiting


def told(run: RunFolder, **options: Any) -> tuple[list[str], Any]:
    """The lines, without their times, and how it ended."""
    lines: list[str] = []
    try:
        end = follow.tell(run, lines.append, **options)
    except (ConfigError, SiteError) as error:
        return [line[10:] for line in lines], error
    return [line[10:] for line in lines], end.state


def test_each_event_is_a_line_until_the_end(submitted, flwr, live, happened, steps) -> None:
    flwr.statuses["100"] = "pending"
    steps += [
        lambda: live(submitted, "enrol", waiting_for=["NORTH", "SOUTH"]),
        lambda: happened(submitted, "start", 0),
        lambda: live(submitted, "pretrain", round=2),
        lambda: happened(submitted, "done"),
        lambda: (submitted.path / "metrics.json").write_text("{}"),
    ]
    flwr.statuses["100"] = "running"
    lines, end = told(submitted)
    assert [line.split()[0] for line in lines] == ["…", "start", "pretrain", "done"]
    assert lines[0] == "…         asks the sites who they are, waiting for NORTH, SOUTH"
    assert end == "done"


def test_what_was_told_before_is_left_out(submitted, happened) -> None:
    happened(submitted, "start", 0, "done")
    (submitted.path / "metrics.json").write_text("{}")
    assert [line.split()[0] for line in told(submitted, after=2)[0]] == ["done"]


def test_what_happened_before_has_no_time(submitted, happened, steps) -> None:
    happened(submitted, "start")
    steps += [lambda: happened(submitted, "done"), lambda: (submitted.path / "metrics.json").write_text("{}")]
    lines: list[str] = []
    follow.tell(submitted, lines.append)
    assert lines[0].startswith("          start")
    assert lines[-1][:8].count(":") == 2


def test_the_runs_own_error_is_raised(submitted, live, steps) -> None:
    steps.append(lambda: live(submitted, "failed", error={"code": "config", "text": "no such finding"}))
    _, error = told(submitted)
    assert isinstance(error, ConfigError)
    assert "no such finding" in str(error)


def test_a_serverapp_that_was_killed_is_noticed(submitted, live, steps) -> None:
    """By the folder that it held: Flower is asked now and then only, and has not noticed."""
    live(submitted, "pretrain")
    steps.append(lambda: live(submitted, "pretrain", killed=True))
    _, error = told(submitted)
    assert "killed, or out of memory" in str(error)
    assert "chexfound-server resume" in str(error)


def test_a_superlink_that_is_away_ends_nothing(submitted, flwr, live, steps, monkeypatch) -> None:
    monkeypatch.setattr(follow, "ASK_S", 0.0)
    live(submitted, "pretrain")
    steps += [
        lambda: setattr(flwr, "down", True),
        lambda: None,
        lambda: setattr(flwr, "down", False),
        lambda: (submitted.path / "metrics.json").write_text("{}"),
    ]
    lines, end = told(submitted)
    assert end == "done"
    assert [line.partition(";")[0] for line in lines] == [
        "the SuperLink does not answer",
        "the SuperLink answers again",
    ]


def test_silence_is_broken_by_who_is_waited_for(submitted, live, steps, monkeypatch) -> None:
    monkeypatch.setattr(follow, "BEAT_S", -1.0)
    live(submitted, "pretrain", round=1, rounds=3, waiting_for=["SOUTH"])
    steps += [lambda: None, lambda: (submitted.path / "metrics.json").write_text("{}")]
    lines, _ = told(submitted)
    assert set(lines) == {"…         pretrain, round 1 of 3, waiting for SOUTH"}


def test_a_run_that_was_stopped_is_told_so(submitted, flwr, live, steps) -> None:
    """Its ServerApp feels that as an error, and Flower was asked before."""
    live(submitted, "pretrain")

    def stop() -> None:
        flwr.statuses["100"] = "finished:stopped"
        live(submitted, "failed", error={"code": "internal", "text": "SystemExit"})

    steps.append(stop)
    assert "was stopped; what is done is kept" in str(told(submitted)[1])


def test_a_run_that_another_command_resumes_is_followed_on(submitted, flwr, live, steps) -> None:
    live(submitted, "pretrain")

    def resume() -> None:
        flwr.statuses["100"] = "finished:failed"
        live(submitted, "pretrain", killed=True)
        flwr.statuses[submit.resubmit(submitted)] = "running"

    steps += [resume, lambda: (submitted.path / "metrics.json").write_text("{}")]
    assert told(submitted)[1] == "done"


def test_an_end_between_two_looks_at_the_folder_is_told(submitted, happened, steps, monkeypatch) -> None:
    look = standing.look
    happened(submitted, "start")

    def late(*given: Any) -> Any:
        if steps:
            return look(*given)
        if not submitted.done:  # the journal has been read by now
            happened(submitted, "done")
            (submitted.path / "metrics.json").write_text("{}")
        return look(*given)

    steps.append(lambda: None)
    monkeypatch.setattr(standing, "look", late)
    assert [line.split()[0] for line in told(submitted)[0]] == ["start", "done"]
