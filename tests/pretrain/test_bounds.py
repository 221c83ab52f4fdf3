"""The box: real optimizers never leave it, the worst gradients reach its walls, and the next float is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chexfound.contract.request import MOMENTS
from chexfound.errors import ConfigError, RefusedError
from chexfound.model.glori import build_head
from chexfound.pretrain import bounds, optimizer, positions, schedules
from chexfound.pretrain.bounds import UpdateBound, check_bounded
from chexfound.pretrain.optimizer import is_decayed
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from strategies.aggregate import RunningMean

NAMES = {  # of parameters whose rates and decay differ
    "backbone.patch_embed.proj.weight": (3, 2),
    "backbone.blocks.0.norm1.weight": (3,),
    "backbone.blocks.1.mlp.w12.weight": (2, 3),
    "dino_head.last_layer.weight_v": (4, 2),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"optim.adamw_beta2": 0.999, "optim.weight_decay_end": 0.4, "optim.freeze_last_layer_epochs": 0.5},
    {"optim.adamw_beta1": 0.0, "optim.adamw_beta2": 0.9},
    {"optim.adamw_beta2": 0.95, "optim.layerwise_decay": 0.7, "optim.patch_embed_lr_mult": 0.2},
    {"optim.clip_grad": 0.0},
    {"optim.optimizer": "sgd", "optim.weight_decay": 2.0, "optim.patch_embed_lr_mult": 0.5},
]
gradients = st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1e-30, 1e-20, -1e-6, 1e3])


def recipe_of(changes: dict[str, Any]) -> Any:
    return recipes.load("demo", {"train.rounds": 4, "train.local_steps": 5, **changes})


def module_of(weights: dict[str, Tensor]) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """A student with parameters of these names."""
    root = torch.nn.Module()
    for name, tensor in weights.items():
        *path, leaf = name.removeprefix("student.").split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
    return root, dict(root.named_parameters())


class Site:
    """A student and its teacher under a recipe's own optimizer, fed with gradients of one's choice."""

    def __init__(self, recipe: Any, sent: dict[str, Tensor]) -> None:
        self.recipe = recipe
        self.module, self.parameters = module_of({n: t for n, t in sent.items() if n.startswith("student.")})
        self.teacher = {n: t.clone() for n, t in sent.items() if n.startswith("teacher.")}
        self.optimizer = optimizer.build(self.module, 4, recipe.optim)
        moments = {n: t for n, t in sent.items() if n.startswith(MOMENTS)}
        if moments:
            optimizer.set_moments(self.optimizer, optimizer.checked_moments(self.module, moments))

    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        values = schedules.at(self.recipe, number)
        optimizer.apply_schedule(self.optimizer, values)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        for child in self.module.children():
            optimizer.clip(child, self.recipe.optim.clip_grad or math.inf)
        self.optimizer.step()
        for name, parameter in self.parameters.items():
            self.teacher[f"teacher.{name}"].lerp_(parameter.detach(), 1 - values.momentum)

    def tensors(self) -> dict[str, Tensor]:
        own = {f"student.{name}": p.detach().clone() for name, p in self.parameters.items()}
        return own | {n: t.clone() for n, t in self.teacher.items()} | optimizer.moments(self.optimizer, self.module)


def begin(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = {name: torch.randn(shape, generator=generator) * size for name, shape in NAMES.items()}
    return {f"{whose}.{name}": t.clone() for whose in ("student", "teacher") for name, t in student.items()}


def wild(values: list[float], step: int) -> dict[str, Tensor]:
    numbers = torch.tensor(values)
    return {
        name: numbers[(torch.arange(math.prod(shape)) + step) % len(numbers)].reshape(shape)
        for name, shape in NAMES.items()
    }


def check(bound: UpdateBound, after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    bound.check(after, before)
    bound.check_moments(after)


@settings(max_examples=60)
@given(
    changes=st.sampled_from(KINDS),
    wilder=st.lists(st.lists(gradients, min_size=5, max_size=9), min_size=2, max_size=2),
    keep=st.booleans(),
    seed=st.integers(0, 9),
    size=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_no_gradients_lead_out_of_the_box(
    changes: dict[str, Any], wilder: list[list[float]], keep: bool, seed: int, size: float
) -> None:
    """Two sites, all rounds: each update, each mean, and all means from the first weights; moments travel or stay."""
    recipe = recipe_of(changes)
    first = sent = begin(seed, size)
    sites, k = [Site(recipe, sent) for _ in range(2)], recipe.train.local_steps
    for number in range(recipe.train.rounds):
        steps = range(number * k, number * k + k)
        bound = UpdateBound.of(recipe, "pretrain", steps)
        updates = []
        for place, site in enumerate(sites):
            if not keep:
                site = sites[place] = Site(recipe, sent)
            else:
                with torch.no_grad():
                    for name, parameter in site.parameters.items():
                        parameter.copy_(sent[f"student.{name}"])
                site.teacher = {n: t.clone() for n, t in sent.items() if n.startswith("teacher.")}
            for step in steps:
                site.step(step, wild(wilder[place], step))
            updates.append(site.tensors())
            check(bound, updates[-1], sent)
        fold = RunningMean(updates[0])
        for place, update in enumerate(updates):
            fold.add(update, 3 + place)
        after = fold.result()
        check(bound, after, sent)
        check(UpdateBound.of(recipe, "pretrain", range(steps.stop)), after, first)
        sent = after


@pytest.mark.parametrize("changes", KINDS[:4])
def test_the_worst_gradients_reach_the_wall(changes: dict[str, Any]) -> None:
    """Growing by β₂/β₁ from step to step, they make of Cauchy-Schwarz an equality at each."""
    recipe = recipe_of({**changes, "optim.clip_grad": 0.0, "train.local_steps": 10, "optim.weight_decay": 0.0})
    recipe = curriculum.changed(recipe, optim=curriculum.changed(recipe.optim, weight_decay_end=0.0))
    before = begin(0, 0.1)
    site, config = Site(recipe, before), recipe.optim
    growth = config.adamw_beta2 / config.adamw_beta1 if config.adamw_beta1 else 9.0  # the limit, where it is infinite
    for step in range(20):
        site.step(step, {name: torch.full(shape, growth**step) for name, shape in NAMES.items()})
    after, bound = site.tensors(), UpdateBound.of(recipe, "pretrain", range(20))
    check(bound, after, before)
    for name in before:
        if name.startswith("student."):
            used = (after[name] - before[name]).abs() / bound.box(name, before[name])
            assert 0.99 < float(used.min()) <= float(used.max()) <= 1


def test_sgd_reaches_its_ball() -> None:
    recipe = recipe_of({**KINDS[5], "optim.patch_embed_lr_mult": 1.0})
    before = begin(0, 0.0)
    site = Site(recipe, before)
    for step in range(5):
        site.step(step, {name: torch.full(shape, 1e3) for name, shape in NAMES.items()})
    after, bound = site.tensors(), UpdateBound.of(recipe, "pretrain", range(5))
    bound.check(after, before)
    names = [name for name in before if name.startswith("student.backbone.")]
    moved = math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in names))
    assert 0.99 < moved / bound.norm < 1.0001  # decay draws some of it back
    further = {n: before[n] + 1.02 * (after[n] - before[n]) for n in names}  # each within its own reach
    with pytest.raises(RefusedError, match="'student.backbone' is .* clipped steps") as caught:
        bound.check(further, before)
    assert caught.value.code == "weights.box"


def test_a_teacher_has_its_share_of_the_ball() -> None:
    recipe = recipe_of({**KINDS[5], "optim.patch_embed_lr_mult": 1.0, "teacher.momentum_teacher": 0.9})
    before = begin(0, 0.0)
    site = Site(recipe, before)
    for step in range(5):
        site.step(step, {name: torch.full(shape, 1e3) for name, shape in NAMES.items()})
    after, bound = site.tensors(), UpdateBound.of(recipe, "pretrain", range(5))
    own = {n.replace("student.", "teacher."): t for n, t in after.items() if n.startswith("student.backbone.")}
    share = 1 - bound.momentum
    bound.check({n: 0.99 * share * t for n, t in own.items()}, before)
    with pytest.raises(RefusedError, match="'teacher.backbone' is .* clipped steps"):  # each within its own reach
        bound.check({n: 1.02 * share * t for n, t in own.items()}, before)


@pytest.mark.parametrize("changes", [KINDS[0], KINDS[1], KINDS[3]])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", list(NAMES))
def test_one_float_beyond_the_wall(changes: dict[str, Any], sign: int, name: str) -> None:
    recipe, before, full = recipe_of(changes), begin(1), f"student.{name}"
    bound = UpdateBound.of(recipe, "pretrain", range(5, 10))
    box = sign * bound.box(full, before[full])
    wall = (before[full].double() + box).float()
    inside = torch.where((wall.double() - before[full]).abs() > box.abs(), wall.nextafter(before[full]), wall)
    outside = inside.clone()
    outside.view(-1)[-1] = inside.view(-1)[-1].nextafter(torch.tensor(sign * math.inf))
    bound.check(before | {full: inside}, before)
    with pytest.raises(RefusedError, match=full) as caught:
        bound.check(before | {full: outside}, before)
    assert caught.value.code == "weights.box"


def test_a_frozen_last_layer_stays_and_then_goes() -> None:
    recipe, before = recipe_of({"optim.freeze_last_layer_epochs": 1.0}), begin(2)
    name = "student.dino_head.last_layer.weight_v"
    moved = before | {name: before[name] + 1e-3}
    with pytest.raises(RefusedError, match="last_layer"):
        UpdateBound.of(recipe, "pretrain", range(10)).check(moved, before)
    UpdateBound.of(recipe, "pretrain", range(5, 15)).check(moved, before)


def test_a_frozen_last_layer_is_not_decayed_either() -> None:
    recipe, before = recipe_of({"optim.freeze_last_layer_epochs": 1.0, "optim.weight_decay": 2.0}), begin(2, 100.0)
    name = "student.dino_head.last_layer.weight_v"
    moved = before | {name: before[name] * (1 - 1e-4)}
    with pytest.raises(RefusedError, match="last_layer"):
        UpdateBound.of(recipe, "pretrain", range(10)).check(moved, before)
    UpdateBound.of(recipe, "pretrain", range(10, 20)).check(moved, before)


def test_what_is_not_trained_is_equal_to_the_last_bit() -> None:
    before, name = begin(2), "student.backbone.blocks.0.norm1.weight"
    bound = UpdateBound.of(recipe_of({}), "pretrain", range(5))
    bound.check(before, before, {name})
    with pytest.raises(RefusedError) as caught:
        bound.check(before | {name: before[name].nextafter(torch.tensor(math.inf))}, before, {name})
    assert caught.value.code == "weights.frozen"


@pytest.mark.parametrize("phase", ["pretrain", "adapt"])
def test_two_rounds_lead_as_far_as_the_one_and_then_the_other(phase: str) -> None:
    """Each by Adam's steps of the whole run, which go further the more of them are behind it."""
    recipe = recipe_of({"optim.freeze_last_layer_epochs": 0.5})
    both, first, second = (UpdateBound.of(recipe, phase, steps) for steps in (range(10), range(5), range(5, 10)))
    for name in ("travel", "decay"):
        sums = [a + b for a, b in zip(getattr(first, name), getattr(second, name), strict=True)]
        assert getattr(both, name) == pytest.approx(sums, rel=1e-12)


