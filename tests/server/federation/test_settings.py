from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from chexfound.errors import ConfigError, SiteError
from chexfound.identity import roster
from chexfound.identity.roster import Address
from client.home import membership
from server import cli
from server.commands import federation
from server.federation import flower_cli, members, settings
from server.federation.settings import Federation
from server.services import supervise


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    ports = [free_port(), free_port()]
    public = Address("localhost", ports[0])
    return settings.create(tmp_path / "f", "thorax", public, public, Address("127.0.0.1", ports[1]))


def test_what_is_made_is_read_back_and_private(made: Federation) -> None:
    assert settings.load(made.folder) == made
    assert made.sites() == roster.Roster(federation="thorax", serial=0)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir() if path.is_file()}
    assert [modes[name] for name in ("ca.key", "server.key", "superexec.secret")] == [0o600] * 3
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert b"PRIVATE" not in made.site_file.read_bytes()
    assert made.path("superexec.secret").read_text() not in made.site_file.read_text()


@pytest.mark.parametrize("name", ["thorax \U0001fac1", 'a "quoted" \\ name', "胸部𠮷"])
def test_any_name_that_may_be_given_is_read_back(tmp_path: Path, name: str) -> None:
    here = Address("127.0.0.1", 1)
    made = settings.create(tmp_path / name, name, here, here, here)
    assert settings.load(made.folder) == made
    told = tomllib.loads((made.path("flower") / "config.toml").read_text())["superlink"]["federation"]
    assert told == {"address": "127.0.0.1:1", "root-certificates": str(made.path("ca.crt"))}


def test_a_change_of_the_superlink_or_of_the_folder_reaches_flowers_command_line(made: Federation) -> None:
    path = made.path("federation.yaml")
    path.write_text(path.read_text().replace(f'"{made.superlink}"', '"127.0.0.1:9"'))
    moved = made.folder.rename(made.folder.with_name("moved"))
    with pytest.raises(SiteError):
        flower_cli.ask(settings.load(moved), ["list", "federation"])
    told = tomllib.loads((moved / "flower" / "config.toml").read_text())["superlink"]["federation"]
    assert told == {"address": "127.0.0.1:9", "root-certificates": str(moved / "ca.crt")}


def test_another_name_in_federation_yaml_is_told(made: Federation) -> None:
    """Sites would say of the file that it is no coordinator's, and refuse each run."""
    path = made.path("federation.yaml")
    path.write_text(path.read_text().replace('"thorax"', '"abdomen"'))
    with pytest.raises(ConfigError, match="of the federation 'thorax', and federation.yaml calls it 'abdomen'"):
        settings.load(made.folder).sites()


def test_a_folder_in_use_is_refused(made: Federation, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="is in use"):
        settings.create(made.folder, "other", made.public, made.listen, made.superlink)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "coordinator.example.org", "::"])
def test_the_superlink_never_leaves_loopback(made: Federation, tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="may listen on loopback only"):
        settings.create(tmp_path / "x", "thorax", made.public, made.listen, Address(host, 1))
    text = made.path("federation.yaml").read_text()
    address = f"[{host}]:1" if ":" in host else f"{host}:1"
    made.path("federation.yaml").write_text(text.replace(f'"{made.superlink}"', f'"{address}"'))
    with pytest.raises(ConfigError, match="may listen on loopback only"):
        settings.load(made.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "more: 1\n", "unknown key 'more'"),
        (lambda text: text.replace("name:", "nom:"), "unknown key 'nom'.*no text for 'name'"),
        (lambda text: text.replace("format: 1", "format: 2"), "format 1"),
        (lambda text: text.replace("public: ", "public: [1] #"), "no text for 'public'"),
        (lambda text: text.replace('public: "', 'public: "http://'), "without a prefix"),
        (lambda text: "[", "cannot be read"),
        (lambda text: "", "format 1"),
        (lambda text: text + "name: again\n", "given twice"),
    ],
)
def test_settings_that_cannot_be(made: Federation, change: Callable[[str], str], message: str) -> None:
    path = made.path("federation.yaml")
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=message):
        settings.load(made.folder)


def test_the_commands_by_hand(made: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["commands", str(made.folder)]) == 0
    out = capsys.readouterr().out
    assert f"export FLWR_HOME={made.folder}/flower\n" in out
    assert "export FLWR_TELEMETRY_ENABLED=0\n" in out
    superlink = next(line for line in out.splitlines() if line.startswith("flower-superlink "))
    options = ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation process"]
    assert all(option in superlink for option in [*options, f"--host 127.0.0.1 --port {made.superlink.port}"])
    assert "--insecure" not in out


