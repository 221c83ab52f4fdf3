from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from chexfound.durable.journal import Journal
from chexfound.errors import CheckpointError, ConfigError, SiteError
from chexfound.recipe import load as recipes
from client.home import membership
from server import app, cli
from server.runs import folders
from server.runs import submit as runs_submit
from server.runs.folders import RunFolder
from server.runs.live import Live


def test_what_is_submitted_is_the_recipe_and_the_folder(thorax, flwr, recipe, tmp_path: Path) -> None:
    backbone = tmp_path / "b.safetensors"
    backbone.write_bytes(b"")
    run = runs_submit.create(thorax, recipe, None, backbone)
    assert run.name.startswith("it-s-tiny-20")
    assert runs_submit.submit(run) == "100"
    config = tomllib.loads(flwr.configs[0])
    assert recipes.from_run_config(config) == recipe
    about = run.about()
    assert about is not None
    token = about["flower_runs"][0]["submission"]
    assert config == {
        "recipe": config["recipe"],
        "run-dir": str(run.path),
        "backbone": str(backbone),
        "submission": token,
    }
    assert (about["rounds"], about["backbone"]) == ({"pretrain": 3, "adapt": 1}, str(backbone))
    assert run.flower_run() == "100"
    assert {path.name for path in run.path.iterdir()} == {"run.json", "run.toml", "recipe.yaml"}


