"""A federation of phantom hospitals as `chexfound-server` and `chexfound-client` make it: TLS, node keys, the guard."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from client.home.paths import close
from client.home.secret import path_of
from tests.server.doors import free_port

SECRET = bytes(range(32))  # of all sites, and of the simulations that a run's model is held against
# What the operators of these hospitals write: a recipe so small that two cores train it in seconds, over few patients,
# in as many runs as there are tests.
ALLOWED = """
model: {min_tokens: 1, min_crop_tokens: 1}
min_patients: 0
min_images: 0
min_batch: 1
min_bootstrap: 1
min_steps: 1
max_runs: 1000
cells: {patients: 0}
"""


def allow_small(home: Path, site: str) -> None:
    """Write a site's policy, before it is served."""
    folder = home / "sites" / site
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text(ALLOWED)


def give_secret(home: Path, site: str) -> None:
    """Have a site that was never served name and split its patients as the simulation does (`in_process`)."""
    folder = home / "sites" / site
    close(folder)
    path_of(folder).write_bytes(SECRET)


class Hospitals:
    """The federation, while it runs, and what its runs left.

    Args:
        federation: conftest's, which ends what is started here.
        images: a folder to draw the phantoms into.
        sites: how many hospitals, each of `patients`.
    """

    def __init__(self, federation: Any, images: Path, sites: int, patients: int = 40) -> None:
        self.processes, self.folder, self.images = federation, federation.folder / "thorax", images
        self.port, superlink = free_port(), free_port()
        self.address = f"localhost:{self.port}"
        size = ["--sites", str(sites), "--patients", str(patients)]
        self.do("chexfound.commands.main", self.folder.parent, "phantom", *size, "--out", images)
        self.names = sorted(path.name for path in images.iterdir() if path.is_dir())
        ports = ["--listen", f"127.0.0.1:{self.port}", "--superlink", f"127.0.0.1:{superlink}"]
        self.server("init", "--name", "thorax", "--public", self.address, *ports)

    def home(self, site: str) -> Path:
        return self.processes.folder / site

    def server(self, command: str, *options: Any, code: int = 0) -> str:
        return self.do("server.cli", self.folder.parent, command, self.folder, *options, code=code)

    def client(self, site: str, *options: Any) -> str:
        return self.do("client.cli", self.home(site), *options)

    def do(self, module: str, home: Path, *words: Any, code: int = 0) -> str:
        """A command's output, once it has ended with this code."""
        command = [sys.executable, "-m", module, *map(str, words)]
        env = self.processes.env | {"CHEXFOUND_HOME": str(home)}
        done = subprocess.run(command, env=env, cwd=self.folder.parent, capture_output=True, text=True, check=False)
        assert done.returncode == code, (command, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout + done.stderr

    def enrol(self, name: str) -> None:
        give_secret(self.home(name), name)
        self.client(name, "enrol", "--name", name)
        allow_small(self.home(name), name)
        self.server("add-site", name, self.folder.parent / f"{name}.pub")

    def approve(self, name: str) -> str:
        """As the site's operator: the roster, then the code; what the latter says."""
        self.client(name, "roster", "approve", self.folder / "thorax.federation.json", "--yes")
        return self.client(name, "approve")

    def accept_plain(self, name: str) -> None:
        """As the operator of one site of three or more: runs in the clear are taken."""
        with open(self.home(name) / "sites" / name / "site.yaml", "a") as file:
            file.write("plain: accepted\n")

    def up(self) -> Any:
        process = self.processes.start("up", [sys.executable, "-m", "server.cli", "up", str(self.folder)])
        process.wait_for("up: sites connect to")
        return process

    def serve(self, site: str, px: int) -> Any:
        command = [sys.executable, "-m", "client.cli", "--data", str(self.images / site), "--image-px", str(px)]
        name = f"client-{site}-{len(self.processes.processes)}"
        return self.processes.start(name, command, CHEXFOUND_HOME=str(self.home(site)))

    def node(self, site: str) -> dict[str, Any]:
        """What a site's node last said of itself."""
        return node(self.home(site), site)


def node(home: Path, site: str) -> dict[str, Any]:
    """What a site's node last said of itself."""
    return json.loads((home / "sites" / site / "node.json").read_text())


def kill(client: Any, pid: int) -> None:
    """A site, as a machine that loses its power: the client and its node at once."""
    client.stop(signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it dies with the client
        os.kill(pid, signal.SIGKILL)
