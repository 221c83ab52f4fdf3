from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args  # private: how flower-supernode reads --node-config
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from client.node import supernode

names = st.text(st.characters(exclude_categories=["Cs"]))


@given(names, names)
def test_any_name_and_path_come_through_node_config(site: str, data: str) -> None:
    values = {"site": site, "data": data}
    assert parse_config_args([supernode.node_config(values)]) == values


@pytest.mark.parametrize("text", ["O'Brien", 'the "A" ward', "a b=c", "back\\slash", "line\nbreak", "x.toml", "é"])
def test_awkward_names_come_through_node_config(text: str) -> None:
    assert parse_config_args([supernode.node_config({"site": text, "data": "/d"})]) == {"site": text, "data": "/d"}


def test_a_path_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        supernode.node_config({"data": os.fsdecode(b"/images/\xff")})


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    values = supernode.environment(tmp_path)
    assert values["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert values["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert values["FLWR_TELEMETRY_ENABLED"] == "0"
    assert values["FLWR_HOME"] == str(tmp_path)
    monkeypatch.setenv("no_proxy", "example.com")  # which httpx prefers
    values = supernode.environment(tmp_path)
    assert values["NO_PROXY"] == values["no_proxy"] == "example.com,127.0.0.1,localhost"
    assert values["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# ---- the two commands


def test_two_processes_that_know_of_each_other(tmp_path: Path) -> None:
    made = supernode.commands(tmp_path, "127.0.0.1:8000", 'site="A"', None)
    assert list(made) == ["supernode", "worker"]
    node, worker, secret = made["supernode"], made["worker"], str(tmp_path / "worker.secret")
    assert node[:5] == [sys.executable, "-P", "-m", "client.node.flower_node", str(tmp_path)]
    assert node[5:10] == ["--insecure", "--superlink", "127.0.0.1:8000", "--node-config", 'site="A"']
    options = dict(zip(node[6::2], node[7::2], strict=True))
    assert options["--isolation"] == "process"  # or the SuperNode would start Flower's own worker
    assert options["--superexec-auth-secret-file"] == secret
    assert options["--host"] == "127.0.0.1"
    assert 0 < int(options["--port"]) < 65536
    assert worker == [*node[:3], "client.node.worker", str(tmp_path), f"127.0.0.1:{options['--port']}", secret, "60"]
    assert supernode.commands(tmp_path, "127.0.0.1:8000", "", None, 0.5)["worker"][-1] == "0.5"


def test_the_secret_is_new_at_each_start_and_its_owners_alone(tmp_path: Path) -> None:
    secrets = []
    for _ in range(2):
        supernode.commands(tmp_path, "127.0.0.1:8000", "", None)
        secrets.append((tmp_path / "worker.secret").read_text())
        assert stat.S_IMODE((tmp_path / "worker.secret").stat().st_mode) == 0o600
    assert len(set(secrets)) == 2
    assert all(len(bytes.fromhex(secret)) == 32 for secret in secrets)


def test_the_command_with_tls_and_the_nodes_key(tmp_path: Path) -> None:
    held = supernode.Credentials(Path("/h/ca.crt"), Path("/h/node.key"))
    node = supernode.commands(tmp_path, "coordinator:8443", 'site="A"', held)["supernode"]
    assert node[5:9] == ["--root-certificates", "/h/ca.crt", "--auth-supernode-private-key", "/h/node.key"]
    assert "--insecure" not in node


@pytest.mark.parametrize("inherited", [None, "", ":", "."])
def test_a_folder_named_client_where_we_are_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: str | None
) -> None:
    """Nor one that PYTHONPATH had before."""
    for package in ("client", "chexfound"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if inherited is not None:
        monkeypatch.setenv("PYTHONPATH", inherited)
    python = supernode.commands(tmp_path, "127.0.0.1:1", "", None)["worker"][:2]
    code = "import client, chexfound; print(client.__file__, chexfound.__file__)"
    env = supernode.environment(tmp_path)
    shown = subprocess.run([*python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    root = Path(supernode.__file__).parents[2]
    assert shown.stdout.split() == [str(root / name / "__init__.py") for name in ("client", "chexfound")]


# ---- both kept running

# A stand-in for either: it starts a child of its own, writes both ids in a new line, and does what the test adds.
CHILD = """
import os, signal, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def tell(text):
    os.write(told, f"{text}\\n".encode())
signal.signal(signal.SIGTERM, lambda *_: tell("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: tell("SIGINT"))
{before}
tell(f"{os.getpid()} {inner.pid}")
{after}
while True:
    signal.pause()
"""
FINISH = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), tell('finished'), os._exit(0)))"


class Children:
    """Two stand-ins, `first` and `second`, and what each told, a word an entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commands(self, first: str = "", second: str = "", after: str = "") -> dict[str, list[str]]:
        def command(name: str, before: str) -> list[str]:
            text = CHILD.replace("{before}", before).replace("{after}", after if name == "first" else "")
            return [sys.executable, "-S", "-c", text, str(self.folder / name)]

        return {"first": command("first", first), "second": command("second", second)}

    def told(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def pids(self) -> list[int]:
        return [
            int(pid)
            for name in ("first", "second")
            for line in self.told(name)
            if line[0].isdigit()
            for pid in line.split()
        ]

    def signal_when_up(self, *numbers: int) -> threading.Thread:
        """Send ourselves the first signal once both are up, another once that was passed on."""

        def until(reached: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
            while not reached() and time.monotonic() < deadline:
                time.sleep(0.02)

        def send() -> None:
            until(lambda: all(map(self.told, ("first", "second"))))
            os.kill(os.getpid(), numbers[0])
            for number in numbers[1:]:
                until(lambda: len(self.told("first")) > 1)
                os.kill(os.getpid(), number)

        thread = threading.Thread(target=send)
        thread.start()
        return thread


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    result = Children(tmp_path)
    yield result
    for pid in result.pids():  # where a test failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(commands: dict[str, list[str]], drain_s: float = 60.0) -> tuple[int, list[str]]:
    """Which signal ended it, and what was said."""
    said: list[str] = []
    return supernode.keep_running(commands, os.environ, said.append, drain_s), said


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet is a zombie, and has)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_at_sigterm_the_first_may_finish_and_nothing_stays(children: Children) -> None:
    """The second is not told: the first needs it for that."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    sender = children.signal_when_up(signal.SIGTERM)
    asked, said = run(children.commands(FINISH))
    sender.join()
    assert (asked, said) == (signal.SIGTERM, [])
    assert children.told("first")[1:] == ["finished"]
    assert len(children.told("second")) == 1
    assert len(children.pids()) == 4
    assert all(map(gone, children.pids()))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_sigint_is_passed_on_and_waits_for_the_goodbye_only(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "GRACE_S", 0.5)
    sender = children.signal_when_up(signal.SIGINT)
    assert run(children.commands())[0] == signal.SIGINT  # else it waited for the minute of SIGTERM
    sender.join()
    assert children.told("first")[1:] == ["SIGINT"]
    assert all(map(gone, children.pids()))


def test_a_first_that_will_not_finish_is_left_after_the_drain(children: Children) -> None:
    sender = children.signal_when_up(signal.SIGTERM)
    assert run(children.commands(), drain_s=0.5)[0] == signal.SIGTERM
    sender.join()
    assert children.told("first")[1:] == ["SIGTERM"]
    assert all(map(gone, children.pids()))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain(children: Children, second: int) -> None:
    sender = children.signal_when_up(signal.SIGTERM, second)
    asked, _ = run(children.commands(), drain_s=3600)
    sender.join()
    assert asked == signal.SIGTERM
    assert children.told("first")[1:] == ["SIGTERM"]  # the second is ours alone
    assert all(map(gone, children.pids()))


def test_each_is_started_again_after_twice_the_pause_and_what_it_had_started_ends(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "RESTART_S", (0.1, 0.2))
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    # The first ends by itself, every time; the second never does.
    commands = children.commands(after="os._exit(3)")
    assert supernode.keep_running(commands, os.environ, say, 60.0) == signal.SIGTERM
    assert said == [
        f"first ended with exit code 3, its last lines above say why; again in {pause:g} s" for pause in (0.1, 0.2, 0.2)
    ]
    assert len(children.told("first")) == 3
    assert all(map(gone, children.pids()))


def test_one_that_ran_for_long_begins_with_the_short_pause_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    said: list[str] = []
    child = supernode._Child("worker", [sys.executable, "-S", "-c", "input()"], os.environ, said.append)
    child.start()
    try:
        for ran_s, pause_s in ((1, 5), (1, 10), (5 * supernode.RESTART_S[1] + 1, 5), (1, 10)):
            clock.now += ran_s
            child.keep()
            child._process.kill()
            child._process.wait()
            child.keep()
            clock.now += pause_s - 0.1
            child.keep()
            assert not child.running
            clock.now += 0.2
            child.keep()
            assert child.running
    finally:
        child.kill()
    assert [text.split()[-2] for text in said] == ["5", "10", "5", "10"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(supernode, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_the_worker_is_started_again_too(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "RESTART_S", (0.1, 0.1))
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    commands = dict(reversed(children.commands(after="os._exit(4)").items()))
    monkeypatch.setattr(supernode, "GRACE_S", 0.1)
    assert supernode.keep_running(commands, os.environ, say) == signal.SIGINT
    assert [text.split(",")[0] for text in said] == ["first ended with exit code 4"] * 2
    assert all(map(gone, children.pids()))


def test_they_end_with_us_whatever_we_die_of(children: Children) -> None:
    """Killed, we cannot end them; the kernel tells them."""
    code = "import json, os, sys; from client.node.supernode import keep_running as keep; "
    code += "keep(json.loads(sys.argv[1]), os.environ, print)"
    commands = json.dumps(children.commands(*["signal.signal(signal.SIGTERM, signal.SIG_DFL)"] * 2))
    with subprocess.Popen([sys.executable, "-c", code, commands], env=supernode.environment(children.folder)) as parent:
        try:
            deadline = time.monotonic() + 60
            while not all(map(children.told, ("first", "second"))) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            parent.kill()
    outer = [int(line.split()[0]) for name in ("first", "second") for line in children.told(name)]
    assert len(outer) == 2
    assert all(map(gone, outer))
