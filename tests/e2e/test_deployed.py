"""Flower's deployment engine, with real processes: the same bits as in process, and nothing else leaves a site."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import chexfound
from chexfound.durable.journal import read_journal
from chexfound.host import logs
from chexfound.model import checkpoint
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.report import build

pytestmark = pytest.mark.e2e

SECRET = "ward-seven"  # in the path of B's images  # noqa: S105


class Deployed:
    """What the one federation of this module left."""

    def __init__(self) -> None:
        self.failed = ""  # output of the run in which B had lost its images
        self.superlink = ""
        self.stopped = ""  # output of the run that was stopped after a round
        self.streams: list[str] = []
        self.folders: list[Path] = []
        self.hashes: dict[int, str] = {}  # in process, by number of workers
        self.site_b = ""
        self.exit_code_a: int | None = None


@pytest.fixture(scope="module")
def deployed(
    federation: Any,
    make_site: Callable[..., Path],
    simulate: Callable[..., str],
    recipe: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Deployed:
    """One federation for all tests: each round costs Flower's polls and a process a message."""
    images, result = tmp_path_factory.mktemp("images"), Deployed()
    a = make_site(images / "a", "A", 40, 80)
    b = make_site(images / SECRET, "B", 44, 80)  # of whom 20 train, as the policy asks for
    run_config = federation.folder / "recipe.toml"
    run_config.write_text(recipes.to_run_config(recipe))
    superlink = federation.superlink()
    client = federation.client("A", a, federation.folder / "hospital-a", recipe.image_px)

    # A alone: the run waits for min_sites.  B comes, but its images are gone.
    first = federation.run("run-without-images", run_config)
    first.wait_for("event=wait sites=1 of=2")
    gone = b.rename(b.with_name("elsewhere"))
    node = federation.supernode("B", b, federation.folder / "hospital-b")
    first.wait_for("event=failed")
    first.wait()
    result.failed = first.text
    gone.rename(b)

    # The same two nodes go on, with the simulations beside the first run.  Pretraining is done again, and
    # stopped after its first round; another run goes on from what it left.
    again = federation.folder / "again.toml"
    run_dir = federation.folder / "again"
    again.write_text(recipes.to_run_config(replace(recipe, phases=("pretrain",))) + f'run-dir = "{run_dir}"\n')
    runs = [federation.run("run-1", run_config)]
    for workers in (1, 2):
        result.hashes[workers] = simulate(images, tmp_path_factory.mktemp("sim"), workers)
    runs[0].wait()
    stopped = federation.run("run-stopped", again)
    stopped.wait_for("event=round phase=pretrain round=1")
    found = re.search(r"event=begin run=(\d+)", stopped.text)
    assert found
    federation.stop_run(found[1])
    stopped.wait()
    result.stopped = stopped.text
    runs.append(federation.run("run-2", again))
    runs[1].wait()
    assert node.running
    result.site_b = node.text
    result.exit_code_a = client.stop()
    result.streams = [run.text for run in runs]
    result.superlink = superlink.text
    for text in result.streams:
        found = re.search(r"event=written folder=(\S+)", text)
        assert found, text[-6000:]
        result.folders.append(Path(found[1]))
    return result


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_deployed_and_in_process_give_the_same_bits(deployed: Deployed) -> None:
    assert metrics(deployed.folders[0])["model_sha256"]["federated"] == deployed.hashes[1]
    assert deployed.hashes[2] == deployed.hashes[1]


def test_stopped_and_resumed_gives_the_same_bits(deployed: Deployed) -> None:
    rounds = [
        re.findall(r"event=round phase=pretrain round=(\d)", text) for text in (deployed.stopped, *deployed.streams)
    ]
    assert rounds == [["1"], ["1", "2"], ["2"]]
    resumed = "event=resume pretrain_rounds_done=1 adapt_rounds_done=0"
    assert [resumed in text for text in deployed.streams] == [False, True]
    backbones = [
        checkpoint.with_prefix(checkpoint.load(folder / "model.safetensors"), "backbone.")
        for folder in deployed.folders
    ]
    assert backbones[0]
    assert checkpoint.digest(backbones[0]) == checkpoint.digest(backbones[1])


def test_a_run_leaves_what_the_report_needs(deployed: Deployed, recipe: Recipe, federation: Any) -> None:
    folder = deployed.folders[0]
    assert folder.parent == federation.home / "runs"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "journal.jsonl", "model.safetensors", "metrics.json", "history.json", "sites.json"}
    written = metrics(folder)
    assert checkpoint.digest(checkpoint.load(folder / "model.safetensors")) == written["model_sha256"]["federated"]
    assert (written["sites"], written["findings"]) == (["A", "B"], ["Nodule"])
    assert {(row["arm"], row["tested_on"], row["finding"]) for row in written["results"]} == {
        ("federated", "A", "Nodule"), ("federated", "B", "Nodule"),
    }  # fmt: skip
    assert all(row["auroc"] is not None for row in written["results"])
    assert chexfound.load_head(folder / "model").findings == ("Nodule",)
    assert recipes.load(str(folder / "recipe.yaml")) == recipe
    assert read_journal(folder / "journal.jsonl")[-1]["event"] == "done"
    page = build.build(folder).read_text()
    assert "Nodule" in page
    assert written["model_sha256"]["federated"][:12] in page


def test_the_log_is_one_line_a_round(deployed: Deployed, recipe: Recipe) -> None:
    text = deployed.streams[0]
    assert len(re.findall(r"event=round phase=pretrain", text)) == recipe.train.rounds
    assert len(re.findall(r"event=round phase=adapt", text)) == recipe.adapt.rounds
    assert "Traceback" not in text


def test_a_site_that_fails_sends_a_code_and_stays(deployed: Deployed, federation: Any) -> None:
    assert re.search(
        r"event=failed error=site exit_code=7 node \d+ in enrol: replied with error 'data' \(exit code 3\)",
        deployed.failed,
    )
    reasons = federation.folder / "hospital-b" / "sites" / "B" / logs.REASONS
    assert SECRET in reasons.read_text()  # of the site, for its account only; its log says where
    assert f"phase=enrol error=data; the reason may name patients or files, and is in {reasons}" in deployed.site_b
    for text in (deployed.failed, deployed.superlink, *deployed.streams):
        assert SECRET not in text
        assert "no such folder" not in text
        assert str(federation.folder / "hospital-b") not in text
    begun = re.search(r"event=begin run=\S+ folder=(\S+)", deployed.failed)
    assert begun
    assert not (Path(begun[1]) / "metrics.json").exists()


def test_the_client_ends_cleanly(deployed: Deployed, federation: Any) -> None:
    assert deployed.exit_code_a == 0
    log = (federation.folder / "client-A.log").read_text()
    assert "40 new images of 40 patients" in log
    assert "site A: stopped" in log
