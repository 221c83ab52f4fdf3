"""Symptoms of what ails pretraining: read off the rows of a learning curve (`measures.py` says what they hold).

A symptom is said when the mean over a window of steps is beyond its threshold, and so is each half of
the window; it stays until the mean is back beyond a second, laxer one.  Nothing is said of a stage's first steps,
in which any honest run looks ill.  Plain Python over plain numbers: site, coordinator and report all
ask here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chexfound.recipe.schema import Recipe

Row = Mapping[str, float]

# -- the thresholds, each with what it was held against: real X-rays (NIH, Guangzhou) at ViT-demo, batches 8 to 32,
# and at ViT-T with 1,024 prototypes, and collapses made on purpose (tests/pretrain/health/test_symptoms.py)

WINDOW = 50  # rows; a step's loss strays from its mean by up to 3 % of log K at batch 8, the mean of 25 by under 1 %
GRACE = 50  # first steps of a stage, or its warm-up if longer
PATIENCE = 3 * WINDOW  # rows that the DINO loss is watched over: an honest run may take 150 steps to leave log K
TAIL = 4 * WINDOW  # rows of the past that the loss is held against
PROBES = 8  # and probes

# Each (on, off).
# Of log K.  Half a window, honest after 200 steps: 0.82 to 0.98, at worst 0.9938 (ViT-T); stalled: 0.9957 to 0.999
AT_LOG_K = (0.995, 0.99)
FALLS = 0.003  # of log K, from half to half of the window: it is on its way.  Stalled: to 0.0024; that ViT-T: 0.0042
UNIFORM = (0.995, 0.99)  # of log K, the teacher's entropy.  Stalled runs have 0.97 to 0.988, uniform ones over 0.999
FEW_PROTOTYPES = (4.0, 6.0)  # exp of the entropy of the mean assignment; softmax centering gone wrong: 1.0 to 3
FEW_USED = (0.2, 0.3)  # of those that the batch could use; with it, so that four images a batch may use four
# feature_std; 0.025: a mean cosine of 0.9994.  Honest: 0.3 at the start, then 0.6 to 0.98; collapsed: 0.010 to 0.012
SAME_FEATURES = (0.025, 0.04)
FEW_DIMENSIONS = (0.05, 0.08)  # of min(D, images).  Honest: 0.25 at step 20, then 0.5; collapsed: 0.01 to 0.05
LOW_RANK = (2.5, 4.0)  # whatever D and the images are: 5 % of 24 would be next to 1, which nothing falls below
SHRUNK = (0.5, 0.6)  # of the largest rank seen before
RISES = (0.10, 0.05)  # of log K, above the lowest mean of half a window seen before.  Honest: up to 0.03


@dataclass(frozen=True)
class Symptom:
    """A finding about a run's health: its name, what was seen, and what to do."""

    name: str
    seen: str
    advice: str


ADVICE = {
    "constant-features": "the features of all images are the same: lower optim.lr, raise dino.koleo_loss_weight, "
    "or raise teacher.momentum_teacher",
    "one-prototype": "the teacher calls all images one or two prototypes: set train.centering=sinkhorn_knopp, "
    "raise teacher.teacher_temp, or lower optim.lr",
    "uniform-teacher": "the teacher says nothing: lower teacher.teacher_temp and teacher.warmup_teacher_temp; "
    "if images look alike to it, see cls-plateau",
    "cls-plateau": "the image-level objective learns nothing: set dino.head_centered=true, train.sinkhorn_queue, "
    "a larger batch, or more photometric variety (crops.jitter); batches of one site are alike",
    "dimensional-collapse": "the features use few dimensions: raise dino.koleo_loss_weight or ibot.loss_weight, "
    "give more prototypes, or lower optim.lr",
    "loss-rises": "what was learned is being lost: lower optim.lr or set optim.clip_grad",
}


def judged_from(recipe: Recipe, step: int) -> int:
    """The first step that counts in the stage of `step`: after its warm-up and the freeze of its last layer."""
    from chexfound.recipe import curriculum

    stage, number = curriculum.at(recipe, step)
    epochs = max(stage.optim.warmup_epochs, stage.optim.freeze_last_layer_epochs)
    return step - number + max(GRACE, int(epochs * stage.train.OFFICIAL_EPOCH_LENGTH))


def tail(rows: Sequence[Row]) -> list[Row]:
    """Give what `symptoms` needs of the rows so far: the last TAIL, and before them those of the last PROBES probes."""
    probes = [row for row in rows[:-TAIL] if "rankme" in row][-PROBES:]
    return [*probes, *rows[-TAIL:]]


