from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest

from chexfound.errors import ConfigError, DataError
from chexfound.identity import roster, signing
from chexfound.identity.roster import Address
from client import cli
from client.home import membership
from server.federation import settings as federations


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "sites" / "NORTH"


@pytest.fixture
def coordinator(tmp_path: Path) -> federations.Federation:
    at = [Address("coordinator.example.org", 8443), Address("0.0.0.0", 8443), Address("127.0.0.1", 8001)]
    return federations.create(tmp_path / "federation", "thorax", *at)


def add(coordinator: federations.Federation, name: str, file: Path) -> Path:
    keys = roster.read_public_file(file.read_text(), str(file))
    coordinator.write_sites(coordinator.sites().with_site(name, keys))
    return coordinator.site_file


def enrol(name: str = "NORTH") -> Path:
    assert cli.main(["enrol", "--name", name]) == 0
    return Path(f"{name}.pub")


def test_keys_are_made_once_and_stay(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = enrol().read_bytes()
    out = capsys.readouterr().out
    assert "made its keys" in out
    keys = roster.read_public_file(first.decode(), "x")
    assert signing.fingerprint(keys.node) in out
    assert signing.fingerprint(keys.identity) in out
    assert out.rstrip().endswith("chexfound-client join FILE")
    assert enrol().read_bytes() == first
    assert "has its keys already" in capsys.readouterr().out
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    for name in ("node.key", "identity.key"):
        assert stat.S_IMODE((home / "keys" / name).stat().st_mode) == 0o600
        assert (home / "keys" / name).read_bytes() not in first


def test_where_several_sites_share_the_home_commands_name_the_site(
    home: Path, coordinator: federations.Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol()
    file = add(coordinator, "it's", enrol("it's"))
    assert capsys.readouterr().out.rstrip().endswith("chexfound-client join FILE --name 'it'\"'\"'s'")
    assert cli.main(["roster", "approve", str(file), "--yes", "--name", "it's"]) == 0
    named = "--name 'it'\"'\"'s'"
    assert capsys.readouterr().out.endswith(
        f"approved; next: chexfound-client approve {named}, then: chexfound-client --data DIR {named}\n"
    )
    assert cli.main(["roster", "show", "--name", "NORTH"]) == 2
    assert capsys.readouterr().err.endswith("chexfound-client join FILE --name NORTH\n")


@pytest.mark.parametrize("lost", ["node.key", "identity.key"])
def test_a_key_that_is_missing_is_made(home: Path, lost: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As "chexfound-client enrol makes one" says, also where enrol was killed between the two."""
    before = roster.read_public_file(enrol().read_text(), "x")
    (home / "keys" / lost).unlink()
    after = roster.read_public_file(enrol().read_text(), "x")
    assert "made its keys" in capsys.readouterr().out
    assert (before.node == after.node, before.identity == after.identity) == (lost != "node.key", lost == "node.key")


def test_flower_reads_the_nodes_key(home: Path) -> None:
    import argparse

    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    enrol()
    path = str(home / "keys" / "node.key")
    given = argparse.Namespace(auth_supernode_private_key=path, auth_supernode_public_key=None)
    private, _ = _try_setup_client_authentication(given)
    assert private.curve.name == "secp384r1"
    shown = subprocess.run(["ssh-keygen", "-yf", path], capture_output=True, text=True, check=True).stdout
    assert shown.split()[:2] == membership.public_keys(home).node.split()


def test_the_file_that_comes_back_is_approved(
    home: Path, coordinator: federations.Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    file = add(coordinator, "NORTH", enrol())
    capsys.readouterr()
    assert cli.main(["roster", "approve", str(file)]) == 2  # no terminal to ask on
    assert not (home / "federation.json").exists()
    assert cli.main(["roster", "approve", str(file), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "federation thorax at coordinator.example.org:8443, roster 1" in out
    assert f"NORTH (this site): {signing.fingerprint(membership.public_keys(home).identity)}" in out
    held = membership.approved(home)
    assert held is not None
    assert held.sites == coordinator.sites()
    assert (home / "ca.crt").read_text() == coordinator.path("ca.crt").read_text()


def test_the_authority_is_that_of_what_was_approved(home: Path, coordinator: federations.Federation) -> None:
    """Whether approve was killed between its two files, or one was changed since."""
    file = add(coordinator, "NORTH", enrol())
    assert cli.main(["roster", "approve", str(file), "--yes"]) == 0
    held = membership.approved(home)
    assert held is not None
    (home / "ca.crt").write_text("another")
    assert membership.authority_file(home, held).read_text() == held.authority


@pytest.mark.parametrize(("word", "code"), [("no", 6), ("", 6), ("y", 6), ("yes", 0), ("YES ", 0)])
def test_only_yes_is_yes(home, coordinator, monkeypatch, word, code) -> None:
    file = add(coordinator, "NORTH", enrol())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: word)
    assert cli.main(["roster", "approve", str(file)]) == code
    assert (home / "federation.json").exists() == (code == 0)


def test_a_change_is_told_and_an_older_file_refused(
    home: Path, coordinator: federations.Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.json"
    first.write_bytes(add(coordinator, "NORTH", enrol()).read_bytes())
    cli.main(["roster", "approve", str(first), "--yes"])
    second = add(coordinator, "SOUTH", enrol("SOUTH"))
    capsys.readouterr()
    assert cli.main(["roster", "approve", str(second), "--yes", "--name", "NORTH"]) == 0
    assert "change: new site SOUTH" in capsys.readouterr().out
    assert cli.main(["roster", "approve", str(first), "--yes", "--name", "NORTH"]) == 2
    assert "older (serial 1) than what was approved (2)" in capsys.readouterr().err
    assert cli.main(["roster", "approve", str(second), "--yes"]) == 2  # two sites here: which?
    assert "several sites" in capsys.readouterr().err


def test_each_kind_of_change_has_its_words(home: Path, coordinator: federations.Federation, tmp_path: Path) -> None:
    add(coordinator, "NORTH", enrol())
    before = membership.read(add(coordinator, "SOUTH", enrol("SOUTH")))
    other = federations.create(tmp_path / "o", "thorax", Address("o", 1), Address("o", 1), Address("::1", 1))
    stranger, _ = membership.make_keys(tmp_path / "stranger")
    sites = coordinator.sites().without_site("SOUTH").without_site("NORTH").with_site("NORTH", stranger)
    other.write_sites(sites)
    assert membership.changes(None, before) == membership.changes(before, before) == []
    told = membership.changes(before, membership.read(other.site_file))
    assert told == [
        "the coordinator is at o:1, not at coordinator.example.org:8443 any more",
        "the certificate authority is ANOTHER ONE: ask the coordinator why, in person",
        "site SOUTH is gone",
        "site NORTH has OTHER KEYS",
    ]


def test_a_file_without_this_site_or_with_other_keys(
    home: Path, coordinator: federations.Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol()
    file = add(coordinator, "NORTHFIELD", enrol("SOUTH"))
    assert cli.main(["roster", "approve", str(file), "--yes", "--name", "NORTH"]) == 2
    assert "has no site 'NORTH' (it has 'NORTHFIELD')" in capsys.readouterr().err
    stranger, _ = membership.make_keys(tmp_path / "stranger")
    coordinator.write_sites(coordinator.sites().with_site("NORTH", stranger))
    assert cli.main(["roster", "approve", str(file), "--yes", "--name", "NORTH"]) == 2
    assert "has other keys for 'NORTH' than this site holds" in capsys.readouterr().err
    assert not (home / "federation.json").exists()


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"ca": "x"}, {"ca": 1}, {"server": "http://h:1"}, {"name": "other"}, {"roster": {}}, {"more": 1}],
)
def test_files_that_are_not_the_coordinators(
    coordinator: federations.Federation, tmp_path: Path, change: dict[str, object]
) -> None:
    values = json.loads(coordinator.site_file.read_text())
    (tmp_path / "f").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match="f"):
        membership.read(tmp_path / "f")


def test_another_kind_of_file_is_named_as_such(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "federation.yaml").write_text("format: 1\n")
    for file in (enrol(), tmp_path / "federation.yaml"):
        assert cli.main(["roster", "approve", str(file), "--yes"]) == 2
        told = capsys.readouterr().err
        assert told == f"error: {file}: is not a NAME.federation.json of chexfound-server\n"
    assert cli.main(["roster", "approve", "absent.json", "--yes"]) == 2
    assert "absent.json: cannot be read: [Errno 2]" in capsys.readouterr().err


def test_keys_that_cannot_be_read(home: Path, tmp_path: Path) -> None:
    enrol()
    (home / "keys" / "identity.key").write_bytes((home / "keys" / "node.key").read_bytes())
    with pytest.raises(DataError, match="identity key cannot be read"):
        membership.public_keys(home)
    (home / "keys" / "node.key").unlink()
    with pytest.raises(DataError, match="enrol makes one"):
        membership.public_keys(home)
