from __future__ import annotations

import logging

import pytest

from chexfound import logs


@pytest.fixture(autouse=True)
def clean() -> object:
    logger = logging.getLogger("chexfound")
    handlers, level = list(logger.handlers), logger.level
    logger.handlers[:] = []  # another test of this process may have had lines shown, on a terminal that is gone
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_lines_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show()
    logs.show()
    logging.getLogger("chexfound.client").info("phase=%s", "enrol")
    assert capsys.readouterr().err.count("chexfound.client phase=enrol\n") == 1


def test_steps_are_told_every_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("chexfound.logs.time.monotonic", lambda: now)
    logs.show()
    steps = logs.Steps(logging.getLogger("chexfound.client"), every_s=10)
    for step in range(1, 31):
        now = float(step)
        steps("A", "pretrain", step, 30)
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"phase=pretrain site=A done={step} of=30" for step in (10, 20, 30)]
