"""Runs Flower's SuperNode as a child process, and ends it and all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from chexfound.errors import ConfigError

GRACE_S = 10.0  # for the SuperNode to say goodbye to the SuperLink


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" ("[ADDRESS]:PORT" for IPv6).

    Raises: ConfigError.
    """
    host, colon, port = text.rpartition(":")
    if "://" in text or not colon:
        raise ConfigError(f"--superlink {text!r}: write HOST:PORT without a prefix, for example 127.0.0.1:8000")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or "/" in host or any(character.isspace() for character in host) or (":" in bare and bare == host):
        raise ConfigError(f"--superlink {text!r}: {host!r} is not a host name or an address ([ADDRESS]:PORT for IPv6)")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"--superlink {text!r}: {port!r} is not a port (1 to 65535)")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name; a name that is looked up elsewhere is not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def answers(host: str, port: int) -> bool:
    """Whether anything listens there now."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def node_config(values: Mapping[str, str]) -> str:
    """The text for --node-config.

    Flower cuts it at spaces outside quotes and reads the parts as TOML.  What could end a quoted
    string early is written as an escape, so that any name or path comes through as it is.

    Raises: ConfigError for text that is not Unicode (a path of undecodable bytes).
    """
    return " ".join(f"{key}={_quoted(key, value)}" for key, value in values.items())


def _quoted(key: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{key} {value!r}: holds bytes that are not UTF-8; rename it, or make a link to it"
        ) from error
    plain = (f"\\u{ord(c):04x}" if c in '"\\\x7f' or c < " " else c for c in value)
    return f'"{"".join(plain)}"'


def environment(flwr_home: Path) -> dict[str, str]:
    """The child's environment.

    Its own FLWR_HOME, since two nodes that unpack one app into one folder at the same time can
    import it half-written; no telemetry and no update check; and no proxy for calls to this machine.
    """
    values = dict(os.environ)
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
    values["FLWR_HOME"] = str(flwr_home)
    values["FLWR_TELEMETRY_ENABLED"] = "0"
    values["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    values.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
    values.setdefault("PYTHONUNBUFFERED", "1")
    for name in ("NO_PROXY", "no_proxy"):
        values[name] = ",".join([*filter(None, [values.get(name)]), "127.0.0.1", "localhost"])
    return values


def command(superlink: str, config: str) -> list[str]:
    """The child's command: the flower-supernode of this environment, with a free port of its own.

    Raises: ConfigError if there is none.
    """
    beside = Path(sys.executable).with_name("flower-supernode")
    program = str(beside) if beside.exists() else shutil.which("flower-supernode")
    if program is None:
        raise ConfigError("flower-supernode is not installed beside this Python; install the package again")
    return [program, "--insecure", "--superlink", superlink, "--node-config", config, "--port", str(free_port())]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class SuperNode:
    """The child, in a process group of its own, so that a signal reaches it once: through us."""

    def __init__(self, arguments: list[str], env: Mapping[str, str]) -> None:
        self.asked: int | None = None  # the signal by which we were asked to stop
        self._asked_at = 0.0
        self._child = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
            arguments,
            env=dict(env),
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 (no other thread runs)
        )

    def wait(self) -> int:
        """Forward SIGTERM and SIGINT until the child ends; then end what is left of its group.

        Returns the child's exit code.
        """
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._child.wait(timeout=0.5)
                if self.asked is not None and time.monotonic() > self._asked_at + GRACE_S:
                    self._child.kill()
        finally:
            # A ClientApp in mid-step has no one to answer; what it keeps on the disk is whole at any time.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: object) -> None:
        if self.asked is None:
            self.asked, self._asked_at = number, time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)
