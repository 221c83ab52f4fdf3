"""Pretraining of one store without a federation, in one folder that it can be gone on with.

    OUT/pretraining.json     what is done: recipe, store
    OUT/journal.jsonl        a record a round; its lock keeps a second command out
    OUT/rounds/, OUT/own/    the last round's weights, and what the store's site keeps until all is done
    OUT/metrics.jsonl        a row a step, from the journal
    OUT/model/               at the end: the backbone and its heads, a release directory (model/weights/export.py)

The loop is that of all runs (server/rounds/loop.py), and the site is asked directly: it is the centralized arm of
`chexfound-sim` over the whole store, to the bit.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chexfound.contract.request import Request
from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.durable.files import remove_unfinished, storage, write_json, write_text
from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError, ConfigError, DataError
from chexfound.host import machine
from chexfound.host.durations import span
from chexfound.model.weights import export
from chexfound.model.weights.release import folder
from chexfound.parallel import group
from chexfound.phases import dispatch
from chexfound.phases.site_state import Site
from chexfound.pretrain.train import check_gpus
from chexfound.recipe import check, curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import BatchSizes
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe
from server.exchange.direct import DirectExchange
from server.rounds import health
from server.rounds.loop import Outcome
from server.rounds.start import run_of
from sim.arms.plan import lone_recipe
from sim.display import Display

FORMAT = 2
ABOUT = "pretraining.json"
SITE = "store"  # what the store's site is called in its run


def prepare(
    out: Path, store: str | None, recipe: str | None, overrides: list[str], *, resume: bool, gpus: str
) -> LoneStore:
    """Find what is asked for, or what `out` holds already where it is not said, and check that it can be done.

    Raises: ConfigError if the two differ, or nothing says what to do; DataError if the store cannot be used.
    """
    about = _about(out)
    if about is None and resume:
        raise ConfigError(f"{out}: no pretraining to resume here (no {ABOUT}); start one without --resume")
    if overrides and not recipe:
        raise ConfigError("--set changes a recipe: name it too, with --recipe")
    wanted = recipes.load(recipe, recipes.parse_overrides(overrides)) if recipe else None
    held = check.validate(about["recipe"], str(out / ABOUT)) if about else wanted
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
    result = LoneStore(opened, held, out, machine.gpus(gpus))
    if about is None:
        store = str(opened.path.resolve())
        write_json(
            out / ABOUT,
            {"format": FORMAT, "store": store, "store_sha256": sha256, "recipe": recipes.to_dict(held)},
        )
    return result


def _about(out: Path) -> dict[str, Any] | None:
    """Read what the folder says that it is; None for a folder that is not there, or empty.

    Raises: ConfigError if it holds something else; CheckpointError if it is damaged, or of an earlier release.
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
            raise CheckpointError(
                f"{path}: of format {about['format']!r}, and this release goes on with format {FORMAT} only: finish it "
                "with the release that began it, or start anew in another folder; a model/ in it can be used as it is"
            )
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


