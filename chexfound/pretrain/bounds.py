"""How far a recipe's steps can lead, whatever the gradients: the box that no honest weight is outside.

AdamW's moments are sums over the same gradients, so m² ≤ S_t · v with S_t = (1 − β₁)²/(1 − β₂) · (1 − rᵗ)/(1 − r) and
r = β₁²/β₂ < 1 (Cauchy-Schwarz), and its step t is at most lr · c_t with c_t = √(S_t (1 − β₂ᵗ)) / (1 − β₁ᵗ).  Hence
after the steps j from w0

    |w − w0| ≤ Σ_j lr_j · m · (c_j + wd_j · |w0|) + rounding

with the schedules' values at those global steps and the parameter's own multiplier m: 0 where it is frozen.  SGD's
steps are bounded by the norm that a submodule's gradient is clipped to.  The teacher is a mean of students:
|T1 − (a·T0 + (1 − a)·S0)| ≤ (1 − a) · box(S) with a = Π_j momentum_j.

Means over sites keep all of it, since boxes and balls are convex and squares too; so does an optimizer that began
later than the run, as c is taken at the most steps that it can have behind it.  Where the curriculum enters another
stage, position embeddings are resized by a matrix whose rows have sums of magnitudes below `RESIZED`.

What the box is no defence against: docs/threat-model.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chexfound.contract.request import MOMENTS
from chexfound.errors import ConfigError, RefusedError
from chexfound.pretrain import schedules
from chexfound.pretrain.optimizer import is_decayed, multipliers
from chexfound.pretrain.schedules import cosine
from chexfound.recipe import curriculum
from chexfound.recipe.schema import ARCHS, Recipe

HEAD_BETAS = (0.9, 0.999)  # torch's, which adaptation takes
SLACK = 1 + 1e-4  # of a step: Adam's moments are kept in float32, and so are its decay rates
ULP = 2.0**-23  # of a weight in float32, a step
RESIZED = 1.9  # of a position embedding that a stage of the curriculum enters: measured, at most 1.89
MOMENT = 1 + 1e-3  # of a moment
PIECE = 2**17  # values that are looked at at a time: what lies in a core's own cache

Parameter = Callable[[str, int], tuple[float, float, bool]]  # name, ndim: multipliers of rate and decay, is last layer


def check_bounded(recipe: Recipe) -> None:
    """Raise ConfigError for a recipe whose optimizer has no box, with what to do."""
    optim, adapt, found = recipe.optim, recipe.adapt, []
    if "pretrain" in recipe.phases:
        if optim.optimizer == "sgd" and not optim.clip_grad:
            found.append("optim.clip_grad: SGD without clipping goes as far as the images make it; set it to 3")
        if optim.optimizer == "adamw" and optim.adamw_beta1**2 >= optim.adamw_beta2:
            found.append(
                f"optim.adamw_beta2: {optim.adamw_beta2:g} is not above the square of adamw_beta1 "
                f"({optim.adamw_beta1:g}), and then no step of AdamW is bounded; raise it"
            )
        for stage in curriculum.stages(recipe):
            rate = stage.optim.lr * max(1.0, stage.optim.patch_embed_lr_mult)
            if rate * max(stage.optim.weight_decay, stage.optim.weight_decay_end) > 1:
                found.append("optim.weight_decay: times the rate it is above 1, and turns weights over; lower it")
                break
    if "adapt" in recipe.phases and adapt.lr * adapt.weight_decay > 1:
        found.append("adapt.weight_decay: times the rate it is above 1, and turns weights over; lower it")
    if found:
        raise ConfigError("no bound holds for this recipe's steps: " + "; ".join(found))


def betas(recipe: Recipe, phase: str) -> tuple[float, float]:
    """Give Adam's decay rates in a phase."""
    return HEAD_BETAS if phase == "adapt" else (recipe.optim.adamw_beta1, recipe.optim.adamw_beta2)


def corrections(beta1: float, beta2: float, steps: int) -> np.ndarray:
    """The c of Adam's steps 1 … steps, each the largest up to it; infinite where β₁² ≥ β₂."""
    numbers = np.arange(1, steps + 1, dtype=np.float64)
    if beta1**2 >= beta2:
        return np.full(steps, math.inf)
    root = np.sqrt(squared(beta1, beta2, numbers) * (1 - beta2**numbers))
    result: np.ndarray = np.maximum.accumulate(root / (1 - beta1**numbers))
    return result


