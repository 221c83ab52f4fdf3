"""Ctrl-C, kill -9 and a site's process that dies: a run that --resume takes to the same hash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
LINUX = Path("/proc/self/task").is_dir()


@pytest.fixture
def command(tiny_images: Path, tiny_recipe_file: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`command(out, "--workers", "2")` starts `chexfound-sim` as a process."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
        given = ["--out", str(out), *arguments]
        if "--resume" not in arguments:
            given += ["--data", str(tiny_images), "--recipe", str(tiny_recipe_file)]
        process = subprocess.Popen(
            [sys.executable, "-m", "sim.cli", *given],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], journal: Path, record: str) -> None:
    """Until a journal holds a record, as text."""
    deadline = time.monotonic() + PATIENCE_S
    while not (journal.exists() and record in journal.read_text()):
        if process.poll() is not None:
            pytest.fail(f"ended before {record}: {process.communicate()}")
        assert time.monotonic() < deadline, f"no {record} in {journal}"
        time.sleep(0.002)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The pool's processes (the parent has a resource tracker as well)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopped_and_killed_it_ends_with_the_same_hashes(
    command: Any, simulate: Any, two_workers: Any, tmp_path: Path
) -> None:
    """Ctrl-C while it pretrains, then kill -9 while another arm does, then to the end."""
    out = tmp_path / "out"
    process = command(out, "--workers", "1")
    wait_for(process, out / "work" / "seed-0" / "federated" / "journal.jsonl", '"phase":"pretrain","round":0')
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert f"Stopped. What is done is kept; go on with: chexfound-sim --out {out} --resume" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not (out / "metrics.json").exists()

    process = command(out, "--resume", "--workers", "2")
    wait_for(process, out / "work" / "seed-0" / "centralized" / "journal.jsonl", '"event":"start"')
    workers = workers_of(process) if LINUX else []
    process.kill()
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    wait_until_gone(workers)  # two runs must never share a site's disk
    assert not (out / "metrics.json").exists()

    ran = simulate("--resume", out=out)
    assert ran.code == 0, ran.stderr
    assert "already done: federated, random, shuffled" in ran.stdout
    assert ran.hashes == two_workers.hashes
    assert ran.metrics["results"] == two_workers.metrics["results"]


@pytest.mark.skipif(not LINUX, reason="finds the worker in /proc")
def test_a_site_process_that_dies_in_a_round(command: Any, simulate: Any, two_workers: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = command(out, "--workers", "2", "--arms", "federated,centralized")
    wait_for(process, out / "work" / "seed-0" / "federated" / "journal.jsonl", '"phase":"pretrain","round":0')
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 7, errors
    told = " ".join(errors.split())
    assert "Traceback" not in errors
    assert "the process that works on site '" in told or "the process that last worked on site '" in told
    assert "killed by signal 9 (SIGKILL)" in told
    assert "what is done is kept; go on with: chexfound-sim --out" in told
    wait_until_gone(workers)  # the others end with the run

    ran = simulate("--resume", out=out)
    assert ran.code == 0, ran.stderr
    assert ran.hashes == {arm: two_workers.hashes[arm] for arm in ("federated", "centralized")}
