from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chexfound import __version__
from chexfound.model import checkpoint
from chexfound.model.weights.in_parts import Weights
from chexfound.model.weights.release import folder
from chexfound.recipe import load as recipes
from client.home import membership
from server import cli
from server.federation.settings import Federation
from server.runs import follow, submit
from server.services import supervise


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "listens", lambda address: True)
    monkeypatch.setattr(supervise, "superexec_seen", lambda federation: True)


def do(thorax: Federation, command: str, *options: str) -> int:
    return cli.main([command, str(thorax.folder), *options])


def test_run_says_what_it_made_and_what_is_next(thorax, flwr, listening, capsys) -> None:
    assert do(thorax, "run", "demo", "--name", "first", "--detach", "--set", "train.rounds=7") == 0
    assert capsys.readouterr().out == (
        f"run first: submitted as Flower's 100; its folder is {thorax.path('runs')}/first\n"
        f"next: chexfound-server watch {thorax.folder} first\n"
    )
    assert json.loads((thorax.path("runs") / "first" / "run.json").read_text())["rounds"]["pretrain"] == 7


def resolved(thorax: Federation, name: str) -> str:
    return recipes.load(str(thorax.path("runs") / name / "recipe.yaml")).aggregation


def test_from_three_sites_on_a_run_is_under_masks_and_says_so(thorax, flwr, listening, capsys, tmp_path: Path) -> None:
    shared = ("--detach", "--set", "train.pooled_batch_size=36", "--set", "adapt.pooled_batch_size=66")
    assert do(thorax, "run", "demo", "--name", "two", *shared) == 0
    assert "masks" not in capsys.readouterr().out
    thorax.write_sites(thorax.sites().with_site("WEST", membership.make_keys(tmp_path / "west")[0]))
    assert do(thorax, "run", "demo", "--name", "three", *shared) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 sites: the run aggregates under masks (aggregation: secagg)")
    assert "plain: accepted" in said
    assert do(thorax, "run", "demo", "--name", "clear", *shared, "--set", "aggregation=fedavg") == 0
    written = tmp_path / "own.yaml"
    written.write_text("aggregation: fedavg\ntrain: {pooled_batch_size: 33}\nadapt: {pooled_batch_size: 66}\n")
    assert do(thorax, "run", str(written), "--name", "own", "--detach") == 0
    assert "masks" not in capsys.readouterr().out
    kinds = {name: resolved(thorax, name) for name in ("two", "three", "clear", "own")}
    assert kinds == {"two": "fedavg", "three": "secagg", "clear": "fedavg", "own": "fedavg"}


def test_ctrl_c_leaves_the_run_going(thorax, flwr, listening, capsys, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "tell", interrupted)
    assert do(thorax, "run", "demo", "--name", "first") == 130
    assert "run first goes on; see it: chexfound-server watch" in capsys.readouterr().out
    assert flwr.statuses == {"100": "pending"}
    assert do(thorax, "watch") == 130
    assert "run first goes on" in capsys.readouterr().out


def test_a_run_that_failed_ends_with_its_own_code(thorax, submitted, live, listening, capsys) -> None:
    live(submitted, "failed", error={"code": "data", "text": "no image\nat \x1bSOUTH"})
    assert do(thorax, "watch") == 3
    said = capsys.readouterr().err
    assert said.startswith("error: run first failed: no image\nat \\x1bSOUTH\n")
    assert said.rstrip().endswith(f"chexfound-server resume {thorax.folder} first")


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["dem"], "did you mean 'demo'", 2),
        (["demo", "--set", "train.round=3"], "did you mean 'train.rounds'", 2),
        (["demo"], "nothing listens at 127.0.0.1:.*chexfound-server up", 7),
    ],
)
def test_run_is_refused_before_anything_is_made(thorax, flwr, capsys, options, message: str, code: int) -> None:
    assert do(thorax, "run", *options) == code
    assert re.search(message, capsys.readouterr().err)
    assert not thorax.path("runs").exists()


def test_a_missing_superexec_is_warned_of(thorax, flwr, capsys, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "listens", lambda address: True)
    assert do(thorax, "run", "demo", "--detach") == 0
    assert "no SuperExec of this federation is seen" in capsys.readouterr().err


def test_resume_goes_on_and_tells_from_where(thorax, submitted, flwr, listening, happened, capsys) -> None:
    happened(submitted, "start", 0, 1)
    flwr.statuses["100"] = "finished:failed"
    assert do(thorax, "resume", "--detach") == 0
    out = capsys.readouterr().out
    assert "run first: submitted as Flower's 101" in out
    assert "it goes on after 2 of 3 rounds of pretrain, 0 of 1 rounds of adapt" in out


