"""Runs Flower's SuperNode as a child process, and ends it and all that it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chexfound.errors import ConfigError
from chexfound.processes import die_with_parent

GRACE_S = 10.0  # for the SuperNode to say goodbye to the SuperLink
RESTART_S = (5.0, 60.0)  # before one that ended by itself is started again: doubled each time, up to this


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
    without_proxy = values.get("no_proxy", values.get("NO_PROXY"))  # httpx looks at the other only if one is absent
    for name in ("NO_PROXY", "no_proxy"):
        values[name] = ",".join([*filter(None, [without_proxy]), "127.0.0.1", "localhost"])
    return values


def command(superlink: str, config: str, credentials: Credentials | None) -> list[str]:
    """The child's command: the flower-supernode of this environment, with a free port of its own.

    Args:
        superlink: HOST:PORT.
        config: of `node_config`.
        credentials: for TLS and authentication; None is a connection without both.

    Raises: ConfigError if there is no such program.
    """
    beside = Path(sys.executable).with_name("flower-supernode")
    program = str(beside) if beside.exists() else shutil.which("flower-supernode")
    if program is None:
        raise ConfigError("flower-supernode is not installed beside this Python; install the package again")
    proof = ["--insecure"]
    if credentials is not None:
        proof = ["--root-certificates", str(credentials.authority)]
        proof += ["--auth-supernode-private-key", str(credentials.node_key)]
    return [program, *proof, "--superlink", superlink, "--node-config", config, "--port", str(free_port())]


@dataclass(frozen=True)
class Credentials:
    """Files: the certificate that signs the coordinator's, and the key that the node is known by."""

    authority: Path
    node_key: Path


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SuperNode:
    """The child, in a process group of its own, so that a signal reaches it once: through us."""

    def __init__(self, arguments: list[str], env: Mapping[str, str]) -> None:
        self.asked: int | None = None  # the signal by which we were asked to stop
        self._asked_at = 0.0
        self._child = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
            arguments,
            env=dict(env),
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs)
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


def keep_running(arguments: Sequence[str], env: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Run a SuperNode, and a new one whenever it ends by itself, until SIGTERM or SIGINT; returns which.

    A node that was killed is refused until the SuperLink has missed it for a minute; a coordinator may be away for
    days: so it is tried for ever.
    """
    pause = RESTART_S[0]
    while True:
        began = time.monotonic()
        child = SuperNode(list(arguments), env)
        code = child.wait()
        if child.asked is not None:
            return child.asked
        if time.monotonic() - began > 5 * RESTART_S[1]:
            pause = RESTART_S[0]
        say(f"flower-supernode ended with exit code {code}, its last lines above say why; again in {pause:.0f} s")
        if (number := _told_to_stop(pause)) is not None:
            return number
        pause = min(2 * pause, RESTART_S[1])


def _told_to_stop(seconds: float) -> int | None:
    """Wait; SIGTERM or SIGINT if one of them comes."""
    wanted = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    try:
        got = signal.sigtimedwait(wanted, seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return got.si_signo if got else None
