"""`chexfound pretrain`, in this process: what it leaves, what it refuses, and that it goes on to the bit."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chexfound.commands import main
from chexfound.contract.request import Request
from chexfound.errors import CheckpointError, ConfigError, DataError, StorageError
from chexfound.model import checkpoint
from chexfound.model.weights.release import run_model
from chexfound.phases import dispatch
from chexfound.pretrain import positions
from chexfound.pretrain.health import measures
from chexfound.pretrain.meta_arch import SSLMetaArch
from chexfound.pretrain.train import Pretrainer, initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe

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
        command = ["pretrain", str(tiny_store_path), "--recipe", str(tiny_recipe_file), "--out", str(out), *options]
        return main.main([*command, *(part for pair in settings for part in ("--set", pair))])

    return run


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    return recipes.load(tiny_recipe_file, recipes.parse_overrides(SETTINGS))


def files(out: Path) -> dict[str, bytes]:
    """All that is left, but the lock, by its path."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_what_it_leaves(pretrain, tmp_path, recipe, capsys):
    out = tmp_path / "out"
    assert pretrain(out, "--log-every", "4") == 0
    printed = capsys.readouterr().out
    assert "10 steps on 1 × cpu" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("step=")] == [
        "step=4",
        "step=6",
        "step=8",
        "step=10",
    ]
    assert sorted(files(out)) == [
        "heads.safetensors", "metrics.jsonl", "model/README.md", "model/config.json", "model/model.safetensors",
        "pretraining.json",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))
    loaded, findings, backbone, head = run_model.load(out / "model")
    assert (loaded, findings, head) == (recipe, (), None)
    assert backbone.pos_embed.shape[1] == 1 + 9  # of the last stage
    heads = checkpoint.load(out / "heads.safetensors")
    assert {tuple(name.split(".")[:2]) for name in heads} == {
        (who, head) for who in ("student", "teacher") for head in ("dino_head", "ibot_head")
    }
    again = files(out)
    assert pretrain(out) == 0
    assert "finished already" in capsys.readouterr().out
    assert files(out) == again


def test_it_is_a_lone_site_asked_for_round_after_round(pretrain, tmp_path, tiny_recipe_file, make_site):
    recipe = recipes.load(tiny_recipe_file, recipes.parse_overrides(PROBED))
    assert pretrain(tmp_path / "out", settings=PROBED) == 0
    site = make_site("all", None)
    weights = initial_weights(recipe)
    rows = []
    for number in range(recipe.pretrain_rounds):
        weights = positions.enter(weights, recipe, 2 * number)
        request = Request(phase="pretrain", round=number, step=2 * number, steps=2, batch_size=4, tensors=weights)
        reply = dispatch.run(site, recipe, request)
        weights, rows = reply.tensors, rows + reply.values["history"]
    model = checkpoint.load(tmp_path / "out/model/model.safetensors")
    teacher = checkpoint.with_prefix(weights, "teacher.backbone.")
    assert checkpoint.digest(checkpoint.with_prefix(model, "backbone.")) == checkpoint.digest(teacher)
    own = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert own != rows
    assert measures.told(own) == rows  # what leaves a site has fewer digits
    assert [row["step"] for row in rows if {"probe_images", "rankme", "knn_auroc"} <= row.keys()] == [2, 5, 8]


