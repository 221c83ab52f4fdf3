"""metrics.json of a deployed run, as the report reads it."""

from __future__ import annotations

from chexfound import recipe as recipes
from chexfound.journal import Journal
from chexfound.report.build import build
from server.exchange import Member
from server.result import write_metrics
from server.run import Outcome


def test_the_report_of_a_deployed_run_says_what_is_not_known_and_nothing_false(tmp_path):
    values = {"site": "a", "images": 9, "patients": 8, "train": 5, "val": 2, "test": 2, "findings": {}}
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"event": "start", "roster": [values]})
    row = {"arm": "federated", "tested_on": "a", "finding": "Mass", "n": 2, "positives": 1}
    row |= {"auroc": 0.8, "auroc_ci": [0.7, 0.9]}
    outcome = Outcome(
        roster=[Member(name="a", values=values)],
        findings=("Mass",),
        tensors={},
        model_sha256="0" * 64,
        results=[row],
    )
    write_metrics(tmp_path, recipes.load("demo"), outcome)
    page = build(tmp_path).read_text()
    assert "A deployed run trains the federated arm only" in page
    assert "No image leaves a site" in page
    assert "would need the pooled images" not in page
    assert ".npz" not in page