def test_without_a_name_the_one_that_can_go_on_is_gone_on_with(
    thorax, submitted, flwr, recipe, listening, live, capsys
) -> None:
    assert do(thorax, "resume") == 2  # it is going
    assert "there is no run to go on with" in capsys.readouterr().err
    for name, error in (("bad", {"code": "config", "text": "32 among 3"}), ("lost", {"code": "site", "text": "away"})):
        run = submit.create(thorax, recipe, name, None)
        flwr.statuses[submit.submit(run)] = "finished:failed"
        live(run, "failed", error=error)
    (thorax.path("runs") / "damaged").mkdir()
    (thorax.path("runs") / "damaged" / "live.json").write_text("{")
    assert do(thorax, "resume", "--detach") == 0
    assert "run lost: submitted as Flower's 103" in capsys.readouterr().out
    flwr.statuses |= {"103": "finished:stopped", "100": "finished:stopped"}
    assert do(thorax, "resume") == 2
    assert "which run? Unfinished are first, lost; name one" in capsys.readouterr().err
    assert do(thorax, "resume", "bad", "--detach") == 0  # who names it may


def test_one_whose_command_was_killed_as_it_submitted_is_followed_on(
    thorax, submitted, flwr, listening, live, capsys
) -> None:
    live(submitted, "pretrain")
    about = submitted.about()
    (submitted.path / "run.json").write_text(
        json.dumps(about | {"flower_runs": [{**about["flower_runs"][0], "id": None}]})
    )
    assert do(thorax, "resume", "--detach") == 0
    assert "run first: submitted as Flower's 100" in capsys.readouterr().out
    assert submitted.about()["flower_runs"][-1]["id"] == "100"
    assert flwr.statuses == {"100": "running"}


def test_one_whose_coordinators_side_was_killed_just_now_is_gone_on_with(
    thorax, submitted, flwr, listening, live
) -> None:
    """Flower lists it as running for a minute more."""
    live(submitted, "pretrain")
    assert do(thorax, "resume", "--detach") == 2
    live(submitted, "pretrain", killed=True)
    assert do(thorax, "resume", "--detach") == 0
    assert flwr.statuses == {"100": "finished:stopped", "101": "pending"}


def test_a_batch_that_these_sites_cannot_share_becomes_the_nearest_that_they_can(
    thorax, flwr, listening, tmp_path: Path, capsys
) -> None:
    thorax.write_sites(thorax.sites().with_site("WEST", membership.make_keys(tmp_path / "west")[0]))
    assert do(thorax, "run", "demo", "--detach", "--set", "federation.min_sites=3") == 0
    said = capsys.readouterr()
    assert "train.pooled_batch_size is 33, not 32: 3 sites take 11 images each\n" in said.out
    assert said.err == ""
    (made,) = thorax.path("runs").iterdir()
    assert yaml.safe_load((made / "recipe.yaml").read_text())["train"]["pooled_batch_size"] == 33


