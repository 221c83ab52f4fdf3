"""What sites said of their policy when they enrolled last keeps a run from being submitted that one of them refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chexfound.errors import RefusedError
from chexfound.identity.roster import Keys
from chexfound.recipe import load as recipes
from client.home import membership
from client.home.policy import Policy
from server import cli
from server.federation import policies
from server.federation.settings import Federation


@pytest.fixture
def sites(thorax: Federation, tmp_path: Path) -> list[str]:
    """Two of the federation, and what one of them said."""
    names = sorted(thorax.sites().sites)
    known = thorax.sites()
    while len(names) < 2:
        keys: Keys = membership.make_keys(tmp_path / f"more-{len(names)}")[0]
        known = known.with_site(f"ZULU{len(names)}", keys)
        names = sorted(known.sites)
    thorax.write_sites(known)
    return names


def granted(**changed: object) -> object:
    return replace(Policy().limits(2), masked=False, **changed)


def test_a_recipe_that_all_of_them_grant_goes_through(thorax: Federation, sites: list[str]) -> None:
    policies.check(thorax, recipes.load("demo"))
    for name in sites:
        policies.keep(thorax.folder, name, granted())
    policies.check(thorax, recipes.load("demo"))


def test_whose_file_which_line_and_what_to_do(
    thorax: Federation, sites: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is asked for, or made."""
    monkeypatch.setattr("server.runs.submit.create", lambda *_: pytest.fail("a run was made"))
    policies.keep(thorax.folder, sites[0], granted(max_rounds=10))
    assert cli.main(["run", str(thorax.folder), "demo"]) == 6
    said = capsys.readouterr().err
    for words in (f"site {sites[0]!r} refuses", "policy.work", "'max_rounds: 10'", "rounds of pretrain 20"):
        assert words in said
    path = thorax.path("policies") / f"{sites[0]}.json"
    assert f"rm {path}" in said
    path.unlink()
    policies.check(thorax, recipes.load("demo"))


def test_what_a_site_said_that_has_left_does_not_count(thorax: Federation, sites: list[str]) -> None:
    policies.keep(thorax.folder, "GONE", granted(max_rounds=1))
    policies.check(thorax, recipes.load("demo"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"at": 1, "policy": {}}', '{"at": "x", "policy": {"masked": 1}}']
)
def test_a_damaged_memory_hinders_no_run(thorax: Federation, sites: list[str], text: str) -> None:
    policies.keep(thorax.folder, sites[0], granted(max_rounds=1))
    with pytest.raises(RefusedError):
        policies.check(thorax, recipes.load("demo"))
    (thorax.path("policies") / f"{sites[0]}.json").write_text(text)
    policies.check(thorax, recipes.load("demo"))