def test_names_are_unique(thorax, flwr, recipe) -> None:
    assert len({runs_submit.create(thorax, recipe, None, None).name for _ in range(3)}) == 3
    runs_submit.create(thorax, recipe, "first", None)
    with pytest.raises(ConfigError, match="there is a run 'first' already.*chexfound-server resume .* first"):
        runs_submit.create(thorax, recipe, "first", None)


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a\nb", "a" * 65])
def test_names_that_cannot_be(thorax, recipe, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        runs_submit.create(thorax, recipe, name, None)
    assert not thorax.path("runs").exists() or not any(thorax.path("runs").iterdir())


def test_what_cannot_begin_is_not_made(thorax, recipe) -> None:
    masked = recipes.load("demo", {"aggregation": "secagg"})
    with pytest.raises(ConfigError, match=r"3 to 128 sites; this federation has 2"):
        runs_submit.create(thorax, masked, None, None)
    many = recipes.load("demo", {"federation.min_sites": 3})
    with pytest.raises(ConfigError, match=r"min_sites 3 sites, and the federation has 2.*min_sites=2"):
        runs_submit.create(thorax, many, None, None)
    summed = recipes.load("demo", {"federation.min_sites": 2, "aggregation": "secagg"})
    with pytest.raises(ConfigError, match="3 to 128 sites; this federation has 2"):
        runs_submit.create(thorax, summed, None, None)
    with pytest.raises(ConfigError, match="--backbone.*no such file"):
        runs_submit.create(thorax, recipe, None, Path("nothing.safetensors"))
    assert folders.all_runs(thorax) == []


def test_weights_that_another_recipe_began_with_are_told(thorax, tmp_path: Path) -> None:
    for name in ("EAST", "WEST"):
        thorax.write_sites(thorax.sites().with_site(name, membership.make_keys(tmp_path / name)[0]))
    local = {"aggregation": "secagg", "train.optimizer_state": "local", "adapt.optimizer_state": "local"}

    def masked(**values: Any) -> Any:
        return recipes.load("demo", local | {key.replace("__", "."): value for key, value in values.items()})

    first = runs_submit.create(thorax, masked(), "first", None)
    other = masked(train__rounds=3)
    assert runs_submit.check_beginning(thorax, other, None) is None  # no sum was opened
    with Journal(first.path / "journal.jsonl") as journal:
        journal.append({"event": "round", "phase": "pretrain", "round": 0})
    told = runs_submit.check_beginning(thorax, other, None)
    assert told is not None
    assert told.startswith("run first began with the same weights")
    assert told.endswith("--set seed=1")
    for fine in (masked(), masked(name="another"), masked(adapt__lr=1e-4), masked(train__rounds=3, seed=1)):
        assert runs_submit.check_beginning(thorax, fine, None) is None
    assert runs_submit.check_beginning(thorax, masked(train__rounds=3, student__arch="vit_small"), None) is None
    assert runs_submit.check_beginning(thorax, other, tmp_path / "backbone.safetensors") is None
    assert runs_submit.check_beginning(thorax, recipes.load("demo", {"train.rounds": 3}), None) is None  # in the clear
    (first.path / "run.json").write_text("x")
    assert runs_submit.check_beginning(thorax, other, None) is None


def test_the_runs_of_the_docs_can_be(thorax, tmp_path: Path) -> None:
    """Those of two sites, with a quorum the one of three, and under masks the one of four."""
    for name in ("EAST", "WEST"):
        thorax.write_sites(thorax.sites().with_site(name, membership.make_keys(tmp_path / name)[0]))
    text = (Path(__file__).parents[3] / "docs" / "coordinator.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^\$ (chexfound-server run .*)$", text, re.MULTILINE)
    assert len(lines) > 2
    for line in lines:
        given = cli.parser().parse_args(shlex.split(line)[1:])
        runs_submit.create(thorax, recipes.load(given.recipe, recipes.parse_overrides(given.set)), None, None)


def test_the_latest_is_chosen_and_a_doubt_is_told(thorax, recipe) -> None:
    with pytest.raises(ConfigError, match="there is no run; chexfound-server run starts one"):
        folders.choose(thorax, None)
    for number, name in enumerate(("b", "a")):
        made = runs_submit.create(thorax, recipe, name, None)
        os.utime(made.path / "run.json", (number, number))
    assert folders.choose(thorax, None).name == "a"
    assert folders.choose(thorax, "b").name == "b"
    with pytest.raises(ConfigError, match="there is no finished run"):
        folders.choose(thorax, None, done=True)
    (made.path / "metrics.json").write_text("{}")
    assert folders.choose(thorax, None, done=True).name == "a"
    with pytest.raises(ConfigError, match="no run 'c'; the latest are b, a"):
        folders.choose(thorax, "c")


def test_the_one_that_is_going_is_chosen_to_be_stopped(submitted, flwr, recipe) -> None:
    other = runs_submit.create(submitted.federation, recipe, "other", None)
    assert folders.choose_going(submitted.federation, None) == submitted
    runs_submit.submit(other)
    with pytest.raises(ConfigError, match="Going are first, other; name one"):
        folders.choose_going(submitted.federation, None)
    assert folders.choose_going(submitted.federation, "other") == other
    flwr.statuses = dict.fromkeys(flwr.statuses, "finished:stopped")
    with pytest.raises(ConfigError, match="no run is going"):
        folders.choose_going(submitted.federation, None)


def test_a_refused_submission_can_be_made_again(thorax, flwr, recipe) -> None:
    run = runs_submit.create(thorax, recipe, "first", None)
    flwr.down = True
    with pytest.raises(SiteError):
        runs_submit.submit(run)
    flwr.down = False
    assert runs_submit.resubmit(run) == run.flower_run() == "100"


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "unknown"])
def test_a_run_that_ended_is_submitted_again_as_it_was(submitted: RunFolder, flwr: Any, status: str) -> None:
    if status == "unknown":
        flwr.statuses = {"7": "running"}
    else:
        flwr.statuses["100"] = status
    assert runs_submit.resubmit(submitted) == "101"
    assert submitted.flower_run() == "101"
    first, second = map(tomllib.loads, flwr.configs)
    assert first.pop("submission") != second.pop("submission")
    assert first == second


@pytest.mark.parametrize("status", ["pending", "starting", "running"])
def test_a_run_that_goes_on_is_left_alone(submitted: RunFolder, flwr: Any, live: Any, status: str) -> None:
    flwr.statuses["100"] = status
    if status == "running":
        live(submitted, "pretrain")
    with Journal(submitted.path / "journal.jsonl"):  # as its ServerApp has it open
        with pytest.raises(ConfigError, match=f"run 'first' is {status}; see it with .* watch .* first"):
            runs_submit.resubmit(submitted)
    assert flwr.statuses == {"100": status}


