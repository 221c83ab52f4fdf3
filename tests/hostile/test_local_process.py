"""Another process of the coordinator's machine, which reaches the SuperLink's loopback port and has the public ca.crt.

On the code before, the app of the first test ran as the federation's account, and had copied ca.key.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from server.runs import submit
from server.services.supervise import superexec_seen
from tests.hostile.machine import Machine, machine
from tests.patience import PATIENCE_S

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


def flwr(here: Machine, folder: Path, *words: str) -> dict[str, Any]:
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
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def submitted(here: Machine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Apps by `flwr run`, one after the other, and how Flower says that their runs ended."""
    folder = tmp_path_factory.mktemp("local process")
    stolen, lonely = folder / "stolen", here.held.path("runs") / "lonely"
    apps = {name: folder / name for name in ("foreign", "beside", "release")}
    (apps["foreign"] / "thief").mkdir(parents=True)
    (apps["foreign"] / "thief" / "__init__.py").touch()
    (apps["foreign"] / "thief" / "app.py").write_text(THIEF.format(stolen=str(stolen)))
    (apps["foreign"] / "pyproject.toml").write_text(PROJECT.format(package="thief"))
    for name in ("beside", "release"):
        submit.stage(apps[name])
    with open(apps["beside"] / "server" / "app.py", "a") as file:
        file.write(THIEF.format(stolen=str(stolen)))
    recipe: Recipe = check.validate({"name": "lonely", "federation": {"min_sites": 2, "wait_s": 1}}, "the test")
    config = folder / "run.toml"
    config.write_text(recipes.to_run_config(recipe, {"run-dir": str(lonely)}))
    numbers = {
        "foreign": number(here, folder, apps["foreign"]),
        "beside": number(here, folder, apps["beside"]),
        "release": number(here, folder, apps["release"], "-c", str(config)),
    }
    deadline = time.monotonic() + 120
    commands: set[tuple[str, ...]] = set()
    while not (lonely / "live.json").exists() or json.loads((lonely / "live.json").read_text())["state"] != "failed":
        assert time.monotonic() < deadline, here.log("superexec")
        commands |= {words for words in command_lines() if str(here.held.superlink) in words}
        time.sleep(0.2)
    while True:
        listed = {str(one["run-id"]): one["status"] for one in flwr(here, folder, "list", "there")["runs"]}
        if all(status.startswith("finished") for status in listed.values()):
            break
        assert time.monotonic() < deadline, (listed, here.log("superexec"))
    ends = {name: listed[one] for name, one in numbers.items()}
    return {"ends": ends, "stolen": stolen.exists(), "commands": commands}


def command_lines() -> Iterator[tuple[str, ...]]:
    """Of all processes of this machine, as every account may read them."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield tuple(file.read_bytes().decode(errors="replace").rstrip("\0").split("\0"))


def number(here: Machine, folder: Path, app: Path, *options: str) -> str:
    """Flower's number of a run of an app."""
    return str(flwr(here, folder, "run", str(app), "there", *options)["run-id"])


def test_an_app_of_a_local_process_does_not_run(here: Machine, submitted: dict[str, Any]) -> None:
    """Not even one that calls itself ours, or that has all of our files and a line more."""
    assert submitted["ends"]["foreign"] == submitted["ends"]["beside"] == "finished:failed"
    assert not submitted["stolen"]
    assert here.log("superexec").count('event=refused reason="the run ships') == 2


def test_the_release_runs_after_all_that_from_the_installation(here: Machine, submitted: dict[str, Any]) -> None:
    """It looked for sites, of which there is none; nothing was unpacked where Flower keeps what it runs."""
    assert here.up("superexec")
    assert submitted["ends"]["release"] == "finished:failed"
    live = json.loads((here.held.path("runs") / "lonely" / "live.json").read_text())
    assert "2" in live["error"]["text"], live
    assert not (here.held.path("flower") / "apps").exists()


def test_a_tasks_token_is_on_no_command_line(here: Machine, submitted: dict[str, Any]) -> None:
    """Every account reads those; on the code before, `flwr-serverapp --token …` let it act for the run."""
    tasks = [words for words in submitted["commands"] if "server.services.task" in words]
    assert tasks
    for words in tasks:
        address, authority, parent = words[words.index("server.services.task") + 1 :]
        assert (address, authority) == (str(here.held.superlink), str(here.held.path("ca.crt")))
        assert parent.isdecimal()
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
