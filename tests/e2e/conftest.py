"""Real processes of a federation on loopback ports, each ended by the id that we started."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.recipe import check
from chexfound.recipe.schema import Recipe
from chexfound.rng import numpy_generator
from client.home.secret import Secret
from sim.arms.federated import run_federated
from sim.arms.plan import ArmPlan
from sim.engine.pool import Pool
from sim.partition import partition
from tests.e2e.hospitals import SECRET, allow_small, give_secret
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], tuple[int, ...]]:
    return lambda number: tuple(free_port() for _ in range(number))


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


class Process:
    """A process in a session of its own, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=dict(env), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, words: str) -> None:
        """Until the words stand in the output; fails if the process ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.text:
            if not self.running and words not in self.text:
                pytest.fail(f"{self.name} ended ({self._process.returncode}) without {words!r}:\n{self.text[-6000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"{self.name}: no {words!r} in {PATIENCE_S:g} s:\n{self.text[-6000:]}")
            time.sleep(0.05)

    def wait(self) -> int:
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} did not end in {PATIENCE_S:g} s:\n{self.text[-6000:]}")

    def stop(self, number: int = signal.SIGTERM, patience_s: float = 30) -> int:
        """Ask it to end, then end what is left of its group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            return self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Federation:
    """A SuperLink, and whatever is started to join it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.home = folder / "coordinator"
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "CHEXFOUND_HOME": str(self.home),
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        (folder / "flower").mkdir(parents=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink.here]\naddress = "{self.address}"\ninsecure = true\n'
        )

    def start(self, name: str, command: Sequence[str], **env: str) -> Process:
        process = Process(name, command, self.folder / f"{name}.log", self.env | env)
        self.processes.append(process)
        return process

    def superlink(self) -> Process:
        command = [program("flower-superlink"), "--insecure", "--disable-runtime-dependency-installation"]
        process = self.start("superlink", [*command, "--host", "127.0.0.1", "--port", str(self.port)])
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return process
            if not process.running or time.monotonic() > deadline:
                pytest.fail(f"the SuperLink does not listen:\n{process.text}")
            time.sleep(0.05)

    def client(self, site: str, data: Path, home: Path, px: int) -> Process:
        allow_small(home, site)
        approve = [sys.executable, "-m", "client.cli", "approve", "--name", site]
        env = self.env | {"CHEXFOUND_HOME": str(home)}
        give_secret(home, site)
        subprocess.run(approve, env=env, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S)
        command = [sys.executable, "-m", "client.cli", "--data", str(data), "--name", site, "--superlink", self.address]
        return self.start(f"client-{site}", [*command, "--insecure", "--image-px", str(px)], CHEXFOUND_HOME=str(home))

    def supernode(self, site: str, data: Path, home: Path) -> Process:
        """Flower's own, as someone would start it who has not heard of chexfound-client."""
        allow_small(home, site)
        command = [program("flower-supernode"), "--insecure", "--superlink", self.address, "--port", str(free_port())]
        config = ["--node-config", f'site="{site}" data="{data}"']
        flower = self.folder / f"flower-{site}"
        give_secret(home, site)
        return self.start(f"supernode-{site}", [*command, *config], CHEXFOUND_HOME=str(home), FLWR_HOME=str(flower))

    def run(self, name: str, run_config: Path) -> Process:
        return self.start(name, [program("flwr"), "run", ".", "here", "--stream", "-c", str(run_config)])

    def stop_run(self, run_id: str) -> None:
        command = [program("flwr"), "stop", run_id, "here"]
        subprocess.run(command, env=self.env, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop(patience_s=3)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one = Federation(tmp_path_factory.mktemp("federation"))
    try:
        yield one
    finally:
        one.stop()


def write_site(folder: Path, name: str, patients: int, px: int) -> Path:
    """A manifest source with one noise image a patient, every second one with a bright disc: a nodule."""
    folder.mkdir(parents=True)
    noise = numpy_generator(0, "e2e images", name)
    rows = []
    for number in range(patients):
        image = noise.normal(110, 30, (px, px))
        if number % 2:
            y, x = noise.uniform(px * 0.3, px * 0.7, 2)
            across, down = np.meshgrid(np.arange(px), np.arange(px))
            image[(across - x) ** 2 + (down - y) ** 2 < (px / 8) ** 2] += 110
        cv2.imwrite(str(folder / f"{number:03d}.png"), image.clip(0, 255).astype(np.uint8))
        rows.append(
            {
                "file": f"{number:03d}.png",
                "source": name,
                "patient_id": f"p{number}",
                "findings": "Nodule" if number % 2 else "No Finding",
            }
        )
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "labelled.json").write_text(json.dumps({name: ["Nodule"]}))
    return folder


@pytest.fixture(scope="session")
def make_site() -> Callable[[Path, str, int, int], Path]:
    return write_site


PX = 64
RECIPE = check.validate(
    {
        "name": "it's tiny",  # a quote, which the run-config file must carry
        "image_px": PX,
        "federation": {"min_sites": 2},
        "train": {"rounds": 2, "local_steps": 2, "pooled_batch_size": 8, "OFFICIAL_EPOCH_LENGTH": 2},
        "crops": {"global_crops_size": 48, "local_crops_size": 32, "local_crops_number": 1},
        "adapt": {"rounds": 1, "local_steps": 2, "pooled_batch_size": 8, "views": 1, "min_positives": 4},
        "evaluate": {"bootstrap_samples": 20},
    },
    "the test's recipe",
)


PART_MB = 2.0  # for sites that our own client serves: student, teacher and moments, 13.5 MB, then go in seven


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return RECIPE


def in_process(images: Path, folder: Path, workers: int, recipe: Recipe = RECIPE) -> str:
    own, store = Secret.of(SECRET), folder / "store"
    ingest(images, store, PX, naming=own.naming)
    sites = partition(Store.open(store), "source", recipe.seed).sites
    plan = ArmPlan(recipe=recipe, store=store, sites=sites, folder=folder / "plan", split_key=own.split)
    plan.write_shards()
    with Pool(workers) as pool:
        run_federated(plan, "federated", pool)
    return json.loads((plan.arm_folder("federated") / "metrics.json").read_text())["model_sha256"]["federated"]


@pytest.fixture(scope="session")
def simulate() -> Callable[..., str]:
    """The hash of the model of the same run in process."""
    return in_process