def symptoms(rows: Sequence[Row], *, dim: int, judged_from: int = GRACE, before: Collection[str] = ()) -> list[Symptom]:
    """The symptoms at the end of a curve, those that only follow from another left out: each asks for something else.

    Args:
        rows: in the order of steps, of one site; a figure that they lack is not judged.
        dim: D, the width of the backbone.
        judged_from: the first step that counts.
        before: names of the symptoms that were there when last looked; they must clear further to go.
    """
    judged = [row for row in rows if row["step"] >= judged_from]
    if len(judged) < WINDOW:
        return []
    look = _Look(judged, dim, before)
    found = [one for check in (look.constant, look.one_prototype, look.uniform, look.plateau) if (one := check())][:1]
    if not any(one.name == "constant-features" for one in found) and (one := look.dimensions()):
        found.append(one)
    if rises := look.rises():  # what comes with it comes from it
        found = [one for one in found if one.name in before] + [rises]
    return found


@dataclass(frozen=True)
class _Look:
    rows: Sequence[Row]
    dim: int
    before: Collection[str]

    def _limit(self, name: str, on_off: tuple[float, float]) -> float:
        return on_off[name in self.before]

    def _window(
        self, value: Callable[[Row], float], *needed: str, size: int = WINDOW
    ) -> tuple[float, float, float] | None:
        """Mean over a window and over each half of it; None where a row lacks what is needed, or K is 1."""
        rows = self.rows[-size:]
        if len(rows) < size or not all(
            key in row and (key != "log_k" or row[key] > 0) for row in rows for key in needed
        ):
            return None
        values = [value(row) for row in rows]
        return fmean(values), fmean(values[: size // 2]), fmean(values[size // 2 :])

    def _beyond(self, name: str, on_off: tuple[float, float], window: tuple[float, ...], *, below: bool) -> bool:
        """All three means are beyond the limit; of a symptom that was there, the mean over the window is enough."""
        limit, values = self._limit(name, on_off), window[:1] if name in self.before else window
        return all(value <= limit if below else value >= limit for value in values)

    def constant(self) -> Symptom | None:
        name, window = "constant-features", self._window(lambda row: row["feature_std"], "feature_std")
        if window is None or not self._beyond(name, SAME_FEATURES, window, below=True):
            return None
        return _of(name, f"feature std {window[0]:.3f} of 1")

    def one_prototype(self) -> Symptom | None:
        name = "one-prototype"
        needed = ("prototype_perplexity", "log_k")
        count = self._window(lambda row: row["prototype_perplexity"] * math.exp(row["log_k"]), *needed)
        used = self._window(lambda row: row["prototype_usage"], "prototype_usage")
        if count is None or used is None:
            return None
        few = self._beyond(name, FEW_PROTOTYPES, count, below=True) and self._beyond(name, FEW_USED, used, below=True)
        return _of(name, f"{count[0]:.1f} prototypes in even use") if few else None

    def uniform(self) -> Symptom | None:
        name, needed = "uniform-teacher", ("teacher_entropy", "log_k")
        window = self._window(lambda row: row["teacher_entropy"] / row["log_k"], *needed)
        if window is None or not self._beyond(name, UNIFORM, window, below=False):
            return None
        return _of(name, f"teacher entropy {100 * window[0]:.1f} % of log K")

    def plateau(self) -> Symptom | None:
        name = "cls-plateau"
        window = self._window(lambda row: row["dino"] / row["log_k"], "dino", "log_k", size=PATIENCE)
        if window is None or not self._beyond(name, AT_LOG_K, window, below=False):
            return None
        if window[1] - window[2] >= FALLS:
            return None
        log_k = self.rows[-1]["log_k"]
        return _of(name, f"DINO loss {window[0] * log_k:.3f}, log K {log_k:.3f}")

    def dimensions(self) -> Symptom | None:
        """The last two probes agree; of a symptom that was there, the last is enough."""
        name = "dimensional-collapse"
        probes = [
            (row["rankme"], row["probe_images"]) for row in self.rows if "rankme" in row and "probe_images" in row
        ]
        if len(probes) < 2:
            return None
        most = min(float(self.dim), probes[-1][1])
        best = max((rank for rank, _ in probes[:-2]), default=0.0)
        limit = max(
            self._limit(name, LOW_RANK),
            self._limit(name, FEW_DIMENSIONS) * most,
            self._limit(name, SHRUNK) * best,
        )
        last = [rank for rank, _ in probes[-1 if name in self.before else -2 :]]
        return _of(name, f"effective rank {last[-1]:.1f} of {most:.0f}") if max(last) <= limit else None

    def rises(self) -> Symptom | None:
        """Either half of the window is above the lowest mean over as many steps that was seen before it."""
        name, part = "loss-rises", WINDOW // 2
        window, earlier = self._window(lambda row: row["loss"], "loss", "log_k"), self.rows[:-WINDOW]
        if window is None or len(earlier) < part or not all("loss" in row for row in earlier):
            return None
        losses = [row["loss"] for row in earlier]
        lowest = min(fmean(losses[start : start + part]) for start in range(len(losses) - part + 1))
        above = tuple((value - lowest) / self.rows[-1]["log_k"] for value in (window[2], *window[1:]))
        if not self._beyond(name, RISES, above, below=False):
            return None
        return _of(name, f"loss {window[2]:.2f}, {window[2] - lowest:.2f} above its lowest")


def _of(name: str, seen: str) -> Symptom:
    return Symptom(name, seen, ADVICE[name])
