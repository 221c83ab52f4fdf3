"""Pretraining of one store without a federation, in one folder that it can be gone on with.

    OUT/pretraining.json        what is done: recipe, store
    OUT/saves/*.safetensors     the last two states, until it is done
    OUT/metrics.jsonl           a row a step
    OUT/health.json             the end of that curve and what ails it, until it is done
    OUT/model/                  at the end: the teacher's backbone, as model/release.py has it
    OUT/heads.safetensors       at the end: `student.dino_head.…`, `teacher.ibot_head.…`, and so on

It takes the steps, to the bit, that a lone site takes which is asked for round after round.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.durable.files import remove_unfinished, replace_file, storage, write_json
from chexfound.errors import CheckpointError, ConfigError, DataError, DivergedError
from chexfound.host import machine
from chexfound.host.durations import span
from chexfound.model import checkpoint
from chexfound.model.weights.release import run_card, run_model
from chexfound.parallel import group
from chexfound.pretrain import checkpoints, display, positions
from chexfound.pretrain.checkpoints import Checkpoints
from chexfound.pretrain.health import watch
from chexfound.pretrain.health.probe import Probe
from chexfound.pretrain.train import DTYPES, Pretrainer, check_gpus
from chexfound.recipe import batch_sizes, curriculum
from chexfound.recipe import check as recipes_check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe

FORMAT = 1
ABOUT = "pretraining.json"
HEALTH = "health.json"


def prepare(
    out: Path, store: str | None, recipe: str | None, overrides: list[str], *, resume: bool, log_every: int
) -> Pretraining:
    """What is asked for, or what `out` holds already where it is not said.

    Raises: ConfigError if the two differ, or nothing says what to do; DataError if the store cannot be used.
    """
    about = _about(out)
    if about is None and resume:
        raise ConfigError(f"{out}: no pretraining to resume here (no {ABOUT}); start one without --resume")
    if overrides and not recipe:
        raise ConfigError("--set changes a recipe: name it too, with --recipe")
    wanted = recipes.load(recipe, recipes.parse_overrides(overrides)) if recipe else None
    held = recipes_check.validate(about["recipe"], str(out / ABOUT)) if about else wanted
    assert held is not None  # the command asks for a recipe where there is nothing to resume
    if wanted is not None and wanted != held:
        raise ConfigError(
            f"{out}: holds a pretraining by another recipe ({_differences(held, wanted)}); choose another --out"
        )
    opened = Store.open(Path(store or (about or {})["store"]))
    sha256 = opened.digest()
    if about and about["store_sha256"] != sha256:
        raise ConfigError(
            f"{out}: was begun with other images than those of {opened.path} (another store, or images were added or "
            "changed since); give that store, or choose another --out"
        )
    group.barrier()  # all have read what the first will write
    return Pretraining(opened, sha256, held, out, log_every, finished=bool(about and about.get("model_sha256")))


def _about(out: Path) -> dict[str, Any] | None:
    """What the folder says that it is; None for a folder that is not there, or empty.

    Raises: ConfigError if it holds something else; CheckpointError if it is damaged.
    """
    path = out / ABOUT
    with storage(path):
        if not path.is_file():
            if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
                raise ConfigError(f"{out}: is in use by something else (no {ABOUT} in it); choose another --out")
            return None
        text = path.read_bytes()
    try:
        about = json.loads(text)
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: of format {about['format']!r}; this release reads {FORMAT}")
        kinds = {"store": str, "store_sha256": str, "recipe": dict}
        if not all(isinstance(about[name], kind) for name, kind in kinds.items()):
            raise TypeError("a value is of another kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); start anew in another folder") from error
    return about  # type: ignore[no-any-return]


def _differences(held: Recipe, wanted: Recipe) -> str:
    one, other = _flat(recipes.to_dict(held)), _flat(recipes.to_dict(wanted))
    keys = [name for name in one | other if one.get(name) != other.get(name)]
    told = "; ".join(f"{name} is {one.get(name)!r} there, {other.get(name)!r} here" for name in keys[:3])
    return told + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


@dataclass
class Pretraining:
    """A pretraining in its folder; with several ranks, all make one, and the first one writes and talks.

    Args:
        store: its training patients' images are trained on.
        store_sha256: its digest.
        recipe: the run.
        out: the folder.
        log_every: steps between two lines of loss and speed.
        finished: whether the folder says so.
    """

    store: Store
    store_sha256: str
    recipe: Recipe
    out: Path
    log_every: int = 50
    finished: bool = False
    paced: int = 0  # pieces that were trained, until it was said how long all may take

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Pretrain from where the folder is to the end, or until told to stop; returns whether it was stopped.

        Raises: ChexfoundError; what was saved is kept.
        """
        if self.finished:
            run_model.load(self.out / "model")  # it is there, and as it was left
            display.say(f"{self.out}: finished already; its model is {self.out / 'model'}")
            return False
        torch.set_num_threads(self.recipe.threads)
        self.check(group.size())
        with self._alone():
            if group.first():
                remove_unfinished(self.out)
            self._write_about()
            step = self._train(stop)
            if step == self.recipe.pretrain_steps:
                self._finish()
            else:
                display.say(
                    f"stopped before step {step} of {self.recipe.pretrain_steps}; the same command goes on from there"
                )
            group.barrier()  # whoever ends first is the end of all
        return step < self.recipe.pretrain_steps

    def check(self, gpus: int) -> None:
        """Raise what is wrong with recipe and store before anything is done; `gpus`: how many are to train."""
        if "pretrain" not in self.recipe.phases:
            raise ConfigError("recipe: its phases leave pretrain out, so there is nothing to do; add it to phases")
        if self.store.px != self.recipe.image_px:
            raise DataError(
                f"{self.store.path}: holds images of {self.store.px} px, the recipe asks for {self.recipe.image_px}; "
                f"ingest again with --image-px {self.recipe.image_px}"
            )
        check_gpus(self.recipe, gpus)
        for _, batch in self._stages():
            group.share(batch, gpus)
        self.ids = View.of(self.store, "all", None).split(Membership.of(self.recipe), "train")
        if not len(self.ids):
            raise DataError(f"{self.store.path}: no training image; the split gives all to val and test")

    def _stages(self) -> Iterator[tuple[int, int]]:
        """The step after the last, and images a step, of each stage."""
        last = 0
        for stage in curriculum.stages(self.recipe):
            last += stage.pretrain_steps
            yield last, batch_sizes.site_batch_size(stage.train, 1, "train")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second command out of the folder.

        Raises: ConfigError.
        """
        if not group.first():
            yield
            return
        with storage(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            handle = open(self.out / ".lock", "w")  # noqa: SIM115 (held, with its lock, as long as we train)
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"{self.out}: another process is pretraining into it; wait for it, or stop it"
                ) from error
            yield

    def _write_about(self, **more: str) -> None:
        if group.first():
            about = {"format": FORMAT, "store": str(self.store.path.resolve()), "store_sha256": self.store_sha256}
            write_json(self.out / ABOUT, {**about, **more, "recipe": recipes.to_dict(self.recipe)})

    # -- training

    def _train(self, stop: Callable[[], bool]) -> int:
        """Take the steps that are left, or some of them; returns the step that is next."""
        work = checkpoints.key(recipes.to_json(self.recipe), self.store_sha256)
        self.saves = Checkpoints(self.out / "saves", work, lasting=True)
        self.probe = self._probe()
        total, step = self.recipe.pretrain_steps, self.saves.newest() or 0
        self._cut_rows(step)
        display.say(
            f"{len(self.ids)} training images of {self.store.path}, {total} steps on {group.size()} × "
            f"{machine.device()}" + (f"; going on at step {step}" if step else "")
        )
        stopped = False
        with display.Display(total, step) as shown:
            for last, batch in self._stages():
                if step < last and not stopped:
                    step, stopped = self._stage(step, last, batch, shown, stop)
        return step

    def _stage(
        self, step: int, last: int, batch: int, shown: display.Display, stop: Callable[[], bool]
    ) -> tuple[int, bool]:
        """Take the steps up to `last`; returns the step that is next, and whether it was told to stop."""
        trainer = Pretrainer(
            self.recipe,
            lambda places: self.store.pixels(self.ids[places]),
            len(self.ids),
            0,
            step=step,
            device=machine.device(),
        )
        if step:
            trainer.load_state(positions.enter(self.saves.read(step).state, self.recipe, step))
        every = checkpoints.steps_between(self.recipe) or self.recipe.train.local_steps
        untold, began, stopped = [], time.monotonic(), False
        while step < last and not stopped:
            until = checkpoints.next_stop(step, last, every, self.log_every)
            if self.paced < 2:  # the first two alone, so that it is known soon how long all will take
                until, step_began = step + 1, time.monotonic()
            try:
                rows = trainer.run(step, until - step, batch, shown.progress(step), self.probe, stop)
            except DivergedError as error:
                raise checkpoints.diverged(self.out, self.store, self.ids, trainer, error) from error
            self.paced += 1
            if self.paced == 2:  # the first is slower: memory is taken, kernels are chosen
                seconds = time.monotonic() - step_began
                left = span((self.recipe.pretrain_steps - until) * seconds)
                shown.say(f"a step takes {seconds:.1f} s; at that pace {left} are left")
            step += len(rows)
            untold += rows
            stopped = group.any_of(stop())
            self._add_rows(rows)
            self._warn(rows, shown)
            if step % self.log_every == 0 or step == last:
                shown.say(display.line(untold, self.recipe.pretrain_steps, batch, time.monotonic() - began))
                untold, began = [], time.monotonic()
            if step % every == 0 or step == last or stopped:
                state = trainer.state()
                self.saves.write(step, state)
        return step, stopped

    def _probe(self) -> Probe | None:
        """What looks at the teacher while it trains; every rank asks it, as its weights may be dealt out to all."""
        config = self.recipe.health
        if not config.eval_period_iterations:
            return None
        return Probe(
            lambda places: self.store.pixels(self.ids[places]),
            self.store.labels(self.ids, tuple(self.store.findings)),
            self._patients(),
            every=config.eval_period_iterations,
            limit=config.probe_images,
            seed=self.recipe.seed,
            roster_index=0,
            dtype=DTYPES[self.recipe.compute_precision.param_dtype],
        )

    def _patients(self) -> list[str]:
        return [self.store.keys[place] for place in self.ids]

    # -- what is written

    def _cut_rows(self, step: int) -> None:
        """Drop the rows of steps that will be taken again, and one that was half-written."""
        path = self.out / "metrics.jsonl"
        if group.first():
            with storage(path):
                lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
            if len(lines) < step:
                display.say(f"{path}: the rows of {step - len(lines)} steps before step {step} are not there any more")
            with replace_file(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines[:step]))

    def _add_rows(self, rows: list[dict[str, Any]]) -> None:
        path = self.out / "metrics.jsonl"
        if group.first():
            with storage(path), open(path, "a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def _warn(self, rows: list[dict[str, Any]], shown: display.Display) -> None:
        """Say what begins to ail the training."""
        if group.first():
            for one in watch.new_symptoms(self.out / HEALTH, self.recipe, rows[0]["step"], rows):
                shown.say(f"warning: {one.name} by step {rows[-1]['step'] + 1}: {one.seen}; {one.advice}")

    def _finish(self) -> None:
        """Leave the model of the last save, and the heads beside it."""
        if not group.first():
            return
        state = checkpoint.with_prefix(self.saves.read(self.recipe.pretrain_steps).state, "model.")
        checkpoint.save(self.out / "heads.safetensors", {name: state[name] for name in state if "_head." in name})
        backbone = checkpoint.add_prefix(checkpoint.with_prefix(state, "teacher.backbone."), "backbone.")
        sha256 = checkpoint.digest(backbone)
        told = run_card.pretraining_card(self.recipe, backbone, len(self.ids), len(set(self._patients())), sha256)
        run_model.save(self.out / "model", self.recipe, (), backbone, told)
        self._write_about(model_sha256=sha256)
        self.saves.clear()
        (self.out / HEALTH).unlink(missing_ok=True)
        display.say(f"model: {self.out / 'model'} (sha256 {sha256})")
        display.say(f"in Python: chexfound.load_backbone({str(self.out / 'model')!r})")
