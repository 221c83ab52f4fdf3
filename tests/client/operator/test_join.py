"""One command shows who, which code and which policy, asks once, and leaves what the steps by hand leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chexfound.identity import bundle
from chexfound.identity.signing import fingerprint
from client import cli
from client.home import approval, membership
from client.home.policy import Policy
from client.node.flwr_private import release_bundle
from client.operator import join
from tests.client.home.test_approval import CAME, DIGEST
from tests.client.home.test_membership import add, enrol
from tests.client.home.test_membership import coordinator as coordinator_of
from tests.client.home.test_membership import home as home_of

home, coordinator = home_of, coordinator_of


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Say a word at the terminal; returns what is asked."""
    asked: list[str] = []

    def say(word: str) -> list[str]:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or word)
        return asked

    return say


def test_one_question_leaves_what_the_steps_by_hand_leave(home, coordinator, answer, capsys) -> None:
    file, asked = add(coordinator, "NORTH", enrol()), answer("yes")
    capsys.readouterr()
    assert cli.main(["join", str(file)]) == 0
    out = capsys.readouterr().out
    assert asked == [f"{join.QUESTION} [yes/no] "]
    held = membership.approved(home)
    assert held == membership.read(file)
    assert list(approval.approved(home)) == [release_bundle().digest()]
    for told in (held.authority_fingerprint, release_bundle().digest()):
        assert told in out
    assert f"NORTH (this site): {fingerprint(membership.public_keys(home).identity)}" in out
    assert f"policy {home / 'site.yaml'}\n  runs in the clear are accepted, with 1 site\n" in out
    assert out.endswith("runs with this code are accepted; next: chexfound-client --data DIR\n")


@pytest.mark.parametrize("word", ["no", "y", ""])
def test_any_other_word_changes_nothing(home, coordinator, answer, word: str) -> None:
    file = add(coordinator, "NORTH", enrol())
    answer(word)
    assert cli.main(["join", str(file)]) == 6
    assert membership.approved(home) is None
    assert approval.approved(home) == {}


def test_without_a_terminal_it_shows_and_asks_for_the_word(home, coordinator, capsys, monkeypatch) -> None:
    file = add(coordinator, "NORTH", enrol())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert cli.main(["join", str(file)]) == 2
    assert "give --yes" in capsys.readouterr().err
    assert membership.approved(home) is None
    assert cli.main(["join", str(file), "--yes"]) == 0
    assert membership.approved(home) is not None


def test_what_changed_in_the_roster_is_told_and_an_older_file_refused(home, coordinator, tmp_path, capsys) -> None:
    first = tmp_path / "first.json"
    first.write_bytes(add(coordinator, "NORTH", enrol()).read_bytes())
    assert cli.main(["join", str(first), "--yes"]) == 0
    second = add(coordinator, "SOUTH", enrol("SOUTH"))
    capsys.readouterr()
    assert cli.main(["join", str(second), "--yes", "--name", "NORTH"]) == 0
    out = capsys.readouterr().out
    assert "  change: new site SOUTH\n" in out
    assert "--data DIR" not in out  # it serves already
    assert cli.main(["join", str(first), "--yes", "--name", "NORTH"]) == 2
    assert "older (serial 1) than what was approved (2)" in capsys.readouterr().err
    assert cli.main(["join", str(second), "--yes", "--name", "EAST"]) != 0
    assert cli.main(["join", "absent.json", "--yes", "--name", "NORTH"]) == 2


def test_code_that_was_refused_is_shown_and_stays_refused(home, coordinator, capsys) -> None:
    file = add(coordinator, "NORTH", enrol())
    approval.check(home, CAME)
    assert cli.main(["join", str(file), "--yes"]) == 0
    out = capsys.readouterr().out
    differing = len(bundle.read(CAME).differences(release_bundle()))
    assert f"refused before, and not approved by this: {DIGEST[:12]}…, with {differing} other files;\n" in out
    assert f"look at it: chexfound-client approve {DIGEST[:12]}\n" in out
    assert DIGEST not in approval.approved(home)


def test_the_policy_is_read_line_by_line_before_the_question(home, coordinator, capsys) -> None:
    file = add(coordinator, "NORTH", enrol())
    (home / "site.yaml").write_text("min_patients: 50\nmodel:\n  max_patch_px: 14\nsecagg:\n  required: true\n")
    assert cli.main(["join", str(file), "--yes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"policy {home / 'site.yaml'}" in lines
    assert "  runs in the clear are refused, with 1 site" in lines
    assert "  * min_patients               50" in lines
    assert "  * model.max_patch_px         14" in lines
    assert "    cells.patients             10" in lines
    assert "    phases                     [pretrain, adapt, evaluate]" in lines


@pytest.mark.parametrize(("n", "told"), [(1, True), (2, True), (3, False)])
def test_that_no_sum_of_few_sites_is_masked_is_told(home, coordinator, capsys, n: int, told: bool) -> None:
    file = add(coordinator, "NORTH", enrol())
    for name in ("SOUTH", "WEST")[: n - 1]:
        file = add(coordinator, name, enrol(name))
    for words in (["join", str(file), "--yes"], ["roster", "approve", str(file), "--yes"], ["roster", "show"]):
        capsys.readouterr()
        assert cli.main([*words, "--name", "NORTH"]) == 0
        assert ("so the coordinator sees this site's own update" in capsys.readouterr().out) == told


def test_values_are_told_as_they_may_stand_in_site_yaml(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    lines = [line[4:].split(maxsplit=1) for line in join.policy_lines(Policy(), 3, path)[2:]]
    values = dict(lines)
    assert values["secagg.attempt_s"] == "86400"
    assert values["model.max_clip_grad"] == "3"
    assert values["machine.hours"] == values["plain"] == "null"
    assert values["findings"] == "[]"
    assert values["weights.refuse_change"] == "false"
    sections: dict[str, list[str]] = {}
    for key, value in lines:
        section, _, field = key.rpartition(".")
        sections.setdefault(section, []).append(f"{field}: {value}")
    top = sections.pop("")
    path.write_text("\n".join([*top, *(f"{name}: {{{', '.join(one)}}}" for name, one in sections.items())]))
    assert Policy.load(tmp_path) == Policy()


def test_every_demand_of_a_policy_has_its_line(tmp_path: Path) -> None:
    told = [line[4:].split()[0] for line in join.policy_lines(Policy(), 3, tmp_path / "site.yaml")[2:]]
    assert {"phases", "machine.hours", "secagg.required", "split.train", "weights.refuse_change", "plain"} <= set(told)
    assert {name.partition(".")[0] for name in told} == set(Policy.__dataclass_fields__)


def test_a_policy_that_cannot_be_read_is_told_before_anything(home, coordinator, capsys) -> None:
    file = add(coordinator, "NORTH", enrol())
    (home / "site.yaml").write_text("min_patient: 50\n")
    assert cli.main(["join", str(file), "--yes"]) == 2
    assert "min_patient" in capsys.readouterr().err
    assert membership.approved(home) is None
