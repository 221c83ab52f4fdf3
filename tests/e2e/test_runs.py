"""What is killed at the coordinator leaves one run, told as it is; and a site that works for nobody stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from server.federation import settings as federations
from server.runs import standing, submission
from server.runs.folders import RunFolder
from tests.e2e.hospitals import Hospitals
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="finds who holds a lock in /proc")]
SECONDS = 20.0  # on an idle machine; Flower's own minute, and a round of an hour, are far from it
KILLED = """
import os
from server import cli
from server.runs import submission
submission.record = lambda *_: os._exit(9)
cli.main()
"""


def until(what: str, true: Callable[[], Any], seconds: float = PATIENCE_S) -> float:
    """Wait; returns how long it took, of the time in which a process had its turn: half of it under twice the load."""
    began = time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if true():
                return took / _busy()
        time.sleep(0.2)
    pytest.fail(f"not within {seconds:g} s: {what}")


def _busy() -> float:
    """How many processes want each processor: over the last minute, or now."""
    now = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return max(1.0, max(os.getloadavg()[0], now) / (os.cpu_count() or 1))


def holder(lock: Path) -> int:
    """The process that holds a lock."""
    place = str(lock.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, mode, pid, where, *_ = line.split()
        if (kind, mode, where.rpartition(":")[2]) == ("FLOCK", "WRITE", place):
            return int(pid)
    raise ValueError("nobody holds it")


@pytest.fixture(scope="module")
def seen(federation: Any, recipe: Recipe, tmp_path_factory: Any) -> SimpleNamespace:
    """One hospital with steps for an hour, to which all of it happens in turn."""
    made, found = Hospitals(federation, tmp_path_factory.mktemp("images") / "phantoms", 1, 60), SimpleNamespace()
    (name,) = made.names
    made.enrol(name)
    made.client(name, "join", made.folder / "thorax.federation.json", "--yes")
    made.up()
    client = made.serve(name, recipe.image_px)
    long = replace(
        recipe,
        federation=replace(recipe.federation, min_sites=1),
        train=replace(recipe.train, rounds=1, local_steps=9000, OFFICIAL_EPOCH_LENGTH=9000, pooled_batch_size=2),
    )
    path = federation.folder / "recipe.yaml"
    path.write_text(recipes.to_yaml(long))
    folder = made.folder / "runs" / "first"

    def status() -> dict[str, Any]:
        return json.loads(made.server("status", "first", "--json").splitlines()[0])["runs"][0]

    def trains() -> bool:
        node = made.node(name)
        return (
            node["state"] == "working"
            and json.loads((made.home(name) / "sites" / name / "work.json").read_text())["done"] > 0
        )

    command = [sys.executable, "-c", KILLED, "run", str(made.folder), str(path), "--name", "first", "--detach"]
    env = made.processes.env | {"CHEXFOUND_HOME": str(made.folder.parent)}
    found.killed = subprocess.run(command, env=env, cwd=made.folder.parent, check=False).returncode
    found.intent = submission.last(submission.about(folder))
    found.first = made.server("resume", "first", "--detach")
    found.submissions = submission.about(folder)["flower_runs"]
    until("the site trains", trains)

    os.kill(holder(folder / submission.LOCK), signal.SIGKILL)
    number = found.submissions[-1]["id"]  # of which Flower says for a minute more that it runs
    run = RunFolder(federations.load(made.folder), "first")
    found.died_s = until("it has died", lambda: standing.look(run, {number: "running"}).state == "died")
    found.died = status()["state"]
    found.second = made.server("resume", "first", "--detach")
    until("the site trains again", lambda: status()["round"] == 1 and trains())
    found.again = status()

    made.server("stop", "first")
    found.idle_s = until("the site is idle", lambda: made.node(name)["state"] == "idle")
    made.server("resume", "first", "--detach")
    until("the site trains once more", trains)
    made.server("stop", "first")
    began = time.monotonic()
    found.code = client.stop(signal.SIGTERM, patience_s=PATIENCE_S)
    found.left_s = (time.monotonic() - began) / _busy()
    return found


def test_what_a_killed_command_has_submitted_is_taken_up(seen: SimpleNamespace) -> None:
    assert seen.killed == 9
    assert seen.intent["id"] is None
    (one,) = seen.submissions
    assert one["submission"] == seen.intent["submission"]
    assert f"submitted as Flower's {one['id']}" in seen.first


def test_a_killed_serverapp_is_told_within_seconds_and_gone_on_with(seen: SimpleNamespace) -> None:
    assert seen.died_s < SECONDS
    assert seen.died == "died"
    assert "submitted as Flower's" in seen.second
    assert seen.again["state"] == "pretrain"
    assert seen.again["lost"] == []


def test_a_site_stops_within_seconds_of_its_runs_end(seen: SimpleNamespace) -> None:
    assert seen.idle_s < SECONDS
    assert seen.code == 0
    assert seen.left_s < SECONDS
