from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from chexfound.host import logs


@pytest.fixture(autouse=True)
def clean() -> object:
    logger = logging.getLogger("chexfound")
    handlers, level = list(logger.handlers), logger.level
    logger.handlers[:] = []  # another test of this process may have had lines shown, on a terminal that is gone
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_lines_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show()
    logs.show()
    logging.getLogger("chexfound.client").info("phase=%s", "enrol")
    assert capsys.readouterr().err.count("chexfound.client phase=enrol\n") == 1


def test_a_text_that_may_name_patients_goes_to_a_file_of_the_sites(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, log = tmp_path / logs.REASONS, logging.getLogger("chexfound.client")
    logs.show(path)
    log.info("phase=%s", "enrol")
    assert not path.exists()
    try:
        raise ValueError("pacs/MUELLER^Hans")
    except ValueError as error:
        log.error("phase=enrol error=data %s", error, exc_info=error, extra={"told": "phase=enrol error=data"})
    shown = capsys.readouterr().err
    assert f"phase=enrol error=data; the reason may name patients or files, and is in {path}\n" in shown
    assert "MUELLER" not in shown
    assert "phase=enrol error=data pacs/MUELLER^Hans\nTraceback" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_reason_that_cannot_be_kept_is_not_shown_either(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logs.show(tmp_path / "absent" / logs.REASONS)
    logging.getLogger("chexfound.client").error("error=data %s", "MUELLER", extra={"told": "error=data"})
    assert "error=data; the reason" in (shown := capsys.readouterr().err)
    assert "MUELLER" not in shown


def test_steps_are_told_every_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("chexfound.host.logs.time.monotonic", lambda: now)
    logs.show()
    steps = logs.Steps(logging.getLogger("chexfound.client"), every_s=10)
    for step in range(1, 31):
        now = float(step)
        steps("A", "pretrain", step, 30)
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"phase=pretrain site=A done={step} of=30" for step in (10, 20, 30)]
