"""`chexfound weights`, as a user types it: what it prints, what it leaves, and with which code it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chexfound.commands.main import main
from chexfound.model.checkpoint import add_prefix
from chexfound.model.weights.architecture import Backbone
from chexfound.recipe.schema import Input

torch.set_num_threads(1)


def backbone(**values: object) -> dict[str, Tensor]:
    """A small backbone in the reference's names, in two chunks of one block."""
    given = dict(dim=64, depth=2, heads=4, patch_size=8, in_chans=3, registers=4, ffn="mlp", layerscale=True, grid=4)
    state = Backbone(**{**given, **values}).build(Input()).state_dict()
    return {
        f"blocks.{name.split('.')[1]}.{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name: tensor
        for name, tensor in state.items()
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of published checkpoints, where the user stands."""
    monkeypatch.chdir(tmp_path)
    teacher, student = (add_prefix(backbone(), f"{whose}.backbone.") for whose in ("teacher", "student"))
    torch.save({"teacher": add_prefix(backbone(), "backbone.")}, "teacher_checkpoint.pth")
    torch.save({"model": {**teacher, **student, "dino_loss.center": torch.zeros(1, 4)}}, "model_checkpoint.pth")
    rates = {f"classifiers_dict.linear:blocks=2:avgpool=False:lr=0_{lr}.linear.": lr for lr in (1, 2)}
    tensors = {
        f"{start}{name}": torch.ones(shape) * lr for start, lr in rates.items() for name, shape in LINEAR.items()
    }
    torch.save({"model": tensors, "iteration": 9, "optimizer": {"state": {}}}, "linear.pth")
    return tmp_path


LINEAR = {"weight": (3, 128), "bias": (3,)}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`run("import", …)`: exit code, and all that was printed."""

    def call(*arguments: str) -> tuple[int, str]:
        try:
            code = main(["weights", *arguments])
        except SystemExit as end:
            code = int(str(end.code))
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())  # lines are wrapped

    return call


def test_import_prints_what_it_found_and_writes_nothing_unasked(here, run):
    before = sorted(os.listdir())
    code, text = run("import", "teacher_checkpoint.pth")
    assert code == 0
    assert "width 64, depth 2, heads 1, patch 8, 3 channels, 4 registers, mlp (hidden 256), LayerScale" in text
    assert "36 tensors" in text
    assert "0 missing, 0 unexpected" in text
    assert "1 attention head of the backbone (width / 64); the file does not say: --heads" in text
    assert "ImageNet's mean and deviation" in text
    assert "nothing was written" in text
    assert sorted(os.listdir()) == before


def test_import_then_show_then_export(here, run):
    code, text = run("import", "teacher_checkpoint.pth", "--heads", "4", "--out", "imported")
    assert code == 0
    assert "heads 4" in text
    assert "wrote imported: backbone_compatible.safetensors, config.json" in text
    assert 'chexfound.load_backbone("imported")' in text
    code, text = run("show", "imported")
    assert code == 0
    assert "an imported folder" in text
    code, text = run("show", "imported", "--json")
    assert json.loads(text)["parts"]["backbone"]["heads"] == 4
    code, text = run("export", "imported", "--out", "release")
    assert code == 0
    assert 'timm.create_model("local-dir:release", pretrained=True)' in text
    assert run("export", "imported", "--out", "release")[0] == 2
    assert run("export", "release", "--out", "again")[0] == 2


def test_what_is_left_out_is_named(here, run):
    code, text = run("import", "model_checkpoint.pth", "--heads", "4")
    assert code == 0
    assert "student: 36 tensors; take it with --which student" in text
    assert "dino_loss: training state" in text
    code, text = run("import", "model_checkpoint.pth", "--which", "student", "--heads", "4")
    assert "the student's" in text


