"""A long piece of training in parts, with its state on the disk after each: what a killed process goes on from.

A save is one file, replaced atomically: the whole state, and in its metadata the step it was taken
before, what it belongs to, the rows so far, and the state's digest.  What it belongs to is the digest of all that
the work stands on.  A save that is damaged is set aside, as NAME.damaged, and the one before it taken.
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

from chexfound.data.store.reader import Store
from chexfound.durable.files import canonical, remove_unfinished, storage, write_json
from chexfound.errors import CheckpointError, DataError, DivergedError, StoppedError
from chexfound.model import checkpoint
from chexfound.parallel import group
from chexfound.pretrain.train import Pretrainer, Probe, Progress
from chexfound.recipe.schema import Recipe

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
class Checkpoint:
    """The state before a global step, and the rows of the steps before it that the work has taken."""

    step: int
    state: dict[str, Tensor]
    rows: list[dict[str, Any]] = field(default_factory=list)


class Checkpoints:
    """The saves of one piece of work, in a folder of their own.  The first rank writes and removes; all read.

    Args:
        folder: theirs.
        work: what they belong to.
    """

    def __init__(self, folder: Path, work: str) -> None:
        self.folder, self.work = Path(folder), work

    def newest(self) -> int | None:
        """The step of the newest sound one, if there is any; leftovers of other work and half-written ones are removed.

        Raises: StorageError for one that may not be read; nothing is removed then.
        """
        step = group.broadcast(self._newest() if group.first() else 0)
        return step if step >= 0 else None

    def _newest(self) -> int:
        remove_unfinished(self.folder)
        for step in sorted(self._own(), reverse=True):
            path = self._path(step)
            with storage(path), contextlib.suppress(CheckpointError, SafetensorError):
                with safe_open(path, "pt") as file:
                    sha256 = (file.metadata() or {}).get("sha256")
                if checkpoint.digest(checkpoint.load(path)) == sha256:
                    return step
            self._set_aside(path)
        return -1

    def read(self, step: int) -> Checkpoint:
        """The save of a step that `newest` named.

        Raises: CheckpointError.
        """
        path = self._path(step)
        try:
            with safe_open(path, "pt") as file:
                rows = json.loads((file.metadata() or {})["rows"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read any more: {error}") from error
        return Checkpoint(step=step, state=checkpoint.load(path), rows=rows)

    def write(self, step: int, state: dict[str, Tensor], rows: Sequence[dict[str, Any]] = ()) -> None:
        """Keep the state before `step`, and of the older ones the newest."""
        if not group.first():
            return
        metadata = {"work": self.work, "step": str(step), "rows": json.dumps(list(rows), allow_nan=False)}
        checkpoint.save(self._path(step), state, {**metadata, "sha256": checkpoint.digest(state)})
        for old in self._files()[:-KEPT]:
            old.unlink()

    def clear(self) -> None:
        """Remove all, and those that were set aside."""
        if group.first():
            for path in (*self._files(), *self.folder.glob("*.damaged")):
                path.unlink()
            with contextlib.suppress(OSError):  # not there, or something else is in it
                self.folder.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}.safetensors"

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.safetensors") if path.is_file())

    def _own(self) -> list[int]:
        """The steps of this work's, as their metadata say."""
        steps, others = [], []
        for path in self._files():
            with storage(path):
                path.open("rb").close()  # one that may not be read is not damaged
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    step, rows, work = int(metadata["step"]), json.loads(metadata["rows"]), metadata["work"]
                if path != self._path(step) or not isinstance(rows, list):
                    raise ValueError("it says something else than its name")
            except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
                self._set_aside(path)
                continue
            if work == self.work:
                steps.append(step)
            else:
                others.append(path)
        for path in others:
            log.info("save=%s is of work that is done; removed", path.name)
            path.unlink()
        return steps

    def _set_aside(self, path: Path) -> None:
        log.warning("save=%s is damaged; set aside", path.name)
        with storage(path):
            path.replace(path.with_suffix(".damaged"))


def run(
    trainer: Pretrainer,
    first_step: int,
    steps: int,
    batch_size: int,
    progress: Progress | None,
    saves: Checkpoints | None,
    probe: Probe | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """`Pretrainer.run` with saves every `train.saveckp_freq` epochs, from the newest of which it goes on.

    Asked to `stop`, it saves what it has after the step; whoever may ask gives `saves`.

    Raises: what `Pretrainer.run` raises; CheckpointError if the newest save does not fit; StoppedError.
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
        rows += trainer.run(step, until - step, batch_size, _shifted(progress, step - first_step, steps), probe, stop)
        step = first_step + len(rows)
        if step < last:
            state = trainer.state()
            saves.write(step, state, rows)
            if stop is not None and group.any_of(stop()):
                group.barrier()  # whoever ends first is the end of all
                raise StoppedError(f"stopped before step {step}")
    return rows


def _shifted(progress: Progress | None, before: int, of: int) -> Progress | None:
    if progress is None:
        return None
    told: Callable[[int, int], None] = progress
    return lambda done, _: told(before + done, of)


def diverged(home: Path, store: Store, ids: np.ndarray, trainer: Pretrainer, error: DivergedError) -> DataError:
    """Save the state that the step that failed began with (or left), and the files of its batch; the error says where.

    Args:
        home: both go into `diverged/` in it.
        store: the images.
        ids: of the training images, in the order that the error's places are of.
        trainer: as the failed step left it.
        error: what it raised.
    """
    files = [store.file(ids[place]) for place in error.places]
    path = home / "diverged" / f"step-{error.step:08d}.safetensors"
    state = trainer.state()
    if group.first():
        checkpoint.save(path, state)
        write_json(path.with_suffix(".json"), {"step": error.step, "error": str(error), "files": files})
    group.barrier()  # whoever ends first is the end of all
    named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return DataError(
        f"{error}. Its images: {named}; all are listed, and the state {error.when} it is saved, in {path.parent}"
    )
