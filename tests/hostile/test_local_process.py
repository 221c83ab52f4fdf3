"""Another process of the coordinator's machine, which reaches the SuperLink's loopback port and has the public ca.crt.

On the code before, the app of the first test ran as the federation's account: it wrote ca.key's first line into its file.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chexfound import recipe as recipes
from chexfound.schema import Recipe
from server import runs
from server.up import superexec_seen
from tests.hostile.machine import Machine, machine

THIEF = """
import os
from pathlib import Path
from flwr.serverapp import ServerApp

Path({stolen!r}).write_text((Path(os.environ["CHEXFOUND_HOME"]) / "ca.key").read_text())
app = ServerApp()
"""
PROJECT = """
[project]
name = "federated-chexfound"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "federated-chexfound"
[tool.flwr.app.components]
serverapp = "{package}.app:app"
clientapp = "{package}.app:app"
[tool.flwr.app.config]
recipe = ""
backbone = ""
run-dir = ""
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("local")) as one:
        one.start("superlink")
        one.start("superexec")
        yield one


def flwr(here: Machine, folder: Path, *words: str) -> dict:
    """Flower's command line as another account has it: with the certificate, which is public, and no more."""
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    authority = folder / "ca.crt"
    authority.write_bytes(here.held.path("ca.crt").read_bytes())
    (home / "config.toml").write_text(
        f'[superlink.there]\naddress = "{here.held.superlink}"\nroot-certificates = "{authority}"\n'
    )
    env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = [Path(sys.executable).with_name("flwr"), *words, "--format", "json"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    return json.loads(done.stdout)


def ended(here: Machine, folder: Path, number: str) -> dict:
    """The run, once it has ended."""
    deadline = time.monotonic() + 120
    while True:
        run = flwr(here, folder, "list", "there", "--run-id", number)["runs"][0]
        if run["status"].startswith("finished"):
            return run
        assert time.monotonic() < deadline, (run, here.log("superexec"))
        time.sleep(0.5)


def submit(here: Machine, folder: Path, app: Path, config: str = "") -> dict:
    """An app by `flwr run`; how its run ended."""
    options = ["-c", config] if config else []
    number = str(flwr(here, folder, "run", str(app), "there", *options)["run-id"])
    return ended(here, folder, number)


def test_an_app_of_a_local_process_does_not_run(here: Machine, tmp_path: Path) -> None:
    """Not even one that calls itself ours, or that hides beside ours; and the SuperExec goes on."""
    stolen, foreign = tmp_path / "stolen", tmp_path / "foreign"
    (foreign / "thief").mkdir(parents=True)
    (foreign / "thief" / "__init__.py").touch()
    (foreign / "thief" / "app.py").write_text(THIEF.format(stolen=str(stolen)))
    (foreign / "pyproject.toml").write_text(PROJECT.format(package="thief"))
    beside = tmp_path / "beside"
    runs.stage(beside)
    with open(beside / "server" / "__init__.py", "a") as file:
        file.write(THIEF.format(stolen=str(stolen)))
    for app in (foreign, beside):
        run = submit(here, tmp_path, app)
        assert run["status"] == "finished:failed", run
        assert not stolen.exists()
    assert here.log("superexec").count("event=refused") == 2
    assert here.up("superexec")
    assert not (here.held.path("flower") / "apps").exists()  # where Flower unpacks what it runs


def test_the_release_cannot_be_made_to_write_elsewhere(here: Machine, tmp_path: Path) -> None:
    app, elsewhere = tmp_path / "app", tmp_path / "elsewhere"
    runs.stage(app)
    run = submit(here, tmp_path, app, f'run-dir="{elsewhere}"')
    assert run["status"] == "finished:failed"
    assert not elsewhere.exists()
    assert "is no folder of" in here.log("superexec")


def test_the_release_runs_after_all_that(here: Machine, tmp_path: Path) -> None:
    """From the installation: it looks for sites, of which there is none."""
    app, config = tmp_path / "app", tmp_path / "run.toml"
    runs.stage(app)
    recipe: Recipe = recipes.validate({"name": "lonely", "federation": {"min_sites": 2, "wait_s": 1}}, "the test")
    config.write_text(recipes.to_run_config(recipe, {"run-dir": str(here.held.path("runs") / "lonely")}))
    run = submit(here, tmp_path, app, str(config))
    assert run["status"] == "finished:failed"
    live = json.loads((here.held.path("runs") / "lonely" / "live.json").read_text())
    assert live["state"] == "failed", live
    assert not (here.held.path("flower") / "apps").exists()


def test_a_tasks_token_is_on_no_command_line(here: Machine) -> None:
    """Every account reads those; who has the token acts for the run."""
    assert "--token" not in " ".join(here.held.processes()["superexec"])
    assert superexec_seen(here.held)


def test_no_other_account_reads_the_federations_keys(here: Machine) -> None:
    assert stat.S_IMODE(here.held.folder.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key", "superexec.secret"):
        assert stat.S_IMODE(here.held.path(name).stat().st_mode) == 0o600
    here.held.folder.chmod(0o755)
    here.held.path("ca.key").chmod(0o644)
    here.held.close()
    assert stat.S_IMODE(here.held.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(here.held.path("ca.key").stat().st_mode) == 0o600
