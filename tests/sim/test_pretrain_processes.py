"""`chexfound pretrain` as real processes: one, two ranks; killed, and gone on to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chexfound import rng
from chexfound.errors import DataError, SiteError
from chexfound.model import checkpoint
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]
ROOT = Path(__file__).resolve().parents[2]
STEPS, ROUND = 40, 10
SCRIPT = ("-c", "import sys; from chexfound._launch import chexfound; sys.exit(chexfound())")
FAULTY = ("-m", "tests.sim.faulty")
SETTINGS = [
    "train.pooled_batch_size=4",
    "train.local_steps=2",
    "train.rounds=15",
    "train.OFFICIAL_EPOCH_LENGTH=10",  # five of its rounds: one of ours
    "train.saveckp_freq=0.2",
    "student.drop_path_rate=0.2",
    "curriculum=[{rounds: 5, global_crops_size: 48, local_crops_size: 32}]",
]


class Command:
    """A command in a session of its own, with its output in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CHEXFOUND_DEVICE": "cpu", "PYTHONUNBUFFERED": "1"}
        for name in ("RANK", "WORLD_SIZE", "CHEXFOUND_GPUS"):
            env.pop(name, None)
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=env, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.005)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def rank(self, number: int) -> int:
        """The process that is that rank."""
        wanted = f"RANK={number}".encode()
        return next(pid for pid in self.children() if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def children(self) -> list[int]:
        """Processes that this one, or a child of it, started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]


@pytest.fixture
def command(tiny_store_path: Path, tiny_recipe_file: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """`command(out, *options, before=…)`: the command, started; ended with the test."""
    started: list[Command] = []

    def start(out: str, *options: str, before: tuple[str, ...] = SCRIPT) -> Command:
        arguments = [
            *before,
            "pretrain",
            str(tiny_store_path),
            "--recipe",
            str(tiny_recipe_file),
            "--out",
            str(tmp_path / out),
        ]
        arguments += [*options, *(part for pair in SETTINGS for part in ("--set", pair))]
        started.append(Command(arguments, tmp_path / f"{len(started)}.log"))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def saved(out: Path) -> int:
    """The step of the newest state on the disk: of a round, or within one."""
    rounds = (ROUND * (int(path.stem[-6:]) + 1) for path in (out / "rounds").glob("pretrain-*.safetensors"))
    return max([0, *rounds, *(int(path.stem) for path in (out / "own/saves").glob("0*.safetensors"))])


def left(out: Path) -> tuple[str, str, str]:
    """Digests of the model and of the heads, and the rows."""
    model, heads = (
        checkpoint.digest(checkpoint.load(out / name)) for name in ("model.safetensors", "model/dino_head.safetensors")
    )
    return model, heads, (out / "metrics.jsonl").read_text()


def some_step(name: str, lowest: int, highest: int) -> int:
    """A step that differs from day to day."""
    return lowest + rng.derive(name, time.time_ns()) % (highest - lowest)


def listening(pids: list[int]) -> set[str]:
    """Local addresses, as /proc/net writes them, at which these processes wait for connections."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def test_one_process_killed_at_any_step_ends_with_the_same_weights(command, tmp_path):
    assert command("whole").wait() == 0
    step = some_step("one", 2, STEPS - 8)
    one = command("out")
    one.wait_for(lambda: saved(tmp_path / "out") >= step)
    one.process.kill()
    assert one.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/model").exists(), step
    again = command("out")
    assert again.wait() == 0, again.text
    assert "going on at step" in again.text
    assert left(tmp_path / "out") == left(tmp_path / "whole"), step


def test_two_ranks_killed_and_interrupted(command, tmp_path):
    """One run is left alone; the one to equal it is killed whole, then a rank of it, then interrupted, then ends."""
    whole = command("whole", "--gpus", "2")
    assert whole.wait() == 0, whole.text
    assert f"{STEPS} steps on 2 × cpu" in whole.text
    assert "find_unused_parameters" not in whole.text
    out = tmp_path / "out"

    killed = command("out", "--gpus", "2")
    step = some_step("two", 2, 16)
    killed.wait_for(lambda: saved(out) >= step and len(killed.children()) == 2)
    pids = killed.children()
    assert len(pids) == 2
    assert listening(pids) <= {"0100007F"}  # 127.0.0.1
    killed.process.kill()
    killed.wait()
    killed.process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlives its parent"
        time.sleep(0.05)
    reached = saved(out)

    bereft = command("out", "--gpus", "2")
    bereft.wait_for(lambda: saved(out) > reached and len(bereft.children()) == 2)
    os.kill(bereft.rank(1), signal.SIGKILL)  # between two rounds there is none
    assert bereft.wait() == SiteError.exit_code
    assert "the process of GPU 1 (of 2) died (killed by signal 9; the machine may be out of memory)" in bereft.text
    assert "Traceback" not in bereft.text
    reached = saved(out)

    interrupted = command("out", "--gpus", "2")
    interrupted.wait_for(lambda: saved(out) > reached)
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.wait() == 130, interrupted.text
    assert f"of {STEPS}; the same command goes on from there" in interrupted.text
    assert "Traceback" not in interrupted.text

    last = command("out", "--gpus", "2")
    assert last.wait() == 0, last.text
    assert left(out) == left(tmp_path / "whole")
    known = (" step=", "model: ", " a step takes ", "in Python: ", " steps on 2 × cpu", "goes on from the save before")
    assert all(any(part in line for part in known) for line in last.text.splitlines()), last.text


def test_a_loss_that_is_nan_at_one_rank_stops_all(command, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTY_RANK", "1")
    monkeypatch.setenv("FAULT", "nan")
    one = command("out", "--gpus", "2", before=FAULTY)
    assert one.wait() == DataError.exit_code, one.text  # as one process
    (told,) = [line for line in one.text.splitlines() if "error" in line]
    assert told.startswith("error: pretraining step 2: the loss is nan")
    saved_at = tmp_path / "out/own/diverged/step-00000002"
    files = json.loads(saved_at.with_suffix(".json").read_text())["files"]
    assert len(files) == 4  # of both
    assert f"Its images: {', '.join(files[:3])} and 1 more" in told
    assert checkpoint.load(saved_at.with_suffix(".safetensors"))
    assert "Traceback" not in one.text


def test_an_error_of_one_rank_ends_all_and_is_told_as_its_own(command, monkeypatch):
    monkeypatch.setenv("FAULTY_RANK", "1")
    monkeypatch.setenv("FAULT", "error")
    one = command("out", "--gpus", "2", before=FAULTY)
    assert one.wait() == SiteError.exit_code
    assert one.text.count("Traceback") == 1
    assert "RuntimeError: a fault of one rank" in one.text
    assert "the process of GPU 1 (of 2) died (exit code 1; its last lines above say why)" in one.text