def test_squares_are_raised_where_positions_are_resized_and_nowhere_else() -> None:
    stage = {"rounds": 1, "global_crops_size": 128, "local_crops_size": 64}
    recipe, clip = recipe_of({"curriculum": [stage], "optim.clip_grad": 2.0}), 2.0
    bound = UpdateBound.of(recipe, "pretrain", range(20, 25))
    for name, most in (("pos_embed", bounds.RESIZED * clip), ("cls_token", clip)):
        key = f"{MOMENTS}backbone.{name}.exp_avg_sq"
        bound.check_moments({key: torch.tensor([most**2])})
        with pytest.raises(RefusedError, match=name):
            bound.check_moments({key: torch.tensor([1.01 * most**2])})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_in_no_box(bad: float) -> None:
    before = begin(3)
    for name in ("student.backbone.blocks.0.norm1.weight", "teacher.backbone.blocks.0.norm1.weight"):
        broken = before | {name: before[name].clone().index_fill_(0, torch.tensor([1]), bad)}
        for changes in (*KINDS, {"optim.adamw_beta2": 0.5}):
            with pytest.raises(RefusedError, match=name):
                UpdateBound.of(recipe_of(changes), "pretrain", range(5)).check(broken, before)


def test_a_teacher_is_the_mean_along_its_students_way() -> None:
    recipe, before = recipe_of({"teacher.momentum_teacher": 0.9}), begin(4)
    before |= {n: t + 1 for n, t in begin(5).items() if n.startswith("teacher.")}
    bound = UpdateBound.of(recipe, "pretrain", range(5))
    a = math.prod(schedules.at(recipe, step).momentum for step in range(5))
    name = "backbone.blocks.1.mlp.w12.weight"
    honest = a * before[f"teacher.{name}"] + (1 - a) * before[f"student.{name}"]
    box = bound.box(f"student.{name}", before[f"student.{name}"]).float()
    bound.check({f"teacher.{name}": honest + (1 - a) * 0.999 * box}, before)
    for other in (honest + (1 - a) * 1.01 * box, before[f"teacher.{name}"], before[f"student.{name}"]):
        with pytest.raises(RefusedError, match="teacher"):
            bound.check({f"teacher.{name}": other}, before)


