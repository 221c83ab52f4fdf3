"""`chexfound pretrain`, in this process: what it leaves, what it refuses, and that it goes on to the bit."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chexfound.commands import main
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.durable.journal import Journal, read_journal
from chexfound.errors import CheckpointError, ConfigError, DataError, StorageError
from chexfound.model import checkpoint
from chexfound.model.weights import export, load
from chexfound.model.weights.release import of_run
from chexfound.pretrain import positions
from chexfound.pretrain.health import measures
from chexfound.pretrain.meta_arch import SSLMetaArch
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from sim import pretrain as command
from sim.lone_store import in_epochs

SETTINGS = [
    "train.pooled_batch_size=4",
    "student.num_register_tokens=1",
    "train.local_steps=2",
    "train.rounds=3",
    "train.OFFICIAL_EPOCH_LENGTH=4",
    "curriculum=[{rounds: 2, global_crops_size: 48, local_crops_size: 32, lr: 0.001}]",
]
PROBED = [*SETTINGS, "health.eval_period_iterations=3", "health.probe_images=30"]
Pretrain = Callable[..., int]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHEXFOUND_DEVICE", "cpu")
    for name in ("RANK", "WORLD_SIZE", "CHEXFOUND_GPUS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pretrain(tiny_store_path: Path, tiny_recipe_file: Path) -> Pretrain:
    """`pretrain(out, *options, settings=…)`: the command on the three hospitals' images; its exit code."""

    def run(out: Path, *options: str, settings: list[str] = SETTINGS) -> int:
        given = [str(tiny_store_path), "--recipe", str(tiny_recipe_file), "--out", str(out), *options]
        return chexfound(*given, *(part for pair in settings for part in ("--set", pair)))

    return run


def chexfound(*arguments: str) -> int:
    """`chexfound pretrain …`; its exit code."""
    return main.main(["pretrain", *arguments], command)


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    return recipes.load(tiny_recipe_file, recipes.parse_overrides(SETTINGS))


