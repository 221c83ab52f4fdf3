"""A long piece of training in parts, with its state on the disk after each: what a killed process goes on from.

A save is one file, replaced atomically: the whole state, and in its metadata the step it was taken
before, what it belongs to, and the rows so far.  What it belongs to is the digest of all that the work
stands on; a save of anything else is not this work's, and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chexfound.data.store import Store
from chexfound.errors import CheckpointError, DataError, DivergedError
from chexfound.journal import canonical, remove_unfinished, write_json
from chexfound.model import checkpoint
from chexfound.pretrain import ranks
from chexfound.pretrain.train import Pretrainer, Probe, Progress
from chexfound.schema import Recipe

log = logging.getLogger("chexfound.pretrain")
KEPT = 2  # the newest, and one more in case that it is damaged


def key(*parts: Any) -> str:
    """SHA-256 of the JSON values that a piece of work stands on."""
    return hashlib.sha256(canonical(parts)).hexdigest()


def steps_between(recipe: Recipe) -> int:
    """Global steps between two saves; 0: none is wanted."""
    wanted = recipe.train.saveckp_freq
    return max(1, round(wanted * recipe.train.OFFICIAL_EPOCH_LENGTH)) if wanted else 0


def next_stop(step: int, last: int, *every: int) -> int:
    """The first step after `step` that is a multiple of one of `every`, or `last`."""
    return min([last, *(step - step % number + number for number in every if number)])


@dataclass(frozen=True, kw_only=True)
class Save:
    """The state before a global step, and the rows of the steps before it that the work has taken."""

    step: int
    state: dict[str, Tensor]
    rows: list[dict[str, Any]] = field(default_factory=list)


class Saves:
    """The saves of one piece of work, in a folder of their own.  The first rank writes and removes; all read."""

    def __init__(self, folder: Path, work: str) -> None:
        self.folder, self.work = Path(folder), work

    def newest(self) -> int | None:
        """The step of the newest, if there is any; those of other work, damaged and half-written are removed."""
        if ranks.first():
            remove_unfinished(self.folder)
        step = ranks.of_first(max(self._own(), default=-1) if ranks.first() else 0)
        return step if step >= 0 else None

    def read(self, step: int) -> Save:
        """The save of a step that `newest` named.

        Raises: CheckpointError.
        """
        path = self._path(step)
        try:
            with safe_open(path, "pt") as file:
                rows = json.loads((file.metadata() or {})["rows"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read any more: {error}") from error
        return Save(step=step, state=checkpoint.load(path), rows=rows)

    def write(self, step: int, state: dict[str, Tensor], rows: Sequence[dict[str, Any]] = ()) -> None:
        """Keep the state before `step`, and of the older ones the newest."""
        if not ranks.first():
            return
        metadata = {"work": self.work, "step": str(step), "rows": json.dumps(list(rows), allow_nan=False)}
        checkpoint.save(self._path(step), state, metadata)
        for old in sorted(self.folder.glob("*.safetensors"))[:-KEPT]:
            old.unlink()

    def clear(self) -> None:
        """Remove all."""
        for path in self.folder.glob("*.safetensors") if ranks.first() else ():
            path.unlink()
        if ranks.first():
            with contextlib.suppress(OSError):  # not there, or something else is in it
                self.folder.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}.safetensors"

    def _own(self) -> list[int]:
        steps = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    step, rows = int(metadata["step"]), json.loads(metadata["rows"])
                valid = metadata["work"] == self.work and path == self._path(step) and isinstance(rows, list)
            except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
                valid = False
            if valid:
                steps.append(step)
            else:
                log.warning("save=%s is damaged or of other work; removed", path.name)
                path.unlink()
        return steps


def run(
    trainer: Pretrainer,
    first_step: int,
    steps: int,
    batch_size: int,
    progress: Progress | None,
    saves: Saves | None,
    probe: Probe | None = None,
) -> list[dict[str, Any]]:
    """`Pretrainer.run` with saves every `train.saveckp_freq` epochs, from the newest of which it goes on.

    Raises: what `Pretrainer.run` raises; CheckpointError if the newest save does not fit.
    """
    if saves is None:
        return trainer.run(first_step, steps, batch_size, progress, probe)
    step, rows, last = first_step, [], first_step + steps
    if (found := saves.newest()) is not None:
        save = saves.read(found)
        trainer.load_state(save.state)
        step, rows = save.step, save.rows
        log.info("pretraining goes on from the save before step %d", step)
    while step < last:
        until = next_stop(step, last, steps_between(trainer.run_recipe))
        rows += trainer.run(step, until - step, batch_size, _shifted(progress, step - first_step, steps), probe)
        step = until
        if step < last:
            state = trainer.state()
            saves.write(step, state, rows)
    return rows


def _shifted(progress: Progress | None, before: int, of: int) -> Progress | None:
    if progress is None:
        return None
    told: Callable[[int, int], None] = progress
    return lambda done, _: told(before + done, of)


def diverged(home: Path, store: Store, ids: np.ndarray, trainer: Pretrainer, error: DivergedError) -> DataError:
    """Save the state before the step that failed, and the files of its batch; the error says where.

    Args:
        home: both go into `diverged/` in it.
        store: the images.
        ids: of the training images, in the order that the error's places are of.
        trainer: as the failed step left it.
        error: what it raised.
    """
    files = [store.images[ids[place]].file for place in error.places]
    path = home / "diverged" / f"step-{error.step:08d}.safetensors"
    state = trainer.state()
    if ranks.first():
        checkpoint.save(path, state)
        write_json(path.with_suffix(".json"), {"step": error.step, "error": str(error), "files": files})
    ranks.meet()  # whoever ends first is the end of all
    named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return DataError(
        f"{error}. Its images: {named}; all are listed, and the state before it is saved, in {path.parent}"
    )