def test_moments_that_cannot_be() -> None:
    recipe, before = recipe_of({}), begin(6)
    site = Site(recipe, before)
    for step in range(5):
        site.step(step, wild([1.0, -2.0, 0.5], step))
    moments = {n: t for n, t in site.tensors().items() if n.startswith(MOMENTS)}
    bound = UpdateBound.of(recipe, "pretrain", range(5))
    bound.check_moments(moments)
    name = f"{MOMENTS}backbone.blocks.0.norm1.weight"
    for key, value in (
        ("step", torch.tensor(4.0)),
        ("step", torch.tensor(6.0)),
        ("exp_avg", moments[f"{name}.exp_avg"] * 10 + 1),
        ("exp_avg_sq", torch.full((3,), 9.1)),
        ("exp_avg_sq", -moments[f"{name}.exp_avg_sq"]),
        ("exp_avg_sq", torch.full((3,), math.nan)),
        ("exp_avg", torch.full((3,), math.nan)),
    ):
        with pytest.raises(RefusedError, match=f"norm1.weight.{key[:7]}"):
            bound.check_moments(moments | {f"{name}.{key}": value})


def test_steps_of_an_optimizer_that_leaves_some_out() -> None:
    """Whose mean over sites is no whole number; below none, and above all, there is none."""
    recipe = recipe_of({"compute_precision.param_dtype": "fp16", "compute_precision.grad_scaler": True})
    bound, name = UpdateBound.of(recipe, "pretrain", range(5)), f"{MOMENTS}backbone.cls_token.step"
    for done in (0.0, 3.5, 5.0):
        bound.check_moments({name: torch.tensor(done)})
    for done in (-0.5, 5.5, math.nan):
        with pytest.raises(RefusedError, match="cls_token.step"):
            bound.check_moments({name: torch.tensor(done)})


