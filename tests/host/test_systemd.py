from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chexfound.errors import ConfigError
from chexfound.host import systemd
from chexfound.identity.roster import Address
from client import cli
from client.operator import options
from server.federation import settings

ODD = "a b%i \\ \"quoted\" 'x' ;#é"  # what a unit gives a meaning to


@pytest.fixture
def verify(require: Callable[[str], Path]) -> Callable[[Path], None]:
    """Fails for whatever `systemd-analyze verify` has to say of a unit."""
    program = require("systemd-analyze")

    def check(unit: Path) -> None:
        done = subprocess.run([program, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
        told = [line for line in done.stderr.splitlines() if unit.stem in line]
        assert (done.returncode, told) == (0, []), done.stderr

    return check


@pytest.fixture(params=["a b%i 100% ;#é$x", ODD])
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An environment in a folder of an odd name; with quotes in it, systemd takes it for no program's."""
    folder = tmp_path / request.param
    folder.mkdir()
    for name in ("chexfound-server", "chexfound-client"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def read(line: str) -> list[str]:
    """The words of a line as systemd reads them: by the shell's rules of double quotes, but for `%%` and `$$`."""
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]
    return words[1:] if words[0] == "/usr/bin/env" else words


def test_the_coordinators_is_made_with_the_federation(programs: Path, verify: Callable, tmp_path: Path) -> None:
    at = [Address("coordinator.example.org", 8443), Address("0.0.0.0", 8443), Address("127.0.0.1", 8001)]
    made = settings.create(tmp_path / ODD / "thorax", "thorax", *at)
    unit = made.path("systemd") / "chexfound-server.service"
    verify(unit)
    text = unit.read_text()
    (command,) = values(text, "ExecStart")
    assert read(command) == [str(programs / "chexfound-server"), "up", str(made.folder)]
    assert [read(line) for line in values(text, "ReadWritePaths")] == [[str(made.folder)]]


def test_a_sites(programs: Path, verify: Callable, tmp_path: Path, monkeypatch, capsys) -> None:
    home, data, name = tmp_path / f"home {ODD}", tmp_path / f"pacs {ODD}", "St. $HOME %n 100%"
    monkeypatch.setenv("CHEXFOUND_HOME", str(home))
    out = tmp_path / "chexfound-client.service"
    given = ["unit", "--data", str(data), "--name", name, "--gpus", "2", "--image-px", "224", "--drain", "600"]
    assert cli.main([*given, "--out", str(out)]) == 0
    assert "systemctl enable --now chexfound-client" in capsys.readouterr().out
    verify(out)
    assert cli.main(given) == 0
    text = capsys.readouterr().out
    assert text == out.read_text()
    (command,) = values(text, "ExecStart")
    program, *words = read(command)
    assert program == str(programs / "chexfound-client")
    parsed = cli.parser().parse_args(words)
    assert (parsed.data, parsed.name, parsed.gpus, parsed.image_px) == (str(data), name, "2", 224)
    assert parsed.drain == 600
    assert values(text, "TimeoutStopSec") == ["660s"]
    assert [read(line) for line in values(text, "Environment")] == [[f"CHEXFOUND_HOME={home}"]]
    assert [read(line) for line in values(text, "ReadWritePaths")] == [[str(home)]]
    assert [read(line) for line in values(text, "ReadOnlyPaths")] == [[str(data)]]
    assert values(text, "EnvironmentFile") == [f"-{home}/environment".replace("%", "%%")]
    assert values(text, "WantedBy") == ["multi-user.target"]
    assert values(text, "KillSignal") == ["SIGTERM"]


def test_a_wrong_unit_is_told(verify: Callable, tmp_path: Path) -> None:
    """So that the others can fail: neither the program's percent sign nor its spaces may stand as they are."""
    text = systemd.server(tmp_path).replace(str(Path(sys.executable).parent), f"{tmp_path}/no%t")
    (tmp_path / "chexfound-server.service").write_text(text)
    with pytest.raises(AssertionError, match="not executable"):
        verify(tmp_path / "chexfound-server.service")


def test_a_site_drains_for_as_long_as_without_a_unit() -> None:
    unit = options.parser().parse_args(["unit", "--data", "/pacs"])
    assert unit.drain == cli.parser().get_default("drain")


@pytest.mark.parametrize("home", ["/home\nExecStartPre=/bin/sh", "/\x1b"])
def test_a_line_is_not_broken(home: str) -> None:
    with pytest.raises(ConfigError, match="printable characters only"):
        systemd.client(Path(home), Path("/pacs"), [], 120)
    with pytest.raises(ConfigError, match="printable characters only"):
        systemd.server(Path(home))


def test_root_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd.os, "geteuid", lambda: 0)
    assert values(systemd.server(Path("/srv/thorax")), "User") == ["chexfound"]


@pytest.mark.parametrize("which", ["server", "client"])
def test_what_a_unit_may_do_is_little(require: Callable[[str], Path], tmp_path: Path, which: str) -> None:
    """systemd's own mark, of 10 for everything; a site keeps devices, for its GPUs."""
    made = {
        "server": lambda: systemd.server(Path("/srv/thorax")),
        "client": lambda: systemd.client(Path("/var/lib/chexfound"), Path("/pacs"), ["--data", "/pacs"], 120),
    }
    unit = tmp_path / f"chexfound-{which}.service"
    unit.write_text(made[which]())
    command = [require("systemd-analyze"), "security", "--offline=true", "--threshold=25", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
