"""Whatever fails between the word `resume` and the SuperLink's answer, one ServerApp works at the run, and is found."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.durable.journal import Journal
from chexfound.errors import ChexfoundError, ConfigError, SiteError, StorageError
from server.federation import flower_cli
from server.runs import folders, submission, submit
from server.runs.folders import RunFolder


class KilledError(BaseException):
    """In the place of SIGKILL: nothing of ours runs after it."""


@pytest.fixture(autouse=True)
def database(flwr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's runs by the token in their configuration, as its database has them."""

    def tokens(made: Any) -> dict[str, str]:
        return {tomllib.loads(text)["submission"]: str(100 + place) for place, text in enumerate(flwr.configs)}

    for module in (folders, submit):
        monkeypatch.setattr(module, "submitted", tokens)


def full(*_: Any) -> Any:
    raise StorageError("no space left") from OSError(errno.ENOSPC, "No space left on device")


def killed(*_: Any) -> Any:
    raise KilledError


def away(*_: Any) -> Any:
    raise SiteError("no answer of the SuperLink in 60 s")


@contextlib.contextmanager
def fault(step: str, raised: Callable[..., Any]) -> Iterator[None]:
    """Make one step fail, or end after it: the intent's writing, the submission, the number's writing."""
    write, ask = submission.write_json, flower_cli.ask
    writes = {"intent": 1, "number": 2}
    name, _, when = step.partition(" ")
    count = 0

    def writing(path: Path, values: Any) -> None:
        nonlocal count
        count += 1
        if when == "before" and count == writes.get(name):
            raised()
        write(path, values)
        if when == "after" and count == writes.get(name):
            raised()

    def asking(federation: Any, arguments: Any) -> Any:
        if arguments[0] != "run" or name != "submission":
            return ask(federation, arguments)
        if when == "before":
            raised()
        ask(federation, arguments)
        return raised()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(submission, "write_json", writing)
        patched.setattr(flower_cli, "ask", asking)
        yield


def serve(run: RunFolder, flwr: Any) -> list[str]:
    """Start the ServerApp of each run that Flower has, all at once; the numbers of those that work at the folder."""
    working = []
    with contextlib.ExitStack() as held:
        for place, text in enumerate(flwr.configs):
            with contextlib.suppress(ConfigError):
                number = str(100 + place)
                held.enter_context(submission.alone(run.path, tomllib.loads(text)["submission"], number))
                working.append(number)
    return working


FAULTS = [(f"{name} {when}", killed) for name in ("intent", "submission", "number") for when in ("before", "after")]
FAULTS += [("intent before", full), ("submission before", full), ("submission after", full), ("number before", full)]
FAULTS += [("submission before", away), ("submission after", away)]


@pytest.mark.parametrize(("step", "raised"), FAULTS)
@pytest.mark.parametrize("again", [True, False], ids=["resume", "run"])
def test_a_fault_at_any_step_leaves_one_serverapp(
    thorax, flwr, recipe, step: str, raised: Any, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "TAKE_S", 0.0)
    run = submit.create(thorax, recipe, "first", None)
    if again:
        flwr.statuses[submit.submit(run)] = "finished:failed"
    before, failed = len(flwr.configs), None
    with fault(step, raised):
        try:
            (submit.resubmit if again else submit.submit)(run)
        except (ChexfoundError, KilledError) as error:
            failed = error
    made = len(flwr.configs) - before
    if isinstance(failed, ChexfoundError):
        assert made == 0, "it said that it failed, and has submitted"
    if failed is None:
        assert made == 1
    if failed is None and not step.startswith("number"):
        with pytest.raises(ConfigError, match="is pending; see it with"):
            submit.resubmit(run)
    elif made:
        assert run.flower_run() == str(100 + before)
        if step == "number after":
            assert not folders.interrupted(run)
        else:
            assert folders.interrupted(run)
            assert submit.resubmit(run) == str(100 + before)
    else:
        assert submit.resubmit(run) == str(100 + before)
    assert len(flwr.configs) == before + 1
    assert serve(run, flwr) == [str(100 + before)]
    assert run.flower_run() == str(100 + before)
    assert submit.stop(run)


