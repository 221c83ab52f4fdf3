"""Limits: a site's grants to the runs that it takes part in, and whether a recipe keeps within them.

Both ends judge by it: the site by its own site.yaml, before it touches an image; the coordinator by what the site said
of that when it enrolled, so that it need not ask for what will be refused.  A coordinator can ask for less, never for
more: the site's own judgement is the one that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass as plain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from chexfound.contract.fields import parse
from chexfound.errors import REFUSALS, RefusedError
from chexfound.recipe.schema import Adapt, Input, Recipe, Train

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # of what comes from a file, or from outside
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(gt=0)]
Phases = tuple[Literal["pretrain", "adapt", "evaluate"], ...]
Tensors = tuple[Literal["student", "teacher", "head", "optimizer"], ...]
Normalization = Literal["zscore", "grey", "imagenet"]

# Mean and deviation of the fixed normalisations.  With numbers of its own choice a recipe makes a threshold of them,
# which one patient's image passes and no other.
FIXED: dict[str, tuple[Any, Any]] = {
    "grey": (0.5, 0.25),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SLACK = 1 + 1e-9  # of a rate, which is a product of floats


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Bound a recipe's model: a wide patch, or a LayerScale of 1, makes of it a camera (docs/threat-model.md)."""

    min_patch_px: Positive = 14
    max_patch_px: Positive = 16
    min_tokens: Positive = 49  # patches of an image that features are of
    # Patches of a crop in pretraining, global or local; those of the presets' local crops.  One number for both: what
    # part of an image a local crop shows is the recipe's choice too, so a higher one for global crops were no bound.
    min_crop_tokens: Positive = 9
    max_layerscale: Amount = 0.1
    max_registers: Count = 8
    min_image_px: Positive = 64
    max_image_px: Positive = 1024  # of crops too
    normalizations: tuple[Normalization, ...] = ("zscore", "grey", "imagenet")
    max_lr: Amount = 2e-3  # of pretraining, multipliers included
    max_adapt_lr: Amount = 4e-3
    max_clip_grad: Amount = 3.0  # of a gradient's norm; a recipe that clips none asks for more than any number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Limits:
    """Hold what a coordinator is told of site.yaml: field by field, but for `masked`, which follows from it."""

    phases: Phases
    tensors: Tensors
    model: Model
    min_patients: Count
    min_images: Count
    min_batch: Positive
    max_batch: Positive
    min_steps: Positive
    max_steps: Positive
    max_rounds: Positive
    max_runs: Positive
    min_bootstrap: Positive
    max_missed_rounds: Count
    masked: bool  # runs in the clear are refused

    def as_dict(self) -> dict[str, Any]:
        """Give these limits as plain JSON values, as they travel."""
        values: dict[str, Any] = TypeAdapter(Limits).dump_python(self, mode="json")
        return values

    @staticmethod
    def parse(values: Any, what: str) -> Limits:
        """The inverse of `as_dict`, for values from outside.

        Raises: ProtocolError.
        """
        return parse(Limits, values, what)


@plain(frozen=True, kw_only=True)
class Verdict:
    """Hold what a recipe asks under one line of site.yaml, and whether that is granted.

    Args:
        key: of site.yaml, with its section.
        granted: its value, as YAML.
        asked: key and value of the recipe.
        ok: whether the one is within the other.
        code: that a refusal leaves the site with.
    """

    key: str
    granted: str
    asked: str
    ok: bool
    code: str

    @property
    def line(self) -> str:
        """Give the line that may stand in site.yaml for what is granted."""
        section, dot, key = self.key.rpartition(".")
        return f"{section}: {{{key}: {self.granted}}}" if dot else f"{key}: {self.granted}"


def judge(recipe: Recipe, limits: Limits, n_sites: int) -> list[Verdict]:
    """A verdict on each line that bears on a recipe.

    Args:
        recipe: of the run.
        limits: of one site.
        n_sites: that share its pooled batches.
    """
    desk = _Desk(limits)
    desk.among("phases", recipe.phases, "phases", "policy.phase")
    desk.among("tensors", travelling(recipe), "what leaves", "policy.tensors")
    _judge_model(desk, recipe)
    _judge_rates(desk, recipe)
    _judge_work(desk, recipe, n_sites)
    _judge_figures(desk, recipe)
    if limits.masked:
        masked = recipe.aggregation == "secagg"
        desk.add("secagg.required", "true", f"aggregation {recipe.aggregation}", masked, "secagg.plain")
    return desk.verdicts


