"""Runs the site's two processes, Flower's SuperNode and our worker, and ends them and all that they started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chexfound._launch import application_root
from chexfound.durable.files import replace_file
from chexfound.errors import ConfigError
from chexfound.host.processes import die_with_parent

GRACE_S = 10.0  # for the SuperNode to say goodbye to the SuperLink
DRAIN_S = 120.0  # for the message in hand to be answered, at SIGTERM
KEEP_WARM_S = 60.0  # without a message, after which the worker gives back its memory, the GPU's too
RESTART_S = (5.0, 60.0)  # before one that ended by itself is started again: doubled each time, up to this


def node_config(values: Mapping[str, str | bool]) -> str:
    """The text for --node-config.

    Flower cuts it at spaces outside quotes and reads the parts as TOML.  What could end a quoted
    string early is written as an escape, so that any name or path comes through as it is.

    Raises: ConfigError for text that is not Unicode (a path of undecodable bytes).
    """
    return " ".join(f"{key}={_quoted(key, value)}" for key, value in values.items())


def _quoted(key: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
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

    Its own FLWR_HOME; our packages where they can be found; no telemetry and no update check; and no proxy for calls
    to this machine.
    """
    values = dict(os.environ)
    values["PYTHONPATH"] = os.pathsep.join([str(application_root()), *filter(None, [values.get("PYTHONPATH")])])
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
    values["FLWR_HOME"] = str(flwr_home)
    values["FLWR_TELEMETRY_ENABLED"] = "0"
    values["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    values.setdefault("PYTHONUNBUFFERED", "1")
    without_proxy = values.get("no_proxy", values.get("NO_PROXY"))  # httpx looks at the other only if one is absent
    for name in ("NO_PROXY", "no_proxy"):
        values[name] = ",".join([*filter(None, [without_proxy]), "127.0.0.1", "localhost"])
    return values


def commands(
    home: Path, superlink: str, config: str, credentials: Credentials | None, keep_warm_s: float = KEEP_WARM_S
) -> dict[str, list[str]]:
    """The two processes: Flower's SuperNode, which talks with the coordinator, and the worker that does what is asked.

    They talk on a free port of loopback, and share a secret in a new file of `home`.

    Args:
        home: the site's.
        superlink: HOST:PORT.
        config: of `node_config`.
        credentials: for TLS and authentication; None is a connection without both.
        keep_warm_s: without a message, after which the worker gives back its memory.
    """
    secret, port = home / "worker.secret", str(free_port())
    with replace_file(secret, 0o600) as temporary:
        temporary.write_text(secrets.token_hex(32))
    proof = ["--insecure"]
    if credentials is not None:
        proof = ["--root-certificates", str(credentials.authority)]
        proof += ["--auth-supernode-private-key", str(credentials.node_key)]
    node = [*proof, "--superlink", superlink, "--node-config", config, "--host", "127.0.0.1", "--port", port]
    node += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    python = [sys.executable, "-P", "-m"]  # -P: nothing is imported from the present folder
    return {
        "supernode": [*python, "client.node.flower_node", str(home), *node],
        "worker": [*python, "client.node.worker", str(home), f"127.0.0.1:{port}", str(secret), f"{keep_warm_s:g}"],
    }


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


@dataclass
class _Child:
    """One of them, in a process group of its own, so that a signal reaches it once: through us."""

    name: str
    arguments: list[str]
    env: Mapping[str, str]
    say: Callable[[str], None]
    _pause: float = field(default_factory=lambda: RESTART_S[0])
    _again_at: float = 0.0

    def start(self) -> None:
        self._again_at, self._began = 0.0, time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
            self.arguments,
            env=dict(self.env),
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs)
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def keep(self) -> None:
        """Start it again if it ended, after a while."""
        now = time.monotonic()
        if self.running:
            if now - self._began > 5 * RESTART_S[1]:
                self._pause = RESTART_S[0]
        elif not self._again_at:
            self.kill()  # what it had started
            self._again_at = now + self._pause
            code = self._process.returncode
            self.say(
                f"{self.name} ended with exit code {code}, its last lines above say why; again in {self._pause:g} s"
            )
        elif now >= self._again_at:
            self._pause = min(2 * self._pause, RESTART_S[1])
            self.start()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it and what is left of its group; what a worker keeps on the disk is whole at any time."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def keep_running(
    commands: Mapping[str, list[str]], env: Mapping[str, str], say: Callable[[str], None], drain_s: float = DRAIN_S
) -> int:
    """Run them, each anew whenever it ends by itself, until SIGTERM or SIGINT; returns which.

    A node that was killed is refused until the SuperLink has missed it for a minute; a coordinator may be away for
    days: so it is tried for ever.  At SIGTERM the first, which talks with the coordinator, may first finish what it has
    in hand; a second signal ends that, as the first SIGINT does.
    """
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda *got: asked.append(got[0])) for number in (signal.SIGTERM, signal.SIGINT)
    }
    children = [_Child(name, arguments, env, say) for name, arguments in commands.items()]
    started: list[_Child] = []
    try:
        for child in children:
            child.start()
            started.append(child)
        while not asked:
            time.sleep(0.1)
            for child in children:
                child.keep()
        first, deadline = children[0], time.monotonic() + (drain_s if asked[0] == signal.SIGTERM else GRACE_S)
        first.send(asked[0])
        while first.running and len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return asked[0]
    finally:
        for child in started:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
