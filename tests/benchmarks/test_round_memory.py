from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
HOLDER = "import sys, time; held = bytearray(b'x') * (80 * 2**20); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import round_memory

    return round_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_the_memory_of_a_federation_s_processes_is_seen(bench: ModuleType, tmp_path: Path) -> None:
    """One that names the folder as a site's worker does, and one of another federation."""
    with bench.watching(str(tmp_path / "here")) as peaks:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, "client.node.worker", str(tmp_path / home)], stdout=subprocess.PIPE
            )
            for home in ("here", "there")
        ]
        try:
            for one in started:
                assert one.stdout is not None
                assert one.stdout.readline() == b"up\n"
            until = time.monotonic() + 30
            while peaks["site: worker"] <= 80 * MIB and time.monotonic() < until:
                time.sleep(0.05)
            seen = [size for kind, size in bench.looked_at(str(tmp_path / "here")) if kind == "site: worker"]
        finally:
            for one in started:
                one.kill()
                one.communicate()
    assert len(seen) == 1
    assert min(seen[0], peaks["site: worker"]) > 80 * MIB
    assert peaks["coordinator: ServerApp"] == 0


def test_what_grows_with_the_model_is_told_in_payloads(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own 300 MiB are in neither."""
    payloads = {"vit_tiny": 10 * MIB, "vit_small": 30 * MIB}

    def federation(recipe: object) -> tuple[dict[str, int], int]:
        payload = payloads[recipe.student.arch]  # type: ignore[attr-defined]
        copies = 6 if recipe.aggregation == "secagg" else 9  # type: ignore[attr-defined]
        return dict.fromkeys(bench.KINDS, 300 * MIB + copies * payload), payload

    monkeypatch.setattr(bench, "federation", federation)
    rows = list(bench.measure("vit_tiny", "vit_small"))
    assert {row["process"] for row in rows} == set(bench.KINDS)
    assert {(row["ours"], row["rival"], row["ratio"]) for row in rows} == {(6.0, 9.0, 1.5)}