def test_a_probe_takes_no_part_in_training(pretrain, tmp_path, capsys):
    assert pretrain(tmp_path / "plain") == 0
    assert "rankme=" not in capsys.readouterr().out
    assert pretrain(tmp_path / "probed", settings=PROBED) == 0
    assert "rankme=" in capsys.readouterr().out
    for name in ("model/model.safetensors", "heads.safetensors"):
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
        assert len(list((tmp_path / "out/saves").glob("*"))) <= 2
    monkeypatch.setattr(Pretrainer, "step", step)
    assert pretrain(tmp_path / "out", "--log-every", "3", settings=settings) == 0
    assert (killed, files(tmp_path / "out")) == (5, files(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(pretrain, tmp_path, monkeypatch, capsys, number, code):
    settings = [*SETTINGS, "train.saveckp_freq=100"]  # of itself, it saves at a stage's end only
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
    assert [path.name for path in (out / "saves").iterdir()] == ["0000000004.safetensors"]
    monkeypatch.setattr(Pretrainer, "step", step)
    assert main.main(["pretrain", "--resume", "--out", str(out)]) == 0
    assert "going on at step 4" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "whole")


def test_killed_while_the_model_is_written(pretrain, tmp_path, monkeypatch):
    assert pretrain(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(run_model, "save", killed)
        with pytest.raises(Killed):
            pretrain(tmp_path / "out")
    assert pretrain(tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_removed(begun, pretrain, tmp_path):
    (begun / "model").mkdir()
    (begun / "model/.config.json.x1.tmp").touch()
    for name in ("heads.safetensors", "metrics.jsonl", "saves/0000000009.safetensors"):
        path = begun / name
        (path.parent / f".{path.name}.x1.tmp").write_bytes(b"half")
    assert pretrain(begun) == 0
    assert not list(begun.rglob("*.tmp"))
    assert not (begun / "saves").exists()


def test_a_symptom_is_told_once(pretrain, tmp_path, monkeypatch, capsys):
    """Of steps that are not taken: all features are the same, and from step 140 on the teacher says nothing."""
    settings = ["train.pooled_batch_size=2", "train.rounds=100", "train.local_steps=2", "train.saveckp_freq=1"]
    killed = iter([False] * 124 + [True] + [False] * 100)

    def step(self: Pretrainer, batch: Any, number: int) -> dict[str, float]:
        if next(killed):
            raise Killed
        early = number < 140
        return {"loss": 5.0, "feature_std": 0.0 if early else 0.5, "teacher_entropy": 1.0 if early else math.log(32)}

    monkeypatch.setattr(Pretrainer, "step", step)
    with pytest.raises(Killed):
        pretrain(tmp_path / "out", settings=settings)
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(first) == 1
    assert first[0].startswith("warning: constant-features by step 100: feature std 0.000 of 1; the features of all")
    assert pretrain(tmp_path / "out", settings=settings) == 0
    then = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1] for line in then] == [" uniform-teacher by step 190"]
    assert not (tmp_path / "out/health.json").exists()


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
    assert main.main(["pretrain", str(tmp_path / "store"), "--resume", "--out", str(begun)]) == ConfigError.exit_code
    assert "was begun with other images than those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 2}', "of format 2; this release reads 1"),
        ('{"format": 1, "store": 3, "store_sha256": "", "recipe": {}}', "damaged (a value is of another kind)"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path, text, message, capsys):
    (tmp_path / "pretraining.json").write_text(text)
    assert main.main(["pretrain", "--resume", "--out", str(tmp_path)]) == CheckpointError.exit_code
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
    import fcntl

    with open(begun / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert pretrain(begun) == ConfigError.exit_code
    assert "another process is pretraining into it" in capsys.readouterr().err


def test_store_and_recipe_are_missed(capsys, tmp_path):
    assert main.main(["pretrain", "--out", str(tmp_path)]) == ConfigError.exit_code
    assert "STORE is missing: name both, or give --resume" in capsys.readouterr().err
    assert main.main(["pretrain", "store", "--out", str(tmp_path)]) == ConfigError.exit_code
    assert "--recipe is missing" in capsys.readouterr().err


def test_a_step_that_diverges_leaves_state_and_files(pretrain, tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain(out, settings=[*SETTINGS, "optim.lr=1.0e+30", "optim.warmup_epochs=0"]) == DataError.exit_code
    error = capsys.readouterr().err
    assert "Its images: " in error
    told = json.loads(next((out / "diverged").glob("*.json")).read_text())
    assert len(told["files"]) == 4
    assert next((out / "diverged").glob("*.safetensors")).stat().st_size > 1000


@pytest.mark.parametrize("at", [0, 4, 5, 8])
def test_told_to_stop_it_stops_after_that_step(pretrain, tmp_path, monkeypatch, at):
    """Also where each step is a piece of its own, and where a stage ends."""
    step = Pretrainer.step

    def asked(self: Pretrainer, batch: Any, number: int) -> Any:
        if number == at:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Pretrainer, "step", asked)
    assert pretrain(tmp_path / "out", "--log-every", "1") == 143
    assert max(path.name for path in (tmp_path / "out/saves").iterdir()) == f"{at + 1:010d}.safetensors"
    monkeypatch.setattr(Pretrainer, "step", step)
    assert pretrain(tmp_path / "out") == 0


def test_a_recipe_that_was_changed_in_the_folder_costs_no_save(begun, capsys):
    out, whole = begun, files(begun)
    about = json.loads(whole["pretraining.json"])
    about["recipe"]["optim"]["lr"] *= 2
    (out / "pretraining.json").write_text(json.dumps(about))
    assert main.main(["pretrain", "--resume", "--out", str(out)]) == 4
    assert "is a save of other work than is asked for now" in capsys.readouterr().err
    assert {name for name in whole if name.startswith("saves/")} <= set(files(out))
    (out / "pretraining.json").write_bytes(whole["pretraining.json"])
    assert main.main(["pretrain", "--resume", "--out", str(out)]) == 0


@pytest.mark.parametrize("left", [b"", b"\xff"])
def test_rows_that_went_away_are_told(begun, capsys, left):
    (begun / "metrics.jsonl").write_bytes(left)
    assert main.main(["pretrain", "--resume", "--out", str(begun)]) == 0
    assert "metrics.jsonl: the rows of 1 steps before step 1 are not there any more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [lambda model: model.write_bytes(model.read_bytes()[:-8]), lambda model: model.unlink()]
)
def test_a_finished_model_that_is_damaged_is_told(pretrain, tmp_path, capsys, damage):
    assert pretrain(tmp_path / "out") == 0
    damage(tmp_path / "out/model/model.safetensors")
    assert pretrain(tmp_path / "out") == 4
    assert "model.safetensors" in capsys.readouterr().err


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
