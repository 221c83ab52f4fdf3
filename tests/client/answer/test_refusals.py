from __future__ import annotations

from pathlib import Path

import pytest

from chexfound.errors import CodeError, ConfigError, DataError, ProtocolError, RefusedError
from client.answer import refusals


def test_a_refusal_stands_until_another_run_is_answered(tmp_path: Path) -> None:
    assert refusals.read(tmp_path) is None
    refusals.note(tmp_path, 7, "pretrain", "weights.box")
    last = refusals.read(tmp_path)
    assert last is not None
    assert (last.run, last.phase, last.code) == ("7", "pretrain", "weights.box")
    assert "steps" in last.why
    refusals.answered(tmp_path, 7)
    assert refusals.read(tmp_path) == last
    refusals.answered(tmp_path, 8)
    assert refusals.read(tmp_path) is None


def test_a_file_that_cannot_be_removed_costs_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(path)

    refusals.note(tmp_path, 7, "pretrain", "weights.box")
    monkeypatch.setattr(Path, "unlink", refuse)
    refusals.answered(tmp_path, 8)
    assert refusals.read(tmp_path) is not None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError("policy.runs"), "policy.runs"),
        (CodeError("other code"), "code"),
        (ConfigError("site.yaml"), "config"),
        (DataError("/pacs/MUELLER"), None),
        (ProtocolError("no request"), None),
        (OSError("full"), None),
    ],
)
def test_what_is_a_refusal(error: Exception, code: str | None) -> None:
    assert refusals.code_of(error) == code


@pytest.mark.parametrize("text", ["", "[]", '{"run": "7"}', '{"run": "7", "phase": 1, "code": "x", "since": "y"}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "refused.json").write_text(text)
    assert refusals.read(tmp_path) is None
