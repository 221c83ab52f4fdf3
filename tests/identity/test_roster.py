from __future__ import annotations

import json
from pathlib import Path

import pytest

from chexfound.errors import ConfigError
from chexfound.identity import roster
from chexfound.identity.roster import Address, Keys, Roster
from client.home import membership


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8000", "127.0.0.1", 8000), ("[::1]:1", "::1", 1), ("a.example:65535", "a.example", 65535)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert Address.parse(text, "--superlink") == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8000",
        "host",
        "host:",
        ":8000",
        "host:0",
        "host:65536",
        "host:x",
        "host:-1",
        "http://h:1",
        "h/p:1",
        "::1:80",
        "a b:1",
        "h:²",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--superlink"):
        Address.parse(text, "--superlink")


def test_loopback() -> None:
    assert all(Address(host, 1).loopback for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(
        Address(host, 1).loopback for host in ("10.0.0.1", "0.0.0.0", "example.org", "localhost.example.org")
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Keys]:
    """Of three sites."""
    return [membership.make_keys(tmp_path_factory.mktemp("site"))[0] for _ in range(3)]


@pytest.fixture
def sites(keys: list[Keys]) -> Roster:
    return Roster(federation="thorax", serial=0).with_site("B", keys[0]).with_site("A", keys[1])


def test_a_roster_is_the_same_in_whatever_order_it_was_made(sites: Roster, keys: list[Keys]) -> None:
    other = Roster(federation="thorax", serial=0).with_site("A", keys[1]).with_site("B", keys[0])
    assert other.sha256() == sites.sha256()
    assert list(sites.as_dict()["sites"]) == ["A", "B"]
    assert roster.parse(json.loads(json.dumps(sites.as_dict())), "x") == other


def test_every_change_is_another_roster(sites: Roster, keys: list[Keys]) -> None:
    assert sites.serial == 2
    others = [
        sites.with_site("C", keys[2]),
        sites.without_site("A"),
        Roster(federation="t", serial=2, sites=sites.sites),
    ]
    assert len({one.sha256() for one in (sites, *others)}) == 4
    again = sites.without_site("A").with_site("A", keys[1])
    assert again.serial == 4
    assert again.sha256() != sites.sha256()  # nobody can be shown an older one as new


def test_what_a_roster_refuses(sites: Roster, keys: list[Keys]) -> None:
    with pytest.raises(ConfigError, match="in the federation already"):
        sites.with_site("A", keys[2])
    with pytest.raises(ConfigError, match="a key of 'C' is that of 'B'"):
        sites.with_site("C", Keys(keys[2].node, keys[0].identity))
    with pytest.raises(ConfigError, match="a key of 'C' is that of 'A'"):
        sites.with_site("C", Keys(keys[1].node, keys[2].identity))
    with pytest.raises(ConfigError, match="site name '../x'"):
        sites.with_site("../x", keys[2])
    with pytest.raises(ConfigError, match="no site 'D'; there are A, B"):
        sites.without_site("D")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"serial": -1},
        {"serial": True},
        {"serial": "1"},
        {"federation": "a/b"},
        {"federation": 3},
        {"sites": []},
        {"sites": {"A": {}}},
        {"sites": {"A": {"node": "x", "identity": "y"}}},
        {"sites": {"A": {"node": 1, "identity": 2}}},
        {"more": 1},
    ],
)
def test_what_is_no_roster(sites: Roster, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="here"):
        roster.parse(sites.as_dict() | change, "here")


@pytest.mark.parametrize("value", [None, [], "x", 1, {}])
def test_what_is_no_object(value: object) -> None:
    with pytest.raises(ConfigError, match="not a roster"):
        roster.parse(value, "here")


def test_the_two_keys_cannot_be_exchanged(sites: Roster) -> None:
    values = sites.as_dict()
    held = values["sites"]["A"]
    held["node"], held["identity"] = held["identity"], held["node"]
    with pytest.raises(ConfigError, match="site 'A'"):
        roster.parse(values, "here")


def test_a_sites_public_file(keys: list[Keys]) -> None:
    text = roster.public_file("St. Mary's", keys[0])
    assert roster.read_public_file(text, "x.pub") == keys[0]
    assert roster.read_public_file(text.replace("\n", "\r\n"), "x.pub") == keys[0]
    assert roster.read_public_file(text, "x.pub", "St. Mary's") == keys[0]
    bare = "\n".join(" ".join(line.split()[:2]) for line in text.splitlines())
    assert roster.read_public_file(bare, "x.pub", "any") == keys[0]
    with pytest.raises(ConfigError, match=r"x\.pub is of site \"St. Mary's\", not 'St. Mary'"):
        roster.read_public_file(text, "x.pub", "St. Mary")
    for odd in ("", text + text, text.splitlines()[0], "a b\nc d", "\n".join(reversed(text.splitlines()))):
        with pytest.raises(ConfigError, match=r"x\.pub"):
            roster.read_public_file(odd, "x.pub")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b" " * (roster.SIZE_MAX + 1)])
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        roster.load(tmp_path / "f")
