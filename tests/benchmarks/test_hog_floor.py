from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.patience import PATIENCE_S

pytest.importorskip("skimage", reason="scikit-image is not installed (the extra `bench`)")
pytest.importorskip("chexfound.data.intake.ingest", reason="the store is not there to read images with")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Two sources whose positives have upright stripes, and one that labels nothing."""
    from PIL import Image

    generator = np.random.default_rng(0)
    rows = ["file,source,patient_id,findings"]
    for source in ("a", "b", "mute"):
        (tmp_path / source).mkdir()
        for number in range(120):
            image = 90 + 60 * (np.indices((64, 64))[number % 2] // 4 % 2) + generator.normal(0, 10, (64, 64))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / source / f"{number}.png")
            finding = "" if source == "mute" else ("No Finding", "Pneumonia")[number % 2]
            rows.append(f"{source}/{number}.png,{source},{source}-{number},{finding}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    labelled = {"a": ["Pneumonia", "No Finding"], "b": ["Pneumonia", "No Finding"]}
    (tmp_path / "labelled.json").write_text(json.dumps(labelled))
    return tmp_path


@pytest.fixture
def simulated(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`simulated(reached, finding)`: a run's folder whose centralized arm reaches that AUROC at both sources."""
    from chexfound.data.intake.ingest import ingest

    def make(reached: float | None, finding: str = "Pneumonia") -> Path:
        for name in ("manifest.csv", "labelled.json"):
            (stripes / name).write_text((stripes / name).read_text().replace("Pneumonia", finding))
        out = tmp_path_factory.mktemp("run")
        ingest(stripes, out / "store", 128)
        options = {"data": str(stripes), "by": "source", "seeds": [0, 1], "arms": ["centralized"], "recipe": {}}
        (out / "simulation.json").write_text(json.dumps(options))
        row = {"arm": "centralized", "finding": finding, "auroc": reached, "n": 20, "positives": 10}
        results = [{**row, "tested_on": site} for site in ("a", "b")]
        metrics = {"schema": 1, "seed": 0, "results": results, "replicates": [{"seed": 1, "results": results}]}
        (out / "metrics.json").write_text(json.dumps({**metrics, "void": None}))
        return out

    return make


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/hog_floor.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def test_edges_are_found_at_each_source_and_told_as_json(stripes):
    done = run("--data", str(stripes), "--seeds", "0,1", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["seed"], line["tested_on"]) for line in lines] == [(s, n) for s in (0, 1) for n in ("a", "b", "mute")]
    for line in lines:
        assert (line["name"], line["finding"], line["trained_on"]) == ("hog_floor", "Pneumonia", ["a", "b"])
        if line["tested_on"] == "mute":
            assert (line["n"], line["auroc"], line["reason"]) == (0, None, "no labelled held-out image")
        else:
            assert line["auroc"] > 0.95
            assert line["auroc_ci"][0] <= line["auroc"] <= line["auroc_ci"][1]
    assert str(stripes) not in done.stdout


def test_an_unknown_finding_is_told_with_those_that_there_are(stripes):
    done = run("--data", str(stripes), "--finding", "Pnumonia")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "'Pnumonia': no image has a label for it; there are No Finding, Pneumonia" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("reached", "void"), [(0.6, True), (0.999, False)])
def test_a_run_is_held_against_the_floor_and_its_report_has_the_figures(simulated, reached, void):
    out = simulated(reached)
    done = run("--run", str(out), "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(row["finding"], row["tested_on"], row["seeds"]) for row in metrics["floor"]] == [
        ("Pneumonia", "a", [0, 1]),
        ("Pneumonia", "b", [0, 1]),
    ]
    assert all(row["ours"] == pytest.approx(reached) and row["rival"] > 0.95 for row in metrics["floor"])
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["ours"], line["rival"]) for line in told] == [(row["ours"], row["rival"]) for row in metrics["floor"]]
    assert (metrics["void"] is not None) == void
    page = (out / "report.html").read_text()
    assert ("This comparison is void." in page) == void
    assert f'<td class="number">{reached:.3f}</td>' in page


def test_a_run_without_pneumonia_is_judged_by_the_finding_that_leads_it(simulated):
    out = simulated(0.6, "Effusion")
    assert run("--run", str(out)).returncode == 0
    assert {row["finding"] for row in json.loads((out / "metrics.json").read_text())["floor"]} == {"Effusion"}


@pytest.mark.parametrize(
    ("arm", "said"), [("federated", "has no centralized arm"), ("centralized", "no site has a figure of both")]
)
def test_a_run_with_nothing_to_hold_against_the_floor_is_left_as_it_is(simulated, arm, said):
    out = simulated(None)
    text = (out / "metrics.json").read_text().replace("centralized", arm)
    (out / "metrics.json").write_text(text)
    done = run("--run", str(out))
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert (out / "metrics.json").read_text() == text


def test_a_folder_without_a_run_is_told(tmp_path):
    done = run("--run", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