def squared(beta1: float, beta2: float, steps: np.ndarray | float) -> np.ndarray | float:
    """S: how many times v, at most, m² is after so many of Adam's steps."""
    ratio = beta1**2 / beta2
    return (1 - beta1) ** 2 / (1 - beta2) / (1 - ratio) * (1 - ratio**steps)


@dataclass(frozen=True, kw_only=True)
class UpdateBound:
    """Bound how far one run's consecutive global steps can lead.

    Args:
        steps: their numbers.
        parameter: gives a parameter's multipliers, by its name without prefix.
        travel: Σ lr·c, of a weight that is not decayed; and the same where the last layer is frozen for a while.
        decay: Σ lr·wd; likewise.
        momentum: Π momentum, of the teacher.
        norm: Σ lr·clip, of all of a submodule; infinite where the optimizer needs none.
        squared: S: m² over v at most, after the last of the steps.  Infinite: no bound.
        settled: S after ever so many, which is never below 1.
        begun: S after the first of the steps.
        gradient: of a weight at most; infinite if it is not clipped.
        exact: the optimizer takes each of the steps, and leaves none out.
        stage: how many times position embeddings have been resized since the run began.
        resized: how many times since the weights that these steps begin with.
    """

    steps: range
    parameter: Parameter
    travel: tuple[float, float]
    decay: tuple[float, float]
    momentum: float = 0.0
    norm: float = math.inf
    squared: float = math.inf
    settled: float = math.inf
    begun: float = math.inf
    gradient: float = math.inf
    exact: bool = True
    stage: int = 0
    resized: int = 0

    @staticmethod
    def of(recipe: Recipe, phase: str, steps: range, *, resized: int = 0) -> UpdateBound:
        """Give the bound of these steps of pretraining, or of the head's in `adapt`."""
        if phase == "adapt":
            return _of_head(recipe, steps)
        optim, values = recipe.optim, [schedules.at(recipe, step) for step in steps]
        clip, depth = optim.clip_grad or math.inf, ARCHS[recipe.student.arch][1]
        rates = np.array([[value.lr for value in values], [value.last_layer_lr for value in values]]).reshape(2, -1)
        decays = np.array([value.weight_decay for value in values])
        adam = optim.optimizer == "adamw"
        scaled = recipe.compute_precision.param_dtype == "fp16" and recipe.compute_precision.grad_scaler
        if adam:
            beta1, beta2 = optim.adamw_beta1, optim.adamw_beta2
            most = corrections(beta1, beta2, steps.stop)[steps.start :]
            if scaled and beta1**2 < beta2:  # steps are left out, and their mean over sites is no whole number
                largest = max(1.0, math.sqrt(1 - beta2) / (1 - beta1))
                most = np.sqrt(squared(beta1, beta2, np.arange(steps.start + 1, steps.stop + 1.0))) * largest
        else:
            most = np.full(len(steps), clip)
        return UpdateBound(
            steps=steps,
            parameter=lambda name, ndim: multipliers(name, ndim, depth, optim),
            travel=_pair(_product(rates, most)),
            decay=_pair(_product(rates, decays)),
            momentum=math.prod(value.momentum for value in values),
            norm=math.inf if adam else float(_product(rates[0], most)),
            squared=_most_squared(optim.adamw_beta1, optim.adamw_beta2, steps.stop) if adam else math.inf,
            settled=_most_squared(optim.adamw_beta1, optim.adamw_beta2, math.inf) if adam else math.inf,
            begun=_most_squared(optim.adamw_beta1, optim.adamw_beta2, steps.start + 1) if adam else math.inf,
            gradient=clip,
            exact=not scaled,
            stage=curriculum.index_at(recipe, steps.start) + resized,
            resized=resized,
        )

    def box(self, name: str, start: Tensor) -> Tensor:
        """How far each weight of a student, or of a head, can be from where it was, float64.

        Args:
            name: as it travels.
            start: its values, in the stage that the steps end in.
        """
        per, own = self._walls(name, start)
        return start.detach().double().abs() * per + own

    def _walls(self, name: str, start: Tensor) -> tuple[float, float]:
        """(p, q) of a tensor's box p·|w0| + q."""
        rate, wd, last = self.parameter(name.removeprefix("student."), start.ndim)
        travel = rate * self.travel[last] if rate else 0.0
        per, own = rate * wd * self.decay[last] + self._ulps, travel * (SLACK + self._ulps)
        if _is_position(name):
            if self.stage and math.isfinite(self.settled):
                own *= math.sqrt(self.settled / self.begun)  # squares that were raised to m² (curriculum.with_grid)
            if self.resized:  # each is a sum over its neighbours, rounded a few times
                own = RESIZED**self.resized * (own + (per + 7 * self._ulps) * largest(start))
                per = 0.0
        return per, own

    @property
    def _ulps(self) -> float:
        """Give what float32 adds to a weight in all the steps, over its size."""
        return (len(self.steps) + 2) * ULP

    def largest(self, name: str, before: Mapping[str, Tensor]) -> float:
        """How far a tensor's weights can go at most; a teacher goes towards its student, and no further."""
        student = name.replace("teacher.", "student.", 1)
        per, own = self._walls(student, before[student])
        own += per * largest(before[student])
        if name == student:
            return own
        apart = max((float((s - t).abs().max()) for s, t in _together(before[student], before[name])), default=0.0)
        return (1 - self.momentum) * (own + apart) + self._ulps * (own + largest(before[name]))

    def check(
        self,
        after: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        frozen: Collection[str] = (),
        rounding: Mapping[str, float] | None = None,
    ) -> None:
        """Hold weights against where the steps can lead to.

        Args:
            after: `student.…`, `teacher.…` or a head's, by name.  Moments among them are left to `check_moments`.
            before: weights of the same names and shapes; a teacher's student among them.
            frozen: names of those that are not trained.
            rounding: of a tensor, by name, what a masked sum adds.

        Raises: RefusedError of `weights.box` or `weights.frozen`, naming the tensor.
        """
        norms = _Norms(self)
        for name, tensor in after.items():
            if name.startswith(MOMENTS):
                continue
            if name in frozen:
                if not torch.equal(tensor, before[name]):
                    raise RefusedError("weights.frozen", f"{name!r}, which is not trained, is another than before")
                continue
            allowance = (rounding or {}).get(name, 0.0)
            over = self._beyond(name, tensor, before, allowance, norms)
            if not over <= 0:
                raise RefusedError(
                    "weights.box",
                    f"{name!r} holds a weight that is {over:.3g} beyond where {len(self.steps)} steps can lead"
                    if math.isfinite(over)
                    else f"{name!r} holds a value that is not finite",
                )
        norms.check()

    def _beyond(
        self, name: str, tensor: Tensor, before: Mapping[str, Tensor], allowance: float, norms: _Norms
    ) -> float:
        """By how much the worst weight is outside its box; not above 0 if none is."""
        student = name.replace("teacher.", "student.", 1)
        start, worst = before[student], -math.inf
        per, own = self._walls(student, start)
        if math.isinf(own):
            return 0.0 if bool(tensor.isfinite().all()) else math.nan
        if name == student:
            share, pieces = 1.0, _together(tensor, start)
        else:
            share, pieces = 1 - self.momentum, _together(tensor, start, before[name])
        for piece, origin, *teacher in pieces:
            size = origin.abs()
            box = size.mul(per * share).add_(own * share + allowance)
            goal = origin
            if teacher:
                goal = teacher[0].mul(self.momentum).add_(origin, alpha=share)
                box.add_(size.add(teacher[0].abs_()), alpha=self._ulps)
            away = piece.sub_(goal).abs_()
            over = float(box.sub_(away).min())
            if math.isnan(over):
                return math.nan
            worst = max(worst, -over)
            norms.add(name, start.ndim, share, away, size, allowance)
        return worst

    def check_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Hold an optimizer's moments against what can be after these steps, all of which began at zero.

        Args:
            moments: by name, among other tensors.

        Raises: RefusedError of `weights.box`.
        """
        for name, value in moments.items():
            if name.startswith(MOMENTS):
                parameter, _, key = name.rpartition(".")
                if not self._can_be(parameter, key, value, moments):
                    raise RefusedError("weights.box", f"{name!r} holds what cannot be a moment of the optimizer")

    def _can_be(self, parameter: str, key: str, value: Tensor, moments: Mapping[str, Tensor]) -> bool:
        if key == "step":
            done = self.steps.stop
            return bool(((value == done) if self.exact else (value >= 0) & (value <= done)).all())
        if key == "exp_avg_sq":
            most = self.gradient * self._resized(parameter)
            return bool(((value >= 0) & (value <= most * most * MOMENT)).all())
        # below 1e-15 squares fall out of float32, and Adam's eps of 1e-8 leaves nothing of them
        if math.isinf(self.settled):
            return bool(value.isfinite().all())
        times = self.settled if self._resized(parameter) > 1 else self.squared
        squares = moments[f"{parameter}.exp_avg_sq"]
        return all(
            bool((first.square() <= second * (times * MOMENT) + 1e-30).all())
            for first, second in _together(value, squares)
        )

    def _resized(self, parameter: str) -> float:
        return RESIZED**self.stage if _is_position(parameter) else 1.0


@dataclass
class _Norms:
    """How far whole submodules are from where they were, for an optimizer that is bounded by that."""

    bound: UpdateBound
    sums: dict[tuple[str, float], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, ndim: int, share: float, away: Tensor, size: Tensor, allowance: float) -> None:
        """Take up a piece of a tensor: of each weight what decay and rounding do not explain."""
        bound = self.bound
        if math.isinf(bound.norm) or (bound.resized and _is_position(name)):
            return
        rate, decay, last = bound.parameter(name.split(".", 1)[1], ndim)
        if rate:
            explained = size * (rate * decay * bound.decay[last] * share + 2 * bound._ulps)
            explained += allowance + bound.norm * bound._ulps
            rest = (away - explained).clamp_(min=0).div_(rate)
            self.sums[".".join(name.split(".")[:2]), share] += float(rest.square_().sum())

    def check(self) -> None:
        """Raise RefusedError for a submodule that went further than its gradients were clipped to."""
        for (submodule, share), total in self.sums.items():
            if not math.sqrt(total) <= share * self.bound.norm * SLACK:
                raise RefusedError(
                    "weights.box",
                    f"{submodule!r} is {math.sqrt(total):.3g} from where it was, beyond {share * self.bound.norm:.3g}: "
                    f"as far as {len(self.bound.steps)} clipped steps can lead",
                )


def largest(tensor: Tensor) -> float:
    """The largest magnitude of its values; 0 if it has none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _of_head(recipe: Recipe, steps: range) -> UpdateBound:
    config = recipe.adapt
    warmup = min(config.warmup_steps, config.total_steps)
    rates = np.array([cosine(step, config.lr, 0.0, config.total_steps, warmup=warmup) for step in steps])
    travel = float(_product(rates, corrections(*HEAD_BETAS, steps.stop)[steps.start :]))
    decay = float(rates.sum() * config.weight_decay)
    return UpdateBound(
        steps=steps,
        parameter=lambda name, ndim: (1.0, float(is_decayed(name)), False),
        travel=(travel, travel),
        decay=(decay, decay),
        squared=_most_squared(*HEAD_BETAS, steps.stop),
        settled=_most_squared(*HEAD_BETAS, math.inf),
        begun=_most_squared(*HEAD_BETAS, steps.start + 1),
        gradient=config.clip_grad or math.inf,
    )


def _most_squared(beta1: float, beta2: float, steps: float) -> float:
    return math.inf if beta1**2 >= beta2 else float(squared(beta1, beta2, steps))


def _product(rates: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Σ over the steps; a rate of 0 leaves nothing of what has no bound."""
    with np.errstate(invalid="ignore"):
        result: np.ndarray = np.where(rates > 0, rates * others, 0.0).sum(-1)
    return result


def _pair(both: np.ndarray) -> tuple[float, float]:
    return float(both[0]), float(both[1])


def _is_position(name: str) -> bool:
    return name == "pos_embed" or name.endswith(".pos_embed")


def _together(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Values of tensors of one shape in float64, some at a time."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), PIECE):
        yield tuple(one[start : start + PIECE].to(torch.float64, copy=True) for one in flat)