def travelling(recipe: Recipe) -> list[str]:
    """Give what a recipe has leave a site."""
    found = []
    if "pretrain" in recipe.phases:
        found += ["student"] + ["teacher"] * (recipe.teacher.policy == "average")
    if "adapt" in recipe.phases:
        found += ["head"]
    averaged = {"pretrain": recipe.train.optimizer_state, "adapt": recipe.adapt.optimizer_state}
    return found + ["optimizer"] * any(averaged.get(phase) == "average" for phase in recipe.phases)


def normalization(given: Input) -> str | None:
    """The name of a recipe's normalisation; None for one with numbers of its own."""
    if given.normalization == "zscore":
        return "zscore"
    return next((name for name, values in FIXED.items() if values == (given.mean, given.std)), None)


class _Desk:
    """Collect verdicts."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.verdicts = limits, list[Verdict]()

    def add(self, key: str, granted: str, asked: str, ok: bool, code: str) -> None:
        self.verdicts.append(Verdict(key=key, granted=granted, asked=asked, ok=ok, code=code))

    def among(self, key: str, asked: Sequence[str], what: str, code: str) -> None:
        held = self._of(key)
        self.add(key, f"[{', '.join(held)}]", f"{what} {', '.join(asked)}", set(asked) <= set(held), code)

    def most(self, key: str, asked: Iterable[tuple[str, float]], code: str) -> None:
        """The largest of what is asked is no more than the line's number."""
        self._hold(key, max(asked, key=_number, default=None), lambda value, most: value <= most * SLACK, code)

    def least(self, key: str, asked: Iterable[tuple[str, float]], code: str) -> None:
        """The smallest of what is asked is no less than the line's number."""
        self._hold(key, min(asked, key=_number, default=None), lambda value, least: value >= least, code)

    def _hold(self, key: str, asked: tuple[str, float] | None, fits: Callable[[float, float], bool], code: str) -> None:
        if asked is not None:
            what, value = asked
            held = self._of(key)
            self.add(key, _written(held), f"{what} {_written(value)}", fits(value, held), code)

    def _of(self, key: str) -> Any:
        value: Any = self.limits
        for part in key.split("."):
            value = getattr(value, part)
        return value


def _number(one: tuple[str, float]) -> float:
    return one[1]


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _stages(recipe: Recipe) -> list[Recipe]:
    from chexfound.recipe import curriculum  # brings torch, which no command that only reads a policy needs

    return curriculum.stages(recipe)


