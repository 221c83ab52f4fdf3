"""The site.yaml that `enrol` writes: each field with its default, and each with a paragraph in the documentation."""

from __future__ import annotations

import dataclasses
import re
import stat
from pathlib import Path

import pytest

from client.home import template
from client.home.policy import Policy
from client.operator import options

ROOT = Path(__file__).resolve().parents[3]


def names(section: object = Policy(), before: str = "") -> list[str]:
    """Of all fields, with their sections."""
    found = []
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        here = before + field.name
        found += names(value, f"{here}.") if dataclasses.is_dataclass(value) else [here]
    return found


@pytest.mark.parametrize("text", [template.TEXT, template.uncommented()], ids=["as it is", "every line in force"])
def test_it_holds_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    assert Policy.load(tmp_path) == Policy()


def test_every_field_is_in_it() -> None:
    from chexfound.parsing import strict_yaml

    assert strict_yaml.load(template.TEXT) is None
    values = strict_yaml.load(template.uncommented())
    given = [f"{key}.{inner}" for key, one in values.items() if isinstance(one, dict) for inner in one]
    given += [key for key, one in values.items() if not isinstance(one, dict)]
    assert sorted(given) == sorted(names())


def test_one_line_in_force_changes_that_field_alone(tmp_path: Path) -> None:
    text = template.TEXT.replace("#model:\n", "model:\n").replace("#  max_lr: 0.002", "  max_lr: 0.001")
    (tmp_path / "site.yaml").write_text(text)
    assert Policy.load(tmp_path) == Policy(model=dataclasses.replace(Policy().model, max_lr=0.001))


def test_enrol_writes_it_once_and_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert options.run(["enrol", "--name", "NORTH"]) == 0
    path = tmp_path / "sites" / "NORTH" / "site.yaml"
    assert path.read_text() == template.TEXT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in capsys.readouterr().out
    path.write_text("max_runs: 1\n")
    assert options.run(["enrol", "--name", "NORTH"]) == 0
    assert path.read_text() == "max_runs: 1\n"


def test_every_field_has_a_paragraph_in_the_documentation() -> None:
    text = (ROOT / "docs" / "site.md").read_text()
    section = text.partition("### site.yaml, field by field\n")[2].partition("\n### ")[0]
    told = re.findall(r"\*\*`([a-z_.]+)`\*\* \((\S.*?)\)", section.replace("\n", " "))
    assert [name for name, _ in told] == names()