def test_moments_of_a_head_that_cannot_be() -> None:
    recipe = recipes.load("demo", {"adapt.clip_grad": 3.0})
    bound, name = UpdateBound.of(recipe, "adapt", range(5)), f"{MOMENTS}duplicate_pooling"
    most = {f"{name}.exp_avg": torch.zeros(3), f"{name}.exp_avg_sq": torch.full((3,), 9.0)}
    bound.check_moments(most)
    for key, value in (("exp_avg_sq", 9.1), ("exp_avg_sq", -1.0), ("exp_avg", 3.0 * bound.squared**0.5 + 0.1)):
        with pytest.raises(RefusedError, match="duplicate_pooling.exp_avg"):
            bound.check_moments(most | {f"{name}.{key}": torch.full((3,), value)})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.sampled_from([(96, 128), (96, 96, 144), (224, 336), (448, 512), (16, 176)]))
def test_positions_that_a_stage_resizes_stay_in_their_box(seed: int, sizes: tuple[int, ...]) -> None:
    stages = [{"rounds": 2, "global_crops_size": size, "local_crops_size": 48} for size in sizes[1:]]
    recipe = recipe_of({"curriculum": stages, "crops.global_crops_size": sizes[0], "train.rounds": 2})
    k, name = recipe.train.local_steps, "student.backbone.pos_embed"
    generator = torch.Generator().manual_seed(seed)
    before = {name: torch.randn(1, 1 + (sizes[0] // 16) ** 2, 2, generator=generator)}
    after = before
    for number in range(2 * len(sizes) - 1):
        box = UpdateBound.of(recipe, "pretrain", range(number * k, number * k + k)).box(name, after[name])
        signs = torch.randn(after[name].shape, generator=generator).sign()
        after = positions.enter({name: (after[name] + signs * box).float()}, recipe, number * k + k)
    steps = range((2 * len(sizes) - 1) * k)
    start = positions.enter(before, recipe, steps.stop)
    for stage in range(1, len(sizes)):  # as the weights went, from stage to stage
        start = positions.enter(before if stage == 1 else start, recipe, 2 * stage * k)
    bound = UpdateBound.of(recipe, "pretrain", steps, resized=len(sizes) - 1)
    bound.check(after, start)
    with pytest.raises(RefusedError):
        bound.check({name: after[name] + 10}, start)


@pytest.mark.parametrize("grid", range(3, 33))
def test_no_row_of_the_resizing_is_larger_than_said(grid: int) -> None:
    """Columns of the matrix, from a basis; to all larger grids of the presets, and to some smaller."""
    basis = torch.cat([torch.zeros(1, grid * grid), torch.eye(grid * grid)])[None]
    for other in {6, 8, 14, 21, 28, 32, grid + 1, 2 * grid}:
        resized = positions.with_grid({"pos_embed": basis}, other)["pos_embed"]
        assert float(resized.abs().sum(-1).max()) < bounds.RESIZED


def test_no_head_leaves_its_box() -> None:
    recipe = recipes.load("demo", {"adapt.rounds": 2, "adapt.local_steps": 10, "adapt.warmup_steps": 5})
    head = build_head(recipe, 3)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if is_decayed(n) is whether], "weight_decay": whether * 0.05}
        for whether in (True, False)
    ]
    one = torch.optim.AdamW(groups, lr=0.0, fused=True)
    for step in range(20):
        lr = schedules.cosine(step, recipe.adapt.lr, 0.0, 20, warmup=5)
        for group in one.param_groups:
            group["lr"] = lr
        for parameter in trained.values():
            parameter.grad = torch.full_like(parameter, 1e-3 * (0.999 / 0.9) ** step)
        one.step()
    after, bound = head.state_dict(), UpdateBound.of(recipe, "adapt", range(20))
    frozen = set(after) - set(trained)
    bound.check(after, before, frozen)
    used = max(float(((after[n] - before[n]).abs() / bound.box(n, before[n])).max()) for n in trained)
    assert used > 0.99
    with pytest.raises(RefusedError, match="query_embed.weight") as caught:
        bound.check(dict(after) | {"query_embed.weight": after["query_embed.weight"] + 1e-6}, before, frozen)
    assert caught.value.code == "weights.frozen"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim.adamw_beta1": 0.99, "optim.adamw_beta2": 0.9}, "adamw_beta2"),
        ({"optim.optimizer": "sgd", "optim.clip_grad": 0.0}, "clip_grad"),
        ({"optim.lr": 0.5, "optim.weight_decay_end": 3.0}, "optim.weight_decay"),
        ({"optim.lr": 0.3, "optim.weight_decay_end": 3.0, "optim.patch_embed_lr_mult": 2.0}, "optim.weight_decay"),
        ({"adapt.lr": 1.0, "adapt.weight_decay": 2.0}, "adapt.weight_decay"),
    ],
)
def test_a_recipe_whose_optimizer_has_no_box(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_bounded(recipes.load("demo", changes))


def test_every_preset_has_a_box() -> None:
    for name in recipes.presets():
        check_bounded(recipes.load(name))


def test_ranges_are_the_box_largest() -> None:
    recipe = recipe_of({})
    before = initial_weights(recipe)
    bound = UpdateBound.of(recipe, "pretrain", range(5))
    for name in ("student.backbone.cls_token", "student.dino_head.mlp.0.weight"):
        assert bound.largest(name, before) == pytest.approx(float(bound.box(name, before[name]).max()))
    name = "backbone.cls_token"
    moved = before | {f"teacher.{name}": before[f"teacher.{name}"] - 0.5}
    assert bound.largest(f"teacher.{name}", moved) == pytest.approx(
        (1 - bound.momentum) * (bound.largest(f"student.{name}", before) + 0.5), rel=1e-5
    )