def test_one_of_several_heads_is_chosen(here, run):
    code, text = run("import", "linear.pth")
    assert code == 2
    assert "2 heads are in it" in text
    assert "linear:blocks=2:avgpool=False:lr=0_2" in text
    code, text = run("import", "linear.pth", "--classifier", "lr=0_2", "--findings", "A,B,C", "--out", "head")
    assert code == 0
    assert "linear: 3 findings from the CLS of the last 2 blocks of width 64" in text
    assert "lr=0_1: another head; take it with --classifier" in text
    assert "optimizer: training state" in text
    assert "iteration 9" in text
    assert 'chexfound.load_head("head")' in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import", "none.pth"], 4, "none.pth: cannot be read"),
        (["import", "teacher_checkpoint.pth", "--heads", "7"], 2, "heads 7: must divide the width 64"),
        (["import", "teacher_checkpoint.pth", "teacher_checkpoint.pth"], 2, "two of the files hold a backbone"),
        (["import", "teacher_checkpoint.pth", "--which", "student"], 2, "holds no student"),
        (["import", "teacher_checkpoint.pth", "--mean", "x", "--std", "1"], 2, "--mean 'x': give one number, or three"),
        (["import", "teacher_checkpoint.pth", "--mean", "0.5,0.5", "--std", "1"], 2, "give one number, or three"),
        (["import", "linear.pth", "--classifier", "0_1", "--findings", "A"], 2, "1 names for a head of 3"),
        (["import", "linear.pth", "--classifier", "0_1", "--findings", "A,A,B"], 2, "each once"),
        (["import", "linear.pth", "--classifier", "0_1", "--n-last-blocks", "3"], 2, "128 channels, which are not 3"),
        (["export", "none", "--out", "x"], 4, "none: cannot be read"),
        (["export", ".", "--out", "x"], 4, "no weights that are known"),
        (["export", "linear.pth", "--out", "x"], 2, "take it in first"),
        (["show", "."], 4, "no weights that are known"),
        (["show"], 2, "PATH"),
        ([], 2, "COMMAND"),
    ],
)
def test_what_is_wrong_ends_with_its_code(here, run, arguments, code, message):
    found, text = run(*arguments)
    assert message in text
    assert found == code
    assert not (here / "x").exists()


def test_a_head_and_a_backbone_that_do_not_fit(here, run):
    torch.save({"linear.weight": torch.zeros(1, 40), "linear.bias": torch.zeros(1)}, "other.pth")
    code, text = run("import", "teacher_checkpoint.pth", "other.pth", "--heads", "4")
    assert code == 4
    assert "the head is made for a backbone of width 10, this one's is 64" in text


def test_code_in_a_checkpoint_does_not_run(here, run):
    class Call:
        def __reduce__(self) -> object:
            return os.mkdir, ("it ran",)

    torch.save({"teacher": {"x": Call()}}, "evil.pth")
    for command in ("import", "show"):
        code, text = run(command, "evil.pth")
        assert code == 4
        assert "refused, nothing of it was run" in text
    assert not (here / "it ran").exists()


def test_help_teaches(run):
    for command, words in (("import", "--classifier lr=0_0005"), ("show", "--json"), ("export", "local-dir:release")):
        code, text = run(command, "--help")
        assert code == 0
        assert "examples:" in text
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--glori-heads", "0"], "--glori-heads 0: must be a whole number from 1"),
        (["--n-last-blocks", "0"], "--n-last-blocks 0: must be a whole number from 1"),
        (["--mean", "nan", "--std", "1"], "--mean nan"),
    ],
)
def test_an_option_that_nothing_can_have_is_refused_for_a_head_alone_too(here, run, arguments, message):
    code, text = run("import", "linear.pth", "--classifier", "0_1", *arguments)
    assert code == 2
    assert message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": "64"}, "image_px: Input should be a valid integer"),
        ({"image_px": True}, "image_px: Input should be a valid integer"),
        ({"image_px": 0}, "image_px: Input should be greater than 0"),
        ({"image_px": 33}, "image_px 33: not 1 to 512 patches of 8"),
        ({"source": {"run": "x"}}, "source"),
        ({"assumed": {"heads": 3}}, "assumed"),
        ({"files": [1]}, "files"),
        ({"format": [1]}, "weights of format [1]"),
    ],
)
def test_a_hostile_config_is_an_error_of_one_line(here, run, change, message):
    assert run("import", "teacher_checkpoint.pth", "--out", "imported")[0] == 0
    values = json.loads((here / "imported" / "config.json").read_text())
    values["chexfound"] |= change
    (here / "imported" / "config.json").write_text(json.dumps(values))
    for arguments in (["show", "imported"], ["export", "imported", "--out", "x"]):
        code, text = run(*arguments)
        assert code == 4
        assert message in text


def test_a_folder_s_parts_are_held_against_its_config(here, run):
    assert run("import", "teacher_checkpoint.pth", "--out", "imported")[0] == 0
    values = json.loads((here / "imported" / "config.json").read_text())
    values["chexfound"]["backbone"]["depth"] = 5
    (here / "imported" / "config.json").write_text(json.dumps(values))
    for arguments in (["show", "imported"], ["export", "imported", "--out", "x"]):
        code, text = run(*arguments)
        assert code == 4
        assert "weights do not fit" in text


def test_a_path_that_is_too_long(here, run):
    assert run("show", "x" * 5000)[0] == 4
    assert run("import", "teacher_checkpoint.pth", "--out", "x" * 300)[0] == 2


def test_output_to_a_full_device_and_to_a_closed_pipe(here):
    command = [sys.executable, "-m", "chexfound.commands.main", "weights", "show", "teacher_checkpoint.pth"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert ended.returncode == 8
    assert ended.stderr.startswith("error: the output could not be written")
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
