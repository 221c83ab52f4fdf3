from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args  # private: how flower-supernode reads --node-config
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from client import supernode

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


def test_the_command_is_that_of_this_environment() -> None:
    program, *arguments = supernode.command("127.0.0.1:8000", 'site="A"', None)
    assert Path(program) == Path(sys.executable).with_name("flower-supernode")
    assert arguments[:5] == ["--insecure", "--superlink", "127.0.0.1:8000", "--node-config", 'site="A"']
    assert 0 < int(arguments[arguments.index("--port") + 1]) < 65536


def test_the_command_with_tls_and_the_nodes_key() -> None:
    held = supernode.Credentials(Path("/h/ca.crt"), Path("/h/node.key"))
    _, *arguments = supernode.command("coordinator:8443", 'site="A"', held)
    assert arguments[:4] == ["--root-certificates", "/h/ca.crt", "--auth-supernode-private-key", "/h/node.key"]
    assert "--insecure" not in arguments


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_ends_by_itself_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """Three times, each after twice the pause; then we are told to stop, in a pause."""
    said: list[str] = []
    monkeypatch.setattr(supernode, "RESTART_S", (0.5, 30.0))
    before = signal.getsignal(number)

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

    assert supernode.keep_running([sys.executable, "-c", "raise SystemExit(3)"], os.environ, say) == number
    assert len(said) == 3
    assert all("ended with exit code 3" in text for text in said)
    assert signal.getsignal(number) == before


# A stand-in for flower-supernode, which starts a child of its own, writes its id, and waits.
CHILD = """
import os, signal, subprocess, sys, time
{prepare}
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(str(inner.pid))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(600)
"""


def run_child(tmp_path: Path, prepare: str, number: int) -> tuple[supernode.SuperNode, int, int]:
    """Start it, send ourselves a signal once it is up; the child, its exit code, its inner process."""
    written = tmp_path / "inner"
    child = supernode.SuperNode([sys.executable, "-c", CHILD.format(prepare=prepare), str(written)], os.environ)

    def send() -> None:
        deadline = time.monotonic() + 60
        while not written.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = child.wait()
    sender.join()
    return child, code, int(written.read_text())


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet is a zombie, and has)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_stays(tmp_path: Path, number: int) -> None:
    handler = signal.getsignal(number)
    prepare = f"signal.signal({int(number)}, lambda *_: os._exit(7))"
    child, code, inner = run_child(tmp_path, prepare, number)
    assert (child.asked, code) == (number, 7)
    assert gone(inner)
    assert signal.getsignal(number) is handler


def test_a_child_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "GRACE_S", 0.2)
    child, code, inner = run_child(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", signal.SIGTERM)
    assert (child.asked, code) == (signal.SIGTERM, -signal.SIGKILL)
    assert gone(inner)


def test_a_child_that_ends_by_itself(tmp_path: Path) -> None:
    child = supernode.SuperNode([sys.executable, "-c", "raise SystemExit(3)"], os.environ)
    assert (child.wait(), child.asked) == (3, None)
