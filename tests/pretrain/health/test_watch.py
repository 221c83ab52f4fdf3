"""A site's own watch: it says a symptom once, and no trouble with its file costs a round."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from chexfound.pretrain.health import watch
from chexfound.recipe import load as recipes

RECIPE = recipes.load("laptop")
FIRST = 95  # the step of the first round after which a symptom can be told: 100 steps are done


def row(step: int, **changed: float) -> dict[str, float]:
    """Of a teacher that says nothing."""
    return {"step": step, "loss": 8.0, "dino": 4.0, "log_k": 5.0, "teacher_entropy": 5.0, **changed}


def told(path: Path, first: int, last: int) -> list[list[str]]:
    """What is told after each round of five steps."""
    return [
        [one.name for one in watch.new_symptoms(path, RECIPE, start, [row(step) for step in range(start, start + 5)])]
        for start in range(first, last, 5)
    ]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_symptom_is_told_once_and_again_in_a_run_that_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "health" / "curve.json"
    once = [[]] * (FIRST // 5) + [["uniform-teacher"]] + [[]] * 10
    assert told(path, 0, 150) == once
    assert told(path, 145, 150) == [[]]  # a round that is asked for again
    assert told(path, 0, 150) == once
    assert warned(caplog) == []


GOOD = row(94)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        json.dumps({"rows": [GOOD]}).encode(),
        json.dumps({"rows": [GOOD], "symptoms": [1]}).encode(),
        json.dumps({"rows": [GOOD | {"loss": float("nan")}], "symptoms": []}).encode(),
        json.dumps({"rows": [GOOD | {"loss": 10**400}], "symptoms": []}).encode(),
        json.dumps({"rows": [GOOD | {"loss": "8"}], "symptoms": []}).encode(),
        json.dumps({"rows": [GOOD | {"log_k": 800.0}], "symptoms": []}).encode(),
        json.dumps({"rows": [{"log_k": 5.0}], "symptoms": []}).encode(),
    ],
)
def test_a_damaged_curve_is_said_once_and_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "curve.json"
    path.write_bytes(content)
    assert told(path, FIRST, FIRST + 50) == [[]] * 9 + [["uniform-teacher"]]
    (line,) = warned(caplog)
    assert "cannot be read, so the watch over this site's pretraining begins anew" in line


def a_file_where_the_folder_should_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.parent.mkdir()
    path.parent.touch()


def a_folder_where_the_file_should_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)


def a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("trouble", [a_file_where_the_folder_should_be, a_folder_where_the_file_should_be, a_full_disk])
def test_a_curve_that_cannot_be_kept_is_said_once_and_costs_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    path = tmp_path / "home" / "health" / "curve.json"
    trouble(path, monkeypatch)
    assert told(path, 0, 150) == [[]] * 30
    assert [("watch over its pretraining is off" in line) for line in warned(caplog)].count(True) == 1
    assert len(warned(caplog)) <= 2  # that it cannot be read either may be said too, once
