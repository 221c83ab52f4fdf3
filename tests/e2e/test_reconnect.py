"""One run through all that can happen to a federation: a site killed, the SuperLink away, the ServerApp killed.

The coordinator's processes are started one by one, to be killed so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chexfound.durable.journal import read_journal
from chexfound.identity.roster import Address
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from server.federation import members
from server.federation import settings as federations
from tests.e2e import hospitals
from tests.e2e.conftest import PART_MB
from tests.e2e.hospitals import allow_small, give_secret
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e
NAMES = ("NORTH", "SOUTH")
# Seconds that the SuperLink is away: past the minute after which Flower calls nodes and tasks lost, or, but for
# `make test-long`, short of it.
AWAY_S = 120 if os.environ.get("CHEXFOUND_TESTS") == "long" else 15


class Disturbed:
    """Two hospitals, and a coordinator whose processes can be killed one by one."""

    def __init__(self, processes: Any, images: dict[str, Path], px: int, ports: tuple[int, int]) -> None:
        self.processes, self.images, self.px = processes, images, px
        self.folder = processes.folder / "thorax"
        self.left = self.folder / "runs" / "run"
        public, superlink = (Address("127.0.0.1", port) for port in ports)
        self.held = federations.create(self.folder, "thorax", Address("localhost", public.port), public, superlink)
        self.env = self.held.environment() | {"PYTHONPATH": processes.env["PYTHONPATH"]}
        for name in NAMES:
            give_secret(processes.folder / name, name)
            self.client(name, "enrol", "--name", name)
            allow_small(self.processes.folder / name, name)
            self.do("server.cli", self.folder.parent, "add-site", str(self.folder), name, f"{name}.pub")
        for name in NAMES:
            self.client(name, "roster", "approve", str(self.held.site_file), "--yes")
            self.client(name, "approve")
        self.running = {name: self.start(name) for name in ("superlink", "superexec", "guard")}
        self.clients = {name: self.serve(name) for name in NAMES}

    def do(self, module: str, home: Path, *words: str) -> None:
        env = self.processes.env | {"CHEXFOUND_HOME": str(home)}
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, env=env, cwd=self.folder.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def client(self, name: str, *words: str) -> None:
        self.do("client.cli", self.processes.folder / name, *words)

    def start(self, name: str) -> Any:
        log = f"{name}-{len(self.processes.processes)}"
        process = self.processes.start(log, self.held.processes()[name], **self.env)
        if name == "superlink":
            process.wait_for("Uvicorn running")
            members.register_all(self.held)
        return process

    def serve(self, name: str) -> Any:
        command = [sys.executable, "-m", "client.cli", "--data", str(self.images[name]), "--image-px", str(self.px)]
        home = str(self.processes.folder / name)
        return self.processes.start(f"client-{name}", command, CHEXFOUND_HOME=home)

    def node(self, name: str) -> dict[str, Any]:
        return hospitals.node(self.processes.folder / name, name)

    def until_at_work(self, name: str, number: int) -> None:
        """Until a site is in the middle of a round of pretraining (from 1)."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            node = self.node(name)
            if node["state"] == "working" and node["round"] == number and "pretrain" in str(node["phase"]):
                return
            time.sleep(0.02)
        self.fail(f"{name} is not at work on round {number}: {node}")

    def until_done(self, number: int) -> None:
        """Until a round of pretraining (from 1) is in the journal; Flower's own stream ends with its connection."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if any(
                entry["event"] == "round" and entry["phase"] == "pretrain" and entry["round"] == number - 1
                for entry in self.journal()
            ):
                return
            time.sleep(0.1)
        self.fail(f"round {number} does not end")

    def journal(self) -> list[dict[str, Any]]:
        path = self.left / "journal.jsonl"
        return read_journal(path) if path.exists() else []

    def fail(self, why: str) -> None:
        """With the last that each process and the run said, short enough to be kept whole by whoever cuts logs."""
        lines = [why]
        for process in self.processes.processes:
            lines += [f"== {process.name} ({'runs' if process.running else 'ended'})", *process.text.splitlines()[-8:]]
        for name in NAMES:
            lines.append(f"== node of {name}: {self.node(name)}")
        for entry in self.journal()[-5:]:
            told = {key: entry[key] for key in ("event", "phase", "round", "site", "reason") if key in entry}
            lines.append(f"== journal: {told}")
        pytest.fail("\n".join(re.sub(r"\x1b\[\d+m", "", line)[:160] for line in lines), pytrace=False)

    def kill_site(self, name: str) -> None:
        hospitals.kill(self.clients[name], self.node(name)["pid"])

    def kill_serverapp(self) -> None:
        found = subprocess.run(
            ["pgrep", "-f", f"server.services.task .*{self.held.superlink.port}"],
            capture_output=True,
            text=True,
            check=True,
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def run(self, name: str, run_config: Path) -> Any:
        command = ["flwr", "run", ".", "federation", "--stream", "-c", str(run_config)]
        return self.processes.start(name, command, **self.env)


@pytest.fixture(scope="module")
def long_recipe(recipe: Recipe) -> Recipe:
    """Of four rounds, each long enough to be interrupted."""
    return replace(
        recipe,
        train=replace(recipe.train, rounds=4, local_steps=25),
        federation=replace(recipe.federation, part_mb=PART_MB),
    )


@pytest.fixture(scope="module")
def disturbed(
    federation: Any,
    free_ports: Callable[[int], tuple[int, ...]],
    make_site: Callable[..., Path],
    long_recipe: Recipe,
    tmp_path_factory: Any,
) -> Any:
    """The run; `told` is what the ServerApp said that ended it."""
    images = tmp_path_factory.mktemp("images")
    data = {name: make_site(images / name.lower(), name, 40, 80) for name in NAMES}
    one = Disturbed(federation, data, long_recipe.image_px, free_ports(2))
    run_config = federation.folder / "recipe.toml"
    run_config.write_text(recipes.to_run_config(long_recipe) + f'run-dir = "{one.left}"\n')
    one.run("run", run_config)
    one.until_done(1)

    one.until_at_work("SOUTH", 2)
    one.kill_site("SOUTH")
    one.clients["SOUTH"] = one.serve("SOUTH")
    one.until_done(2)

    one.until_at_work("SOUTH", 3)
    one.running["superlink"].stop(signal.SIGKILL)
    time.sleep(AWAY_S)
    one.start("superlink")
    one.until_done(3)

    one.until_at_work("SOUTH", 4)
    one.kill_serverapp()
    again = one.run("again", run_config)
    again.wait_for("event=written")
    one.told, one.images_folder = again.text, images
    return one


def test_the_model_is_that_of_an_undisturbed_run(
    disturbed: Any, simulate: Callable[..., str], long_recipe: Recipe, tmp_path: Path
) -> None:
    metrics = json.loads((disturbed.left / "metrics.json").read_text())
    expected = simulate(disturbed.images_folder, tmp_path, 2, long_recipe)
    assert metrics["model_sha256"]["federated"] == expected


def test_what_happened_is_told(disturbed: Any) -> None:
    events = [entry for entry in read_journal(disturbed.left / "journal.jsonl") if entry["event"] in ("lost", "back")]
    assert [(one["event"], one["site"]) for one in events if one["round"] == 1] == [
        ("lost", "SOUTH"),
        ("back", "SOUTH"),
    ]
    assert re.search("event=resume pretrain_rounds_done=3", disturbed.told)


def test_no_round_is_done_twice(disturbed: Any) -> None:
    rounds = [entry["round"] for entry in read_journal(disturbed.left / "journal.jsonl") if entry["event"] == "round"]
    assert rounds == [0, 1, 2, 3, 0]


def test_the_sites_end_when_they_are_told(disturbed: Any) -> None:
    for name in NAMES:
        assert disturbed.clients[name].stop() == 0
        assert disturbed.node(name)["state"] == "stopped"
