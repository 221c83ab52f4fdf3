"""The launcher, with processes that import nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chexfound.errors import ConfigError
from chexfound.parallel import environment, launch
from chexfound.parallel.launch import Ranks

ROOT = Path(__file__).resolve().parents[2]
FOLLOW = "from chexfound.parallel.environment import follow_parent; follow_parent(); "


def ranks(code: str, number: int = 3, **options: object) -> Ranks:
    return Ranks(["-c", "import os, sys, time; rank = int(os.environ['RANK']); " + code], number, **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_is_told_who_it_is(tmp_path):
    told = "[os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'GLOO_SOCKET_IFNAME', 'CHEXFOUND_RENDEZVOUS')]"
    one = ranks(f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(' '.join({told}))")
    assert one.run() == [0, 0, 0]
    texts = [(tmp_path / str(number)).read_text().split() for number in range(3)]
    assert [text[:4] for text in texts] == [[str(n), str(n), "3", launch.LOOPBACK] for n in range(3)]
    meeting = {text[4] for text in texts}
    assert len(meeting) == 1
    assert meeting.pop().startswith("file:///")


def test_one_failure_ends_the_others():
    one = ranks("sys.exit(5) if rank == 1 else time.sleep(600)")
    began = time.monotonic()
    assert one.run() == [0, 5, 0]
    assert time.monotonic() - began < 60
    assert all(process.returncode is not None for process in one._processes)


def test_a_signal_shows_as_its_number():
    assert ranks("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(600)").run() == [-9, 0, 0]
    told = str(launch.died(0, 2, -9))
    assert told.startswith("the process of GPU 0 (of 2) died (killed by signal 9; the machine may be out of memory)")
    assert "exit code 1; its last lines above say why" in str(launch.died(1, 2, 1))


def test_lines_of_the_first_are_heard():
    lines: list[bytes] = []
    code = "[print(rank, n, 'x' * 3000, flush=True) for n in range(100)]"
    assert ranks(code, on_line=lines.append).run() == [0, 0, 0]
    assert lines == [f"0 {n} {'x' * 3000}".encode() for n in range(100)]


def test_an_exception_here_ends_them():
    def fail(_: bytes) -> None:
        raise KeyboardInterrupt

    one = ranks("print(1, flush=True); time.sleep(600)", on_line=fail)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert [process.returncode for process in one._processes] == [-9, -9, -9]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_them_to_stop(tmp_path, number):
    here = f"os.path.join({str(tmp_path)!r}, str(rank))"
    code = (
        f"import signal; signal.signal(signal.SIGTERM, lambda *_: (open({here}, 'w'), sys.exit(0))); "
        f"open({here} + '-ready', 'w'); there = {str(tmp_path / '1-ready')!r}; "
        "[time.sleep(0.02) for _ in range(3000) if not os.path.exists(there)]; print('ready', flush=True); "
        "time.sleep(600)"
    )

    def ready(_: bytes) -> None:
        os.kill(os.getpid(), number)

    one = ranks(code, 2, on_line=ready)
    before = signal.getsignal(number)
    with one.signals():
        assert one.run() == [0, 0]
    assert signal.getsignal(number) is before
    assert one.asked == number
    assert {"0", "1"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_no_orphan_is_left_when_the_parent_is_killed(tmp_path):
    code = FOLLOW + f"open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w'); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys; from chexfound.parallel.launch import Ranks; "
         f"Ranks(['-c', {'import os, time; ' + code!r}], 2).run()"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_whose_parent_is_gone_already_ends(monkeypatch):
    code = f"import os; os.environ['CHEXFOUND_PARENT'] = '1'; {FOLLOW} print('still here')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_torchrun_s_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.to_come() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else
    assert environment.to_come() == 1
    monkeypatch.setenv("RANK", "0")
    assert environment.to_come() == 4


def test_an_error_of_another_rank_waits_for_the_first_s_and_is_named(monkeypatch):
    monkeypatch.setattr(environment, "GRACE_S", 0.0)
    monkeypatch.delenv("RANK", raising=False)
    assert environment.teller() == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert environment.teller() == ""
    monkeypatch.setenv("RANK", "2")
    assert environment.teller() == "GPU 2 (of 4): "


def test_gpus_under_torchrun_are_refused(monkeypatch, capsys):
    from chexfound.commands import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["pretrain", "store", "--recipe", "demo", "--out", "x", "--gpus", "2"]) == ConfigError.exit_code
    assert "--gpus: leave it out under torchrun" in capsys.readouterr().err
