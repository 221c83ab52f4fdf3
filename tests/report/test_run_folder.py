"""Reading a run's folder: metrics.json must be sound, the rest may be absent."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chexfound.errors import DataError
from chexfound.report.run_folder import read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object, not list"),
        ('{"schema": 1, "results": [{"auroc": NaN}]}', "NaN is not a figure"),
        ('{"results": []}', "schema None is unknown"),
        ('{"schema": 2, "results": []}', r"schema 2 is unknown \(this version reads 1\)"),
        ('{"schema": 1}', "results"),
        ('{"schema": 1, "results": 3}', "results: .*list"),
        ('{"schema": 1, "results": [{"arm": "federated"}]}', "2 problems"),
        (
            '{"schema": 1, "results": [{"arm": "a", "tested_on": "b", "finding": "c", "auroc_ci": [0.9, 0.1]}]}',
            "lower end is above",
        ),
        (
            '{"schema": 1, "results": [{"arm": "a", "tested_on": "b", "finding": "c", "auroc_ci": [0.9]}]}',
            "auroc_ci",
        ),
        (
            '{"schema": 1, "results": [{"arm": "a", "tested_on": "b", "finding": "c", "auroc": "high"}]}',
            "auroc.*'high'",
        ),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_damaged_metrics_are_refused_clearly(tmp_path, text, said):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read(tmp_path)


def test_missing_metrics_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="metrics.json: no such file; a report is made from a finished run"):
        read(tmp_path)


def test_unknown_keys_and_empty_intervals_pass(tmp_path):
    row = {
        "arm": "federated",
        "tested_on": "a",
        "finding": "f",
        "auroc": None,
        "auroc_ci": [None, None],
        "new": 1,
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"schema": 1, "results": [row], "later": {}}))
    run = read(tmp_path)
    assert run.result("federated", "a", "f").auroc_ci is None
    assert (run.site_names, run.findings, run.arms) == (["a"], ["f"], ["federated"])
    assert set(run.absent) == {"history", "sites", "recipe", "samples", "attention"}


def test_a_complete_run_is_read_whole(make_run):
    run = read(make_run(steps=300))
    assert run.absent == {}
    assert run.pretrain_steps == 300
    assert run.confidence == 0.95
    assert run.arms[:2] == ["federated", "centralized"]
    assert run.arms[-8:-4] == ["random", "shuffled", "site-view", "histogram"]
    assert run.arms[-4:] == [f"histogram:{name}" for name in ("linear", "boosted", "pooled", "pooled-boosted")]
    assert run.result("histogram", run.site_names[0], "Effusion").variant == "boosted"


def test_steps_come_from_the_history_where_the_recipe_is_absent(make_run):
    out = make_run(steps=300)
    (out / "recipe.yaml").unlink()
    assert read(out).pretrain_steps == 300  # the fixture's last point, and one
    (out / "history.json").unlink()
    assert read(out).pretrain_steps is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("history.json", b"{", "history.json cannot be read"),
        (
            "history.json",
            b'{"pretrain": {"federated": [{"site": "a"}]}}',
            "history.json is damaged: pretrain.federated.0.step",
        ),
        ("history.json", b'{"pretrain": {"federated": [{"step": 1, "dino": NaN}]}}', "NaN is not a figure"),
        ("sites.json", b'{"a": 1}', "sites.json is damaged"),
        ("recipe.yaml", b"- a", "recipe.yaml cannot be read: it is not a mapping"),
        ("recipe.yaml", b"\xff\xfe\x00", "recipe.yaml cannot be read"),
        ("artifacts/samples.npz", b"PK\x03\x04torn", "artifacts/samples.npz cannot be read"),
        ("artifacts/attention.npz", b"", "artifacts/attention.npz cannot be read"),
        ("artifacts/attention.json", b'{"findings": ["one"]}', "do not fit"),
        ("artifacts/attention.json", b"[]", "attention.npz is damaged"),
    ],
)
def test_a_damaged_part_is_absent_with_its_reason(make_run, name, content, said):
    out = make_run()
    (out / name).write_bytes(content)
    assert [said in reason for reason in read(out).absent.values()] == [True]


def test_samples_take_their_sites_names_from_beside_them(make_run):
    out = make_run()
    assert list(read(out).samples) == read(out).site_names
    (out / "artifacts/samples.json").unlink()
    assert list(read(out).samples) == ["site 0", "site 1", "site 2", "site 3"]


def test_pickles_are_not_loaded(make_run):
    out = make_run()
    np.savez(out / "artifacts/samples.npz", a=np.array([{}], dtype=object))
    assert "cannot be read" in read(out).absent["samples"]
