"""The coordinator's processes, kept running: SuperLink, SuperExec, guard."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from logging.handlers import RotatingFileHandler

from chexfound.durable.files import storage
from chexfound.durable.journal import held
from chexfound.errors import ConfigError, SiteError
from chexfound.host.processes import die_with_parent
from chexfound.identity.roster import Address
from server.federation import members
from server.federation.settings import SUPEREXEC, Federation

START_S = 120.0  # in which the SuperLink has to listen
GRACE_S = 15.0  # for a process to end by itself
RESTART_S = (1.0, 30.0)  # before a process that ended is started again: doubled each time, up to this


LOG_BYTES, LOGS_KEPT = 10 * 2**20, 3  # of each process
LAST_LINES = 15  # that are shown of a process that ended by itself


class _Process:
    """One of them, in a session of its own, that dies with us; its lines go to DIR/logs/NAME.log."""

    def __init__(self, name: str, federation: Federation, say: Callable[[str], None]) -> None:
        self.name, self._say = name, say
        self._command, self._environment = federation.processes()[name], federation.environment()
        self._pause, self._again_at, self._started = RESTART_S[0], 0.0, 0.0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.log = federation.path("logs") / f"{name}.log"
        with storage(self.log):
            self.log.parent.mkdir(exist_ok=True)
            self._file = RotatingFileHandler(self.log, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8")
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()
        self._child = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,  # what it writes is nobody else's
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs Python code that locks)
        )
        self._reader = threading.Thread(target=self._keep_lines, args=(self._child,), daemon=True)
        self._reader.start()

    def _keep_lines(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._last.append(text)
                self._file.emit(logging.makeLogRecord({"msg": text}))

    def ended(self) -> int | None:
        """The exit code, once it has ended."""
        return self._child.poll()

    def tell_last(self) -> None:
        """Show its last lines."""
        self._reader.join(timeout=2)
        for line in self._last:
            self._say(f"  {self.name}: {line}")

    def keep(self) -> None:
        """Start it again if it ended, after a while."""
        code, now = self._child.poll(), time.monotonic()
        if code is None:
            if now - self._started > RESTART_S[1]:
                self._pause = RESTART_S[0]
        elif not self._again_at:
            self._again_at = now + self._pause
            self.tell_last()
            self._say(f"{self.name} ended with exit code {code}; starting it again in {self._pause:.0f} s")
        elif now >= self._again_at:
            self._pause, self._again_at = min(2 * self._pause, RESTART_S[1]), 0.0
            self.start()

    def stop(self) -> None:
        """Ask it to end, then end what is left of its session."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._reader.join(timeout=2)
        self._file.close()


def up(federation: Federation, say: Callable[[str], None]) -> int:
    """Run the three until SIGTERM or Ctrl-C; returns the signal.

    Raises: ConfigError if a port is taken; SiteError if the SuperLink does not come up.
    """
    federation.close()
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda *got: asked.append(got[0])) for number in (signal.SIGTERM, signal.SIGINT)
    }
    running: list[_Process] = []
    try:
        for address, key in ((federation.superlink, "superlink"), (federation.listen, "listen")):
            if listens(address):
                raise ConfigError(
                    f"{key} {address}: something listens there already; is this federation up? If that is another "
                    f"program, give it another {key}: in {federation.path('federation.yaml')}"
                )
        running.append(_Process("superlink", federation, say))
        _wait(running[0], federation.superlink, asked)
        if not asked:
            new, struck, refused = members.register_all(federation)
            for name in new:
                say(f"site {name}: registered")
            for name in struck:
                say(f"site {name}: struck off")
            for name, why in refused.items():
                say(f"warning: site {name}: not registered, the others are served without it: {why}")
            running += [_Process(name, federation, say) for name in ("superexec", "guard")]
            say(f"up: sites connect to {federation.public}; logs in {federation.path('logs')}; Ctrl-C ends it")
        while not asked:
            time.sleep(0.2)
            for process in running:
                process.keep()
        return asked[0]
    finally:
        for process in reversed(running):
            process.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(superlink: _Process, address: Address, asked: list[int]) -> None:
    deadline = time.monotonic() + START_S
    while not asked and not listens(address):
        if (code := superlink.ended()) is not None:
            superlink.tell_last()
            raise SiteError(f"flower-superlink ended with exit code {code}; its last lines above say why")
        if time.monotonic() > deadline:
            raise SiteError(
                f"flower-superlink does not listen at {address} after {START_S:.0f} s; {superlink.log} may say why"
            )
        time.sleep(0.1)


def listens(address: Address) -> bool:
    """Tell whether anything listens at an address of this machine now."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 (all addresses: try one)
    try:
        socket.create_connection((host, address.port), timeout=2).close()
    except OSError:
        return False
    return True


def processes(federation: Federation) -> dict[str, str]:
    """Say of each process whether it is up: by its port; the SuperExec, which has none, by its lock on this machine."""
    return {
        "superlink": "up" if listens(federation.superlink) else "down",
        "superexec": "up" if superexec_seen(federation) else "not seen on this machine",
        "guard": "up" if listens(federation.listen) else "down",
    }


def superexec_seen(federation: Federation) -> bool:
    """Whether a process of this machine runs this federation's SuperExec."""
    return held(federation.path(SUPEREXEC))