def in_epochs(recipe: Recipe) -> Recipe:
    """Take the same steps in rounds of an epoch at most: what stands between two takes time, and no bit changes.

    With `robust.clip` they stay as they are: it bounds a round by the one before.
    """
    train = recipe.train
    shared = math.gcd(train.rounds, *(stage.rounds for stage in recipe.curriculum))
    most = train.OFFICIAL_EPOCH_LENGTH // train.local_steps if recipe.robust.clip is None else 1
    times = max([number for number in range(1, most + 1) if shared % number == 0], default=1)
    return changed(
        recipe,
        train=changed(train, rounds=train.rounds // times, local_steps=train.local_steps * times),
        curriculum=tuple(changed(stage, rounds=stage.rounds // times) for stage in recipe.curriculum),
    )


class LoneStore:
    """A pretraining of one store in its folder.

    Args:
        store: its training patients' images are trained on.
        recipe: what is to be done; of its phases, pretrain.
        out: the folder.
        gpus: how many train together.

    Raises: ConfigError or DataError for what is wrong with them; nothing is written then.
    """

    def __init__(self, store: Store, recipe: Recipe, out: Path, gpus: int) -> None:
        self.recipe, self.out, self.gpus = recipe, out, gpus
        if "pretrain" not in recipe.phases:
            raise ConfigError("recipe: its phases leave pretrain out, so there is nothing to do; add it to phases")
        self.lone = in_epochs(lone_recipe(changed(recipe, phases=("pretrain",))))
        self.batches = BatchSizes.pooled(recipe, 1)
        check_gpus(recipe, gpus)
        for (batch,) in self.batches.pretrain:
            group.share(batch, gpus)
        self.site = Site(view=View.of(store, SITE, None), home=out / "own", progress=self._step_taken, gpus=str(gpus))
        dispatch.run(self.site, self.lone, Request(phase="enrol"))  # it raises what is wrong with the store
        self.ids = self.site.training_ids(self.lone)
        if not len(self.ids):
            raise DataError(f"{store.path}: no training image; the split gives all to val and test")
        self._images, self._began, self._paced = 0, 0.0, 0  # since the last line; and steps that were timed
        self._rows: list[dict[str, Any]] = []

    def run(self, stop: Callable[[], bool], log_every: int) -> None:
        """Pretrain from where the folder is to the end, or until told to stop.

        Raises: StoppedError if it was; ChexfoundError; what was saved is kept.
        """
        model = self.out / "model"
        if (model / "config.json").is_file():  # written last
            folder.read(model)  # it is there, and as it was left
            print(f"{self.out}: finished already; its model is {model}")
            return
        self.site.stop, self.log_every = stop, log_every
        with Display(Console()) as self.display:
            run = run_of(self.lone, DirectExchange(self.site), self.out, batches=self.batches, on_event=self._heard)
            outcome = run.run()
        self._finish(outcome)
        print(f"model: {model} (sha256 {outcome.model_sha256})")
        print(f"in Python: chexfound.load_backbone({str(model)!r})")

    # -- what is shown

    def _heard(self, event: dict[str, Any]) -> None:
        """Told each of the journal's records, once it is there."""
        if event["event"] in ("start", "resume"):
            self._begin(event.get("pretrain", 0))
        elif event["event"] == "round":
            rows = event["sites"][0]["history"]
            with storage(self.out / "metrics.jsonl"), open(self.out / "metrics.jsonl", "a") as file:
                file.write(_lines(rows))
            for one in health.warnings(event):
                text = f"{one['symptom']} by step {rows[-1]['step'] + 1}: {one['seen']}; {one['advice']}"
                self.display.say(f"[yellow]warning[/yellow]: {escape(text)}")
            self._rows += rows
            if len(self._rows) >= self.log_every or rows[-1]["step"] + 1 == self.recipe.pretrain_steps:
                self.display.say(escape(self._line()))

    def _begin(self, rounds: int) -> None:
        remove_unfinished(self.out)
        entries = read_journal(self.out / "journal.jsonl")
        write_text(
            self.out / "metrics.jsonl",
            "".join(_lines(entry["sites"][0]["history"]) for entry in entries if entry["event"] == "round"),
        )
        saved = (int(path.stem) for path in (self.site.home / "saves").glob("*.safetensors"))
        step = max(rounds * self.lone.train.local_steps, *saved, 0)
        self.display.say(
            f"{len(self.ids)} training images of {escape(str(self.site.view.store.path))}, "
            f"{self.recipe.pretrain_steps} steps on {self.gpus} × {machine.device()}"
            + (f"; going on at step {step}" if step else "")
        )
        self._began = time.monotonic()

    def _step_taken(self, phase: str, done: int, total: int) -> None:
        self._images += self.batches.pretrain[curriculum.index_at(self.recipe, done - 1)][0]
        self.display.update(SITE, phase, done, total)
        self._paced += 1
        if self._paced == 1:  # it is slower: memory is taken, kernels are chosen
            self._second_began = time.monotonic()
        elif self._paced == 2:
            seconds = time.monotonic() - self._second_began
            self.display.say(f"a step takes {seconds:.1f} s; at that pace {span((total - done) * seconds)} are left")

    def _line(self) -> str:
        """Means of loss and its parts since the last line, the last probe's figures, and the speed."""
        rows, seconds = self._rows, time.monotonic() - self._began
        parts = [name for name in ("loss", "dino", "koleo", "ibot") if name in rows[-1]]
        means = " ".join(f"{name}={sum(row[name] for row in rows) / len(rows):.4f}" for name in parts)
        for row in [row for row in rows if "rankme" in row][-1:]:
            means += "".join(f" {name}={row[name]:.3g}" for name in ("rankme", "knn_auroc") if name in row)
        line = f"step={rows[-1]['step'] + 1} of={self.recipe.pretrain_steps} {means}"
        line += f" images_per_s={self._images / seconds:.1f}"
        self._rows, self._images, self._began = [], 0, time.monotonic()
        return line

    # -- what is left

    def _finish(self, outcome: Outcome) -> None:
        """Leave the model, and drop what a site needs only while it trains."""
        metrics = {"model_sha256": {"pretrained": outcome.model_sha256}, "results": [], "replicates": []}
        export.of_finished(self.out, self.out / "model", metrics | {"date": datetime.date.today().isoformat()})
        for part in ("saves", "state", "health"):
            shutil.rmtree(self.site.home / part, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or what diverged is in it
            self.site.home.rmdir()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False, sort_keys=True) + "\n" for row in rows)
