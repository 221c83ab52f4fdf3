from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chexfound.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import secagg_auroc

    return secagg_auroc


def left(folder: Path, aurocs: dict[str, float | None], weight: float) -> Path:
    """What a simulation leaves, as far as it is read."""
    rows: list[dict[str, Any]] = [
        {"arm": "federated", "tested_on": site, "finding": "Blob", "auroc": auroc} for site, auroc in aurocs.items()
    ]
    rows.append({"arm": "random", "tested_on": "alpha", "finding": "Blob", "auroc": 0.1})
    arm = folder / "work" / "seed-0" / "federated"
    arm.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"results": rows}))
    save_file({"w": torch.tensor([0.0, weight])}, arm / "model.safetensors")
    return folder


def test_what_all_were_judged_on_is_compared(bench: ModuleType, tmp_path: Path) -> None:
    row = bench.compared(
        {
            "rival": left(tmp_path / "rival", {"alpha": 0.6, "beta": 0.8, "delta": 0.9}, 1.0),
            "ours": left(tmp_path / "ours", {"alpha": 0.6, "beta": 0.7, "delta": None}, 0.75),
            "local": left(tmp_path / "local", {"alpha": 0.6, "beta": 0.8, "delta": 0.1}, 0.5),
            "control": left(tmp_path / "control", {"alpha": 0.9, "beta": 0.5, "delta": 0.9}, 1.5),
        }
    )
    assert row == {
        "rival": 0.7, "ours": 0.65, "local": 0.7, "control": 0.7, "figures": 2,
        "ours_difference": -0.05, "ours_apart": 0.05, "ours_most_apart": 0.1, "ours_weights_apart": 0.25,
        "local_difference": 0.0, "local_apart": 0.0, "local_most_apart": 0.0, "local_weights_apart": 0.5,
        # One site .3 up, the other .3 down: the means are equal, and the figures are not.
        "control_difference": 0.0, "control_apart": 0.3, "control_most_apart": 0.3, "control_weights_apart": 0.5,
    }  # fmt: skip


def test_the_interval_is_student_s(bench: ModuleType) -> None:
    """t(0.975; 2) = 4.3027, of differences -0.01, 0.00 and 0.01."""
    still = {"": 0.5, "_difference": 0.0, "_apart": 0.0, "_most_apart": 0.0}
    rows = [
        {f"{kind}{name}": value for kind in ("local", "control") for name, value in still.items()}
        | {
            "rival": 0.5,
            "ours": 0.5 + one,
            "ours_difference": one,
            "ours_apart": 0.03 + one,
            "ours_most_apart": 0.1 - one,
        }
        for one in (-0.01, 0.0, 0.01)
    ]
    values = bench.over_seeds(rows)
    assert values["ours_ci"] == [-0.0248, 0.0248]
    assert (values["ours_difference"], abs(values["ours_largest"]), values["ratio"]) == (0.0, 0.01, 1.0)
    assert (values["ours_apart"], values["ours_most_apart"]) == (0.03, 0.11)
    assert "ours_ci" not in bench.over_seeds(rows[:1])
    lone = {name: value for name, value in rows[0].items() if "local" not in name and "control" not in name}
    assert set(bench.over_seeds([lone])) == {
        "rival", "ours", "ours_difference", "ours_largest", "ours_apart", "ours_most_apart", "ratio",
    }  # fmt: skip


def test_a_run_that_is_done_is_not_done_again(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def start(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 3, "", "no such finding")

    monkeypatch.setattr(bench.subprocess, "run", start)
    done = left(tmp_path / "done", {"alpha": 0.5}, 1.0)
    assert bench.run(tmp_path / "store", "demo", (), 0, done) == done
    assert asked == []
    with pytest.raises(ConfigError, match="ended with 3: no such finding"):
        bench.run(tmp_path / "store", "demo", ("threads=2",), 5, tmp_path / "new")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "simulation.json").write_text("{}")
    with pytest.raises(ConfigError):
        bench.run(tmp_path / "store", "demo", (), 5, tmp_path / "begun")
    assert asked[0][:3] == [sys.executable, "-m", "sim.cli"]
    assert asked[0][-2:] == ["--set", "threads=2"]
    assert "--resume" not in asked[0]
    assert asked[1][3:] == ["--out", str(tmp_path / "begun"), "--workers", "1", "--resume"]  # refused with more
