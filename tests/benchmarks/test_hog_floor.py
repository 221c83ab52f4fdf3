from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image is not installed (the extra `bench`)")
pytest.importorskip("chexfound.data.sources", reason="the store is not there to read images with")

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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/hog_floor.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


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
    assert "'Pnumonia': no image has a label for it; there are No Finding, Pneumonia" in done.stderr
    assert "Traceback" not in done.stderr