def test_the_version(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"chexfound-server {__version__}\n"


def test_stop(thorax, submitted, flwr, happened, capsys) -> None:
    happened(submitted, "start", 0)
    assert do(thorax, "stop") == 0
    assert capsys.readouterr().out == (
        "run first: stopped after 1 of 3 rounds of pretrain, 0 of 1 rounds of adapt\n"
        f"next: chexfound-server resume {thorax.folder} first goes on from there\n"
    )
    assert do(thorax, "stop", "first") == 0
    assert capsys.readouterr().out == "run first was not running (stopped)\n"


# ---- status


def test_status_as_json(thorax, submitted, live, happened, capsys) -> None:
    happened(submitted, "start", 0)
    live(submitted, "pretrain", round=2, rounds=3, waiting_for=["SOUTH"], replied=["NORTH"])
    assert do(thorax, "status", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"schema", "federation", "public", "processes", "certificate", "sites", "runs"}
    assert told["schema"] == 1
    assert 390 < told["certificate"]["days_left"] < 398
    assert [site["site"] for site in told["sites"]] == ["NORTH", "SOUTH"]
    assert told["runs"] == [
        {
            "run": "first", "state": "pretrain", "round": 2, "rounds": 3, "since": "2026-11-27T13:26:23+00:00",
            "done": {"pretrain": [1, 3], "adapt": [0, 1]}, "waiting_for": ["SOUTH"], "replied": ["NORTH"], "lost": [],
            "loss": 9.5, "auroc": None, "bytes": {"down": 27_000_000, "up": 26_956_752}, "flower_run": "100",
            "error": None, "model_sha256": None, "withholding": [], "warnings": [],
        }
    ]  # fmt: skip


def test_status_as_text(thorax, submitted, flwr, recipe, live, happened, capsys, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "processes", lambda held: {"superlink": "up", "superexec": "up", "guard": "down"})
    happened(submitted, "start", 0)
    live(submitted, "failed", error={"code": "site", "text": "SOUTH is gone"})
    bad, long = submit.create(thorax, recipe, "bad", None), "one " * 100 + "and its end"
    flwr.statuses[submit.submit(bad)] = "finished:failed"
    live(bad, "failed", error={"code": "config", "text": f"recipe: 2 problems:\n  - {long}\n  - \x1b"})
    (thorax.path("runs") / "old").mkdir()
    (thorax.path("runs") / "old" / "journal.jsonl").write_text("{}\n")
    assert do(thorax, "status") == 0
    out, err = capsys.readouterr()
    for line in (
        "  guard      down",
        "  NORTH: not registered at the SuperLink: chexfound-server add-site again, or up",
        "  first: failed since 2026-11-27 13:26:23Z",
        "    pretrain 1/3, adapt 0/1, loss 9.5000, down 27.0 MB, up 27.0 MB",
        "    error site: SOUTH is gone",
        f"    go on with: chexfound-server resume {thorax.folder} first",
        "    error config: recipe: 2 problems:",
        f"        - {long}",
        "        - \\x1b",
        f"    start a new run with other values: chexfound-server run {thorax.folder} RECIPE --set KEY=VALUE",
    ):
        assert line in out.splitlines()
    assert out.count("resume") == 1
    assert "old: " in out
    assert "journal.jsonl: line 1 does not continue" in out
    assert err == ""


def test_status_of_a_new_federation_without_a_superlink(thorax, flwr, capsys) -> None:
    flwr.down = True
    assert do(thorax, "status") == 0
    out, err = capsys.readouterr()
    assert "no run yet; chexfound-server run" in out
    assert "the SuperLink is down: " in err


def test_a_stranger_at_the_superlinks_port_is_no_superlink(thorax, flwr, listening, capsys) -> None:
    flwr.down = True
    assert do(thorax, "status", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["processes"]["superlink"] == "down"
    assert told["sites"][0]["status"] == "unknown"
    assert do(thorax, "status") == 0
    out, err = capsys.readouterr()
    assert "  superlink  down" in out.splitlines()
    assert "the SuperLink cannot be asked" in err


# ---- what a finished run leaves


@pytest.fixture
def finished(submitted: Any) -> Any:
    model = submitted.path / "model"
    checkpoint.save(model / "backbone.safetensors", {"weight": torch.arange(6.0)})
    (model / "README.md").write_text("# A card\n")
    folder.write_config(model, Weights(source={"run": "demo", "weights_sha256": "ab" * 32}), "release")
    metrics = {"schema": 1, "model_sha256": {"federated": "ab" * 32}}
    (submitted.path / "metrics.json").write_text(json.dumps(metrics))
    return submitted


def test_the_model_is_fetched_whole_and_checked(thorax, finished, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert do(thorax, "fetch-model", "--out", str(out)) == 0
    assert {path.name for path in out.iterdir()} == {"backbone.safetensors", "config.json", "README.md"}
    assert checkpoint.load(out / "backbone.safetensors")["weight"].sum() == 15
    assert do(thorax, "fetch-model", "--out", str(out)) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["other weights", "damaged", "another run's", "no card", "no config"])
def test_a_model_that_is_not_the_runs_is_not_fetched(thorax, finished, tmp_path: Path, capsys, what: str) -> None:
    model = finished.path / "model"
    if what == "other weights":
        checkpoint.save(model / "backbone.safetensors", {"weight": torch.zeros(6)})
    elif what == "damaged":
        (model / "backbone.safetensors").write_bytes(b"x" * 100)
    elif what == "another run's":
        (model / "config.json").unlink()
        folder.write_config(model, Weights(source={"run": "demo", "weights_sha256": "cd" * 32}), "release")
    else:
        (model / {"no card": "README.md", "no config": "config.json"}[what]).unlink()
    code = 3 if what in ("no card", "no config") else 4
    assert do(thorax, "fetch-model", "--out", str(tmp_path / "model")) == code
    assert not (tmp_path / "model").exists()
    assert str(model) in capsys.readouterr().err


def test_what_is_not_done_has_no_model_and_no_report(thorax, submitted, capsys) -> None:
    assert do(thorax, "report", "first") == 2
    assert "run 'first' is not done" in capsys.readouterr().err
    assert do(thorax, "fetch-model", "--out", "x") == 2
    assert "there is no finished run" in capsys.readouterr().err


def test_commands_say_what_the_plain_superlink_lacks(thorax, capsys) -> None:
    assert do(thorax, "commands") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"# chexfound-server superlink {thorax.folder}" in lines
    assert "export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2" in lines
    assert not any("server.cli" in line for line in lines)
    assert thorax.processes()["superlink"][-2:] == ["superlink", str(thorax.folder)]
