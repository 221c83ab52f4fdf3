"""A coordinator's machine: a federation whose processes run as `chexfound-server up` starts them, as far as needed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from chexfound.identity.roster import Address
from server.federation import settings as federations
from server.federation.settings import Federation
from server.services.supervise import listens
from tests.patience import PATIENCE_S
from tests.server.doors import Node, free_port


class Machine:
    """Args: folder: a new one, for the federation and its logs."""

    def __init__(self, folder: Path) -> None:
        public, superlink = Address("localhost", free_port()), Address("127.0.0.1", free_port())
        inside = Address("127.0.0.1", public.port)
        self.held: Federation = federations.create(folder / "thorax", "thorax", public, inside, superlink)
        self.sites: dict[str, Node] = {}
        self._logs, self._running = folder, {}

    def enrol(self, name: str) -> Node:
        """Take a site into the roster."""
        self.sites[name] = Node()
        self.held.write_sites(self.held.sites().with_site(name, self.sites[name].keys))
        return self.sites[name]

    def start(self, name: str) -> None:
        """One of superlink, superexec, guard; returns once it listens."""
        with open(self._logs / f"{name}.log", "wb") as log:
            self._running[name] = subprocess.Popen(
                self.held.processes()[name],
                env=self.held.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        address = {"superlink": self.held.superlink, "guard": self.held.listen}.get(name)
        deadline = time.monotonic() + PATIENCE_S
        while address and not listens(address):
            assert self.up(name), self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.1)

    def up(self, name: str) -> bool:
        return self._running[name].poll() is None

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def memory(self, name: str) -> int:
        """Anonymous memory of a process, in bytes."""
        text = Path(f"/proc/{self._running[name].pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))

    def stop(self) -> None:
        for process in reversed(self._running.values()):
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    one = Machine(folder)
    try:
        yield one
    finally:
        one.stop()
