"""The seconds of an empty round over three sites: ours against Flower as it comes.

    python benchmarks/round_latency.py [--blocks 2] [--rounds 6] [--json]

An empty round: the coordinator sends a small message to each of three nodes and has all three replies.  Both
federations run on this machine, on free ports of loopback, with TLS, authentication of nodes and a database, from
their processes' start to the end; rounds are done in one at a time, a block of ours, a block of the rival's.

Ours: `chexfound-server up` and three `chexfound-client`, with the guard between them; the apps as they are, and a
recipe that trains a linear head of a few hundred weights for one step a round.  So a round of ours also trains,
checks, signs, averages, and writes weights and journal to the disk: `seconds` of the journal has it all.
Rival: `flower-superlink` and three `flower-supernode`, directly, without packages downloaded, else by default; an
app that echoes; the time of `grid.send_and_receive`, by which Flower's strategies exchange messages.

While one federation works, the other's idle processes go on asking for work: the rival's nodes every 3 s and its four
SuperExecs every second; our nodes every 3 s, our workers every second and our SuperExec five times a second.

The first round of a block is not counted: it brings the run and its code.  `at_sites` is what our sites' own work took
of a round (the longest of the three, of the median round), to a tenth of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from chexfound import rng
from chexfound.durable.journal import read_journal
from chexfound.errors import ChexfoundError, SiteError
from chexfound.host.machine import benchmark_line
from chexfound.host.processes import die_with_parent
from chexfound.identity.roster import Address
from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from client.home import membership
from server.federation import members, settings
from server.federation.settings import Federation

ROOT = Path(__file__).resolve().parents[1]
SITES = ("CENTRE", "NORTH", "SOUTH")
PATIENCE_S = 300.0  # for anything that is not a block
BLOCK_S = 900.0
PX, IMAGES = 32, 60  # enough for each site to train on as many patients as its policy asks for
PACKAGES = ("federated-chexfound", "flwr", "torch", "httpx", "uvicorn")
PYPROJECT = """\
[project]
name = "echo"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "echo:server"
clientapp = "echo:client"
[tool.flwr.app.config]
rounds = 1
sites = 3
out = ""
"""
ECHO = '''\
"""A round is a message to each node and its reply."""

import json
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.query()
def echo(message, context):
    return Message(message.content, reply_to=message)


@server.main()
def main(grid, context):
    config, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < config["sites"]:
        time.sleep(1)
    for number in range(1, config["rounds"] + 1):
        content = RecordDict({"config": ConfigRecord({"round": number})})
        started = time.monotonic()
        messages = [
            Message(content, dst_node_id=node, message_type="query", group_id=str(number)) for node in nodes
        ]
        replies = list(grid.send_and_receive(messages, timeout=3600))
        seconds.append(time.monotonic() - started)
        if len(replies) < len(nodes) or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"round {number}: not all replied")
    with open(config["out"], "w") as file:
        json.dump(seconds, file)
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=2, help="of each side, in turn (default 2)")
    parser.add_argument("--rounds", type=int, default=6, help="that count in each block (default 6)")
    parser.add_argument("--work", type=Path, help="an empty folder, to be kept; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
            scratch = (options.work or Path(temporary)).absolute()
            ours, rival = Ours(scratch, running), Rival(scratch, running)
            row = in_turns({"ours": ours.block, "rival": rival.block}, options.blocks, options.rounds)
            row |= {"at_sites": at_sites(ours.site_logs(), options.rounds), "sites": len(SITES)}
        print(benchmark_line("round_latency", PACKAGES, **row) if options.json else told(row), flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def in_turns(
    sides: dict[str, Callable[[int, int], list[float]]], blocks: int, rounds: int
) -> dict[str, float | str | dict[str, list[float]]]:
    """The median round of both, a block of one after a block of the other; what each took is told on stderr.

    Args:
        sides: given a block's number and how many rounds it has, the seconds of each.
        blocks: of each side.
        rounds: of a block, that count; it has one more, which comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(blocks):
        for name, block in sides.items():
            first, *rest = block(number, rounds + 1)
            seconds[name] += rest
            listed = " ".join(f"{one:.2f}" for one in rest)
            print(f"block {number + 1} {name}: {listed} s (and {first:.2f} s the first)", file=sys.stderr, flush=True)
    ours, rival = (statistics.median(seconds[name]) for name in ("ours", "rival"))
    spread = {name: [round(min(all_), 3), round(max(all_), 3)] for name, all_ in seconds.items()}
    return {
        "ours": round(ours, 3), "rival": round(rival, 3), "unit": "s", "ratio": round(rival / ours, 2),
        "spread": spread, "rounds": blocks * rounds,
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """A line for each side."""
    lines = [
        f"{name:<6}{row[name]:6.2f} s, from {row['spread'][name][0]:.2f} to {row['spread'][name][1]:.2f}"
        for name in ("ours", "rival")
    ]
    return "\n".join([*lines, f"ratio {row['ratio']:.1f}; of ours {row['at_sites']:.1f} s is the sites' own work"])


# -- the two sides


class Ours:
    """A federation as `chexfound-server` and `chexfound-client` make it.

    Args:
        scratch: an empty folder.
        running: ends what was started.
    """

    def __init__(self, scratch: Path, running: contextlib.ExitStack) -> None:
        self.folder, self.running, self.logs = scratch / "ours", running, scratch / "logs"
        self.logs.mkdir(exist_ok=True)
        listen = free_port()
        ports = ["--public", f"localhost:{listen}", "--listen", f"127.0.0.1:{listen}"]
        ports += ["--superlink", f"127.0.0.1:{free_port()}"]
        self._do("server.cli", scratch, "init", str(self.folder), "--name", "ours", *ports)
        for name in SITES:
            self._do("client.cli", scratch / name, "enrol", "--name", name, "--out", str(scratch / f"{name}.pub"))
            self._do("server.cli", scratch, "add-site", str(self.folder), name, str(scratch / f"{name}.pub"))
        held = settings.load(self.folder)
        for name in SITES:
            self._do("client.cli", scratch / name, "roster", "approve", str(held.site_file), "--yes")
            self._do("client.cli", scratch / name, "approve")
        self.environment = ours_first(held.environment())
        up = [sys.executable, "-m", "server.cli", "up", str(self.folder)]
        Process(running, up, self.environment, self.logs / "up.log").wait_for("up: sites connect to")
        sites = []
        for name in SITES:
            data = write_images(scratch / "images" / name, name)
            command = [sys.executable, "-m", "client.cli", "--data", str(data), "--image-px", str(PX)]
            home = ours_first(os.environ) | {"CHEXFOUND_HOME": str(scratch / name)}
            sites.append(Process(running, command, home, self.logs / f"{name}.log"))
        for site in sites:
            site.wait_for("SuperNode ID")

    def _do(self, module: str, home: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        do(command, ours_first(os.environ) | {"CHEXFOUND_HOME": str(home)}, ROOT, PATIENCE_S)

    def site_logs(self) -> list[str]:
        """What each site's client wrote."""
        return [(self.logs / f"{name}.log").read_text(errors="replace") for name in SITES]

    def block(self, number: int, rounds: int) -> list[float]:
        """A run; seconds of each round."""
        return journal_seconds(self.run(f"block-{number}", recipe(rounds)), rounds)

    def run(self, name: str, recipe: Recipe) -> list[dict[str, Any]]:
        """A run to its end; its journal."""
        folder, config = self.folder / "runs" / name, self.folder / "run.toml"
        config.write_text(recipes.to_run_config(recipe) + f"run-dir = {json.dumps(str(folder))}\n")
        command = [program("flwr"), "run", ".", "federation", "--stream", "-c", str(config)]
        said = do(command, self.environment, ROOT, BLOCK_S)
        if not (folder / "metrics.json").exists():  # which a run writes last
            raise SiteError(f"our run failed:\n{said[-3000:]}")
        return read_journal(folder / "journal.jsonl")


class Rival:
    """Flower as it comes, with keys and certificates of the same kinds."""

    def __init__(self, scratch: Path, running: contextlib.ExitStack) -> None:
        self.folder, self.app, logs = scratch / "rival", scratch / "echo", scratch / "logs"
        logs.mkdir(exist_ok=True)
        address = Address("127.0.0.1", free_port())
        held = settings.create(self.folder, "rival", Address("localhost", address.port), address, address)
        self.environment = as_it_comes(ours_first(held.environment()))
        Process(running, superlink(held), self.environment, logs / "superlink.log").wait_for("Uvicorn running on")
        for name in SITES:
            keys, _ = membership.make_keys(self.folder / name)
            held.write_sites(held.sites().with_site(name, keys))
        members.register_all(held)
        nodes = []
        for name in SITES:
            command = [
                program("flower-supernode"), "--superlink", str(held.public),
                "--root-certificates", str(held.path("ca.crt")), "--port", str(free_port()),
                "--auth-supernode-private-key", str(self.folder / name / "keys" / "node.key"),
            ]  # fmt: skip
            own = self.environment | {"FLWR_HOME": str(self.folder / name / "flower")}
            nodes.append(Process(running, command, own, logs / f"supernode-{name}.log"))
        for node in nodes:
            node.wait_for("SuperNode ID")
        self.app.mkdir()
        (self.app / "pyproject.toml").write_text(PYPROJECT)
        (self.app / "echo.py").write_text(ECHO)

    def block(self, number: int, rounds: int) -> list[float]:
        """A run; seconds of each round."""
        out = self.folder / f"block-{number}.json"
        config = f"rounds={rounds} sites={len(SITES)} out={json.dumps(str(out))}"
        command = [program("flwr"), "run", str(self.app), "federation", "--stream", "-c", config]
        said = do(command, self.environment, self.app, BLOCK_S)
        if not out.exists():
            raise SiteError(f"the rival's run failed:\n{said[-3000:]}")
        seconds: list[float] = json.loads(out.read_text())
        return seconds


def superlink(held: Federation) -> list[str]:
    """With the federation's certificate, authentication and a database; isolation by default: subprocess."""
    return [
        program("flower-superlink"), "--host", held.superlink.host, "--port", str(held.superlink.port),
        "--ssl-ca-certfile", str(held.path("ca.crt")), "--ssl-certfile", str(held.path("server.crt")),
        "--ssl-keyfile", str(held.path("server.key")), "--enable-supernode-auth",
        "--database", str(held.path("superlink.sqlite")), "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def recipe(rounds: int) -> Recipe:
    """Rounds that are as good as empty: one step of a linear head on features that each site has."""
    return check.validate(
        {
            "name": "empty rounds",
            "image_px": PX,
            "phases": ["adapt"],
            "federation": {"min_sites": len(SITES)},
            "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
            "adapt": {
                "head": "linear", "rounds": rounds, "local_steps": 1, "pooled_batch_size": 2 * len(SITES),
                "n_last_blocks": 1, "views": 0, "min_positives": 4, "optimizer_state": "local",
            },
        },
        "the benchmark's recipe",
    )  # fmt: skip


def journal_seconds(entries: Sequence[dict[str, Any]], rounds: int) -> list[float]:
    """Seconds of each round of a run, by its journal.

    Raises: SiteError unless all rounds are there, and all sites in each.
    """
    done = [entry for entry in entries if entry["event"] == "round"]
    if len(done) != rounds or any(len(entry["sites"]) != len(SITES) for entry in done):
        raise SiteError(f"our run: {len(done)} of {rounds} rounds, or one without all {len(SITES)} sites")
    return [entry["seconds"] for entry in done]


def at_sites(logs: Sequence[str], rounds: int) -> float:
    """Seconds of the sites' own work in the median round: the longest of the sites, which the others wait for."""
    took: dict[tuple[int, int], float] = {}
    for log in logs:
        seen: dict[int, int] = {}
        for number, seconds in re.findall(r"phase=adapt round=(\d+) .*seconds=([\d.]+)", log):
            block = seen[int(number)] = seen.get(int(number), -1) + 1
            if 1 < int(number) <= rounds + 1:
                place = (block, int(number))
                took[place] = max(took.get(place, 0.0), float(seconds))
    return statistics.median(took.values())


def write_images(folder: Path, site: str) -> Path:
    """Noise, of two classes by turns."""
    folder.mkdir(parents=True)
    noise = rng.numpy_generator(0, "round_latency", site)
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "source", "patient_id", "findings"])
        for number in range(IMAGES):
            cv2.imwrite(str(folder / f"{number}.png"), noise.integers(0, 256, (PX, PX), dtype=np.uint8))
            table.writerow([f"{number}.png", site, f"p{number}", "Nodule" if number % 2 else "No Finding"])
    (folder / "labelled.json").write_text(json.dumps({site: ["Nodule"]}))
    return folder


# -- processes


def program(name: str) -> str:
    """A console script of this interpreter's environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours_first(environment: Any) -> dict[str, str]:
    """With this checkout's packages found first, and no thread more than one a process."""
    return {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def as_it_comes(environment: dict[str, str]) -> dict[str, str]:
    """Without what speeds Flower's own polls up."""
    return {name: value for name, value in environment.items() if not name.startswith("FLWR_SUPEREXEC_")}


def do(command: list[str], environment: dict[str, str], folder: Path, limit_s: float) -> str:
    """Run to the end; returns its output.

    Raises: SiteError if it fails, or takes longer.
    """
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, text=True, timeout=limit_s, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise SiteError(f"{' '.join(command[:6])} … did not end in {limit_s:g} s:\n{error.stdout}") from error
    if done.returncode:
        raise SiteError(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


class Process:
    """A process that lasts until `running` is closed, with its output in a file."""

    def __init__(
        self, running: contextlib.ExitStack, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.command, self.log = command, log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        running.callback(self._stop)

    def wait_for(self, words: str) -> None:
        """Until they stand in the output.

        Raises: SiteError if it ends, or does not say them.
        """
        deadline = time.monotonic() + PATIENCE_S
        while words not in (text := self.log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SiteError(f"{' '.join(self.command[:4])} … did not come up:\n{text[-3000:]}")
            time.sleep(0.1)

    def _stop(self) -> None:
        """Ask it to end, then end what is left of its group."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


if __name__ == "__main__":
    sys.exit(main())