def test_flowers_older_listeners_stay_off(made: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """flwr opens its former gRPC ports on all addresses if these are set, past the guard."""
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    assert not [name for name in made.environment() if name.startswith("FLWR_INTERNAL_")]


# ---- sites


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for `flwr supernode`: its nodes by number, with their keys."""
    nodes: dict[str, Any] = {}

    def ask(made: Federation, arguments: Sequence[str]) -> dict[str, Any]:
        _, command, *rest = arguments
        if command == "register":
            key = Path(rest[0]).read_text()
            if key in {one["key"] for one in nodes.values()}:  # nor one that was unregistered
                raise SiteError("Public key already in use.")
            nodes[str(len(nodes) + 1)] = {"key": key, "status": "registered"}
            return {"node-id": len(nodes)}
        if command == "unregister":
            nodes[rest[0]]["status"] = "unregistered"
            return {}
        listed = [{"node-id": n, "status": one["status"], "created-at": "now"} for n, one in nodes.items()]
        return {"nodes": [one | {"online-at": "then", "offline-at": "N/A"} for one in listed]}

    monkeypatch.setattr(flower_cli, "ask", ask)
    return nodes


def site(tmp_path: Path, name: str, home: str = "") -> Path:
    keys, _ = membership.make_keys(tmp_path / "sites" / (home or name))
    path = tmp_path / f"{home or name}.pub"
    path.write_text(roster.public_file(name, keys))
    return path


def test_sites_come_and_go(made: Federation, flower: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    folder = str(made.folder)
    for name in ("NORTH", "SOUTH"):
        assert cli.main(["add-site", folder, name, str(site(tmp_path, name))]) == 0
    assert [one["status"] for one in flower.values()] == ["registered"] * 2
    assert membership.read(made.site_file).sites == made.sites()
    anew = site(tmp_path, "NORTH", "anew")
    assert cli.main(["add-site", folder, "NORTH", str(anew)]) == 2
    assert "in the federation already" in capsys.readouterr().err
    assert cli.main(["remove-site", folder, "NORTH"]) == 0
    assert [one["status"] for one in flower.values()] == ["unregistered", "registered"]
    assert list(made.sites().sites) == ["SOUTH"]
    assert cli.main(["remove-site", folder, "NORTH"]) == 2
    assert "there are SOUTH" in capsys.readouterr().err
    assert cli.main(["add-site", folder, "NORTH", str(anew)]) == 0  # with new keys
    assert [one["status"] for one in flower.values()] == ["unregistered", "registered", "registered"]


def test_a_key_that_was_struck_off_may_not_come_back(made, flower, tmp_path: Path, capsys: Any) -> None:
    """Flower would refuse it, and the roster would have a site that can never connect."""
    folder, north = str(made.folder), site(tmp_path, "NORTH")
    for name in ("NORTH", "SOUTH"):
        cli.main(["add-site", folder, name, str(site(tmp_path, name))])
    cli.main(["remove-site", folder, "NORTH"])
    cli.main(["remove-site", folder, "SOUTH"])
    before = made.path("roster.json").read_bytes()
    node, identity = north.read_text().splitlines()
    other_node, other_identity = site(tmp_path, "NORTH", "anew").read_text().splitlines()
    capsys.readouterr()
    for lines in ((node, identity), (node, other_identity), (other_node, identity)):
        north.write_text("\n".join(lines))
        assert cli.main(["add-site", folder, "NORTH", str(north)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "a key of 'NORTH' was struck off and may not come back; at the site: move HOME/keys away" in said.err
        assert "chexfound-client enrol --name NORTH anew, and send the new file" in said.err
        assert made.path("roster.json").read_bytes() == before
    north.write_text(f"{other_node}\n{other_identity}\n")
    assert cli.main(["add-site", folder, "NORTH", str(north)]) == 0
    made.path("struck.json").write_text("{}")
    assert cli.main(["add-site", folder, "EAST", str(site(tmp_path, "EAST"))]) == 2
    assert "struck.json: damaged" in capsys.readouterr().err


def test_a_site_that_flower_does_not_take_keeps_no_other_out(made, flower, tmp_path: Path, capsys: Any) -> None:
    """As one whose key was struck off before struck.json was."""
    folder = str(made.folder)
    cli.main(["add-site", folder, "BAD", str(site(tmp_path, "BAD"))])
    cli.main(["remove-site", folder, "BAD"])
    made.path("struck.json").unlink()
    capsys.readouterr()
    assert cli.main(["add-site", folder, "BAD", str(tmp_path / "BAD.pub")]) == 7
    said = capsys.readouterr()
    assert "error: site BAD: not registered: Public key already in use." in said.err
    assert f"chexfound-server remove-site {folder} BAD; at the site: move HOME/keys away" in said.err
    assert "give" not in said.out
    assert cli.main(["add-site", folder, "GOOD", str(site(tmp_path, "GOOD"))]) == 0
    said = capsys.readouterr()
    assert "warning: site BAD: not registered" in said.err
    assert "next: give" in said.out
    assert set(members.nodes(made)) == {"GOOD"}


def test_another_sites_file_is_refused(made, flower, tmp_path: Path, capsys: Any) -> None:
    file = site(tmp_path, "northfield")
    assert cli.main(["add-site", str(made.folder), "riverside", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file} is of site 'northfield', not 'riverside'\n"
    assert made.sites().sites == {}


def test_what_was_changed_while_the_superlink_was_down_is_made_good(made, flower, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(federation, "_register", lambda held, name, what: 0)
    for name in ("NORTH", "SOUTH"):
        cli.main(["add-site", str(made.folder), name, str(site(tmp_path, name))])
    assert members.register_all(made) == (["NORTH", "SOUTH"], [], {})
    assert members.register_all(made) == ([], [], {})
    cli.main(["remove-site", str(made.folder), "NORTH"])
    assert members.register_all(made) == ([], ["NORTH"], {})
    flower.clear()  # its database was lost
    assert members.register_all(made) == (["SOUTH"], [], {})


def test_a_superlink_that_is_down_is_said(made: Federation, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["add-site", str(made.folder), "NORTH", str(site(tmp_path, "NORTH"))]) == 0
    starting = f"chexfound-server up {made.folder}"
    assert (
        f"no SuperLink answers at {made.superlink}; {starting} registers it there at its next"
        in capsys.readouterr().out
    )
    assert cli.main(["sites", str(made.folder), "--json"]) == 0
    assert '"status": "unknown"' in capsys.readouterr().out
    assert cli.main(["sites", str(made.folder)]) == 0
    assert capsys.readouterr().err == (
        f"whether they are connected is not known: no SuperLink answers at {made.superlink}; start it: {starting}\n"
    )
    assert cli.main(["remove-site", str(made.folder), "NORTH"]) == 0
    assert f"{starting} strikes it off there at its next start" in capsys.readouterr().out


def test_a_superlink_that_does_not_answer_as_it_should(made, tmp_path: Path, capsys: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", made.superlink.port)):
        assert cli.main(["add-site", str(made.folder), "NORTH", str(site(tmp_path, "NORTH"))]) == 7
    assert "no SuperLink answers" in capsys.readouterr().err


def test_a_site_that_is_not_registered_is_told_for_programs_too(made, flower, tmp_path: Path, capsys: Any) -> None:
    made.write_sites(made.sites().with_site("NORTH", membership.make_keys(tmp_path / "s")[0]))
    assert cli.main(["sites", str(made.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["superlink"], told["sites"][0]["status"]) == ("up", "unregistered")
    assert cli.main(["sites", str(made.folder)]) == 0
    assert "NORTH: not registered at the SuperLink: chexfound-server add-site again" in capsys.readouterr().out


# ---- up

LISTENS = """
import socket, sys, time
print("a line of", sys.argv[1], flush=True)
with socket.create_server(("127.0.0.1", int(sys.argv[2]))) as server:
    while True:
        server.accept()[0].close()
"""


@pytest.fixture
def stand_ins(made: Federation, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """In place of the three programs; the guard's ends by itself."""
    commands = {
        "superlink": [sys.executable, "-c", LISTENS, "superlink", str(made.superlink.port)],
        "superexec": [sys.executable, "-c", "import time; time.sleep(600)"],
        "guard": [sys.executable, "-c", "print('no port for me'); raise SystemExit(5)"],
    }
    monkeypatch.setattr(Federation, "processes", lambda self: commands)
    monkeypatch.setattr(members, "register_all", lambda made: (["NORTH"], [], {"SOUTH": "Public key already in use."}))
    monkeypatch.setattr(supervise, "RESTART_S", (0.1, 0.4))
    return commands


def test_up_keeps_them_running_until_it_is_told(made, stand_ins) -> None:
    import signal

    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if sum("starting it again" in line for line in said) == 3:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    assert supervise.up(made, say) == signal.SIGTERM
    assert said[:3] == [
        "site NORTH: registered",
        "warning: site SOUTH: not registered, the others are served without it: Public key already in use.",
        f"up: sites connect to {made.public}; logs in {made.path('logs')}; Ctrl-C ends it",
    ]
    assert said[3:5] == ["  guard: no port for me", "guard ended with exit code 5; starting it again in 0 s"]
    assert "a line of superlink" in made.path("logs").joinpath("superlink.log").read_text()
    assert not supervise.listens(made.superlink)


def test_a_superlink_that_does_not_start_says_why(made, stand_ins) -> None:
    stand_ins["superlink"] = [sys.executable, "-c", "print('the database is damaged'); raise SystemExit(9)"]
    said: list[str] = []
    with pytest.raises(SiteError, match="ended with exit code 9"):
        supervise.up(made, said.append)
    assert said == ["  superlink: the database is damaged"]


def test_a_port_that_is_taken_is_said(made, stand_ins) -> None:
    import socket

    with socket.create_server(("127.0.0.1", made.listen.port)):
        with pytest.raises(ConfigError, match="listen localhost.*something listens there already.*another listen: in"):
            supervise.up(made, print)
    with socket.create_server(("127.0.0.1", made.superlink.port)):
        with pytest.raises(ConfigError, match=r"superlink 127.*give it another superlink: in .*federation\.yaml"):
            supervise.up(made, print)


def test_they_die_with_up(made, tmp_path) -> None:
    """Killed, it cannot stop them: they get a signal by themselves."""
    code = (
        "import sys, subprocess, time; from chexfound.host.processes import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(settings.__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
