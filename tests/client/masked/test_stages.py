"""A site's attempts on its disk: killed anywhere, with a full disk or a damaged one, it never says two things.

A killed process is one that does nothing more to its disk from some point on.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.contract.request import Reply
from client.masked import stages
from client.masked.ledger import WORK
from tests.secagg.federation import NAMES, STAGES, Answer, Federation, Try

pytest_plugins = ("tests.secagg.fixtures",)
VICTIM = "alpha"
TOUCHES = ("replace", "fsync", "unlink", "rmdir")  # of os: all that the site's state is written and removed by


class Killed(BaseException):
    """The process of a site ends here."""


class Disk:
    """Ends the process before the n-th touch; what comes after, in `finally` and the like, does nothing either."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        self.patch = monkeypatch
        for name in TOUCHES:
            self._wrap(name, getattr(os, name))

    def _wrap(self, name: str, true: Callable[..., Any]) -> None:
        def touch(*given: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                raise Killed
            return true(*given, **named)

        self.patch.setattr(os, name, touch)


def crashes(
    fed: Federation, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], Answer], tmp_path: Path
) -> Iterator[int]:
    """The victim asked, and killed at each touch of its disk in turn; its home is each time as it was at first."""
    home, kept = fed.homes[VICTIM], tmp_path / "kept"
    shutil.copytree(home, kept)
    for at in itertools.count(1):
        shutil.rmtree(home)
        shutil.copytree(kept, home)
        fed.kill()
        with monkeypatch.context() as patch:
            Disk(patch, at)
            try:
                ask()
            except Killed:
                pass
            else:
                assert at > 2, "nothing was written"
                return
        fed.kill()
        yield at


def same(one: Answer, other: Answer) -> bool:
    """Whether both answers are the same, to the byte."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    arrays = one.masked.keys() == other.masked.keys() and all(
        np.array_equal(one.masked[ring], other.masked[ring]) for ring in one.masked
    )
    return arrays and one.values == other.values


def check_one_answer(one: Try, stage: str, answer: Answer) -> None:
    """That it is the stage's answer, the same again; or a refusal for want of what a crash took."""
    again = one.ask(stage, VICTIM)
    if isinstance(answer, Reply):
        assert same(answer, again)
    else:
        assert answer in ("secagg.incomplete", "secagg.attempt", "secagg.order")
        assert isinstance(again, str)