def files(out: Path) -> dict[str, bytes]:
    """All that is left, by its path, but the journal and the seconds in the summary, whose digest config.json has."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != "journal.jsonl"]
    left = {str(path.relative_to(out)): path.read_bytes() for path in paths}
    if (summary := left.get("model/training_summary.json")) is not None:
        digest = hashlib.sha256(summary).hexdigest().encode()
        left["model/training_summary.json"] = re.sub(rb'"seconds": [0-9.]+', b'"seconds": 0', summary)
        left["model/config.json"] = left["model/config.json"].replace(digest, b"")
    return left


def test_what_it_leaves(pretrain, tmp_path, recipe, capsys):
    out = tmp_path / "out"
    assert pretrain(out, "--log-every", "4") == 0
    printed = capsys.readouterr().out
    assert "10 steps on 1 × cpu" in printed
    assert [word for word in printed.split() if word.startswith("step=")] == ["step=4", "step=8", "step=10"]
    assert sorted(files(out)) == [
        "metrics.jsonl", "model.safetensors", "model/README.md", "model/backbone.safetensors", "model/config.json",
        "model/dino_head.safetensors", "model/ibot_head.safetensors", "model/preprocessor_config.json",
        "model/recipe.yaml", "model/training_summary.json", "pretraining.json", "recipe.yaml",
        "rounds/pretrain-000004.safetensors",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))
    assert load.load_backbone(out / "model").pos_embed.shape[1] == 1 + 9  # of the last stage
    left = of_run.read(out)
    assert left.source["whose"] == "teacher"
    weights = checkpoint.load(out / "rounds" / "pretrain-000004.safetensors")
    for name, part in left.projections.items():
        assert checkpoint.digest(part.tensors) == checkpoint.digest(checkpoint.with_prefix(weights, f"teacher.{name}."))
    again = files(out)
    assert pretrain(out) == 0
    assert "finished already" in capsys.readouterr().out
    assert files(out) == again


def test_it_takes_the_steps_of_a_plain_sequence(pretrain, tmp_path, recipe, tiny_store_path):
    """No rounds, no replies, no files between: two trainers, one a stage."""
    assert pretrain(tmp_path / "out", settings=PROBED) == 0
    store, rows, state = Store.open(tiny_store_path), [], {}
    ids = View.of(store, "all").split(Membership.of(recipe), "train")
    for first, steps in ((0, 6), (6, 4)):
        one = Pretrainer(recipe, lambda places: store.pixels(ids[places]), len(ids), 0, step=first)
        if state:
            one.load_state(positions.enter(state, recipe, first))
        rows += one.run(first, steps, 4)
        state = one.state()
    model = checkpoint.load(tmp_path / "out/model.safetensors")
    teacher = checkpoint.with_prefix(state, "model.teacher.backbone.")
    assert checkpoint.digest(checkpoint.with_prefix(model, "backbone.")) == checkpoint.digest(teacher)
    own = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in own if {"probe_images", "rankme", "knn_auroc"} <= row.keys()] == [2, 5, 8]
    plain = [{name: value for name, value in row.items() if name in rows[0] or name == "ibot"} for row in own]
    assert plain == measures.told(rows)  # to as many digits as leave a site


LONGER = [*SETTINGS, "train.rounds=4"]  # two of its rounds make an epoch


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        (SETTINGS, 5),
        (LONGER, 3),
        ([*LONGER, "robust.clip=1.0"], 6),
        ([*LONGER, "teacher.policy=rederive", "train.optimizer_state=local", "train.centering=centering"], 3),
        ([*LONGER, "teacher.policy=local", "train.sinkhorn_queue=2", "train.saveckp_freq=0.25"], 3),
    ],
    ids=["short", "epochs", "clipped", "state-that-stays", "local-teacher"],
)
def test_it_is_the_centralized_arm_to_the_bit(pretrain, simulate, tiny_store_path, tmp_path, settings, rounds):
    assert pretrain(tmp_path / "out", settings=settings) == 0
    given = [part for pair in [*settings, "phases=[pretrain]"] for part in ("--set", pair)]
    ran = simulate("--by", "iid:2", "--arms", "centralized", *given, data=tiny_store_path)
    assert ran.code == 0, ran.stderr
    journal = read_journal(tmp_path / "out/journal.jsonl")
    assert journal[-1]["model_sha256"] == ran.hashes["centralized"]
    assert sum(entry["event"] == "round" for entry in journal) == rounds


@pytest.mark.parametrize(
    ("rounds", "steps", "epoch", "then"),
    [
        (20, 5, 10, (10, 10)),
        (7, 5, 100, (1, 35)),
        (6, 5, 20, (2, 15)),
        (6, 5, 3, (6, 5)),
        (500, 250, 1250, (100, 1250)),
    ],
)
def test_rounds_are_epochs_at_most(tiny_recipe, rounds, steps, epoch, then):
    train = replace(tiny_recipe.train, rounds=rounds, local_steps=steps, OFFICIAL_EPOCH_LENGTH=epoch)
    found = in_epochs(replace(tiny_recipe, train=train))
    assert (found.train.rounds, found.train.local_steps) == then


def test_a_probe_takes_no_part_in_training(pretrain, tmp_path, capsys):
    assert pretrain(tmp_path / "plain") == 0
    assert "rankme=" not in capsys.readouterr().out
    assert pretrain(tmp_path / "probed", settings=PROBED) == 0
    assert "rankme=" in capsys.readouterr().out
    for name in ("model.safetensors", "model/backbone.safetensors", "model/dino_head.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "probed" / name).read_bytes()


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("freq", ["0", "0.25", "0.75"])  # every 2 steps, 1, 3
def test_killed_again_and_again_it_ends_the_same(pretrain, tmp_path, monkeypatch, freq):
    settings = [*PROBED, f"train.saveckp_freq={freq}"]
    assert pretrain(tmp_path / "whole", settings=settings) == 0
    step, killed = Pretrainer.step, 0
    for at in (0, 4, 5, 6, 9):

        def dying(self: Pretrainer, batch: Any, number: int, at: int = at) -> Any:
            if number == at:
                raise Killed
            return step(self, batch, number)

        monkeypatch.setattr(Pretrainer, "step", dying)
        with pytest.raises(Killed):
            pretrain(tmp_path / "out", settings=settings)
        killed += 1
        assert len(list((tmp_path / "out/own/saves").glob("*"))) <= 2
    monkeypatch.setattr(Pretrainer, "step", step)
    assert pretrain(tmp_path / "out", "--log-every", "3", settings=settings) == 0
    assert (killed, files(tmp_path / "out")) == (5, files(tmp_path / "whole"))
    journals = [read_journal(tmp_path / name / "journal.jsonl") for name in ("out", "whole")]
    told = [[entry.get("sha256") or entry.get("model_sha256") for entry in entries] for entries in journals]
    assert told[0] == told[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(pretrain, tmp_path, monkeypatch, capsys, number, code):
    settings = [*SETTINGS, "train.saveckp_freq=100"]  # of itself, it saves at a round's end only
    assert pretrain(tmp_path / "whole", settings=settings) == 0
    step = Pretrainer.step

    def told(self: Pretrainer, batch: Any, at: int) -> Any:
        if at == 3:
            signal.raise_signal(number)
        return step(self, batch, at)

    monkeypatch.setattr(Pretrainer, "step", told)
    before = signal.getsignal(number)
    out = tmp_path / "out"
    assert pretrain(out, settings=settings) == code
    assert signal.getsignal(number) is before
    assert "stopped before step 4 of 10; the same command goes on" in capsys.readouterr().out
    assert [path.name for path in (out / "rounds").iterdir()] == ["pretrain-000001.safetensors"]
    monkeypatch.setattr(Pretrainer, "step", step)
    assert chexfound("--resume", "--out", str(out)) == 0
    assert "going on at step 4" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "whole")


def test_killed_while_the_model_is_written(pretrain, tmp_path, monkeypatch):
    assert pretrain(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(export, "write", killed)
        with pytest.raises(Killed):
            pretrain(tmp_path / "out")
    assert pretrain(tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_removed(begun, pretrain, tmp_path):
    (begun / "model").mkdir()
    (begun / "model/.config.json.x1.tmp").touch()
    for name in ("model.safetensors", "metrics.jsonl", "own/saves/0000000009.safetensors"):
        path = begun / name
        (path.parent / f".{path.name}.x1.tmp").write_bytes(b"half")
    assert pretrain(begun) == 0
    assert not list(begun.rglob("*.tmp"))
    assert not (begun / "own").exists()


def test_a_symptom_is_told_once(pretrain, tmp_path, monkeypatch, capsys):
    """Of steps that are not taken: all features are the same, and from step 140 on the teacher says nothing."""
    settings = ["train.pooled_batch_size=2", "train.rounds=100", "train.local_steps=2", "train.saveckp_freq=1"]
    killed = iter([False] * 124 + [True] + [False] * 100)

    def step(self: Pretrainer, batch: Any, number: int) -> dict[str, float]:
        if next(killed):
            raise Killed
        for moments in self.optimizer.state.values():
            moments["step"] += 1
        early, figures = number < 140, ("prototype_perplexity", "prototype_usage")
        seen = {"feature_std": 0.0 if early else 0.5, "teacher_entropy": 1.0 if early else math.log(32)}
        return {"loss": 5.0, "dino": 4.0, "koleo": 1.0, **dict.fromkeys(figures, 1.0), **seen}

    monkeypatch.setattr(Pretrainer, "step", step)
    with pytest.raises(Killed):
        pretrain(tmp_path / "out", settings=settings)
    first = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert len(first) == 1
    assert "warning: constant-features by step 100: feature std 0.000 of 1; the features of all" in first[0]
    assert pretrain(tmp_path / "out", settings=settings) == 0
    then = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert ["uniform-teacher by step 190" in line for line in then] == [True]
    assert not (tmp_path / "out/own").exists()


@pytest.fixture
def begun(pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretraining that was stopped after a step."""
    step = Pretrainer.step

    def told(self: Pretrainer, batch: Any, at: int) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(self, batch, at)

    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "step", told)
        assert pretrain(tmp_path / "begun") == 130
    return tmp_path / "begun"


