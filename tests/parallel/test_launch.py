"""The launcher, with processes that import nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_they_are_asked_to_stop(tmp_path):
    here = f"os.path.join({str(tmp_path)!r}, str(rank))"
    code = (
        f"import signal; signal.signal(signal.SIGTERM, lambda *_: (open({here}, 'w'), sys.exit(0))); "
        f"open({here} + '-ready', 'w'); time.sleep(600)"
    )
    ready = [tmp_path / f"{rank}-ready" for rank in (0, 1)]
    assert ranks(code, 2, stop=lambda: all(path.exists() for path in ready)).run() == [0, 0]
    assert {"0", "1"} < {path.name for path in tmp_path.iterdir()}


def test_those_that_do_not_stop_are_ended(monkeypatch):
    monkeypatch.setattr(launch, "STOP_S", 0.5)
    one = ranks("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", 2, stop=lambda: True)
    assert one.run() == [0, 0] or any(code == -signal.SIGTERM for code in (p.returncode for p in one._processes))
    assert all(process.returncode is not None for process in one._processes)


def test_the_first_signal_asks_and_the_second_does_what_it_did(capsys):
    before = signal.getsignal(signal.SIGINT)
    with environment.stoppable(signal.SIGINT, signal.SIGTERM, text="stopping") as asked:
        assert asked == []
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == "stopping\n"
    assert signal.getsignal(signal.SIGINT) is before


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


def test_how_many_there_are_to_come(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.to_come() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else
    assert environment.to_come() == 1
    monkeypatch.setenv("RANK", "0")
    assert environment.to_come() == 4