def check_files(fed: Federation) -> None:
    """That the secrets are in one file for the site alone, and nothing half-written lies about."""
    folder = fed.attempt_folder(VICTIM)
    for path in folder.rglob("*"):
        assert not path.name.endswith(".tmp")
        if path.name == "secrets.json":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere_in_a_stage(
    stage: str, fed: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = fed.attempt().until(stage)
    before = {done: one.answers[done][VICTIM] for done in STAGES[: STAGES.index(stage)]}
    answered = 0
    for _ in crashes(fed, monkeypatch, lambda: one.ask(stage, VICTIM), tmp_path):
        answer = one.ask(stage, VICTIM)
        check_one_answer(one, stage, answer)
        check_files(fed)
        answered += isinstance(answer, Reply)
        if stage == "unmask" and isinstance(answer, Reply):
            assert not fed.secrets(VICTIM).exists()
        for done, given in before.items():
            again = one.ask(done, VICTIM)
            assert isinstance(again, str) or same(given, again)
    assert answered
    assert fed.attempt(number=2).finish()["images"] == 96


def test_killed_while_the_next_attempt_begins(fed: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of the old attempt is gone: what is left of it must not be asked for a second masked array."""
    old = fed.attempt().until("consistency")
    given = dict(old.answers)
    new = fed.attempt(number=2)
    for _ in crashes(fed, monkeypatch, lambda: new.ask("advertise", VICTIM), tmp_path):
        shutil.copytree(fed.homes[VICTIM], tmp_path / "crashed")
        for stage in STAGES[:3]:
            answer = old.ask(stage, VICTIM)
            assert isinstance(answer, str) or same(answer, given[stage][VICTIM]), stage
        shutil.rmtree(fed.homes[VICTIM])
        shutil.move(tmp_path / "crashed", fed.homes[VICTIM])
        check_one_answer(new, "advertise", new.ask("advertise", VICTIM))
        check_files(fed)
        later = fed.attempt(number=3)
        assert isinstance(later.ask("advertise", VICTIM), Reply)
        assert isinstance(old.ask("advertise", VICTIM), str)
    assert fed.attempt(number=4).finish()["images"] == 96


def test_killed_between_any_two_stages(fed: Federation) -> None:
    one = fed.attempt()
    for stage in STAGES:
        for name in NAMES:
            given = one.ask(stage, name)
            assert isinstance(given, Reply)
            fed.kill()
            assert same(given, one.ask(stage, name))
    assert one.sum()["images"] == 96


def test_an_answer_is_given_again_after_the_secrets_are_gone(fed: Federation) -> None:
    one = fed.attempt().until("unmask")
    given = one.ask("unmask", VICTIM)
    assert not fed.secrets(VICTIM).exists()
    assert not list(fed.attempt_folder(VICTIM).glob("*.bin"))
    fed.kill()
    assert same(given, one.ask("unmask", VICTIM))


# -- a disk that is full


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("touch", "stage"), [*itertools.product(["replace", "fsync"], STAGES), ("posix_fallocate", "masked")]
)
def test_a_full_disk_is_told_and_the_attempt_goes_on_after(
    touch: str, stage: str, fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fed.attempt().until(stage)
    with monkeypatch.context() as patch:
        patch.setattr(os, touch, full)
        assert one.ask(stage, VICTIM) == "storage"
    answers = one.stage(stage)
    if (stage, touch) == ("advertise", "replace"):  # begun in the journal, and by that past
        assert answers[VICTIM] == "secagg.attempt"
        one = fed.attempt(number=2)
    assert one.finish()["images"] == 96 if stage == "advertise" else goes_on(one, stage)


def goes_on(one: Try, stage: str) -> bool:
    """The stages after this one, honestly."""
    for later in STAGES[STAGES.index(stage) + 1 :]:
        assert all(isinstance(answer, Reply) for answer in one.stage(later).values())
    return bool(one.sum()["images"] == 96)


# -- a disk that is damaged


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"attempt": 1}', b"\xff\xfe"])
def test_a_damaged_attempt_is_none(damage: bytes, fed: Federation) -> None:
    one = fed.attempt().until("masked")
    (fed.attempt_folder(VICTIM) / "attempt.json").write_bytes(damage)
    assert one.ask("masked", VICTIM) == "secagg.order"
    assert not fed.secrets(VICTIM).exists()
    assert one.ask("advertise", VICTIM) == "secagg.attempt"
    assert fed.attempt(number=2).finish()["images"] == 96


@pytest.mark.parametrize("name", ["share", "masked", "secrets"])
@pytest.mark.parametrize("damage", [None, b"", b"[]", b"{}"])
def test_a_damaged_stage_is_a_refusal(name: str, damage: bytes | None, fed: Federation) -> None:
    one = fed.attempt().until("unmask")
    path = fed.attempt_folder(VICTIM) / f"{name}.json"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert one.ask("unmask", VICTIM) == "secagg.incomplete"
    assert fed.attempt(number=2).finish()["images"] == 96


def test_masked_arrays_that_are_not_what_was_signed_do_not_leave(fed: Federation) -> None:
    for number, change in enumerate((lambda data: data[:-4], lambda data: bytes([data[0] ^ 1]) + data[1:])):
        one = fed.attempt(number=number).until("consistency")
        path = fed.attempt_folder(VICTIM) / "masked-32.bin"
        path.write_bytes(change(path.read_bytes()))
        assert one.ask("masked", VICTIM) == "secagg.incomplete"
        assert fed.refused(VICTIM)[-1] == "secagg.incomplete"
    path.unlink(missing_ok=True)
    assert fed.attempt(number=5).finish()["images"] == 96


# -- what is kept


def test_the_journal_holds_digests_only(fed: Federation) -> None:
    one = fed.attempt().until("unmask")
    secrets = json.loads(fed.secrets(VICTIM).read_text())
    for path in fed.attempt_folder(VICTIM).iterdir():
        text = path.read_bytes()
        if path.name != "secrets.json":
            assert not any(value.encode() in text or bytes.fromhex(value) in text for value in secrets.values())
        assert b"alpha/" not in text  # a patient's key
    one.ask("unmask", VICTIM)
    fed.attempt(number=1).ask("advertise", VICTIM, findings=("Bar",))
    for entry in fed.journal(VICTIM):
        assert set(entry) <= {"event", "of", "attempt", "code", *WORK}
        for value in (entry.get(key) or "0" * 64 for key in ("of", *WORK) if key != "phase"):
            assert re.fullmatch("[0-9a-f]{64}", value)
    text = json.dumps(fed.journal(VICTIM))
    assert not any(word in text for word in ("Blob", *NAMES, *secrets.values()))


def test_sweeping_spares_an_attempt_under_way(fed: Federation) -> None:
    one = fed.attempt().until("masked")
    stages.sweep(fed.homes[VICTIM])
    assert isinstance(one.ask("masked", VICTIM), Reply)