def test_another_recipe_is_refused(begun, pretrain, capsys):
    before = files(begun)
    assert pretrain(begun, settings=[*SETTINGS, "optim.lr=1"]) == ConfigError.exit_code
    assert (
        "holds a pretraining by another recipe (optim.lr is 0.002 there, 1.0 here); choose" in capsys.readouterr().err
    )
    many = ["optim.lr=1", "seed=4", "dino.head_n_prototypes=7", "crops.blur=1"]
    assert pretrain(begun, settings=[*SETTINGS, *many]) == ConfigError.exit_code
    assert "; and 1 more)" in capsys.readouterr().err
    assert files(begun) == before


def test_another_store_is_refused(begun, tiny_recipe_file, make_images, tmp_path, capsys):
    make_images(tmp_path / "images", {"alpha": 8})
    assert main.main(["ingest", str(tmp_path / "images"), str(tmp_path / "store"), "--image-px", "64"]) == 0
    capsys.readouterr()
    assert chexfound(str(tmp_path / "store"), "--resume", "--out", str(begun)) == ConfigError.exit_code
    assert "was begun with other images than those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "of format 1, and this release goes on with format 2 only: finish it with the release that"),
        ('{"format": 2, "store": 3, "store_sha256": "", "recipe": {}}', "damaged (a value is of another kind)"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path, text, message, capsys):
    (tmp_path / "pretraining.json").write_text(text)
    assert chexfound("--resume", "--out", str(tmp_path)) == CheckpointError.exit_code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ((), ["image_px=128"], DataError, "holds images of 64 px, the recipe asks for 128; ingest again"),
        ((), ["phases=[adapt]"], ConfigError, "phases leave pretrain out"),
        (("--gpus", "3"), [], ConfigError, "a batch of 4 images cannot be divided equally among the 3 GPUs"),
        (("--log-every", "0"), [], ConfigError, "--log-every 0: at least 1"),
        (("--gpus", "none"), [], ConfigError, "gpus 'none': give a number of GPUs"),
        (("--resume",), [], ConfigError, "no pretraining to resume here"),
        ((), ["split={train: 0.0001, val: 0.5}"], DataError, "no training image; the split gives all to val and test"),
    ],
)
def test_what_cannot_be_is_told(pretrain, tmp_path, capsys, options, settings, error, message):
    assert pretrain(tmp_path / "out", *options, settings=[*SETTINGS, *settings]) == error.exit_code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else(pretrain, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    assert pretrain(tmp_path / "out") == ConfigError.exit_code
    assert "is in use by something else" in capsys.readouterr().err


def test_no_place_to_write(pretrain, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert pretrain(tmp_path / "file/out") in (ConfigError.exit_code, StorageError.exit_code)
    assert "file/out" in capsys.readouterr().err


def test_two_at_once_are_refused(begun, capsys, pretrain):
    with Journal(begun / "journal.jsonl"):
        assert pretrain(begun) == ConfigError.exit_code
    assert "another process is writing this journal" in capsys.readouterr().err


def test_torchrun_is_refused(monkeypatch, capsys, pretrain, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain(tmp_path / "out") == ConfigError.exit_code
    assert "start it without torchrun: with --gpus N it starts a process for each GPU" in capsys.readouterr().err


def test_store_and_recipe_are_missed(capsys, tmp_path):
    assert chexfound("--out", str(tmp_path)) == ConfigError.exit_code
    assert "STORE is missing: name both, or give --resume" in capsys.readouterr().err
    assert chexfound("store", "--out", str(tmp_path)) == ConfigError.exit_code
    assert "--recipe is missing" in capsys.readouterr().err


def test_a_step_that_diverges_leaves_state_and_files(pretrain, tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain(out, settings=[*SETTINGS, "optim.lr=1.0e+30", "optim.warmup_epochs=0"]) == DataError.exit_code
    error = capsys.readouterr().err
    assert "Its images: " in error
    told = json.loads(next((out / "own/diverged").glob("*.json")).read_text())
    assert len(told["files"]) == 4
    assert next((out / "own/diverged").glob("*.safetensors")).stat().st_size > 1000


@pytest.mark.parametrize("at", [0, 4, 5, 8])
def test_told_to_stop_it_stops_after_that_step(pretrain, tmp_path, monkeypatch, at):
    """Also where a round ends, and a stage."""
    step = Pretrainer.step

    def asked(self: Pretrainer, batch: Any, number: int) -> Any:
        if number == at:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Pretrainer, "step", asked)
    assert pretrain(tmp_path / "out", "--log-every", "1") == 143
    saves = [path.name for path in (tmp_path / "out").glob("own/saves/*")]
    assert saves == ([] if at % 2 else [f"{at + 1:010d}.safetensors"])  # else the round's weights are there
    monkeypatch.setattr(Pretrainer, "step", step)
    assert pretrain(tmp_path / "out") == 0


def test_a_recipe_that_was_changed_in_the_folder_costs_no_save(begun, capsys):
    out, whole = begun, files(begun)
    about = json.loads(whole["pretraining.json"])
    about["recipe"]["optim"]["lr"] *= 2
    (out / "pretraining.json").write_text(json.dumps(about))
    assert chexfound("--resume", "--out", str(out)) == ConfigError.exit_code
    assert "this folder holds a run with another recipe_sha256" in capsys.readouterr().err
    saves = {name for name in whole if "saves/" in name}
    assert saves
    assert saves <= set(files(out))
    (out / "pretraining.json").write_bytes(whole["pretraining.json"])
    assert chexfound("--resume", "--out", str(out)) == 0


@pytest.mark.parametrize("left", [b"", b"\xff", None])
def test_rows_that_went_away_come_back(begun, left):
    (begun / "metrics.jsonl").unlink() if left is None else (begun / "metrics.jsonl").write_bytes(left)
    assert chexfound("--resume", "--out", str(begun)) == 0
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))


@pytest.mark.parametrize(
    "damage", [lambda model: model.write_bytes(model.read_bytes()[:-8]), lambda model: model.unlink()]
)
def test_a_finished_model_that_is_damaged_is_told(pretrain, tmp_path, capsys, damage):
    assert pretrain(tmp_path / "out") == 0
    damage(tmp_path / "out/model/backbone.safetensors")
    assert pretrain(tmp_path / "out") == 4
    assert "backbone.safetensors" in capsys.readouterr().err


def test_weights_that_the_last_step_made_useless_are_no_model(pretrain, tmp_path, monkeypatch, capsys):
    def overflow(self: SSLMetaArch, momentum: float) -> None:
        with torch.no_grad():
            self.student["dino_head"].last_layer.weight_v[3, 1] = math.inf

    monkeypatch.setattr(SSLMetaArch, "update_teacher", overflow)
    settings = [*SETTINGS, "train.rounds=1", "train.local_steps=1", "curriculum=[]"]
    assert pretrain(tmp_path / "out", settings=settings) == 3
    error = capsys.readouterr().err
    assert "pretraining step 0: it left weights that are not finite" in error
    assert "the state after it is saved" in error
    assert not (tmp_path / "out/model").exists()