def test_a_submission_that_was_on_its_way_when_its_command_was_killed_does_not_begin(
    thorax, flwr, recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flwr run` lives on, and the SuperLink takes its run after a second `resume` has looked for it."""
    monkeypatch.setattr(submission, "TAKE_S", 0.0)
    run = submit.create(thorax, recipe, "first", None)
    late: list[Any] = []
    ask = flower_cli.ask

    def slow(federation: Any, arguments: Any) -> Any:
        if arguments[0] == "run" and not late:
            late.append(Path(arguments[4]).read_text())
            raise KilledError
        return ask(federation, arguments)

    monkeypatch.setattr(flower_cli, "ask", slow)
    with pytest.raises(KilledError):
        submit.submit(run)
    assert submit.resubmit(run) == "100"
    flwr.configs += late
    flwr.statuses["101"] = "pending"
    assert serve(run, flwr) == ["100"]
    assert run.flower_run() == "100"


def test_a_serverapp_that_begins_as_the_next_is_submitted_is_left_alone(
    thorax, flwr, recipe, live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SETTLE_S", 0.1)
    run = submit.create(thorax, recipe, "first", None)
    flwr.statuses[submit.submit(run)] = "finished:failed"
    ended = submit.await_end

    def begins(one: RunFolder) -> None:
        ended(one)
        live(run, "waiting")

    monkeypatch.setattr(submit, "await_end", begins)
    with pytest.raises(ConfigError, match="'first' has just begun, as it was submitted before; see it with"):
        submit.resubmit(run)
    assert (len(flwr.configs), run.flower_run()) == (1, "100")


def test_a_submission_that_flower_has_twice_is_served_once(submitted: RunFolder, live: Any) -> None:
    """Its command line asks again when the answer was lost."""
    token = submission.last(submitted.about())["submission"]
    live(submitted, "pretrain", killed=True)
    with pytest.raises(ConfigError, match="Flower has this submission twice; its run 100 is the one"):
        submission.alone(submitted.path, token, "101").__enter__()
    with submission.alone(submitted.path, token, "100"):
        pass


def test_whoever_holds_the_folder_is_the_run(submitted: RunFolder, flwr: Any, live: Any) -> None:
    """Even if a later intent could not be taken back."""
    live(submitted, "pretrain")
    token = submission.last(submitted.about())["submission"]
    submission.intend(submitted.path)
    assert submitted.flower_run() == "100"
    live(submitted, "pretrain", killed=True, submission=token)
    assert submitted.flower_run() is None


def test_a_look_at_the_lock_keeps_no_serverapp_out(submitted: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (submitted.path / submission.LOCK).touch()
    with open(submitted.path / submission.LOCK) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with submission.alone(submitted.path, "", "7"):
            assert submission.served(submitted.path)
    assert not submission.served(submitted.path)


def test_two_processes_do_not_work_at_one_run(submitted: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "TAKE_S", 0.0)
    with submission.alone(submitted.path, "", "1"), pytest.raises(ConfigError, match="another process works"):
        submission.alone(submitted.path, "", "2").__enter__()
    with Journal(submitted.path / "journal.jsonl"), pytest.raises(ConfigError, match="another process works"):
        submission.alone(submitted.path, "", "2").__enter__()


def test_a_folder_that_could_not_be_filled_is_not_left(thorax, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` with its name would be sent to `resume`, and that back to `run`."""
    monkeypatch.setattr(submit, "write_json", full)
    with pytest.raises(StorageError):
        submit.create(thorax, recipe, "first", None)
    assert folders.all_runs(thorax) == []
    monkeypatch.undo()
    submit.create(thorax, recipe, "first", None)


@pytest.mark.parametrize("text", ['[{"id": "1"}, 3]', "[{}]"])
def test_a_damaged_list_of_submissions_is_told(submitted: RunFolder, text: str) -> None:
    path = submitted.path / "run.json"
    path.write_text(f'{{"schema": 1, "recipe": "x", "rounds": {{}}, "flower_runs": {text}}}')
    with pytest.raises(ChexfoundError, match=r"run\.json: damaged at 'flower_runs'"):
        submitted.flower_run()
