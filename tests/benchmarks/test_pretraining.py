"""The benchmarks of pretraining and of heads on it, on three hospitals: they run, keep what is done, say what it is."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.durable.journal import read_journal
from chexfound.evaluate.scores import Scores

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)  # a benchmark silences its process


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_images: Path, tiny_recipe_file: Path) -> Callable:
    """`command("ssl_learns", "--seeds", "3")`: (exit code, its JSON lines, its errors)."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # as when it is run by path: one uses another

    def run(name: str, *arguments: str, json_lines: bool = True, judged: Any = None) -> tuple[int, Any, str]:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        if judged is not None:
            monkeypatch.setattr(module, "_judged", judged)
        given = ["--data", str(tiny_images), "--recipe", str(tiny_recipe_file), "--finding", "Blob", *arguments]
        monkeypatch.setattr(sys, "argv", [name, *given, *(["--json"] if json_lines else [])])
        code = module.main()
        out, errors = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()] if json_lines else out, errors

    return run


def test_variants_are_pretrained_probed_and_kept(command: Callable, tmp_path: Path) -> None:
    names = ["random", "average", "rederive", "iid", "one-share"]
    tiny = ["--work", str(tmp_path / "work"), "--set", "train.rounds=1", "--set", "train.pooled_batch_size=12"]
    code, rows, errors = command("federated_ssl", *tiny, "--variants", ",".join(names))
    assert code == 0, errors
    assert [row["variant"] for row in rows] == names
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        assert set(row["auroc"]) == set(row["auroc_plain"]) == {"alpha", "beta"}  # gamma labels no Blob
        assert all(0 <= area <= 1 for area in row["auroc"].values())
        assert str(tmp_path) not in json.dumps(row)
    assert set(by_name["average"]["dino_less_log_k"]) == {"alpha", "beta", "gamma"}
    assert 0 < by_name["rederive"]["bytes_up"] < by_name["average"]["bytes_up"]
    assert by_name["one-share"]["bytes_up"] == 0
    assert by_name["random"]["dino_less_log_k"] == {}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")}
    code, again, _ = command("federated_ssl", *tiny, "--variants", ",".join(names))
    assert (code, again) == (0, rows)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")} == before
    code, table, _ = command("federated_ssl", *tiny, "--variants", "random,average", json_lines=False)
    assert "| variant | seeds | alpha | beta | DINO − log K | s | MB up |" in table
    grid, plain = (by_name["average"][key]["alpha"] for key in ("auroc", "auroc_plain"))
    assert f"| average | 0 | {grid:.3f} ({plain:.3f}) |" in table


def test_a_row_of_another_recipe_is_measured_anew(command: Callable, tmp_path: Path) -> None:
    asked = ["--work", str(tmp_path), "--variants", "random"]
    _, (first,), _ = command("federated_ssl", *asked)
    _, (second,), _ = command("federated_ssl", *asked, "--set", "adapt.glori_grid=2")
    assert first["auroc"] != second["auroc"]
    assert first["auroc_plain"] == second["auroc_plain"]


def test_unknown_variants_and_findings_are_told(command: Callable, tmp_path: Path) -> None:
    code, _, errors = command("federated_ssl", "--work", str(tmp_path), "--variants", "avarage")
    assert code == 2
    assert "error: --variants 'avarage': there are random, average" in errors
    for name, more in (("federated_ssl", ["--work", str(tmp_path), "--variants", "random"]), ("ssl_learns", [])):
        code, _, errors = command(name, "--finding", "Blub", *more)
        assert code == 2
        assert "error: --finding 'Blub': there are Bar, Blob, No Finding" in errors


def test_the_difference_is_that_of_the_areas(command: Callable) -> None:
    code, rows, errors = command("ssl_learns", "--seeds", "0,1", "--set", "train.rounds=1")
    assert code == 0, errors
    assert {(row["pooling"], row["tested_on"]) for row in rows} == {
        (p, s) for p in ("plain", "grid") for s in ("alpha", "beta")
    }
    for row in rows:
        assert (row["unit"], row["steps"], row["finding"]) == ("AUROC", 2, "Blob")
        assert row["cpu_s"] > 0
        pairs = [pair for pair in row["by_seed"] if None not in pair]
        assert row["difference"] == pytest.approx(sum(ours - rival for ours, rival in pairs) / len(pairs), abs=1e-3)
        assert row["holds"] == (row["ci"] is not None and row["ci"][0] > 0)
        assert not any(math.isnan(value) for pair in pairs for value in pair)
    code, text, _ = command("ssl_learns", "--seeds", "0", "--set", "train.rounds=1", json_lines=False)
    assert "does not hold" in text or "holds" in text
    assert "alpha" in text


def test_a_seed_without_a_class_at_a_source_is_left_out_there(command: Callable) -> None:
    """As covid-chestxray, whose few negatives may all fall to the training patients."""

    def judged(recipe: Any, store: Any, finding: str) -> Any:
        patients, labels = [f"p{number}" for number in range(8)], np.array([[1], [0]] * 4, np.int8)
        scored = {
            "pretrained": Scores(patients, labels, labels.astype(np.float32), [finding]),
            "random": Scores(patients, labels, np.zeros((8, 1), np.float32), [finding]),
        }
        sources = ["alpha", "rare"] if recipe.seed == 1 else ["alpha"]
        return {(p, arm): dict.fromkeys(sources, one) for p in ("plain", "grid") for arm, one in scored.items()}

    code, rows, errors = command("ssl_learns", "--seeds", "0,1,2", judged=judged)
    assert code == 0, errors
    plain = {row["tested_on"]: row for row in rows if row["pooling"] == "plain"}
    assert {name: row["seeds"] for name, row in plain.items()} == {"alpha": [0, 1, 2], "rare": [1]}
    assert (plain["alpha"]["ours"], plain["alpha"]["rival"], plain["alpha"]["difference"]) == (1.0, 0.5, 0.5)
    assert plain["alpha"]["holds"]


def test_heads_of_each_kind_are_compared_on_one_backbone(command: Callable, tmp_path: Path) -> None:
    work = tmp_path / "work"
    asked = ["--work", str(work), "--seeds", "0,1"]
    asked += [word for key in ("train.rounds=1", "adapt.rounds=1") for word in ("--set", key)]
    code, rows, errors = command("token_norm", *asked)
    assert code == 0, errors
    sites = ("alpha", "beta")  # gamma labels no Blob
    assert [(row["kind"], row["tested_on"]) for row in rows] == [
        (kind, site) for kind in ("image", "learned") for site in sites
    ]
    for row in rows:
        assert row["difference"] == pytest.approx(row["ours"] - row["rival"], abs=2e-4)
        assert row["seeds"] == [0, 1]
        assert [first for first, _ in row["by_seed"]] == [
            first for first, _ in next(one for one in rows if one["tested_on"] == row["tested_on"])["by_seed"]
        ]
    for seed in (0, 1):
        starts = [
            read_journal(path)[0]
            for path in sorted((work / f"seed-{seed}").glob("token-norm-*/federated/journal.jsonl"))
        ]
        assert len(starts) == 3
        assert len({start["backbone_sha256"] for start in starts}) == 1
    before = (work / "seed-0" / "average" / "backbone.safetensors").stat().st_mtime_ns
    assert command("token_norm", *asked)[1] == rows
    assert (work / "seed-0" / "average" / "backbone.safetensors").stat().st_mtime_ns == before
