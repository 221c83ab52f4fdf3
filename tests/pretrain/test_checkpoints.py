from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chexfound.errors import CheckpointError, StoppedError, StorageError
from chexfound.model import checkpoint
from chexfound.pretrain import checkpoints
from chexfound.pretrain.checkpoints import Checkpoints, next_stop
from chexfound.pretrain.train import Pretrainer

STATE = {"a": torch.arange(4.0)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_read_back_and_two_are_kept(tmp_path):
    here = Checkpoints(tmp_path / "saves", "w")
    assert here.newest() is None
    for step in (3, 6, 12):
        here.write(step, {"a": torch.full((4,), float(step))}, [{"step": step, "loss": 0.1 + 0.2}])
    assert files(here.folder) == ["0000000006.safetensors", "0000000012.safetensors"]
    assert here.newest() == 12
    save = here.read(12)
    assert torch.equal(save.state["a"], torch.full((4,), 12.0))
    assert (save.step, save.rows) == (12, [{"step": 12, "loss": 0.1 + 0.2}])  # the very number
    here.clear()
    assert not here.folder.exists()
    here.clear()


def test_a_save_of_work_that_is_done_is_removed(tmp_path):
    Checkpoints(tmp_path, "one").write(3, STATE)
    other = Checkpoints(tmp_path, "other")
    assert other.newest() is None
    assert files(tmp_path) == []


def test_a_save_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    here = Checkpoints(tmp_path, "w")
    here.write(3, STATE)
    here.write(6, STATE)

    def refused(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        here.newest()
    assert len(files(tmp_path)) == 2


def test_a_flipped_bit_is_seen(tmp_path):
    """In each byte of the tensor, one after the other."""
    here = Checkpoints(tmp_path, "w")
    here.write(3, STATE)
    path = tmp_path / "0000000003.safetensors"
    whole = path.read_bytes()
    for place in range(len(whole) - 16, len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        assert here.newest() is None
        assert files(tmp_path) == ["0000000003.damaged"]
    path.write_bytes(whole)
    assert here.newest() == 3


def test_a_folder_that_is_called_like_a_save_is_left_alone(tmp_path):
    (tmp_path / "0000000009.safetensors").mkdir()
    here = Checkpoints(tmp_path, "w")
    here.write(3, STATE)
    assert here.newest() == 3


def test_a_half_written_save_is_removed(tmp_path):
    here = Checkpoints(tmp_path, "w")
    here.write(3, STATE)
    (tmp_path / ".0000000006.safetensors.abc.tmp").write_bytes(b"half")
    assert Checkpoints(tmp_path, "w").newest() == 3
    assert files(tmp_path) == ["0000000003.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 200),
        lambda path: checkpoint.save(path, STATE),  # nothing in it says whose it is
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "7", "rows": "[]"}),  # of another step
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "six", "rows": "[]"}),
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "6", "rows": "[" * 100_000}),
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "6", "rows": "{}"}),
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "6", "rows": "[]"}),  # without a digest
        lambda path: checkpoint.save(path, STATE, {"work": "w", "step": "6", "rows": "[]", "sha256": "0" * 64}),
    ],
)
def test_a_damaged_save_gives_way_to_the_one_before(tmp_path, damage):
    here = Checkpoints(tmp_path, "w")
    here.write(3, STATE)
    here.write(6, STATE)
    damage(tmp_path / "0000000006.safetensors")
    assert here.newest() == 3
    assert files(tmp_path) == ["0000000003.safetensors", "0000000006.damaged"]
    here.clear()
    assert not tmp_path.exists()


def test_a_save_that_went_away_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"0000000004\.safetensors: cannot be read any more"):
        Checkpoints(tmp_path, "w").read(4)


@pytest.mark.parametrize(
    ("step", "last", "every", "expected"),
    [(0, 10, (4,), 4), (4, 10, (4,), 8), (8, 10, (4,), 10), (5, 10, (4, 3), 6), (0, 10, (0,), 10), (9, 10, (10,), 10)],
)
def test_next_stop(step, last, every, expected):
    assert next_stop(step, last, *every) == expected


def test_epochs_between_saves(small):
    assert [checkpoints.steps_between(small(train__saveckp_freq=f)) for f in (0, 0.1, 0.5, 1, 2.5)] == [0, 1, 2, 4, 10]


def test_the_key_depends_on_every_part():
    keys = {checkpoints.key(*parts) for parts in [(), ("a",), ("a", "b"), ("ab",), (["a"],), ("a", 1), ("a", "1")]}
    assert len(keys) == 7


# ---- a round in parts


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


def kill_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        if done == step:
            raise Killed

    return progress


def trained(recipe: Any, images: Any, folder: Path, progress: Any = None) -> tuple[list[Any], dict[str, Tensor]]:
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    rows = checkpoints.run(one, 0, 7, 4, progress, Checkpoints(folder, "w"))
    return rows, one.state()


@pytest.mark.parametrize("overrides", [{}, {"train__centering": "centering", "student__drop_path_rate": 0.3}])
@pytest.mark.parametrize("at", range(1, 8))
def test_killed_at_any_step_and_gone_on_is_uninterrupted(small, images, tmp_path, overrides, at):
    recipe = small(train__saveckp_freq=0.5, **overrides)  # every 2 steps
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    rows, whole = one.run(0, 7, 4), one.state()
    with pytest.raises(Killed):
        trained(recipe, images, tmp_path, kill_at(at))
    saved = [int(name[:10]) for name in files(tmp_path)]
    assert saved == [step for step in (2, 4, 6) if step < at][-2:]
    again, state = trained(recipe, images, tmp_path)
    assert again == rows
    assert checkpoint.digest(state) == checkpoint.digest(whole)


def test_progress_counts_from_the_start(small, images, tmp_path):
    told: list[Any] = []
    trained(small(train__saveckp_freq=0.5), images, tmp_path, lambda *what: told.append(what))
    assert told == [(n, 7) for n in range(1, 8)]


def test_stopping_is_after_a_step(small, images):
    one = Pretrainer(small(), lambda places: images[places], len(images), 0)
    answers = iter([False, True])
    assert [row["step"] for row in one.run(0, 5, 4, stop=lambda: next(answers))] == [0, 1]


@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_asked_to_stop_it_saves_after_the_step(small, images, tmp_path, at):
    """Also where it saves of itself; after the last step there is nothing left to stop."""
    recipe = small(train__saveckp_freq=0.5)  # every 2 steps
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    rows, whole = one.run(0, 7, 4), one.state()
    asked: list[int] = []
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)

    def progress(done: int, _: int) -> None:
        if done == at:
            asked.append(done)

    def run() -> list[Any]:
        return checkpoints.run(one, 0, 7, 4, progress, Checkpoints(tmp_path, "w"), None, lambda: bool(asked))

    if at < 7:
        with pytest.raises(StoppedError, match=f"^stopped before step {at}$"):
            run()
        assert files(tmp_path)[-1] == f"{at:010d}.safetensors"
        asked.clear()
        at, one = 0, Pretrainer(recipe, lambda places: images[places], len(images), 0)
    assert run() == rows
    assert checkpoint.digest(one.state()) == checkpoint.digest(whole)