def test_two_resumes_at_once_are_one(submitted: RunFolder, flwr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two ServerApps share the folder, and the one that goes on is the one that nobody finds to stop."""
    flwr.statuses["100"] = "finished:failed"
    submit = runs_submit._submit

    def meanwhile(run: RunFolder) -> str:
        with pytest.raises(ConfigError, match="'first' is being submitted by another command"):
            runs_submit.resubmit(run)
        return submit(run)

    monkeypatch.setattr(runs_submit, "_submit", meanwhile)
    assert runs_submit.resubmit(submitted) == "101"
    assert len(flwr.statuses) == 2


def test_a_second_serverapp_leaves_the_first_ones_word(submitted, live, monkeypatch) -> None:
    live(submitted, "pretrain")
    before = (submitted.path / "live.json").read_bytes()
    monkeypatch.setattr(app.logs, "show", lambda: None)
    context = Context(
        run_id=2, node_id=1, node_config={}, state=RecordDict(), run_config={"run-dir": str(submitted.path)}
    )
    with Journal(submitted.path / "journal.jsonl"), pytest.raises(ConfigError, match="another process works at"):
        app.main(object(), context)
    assert (submitted.path / "live.json").read_bytes() == before


def test_who_refused_is_waited_for_no_more(submitted: RunFolder) -> None:
    told = Live(submitted.path, "100")
    told({"event": "asked", "phase": "enrol", "round": 0, "sites": ["NORTH", "SOUTH"]})
    told({"event": "refused", "phase": "enrol", "round": 0, "site": "SOUTH", "reason": "code"})
    assert (told.values["waiting_for"], told.values["replied"]) == (["NORTH"], [])


def test_a_full_disk_costs_what_is_shown_alone(submitted: RunFolder) -> None:
    """And never the error's text, which is logged after it was shown."""
    (submitted.path / ".live.json.tmp").mkdir()
    told = Live(submitted.path, "100")
    told({"event": "asked", "phase": "enrol", "round": 0, "sites": ["NORTH"]})
    told.failed(SiteError("x"))
    assert told.values["state"] == "failed"


def test_a_run_whose_serverapp_was_killed_is_stopped_first(submitted, flwr, live) -> None:
    """Flower lists it as running for a minute more."""
    live(submitted, "pretrain", killed=True)
    Journal(submitted.path / "journal.jsonl").close()
    assert runs_submit.resubmit(submitted) == "101"
    assert flwr.statuses["100"] == "finished:stopped"


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_serverapp_that_is_just_ending_is_not_stopped(submitted, live, flwr, state: str) -> None:
    live(submitted, state)
    with pytest.raises(ConfigError, match="is running"):
        runs_submit.resubmit(submitted)


def test_a_run_that_is_done_is_not_resumed(submitted: RunFolder) -> None:
    (submitted.path / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match="is done: chexfound-server report"):
        runs_submit.resubmit(submitted)


def test_stop_waits_for_the_serverapp(submitted, flwr, monkeypatch) -> None:
    assert runs_submit.stop(submitted)
    assert flwr.statuses == {"100": "finished:stopped"}
    assert not runs_submit.stop(submitted)
    flwr.statuses["100"] = "running"
    monkeypatch.setattr(runs_submit, "END_S", 0.0)
    with Journal(submitted.path / "journal.jsonl"):
        with pytest.raises(SiteError, match="its ServerApp has not ended"):
            runs_submit.stop(submitted)


@pytest.mark.parametrize("text", ["[", "[]", '{"schema": 2}', '{"schema": 1, "recipe": 3}'])
def test_a_damaged_run_is_told(submitted: RunFolder, text: str) -> None:
    (submitted.path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        submitted.about()


def test_a_run_by_hand_is_known_by_its_folder_or_by_what_it_says(thorax, live, flwr) -> None:
    for name, number in (("123", "123"), ("mine", None)):
        run = RunFolder(thorax, name)
        run.path.mkdir(parents=True)
        assert run.flower_run() == number
        with pytest.raises(ConfigError, match=r"holds no run\.json"):
            runs_submit.resubmit(run)
    live(run, "pretrain", flower_run="77")
    assert run.flower_run() == "77"
    assert json.loads((run.path / "live.json").read_text())["schema"] == 1


def test_a_recipe_whose_optimizer_has_no_box_is_not_submitted(thorax: Any) -> None:
    """Every site would refuse it."""
    recipe = recipes.load("demo", {"optim.optimizer": "sgd", "optim.clip_grad": 0.0})
    with pytest.raises(ConfigError, match="optim.clip_grad: SGD without clipping"):
        runs_submit.create(thorax, recipe, None, None)
    assert folders.all_runs(thorax) == []