def _judge_model(desk: _Desk, recipe: Recipe) -> None:
    student, patch, code = recipe.student, recipe.student.patch_size, "policy.model"
    sides = [
        (f"{'crops' if not number else f'curriculum.{number - 1}'}.{key}", getattr(stage.crops, key))
        for number, stage in enumerate(_stages(recipe))
        for key in ("global_crops_size", "local_crops_size")
        if key == "global_crops_size" or stage.crops.local_crops_number
    ]
    seen = sides if "pretrain" in recipe.phases else []
    desk.least("model.min_patch_px", [("student.patch_size", patch)], code)
    desk.most("model.max_patch_px", [("student.patch_size", patch)], code)
    desk.least("model.min_tokens", [("patches of an image", (recipe.image_px // patch) ** 2)], code)
    desk.least("model.min_crop_tokens", [(f"patches by {name}", (px // patch) ** 2) for name, px in seen], code)
    # 0 leaves the layer out, which is a scale of 1.
    desk.most("model.max_layerscale", [("student.layerscale", student.layerscale or 1.0)], code)
    desk.most("model.max_registers", [("student.num_register_tokens", student.num_register_tokens)], code)
    desk.least("model.min_image_px", [("image_px", recipe.image_px)], code)
    desk.most("model.max_image_px", [("image_px", recipe.image_px), *sides], code)
    desk.among("model.normalizations", [normalization(recipe.input) or "numbers of its own"], "input", code)


def _judge_rates(desk: _Desk, recipe: Recipe) -> None:
    rates, clips = [], []
    if "pretrain" in recipe.phases:
        for stage in _stages(recipe):
            rates.append(("optim.lr", stage.optim.lr))
            rates.append(("optim.lr · patch_embed_lr_mult", stage.optim.lr * stage.optim.patch_embed_lr_mult))
        clips.append(("optim.clip_grad", recipe.optim.clip_grad or float("inf")))
    desk.most("model.max_lr", rates, "policy.rate")
    if "adapt" in recipe.phases:
        desk.most("model.max_adapt_lr", [("adapt.lr", recipe.adapt.lr)], "policy.rate")
        clips.append(("adapt.clip_grad", recipe.adapt.clip_grad or float("inf")))
    desk.most("model.max_clip_grad", clips, "policy.rate")


def _judge_work(desk: _Desk, recipe: Recipe, n_sites: int) -> None:
    steps, least, most = [], [], []
    if "pretrain" in recipe.phases:
        steps.append(("train.local_steps", recipe.train.local_steps))
        least += [("images a step in pretraining", shares(s.train, n_sites)[0]) for s in _stages(recipe)]
        most += [("images a step in pretraining", shares(s.train, n_sites)[1]) for s in _stages(recipe)]
    if "adapt" in recipe.phases:
        steps.append(("adapt.local_steps", recipe.adapt.local_steps))
        least.append(("images a step in adapt", shares(recipe.adapt, n_sites)[0]))
        most.append(("images a step in adapt", shares(recipe.adapt, n_sites)[1]))
    desk.least("min_batch", least, "policy.work")
    desk.most("max_batch", most, "policy.work")
    desk.least("min_steps", steps, "policy.work")
    desk.most("max_steps", steps, "policy.work")
    desk.most("max_rounds", [(f"rounds of {phase}", number) for phase, number in recipe.rounds.items()], "policy.work")


def _judge_figures(desk: _Desk, recipe: Recipe) -> None:
    draws = [("evaluate.bootstrap_samples", recipe.evaluate.bootstrap_samples)] if "evaluate" in recipe.phases else []
    desk.least("min_bootstrap", draws, "policy.work")


def shares(config: Train | Adapt, n_sites: int) -> tuple[int, int]:
    """Give the fewest and the most images a step of one of so many sites; dealt by size, those of sites of one size."""
    if config.batch_size is not None:
        return config.batch_size, config.batch_size
    pooled, sites = config.pooled_batch_size or 0, max(n_sites, 1)
    return pooled // sites, -(-pooled // sites)


# -- what is said of it


def refused(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that are not granted."""
    return [one for one in verdicts if not one.ok]


def table(verdicts: Iterable[Verdict]) -> list[str]:
    """Asked and granted, line by line."""
    return [f"{'ok' if one.ok else 'REFUSED':<8} {one.line:<44} asked: {one.asked}" for one in verdicts]


def refusal(site: str, verdicts: Sequence[Verdict]) -> RefusedError:
    """Say why a site refuses a recipe, for the coordinator."""
    said = "; ".join(f"its site.yaml says {one.line!r}, and the recipe asks for {one.asked}" for one in verdicts)
    code = verdicts[0].code
    return RefusedError(code, f"site {site!r} refuses this recipe ({code}, {REFUSALS[code]}): {said}")


def contradictions(limits: Limits, presets: Iterable[tuple[str, Recipe]], n_sites: int) -> list[str]:
    """Why no recipe can be granted: numbers that exclude each other, or each of some recipes refused."""
    model = limits.model
    pairs = {
        ("model.min_patch_px", "model.max_patch_px"): (model.min_patch_px, model.max_patch_px),
        ("model.min_image_px", "model.max_image_px"): (model.min_image_px, model.max_image_px),
        ("min_batch", "max_batch"): (limits.min_batch, limits.max_batch),
        ("min_steps", "max_steps"): (limits.min_steps, limits.max_steps),
    }
    said = [f"{low} {a} is above {high} {b}" for (low, high), (a, b) in pairs.items() if a > b]
    if (most := (model.max_image_px // model.min_patch_px) ** 2) < model.min_tokens and not said:
        said.append(f"model.min_tokens {model.min_tokens} are more than an image of max_image_px has, {most}")
    for key, held in (("phases", limits.phases), ("tensors", limits.tensors), ("normalizations", model.normalizations)):
        said += [f"{key}: none is granted"] * (not held)
    if said:
        return said
    tried = {name: refused(judge(recipe, limits, n_sites)) for name, recipe in presets}
    against = {name: [one.line for one in found if one.code != "secagg.plain"] for name, found in tried.items()}
    if against and all(against.values()):
        nearest = min(against, key=lambda name: len(against[name]))
        why = ", ".join(against[nearest])
        return [f"none of the presets {', '.join(against)} is granted; the nearest, {nearest}, is refused by {why}"]
    return []
