from __future__ import annotations

import math

import pytest
import torch

from chexfound.errors import ConfigError
from chexfound.model import checkpoint
from chexfound.model.checkpoint import load_tensors
from chexfound.model.vit import resize_positions
from chexfound.pretrain import positions, schedules
from chexfound.pretrain.train import Pretrainer, initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes

STAGES = [
    {"rounds": 2, "global_crops_size": 48, "local_crops_size": 32, "batch_size": 2, "lr": 1e-3},
    {"rounds": 1, "global_crops_size": 64, "local_crops_size": 32, "momentum_teacher": 0.5, "warmup_epochs": 0},
]
BY_RULE = {"optim__base_lr": 1e-3, "optim__scaling_rule": "sqrt_wrt_1024"}
ONE_SIZE = {"train.pooled_batch_size": None, "train.batch_size": 4}


@pytest.fixture
def staged(small):
    return small(curriculum=STAGES, optim__freeze_last_layer_epochs=1, **ONE_SIZE)


def test_stages_follow_each_other(staged):
    # 4 rounds of 3 steps, then 2, then 1.
    assert [curriculum.index_at(staged, step) for step in (0, 11, 12, 17, 18, 20, 99)] == [0, 0, 1, 1, 2, 2, 2]
    assert [curriculum.at(staged, step)[1] for step in (0, 11, 12, 17, 18, 20)] == [0, 11, 0, 5, 0, 2]
    assert (staged.pretrain_rounds, staged.pretrain_steps, staged.position_px) == (7, 21, 64)


def test_a_stage_keeps_what_it_does_not_name(staged):
    first, second, third = curriculum.stages(staged)
    assert [stage.crops.global_crops_size for stage in (first, second, third)] == [32, 48, 64]
    assert [stage.train.batch_size for stage in (first, second, third)] == [4, 2, 2]
    assert [stage.optim.lr for stage in (first, second, third)] == [2e-3, 1e-3, 1e-3]
    assert [stage.teacher.momentum_teacher for stage in (first, second, third)] == [0.95, 0.95, 0.5]
    assert not first.curriculum
    assert (third.dino, third.student) == (staged.dino, staged.student)


def test_schedules_begin_anew_but_not_the_temperature_and_the_freeze(staged):
    first, second = schedules.at(staged, 0), schedules.at(staged, 12)
    assert (first.lr, first.last_layer_lr, first.teacher_temp) == (0.0, 0.0, 0.02)
    assert (second.lr, second.teacher_temp) == (0.0, 0.04)
    assert schedules.at(staged, 13).last_layer_lr == schedules.at(staged, 13).lr > 0
    assert schedules.at(staged, 1).last_layer_lr == 0.0
    assert schedules.at(staged, 18).lr == 1e-3  # no warm-up
    assert schedules.at(staged, 18).momentum == 0.5


def test_the_rate_of_a_stage_follows_the_rule(small):
    recipe = small(
        train__pooled_batch_size=256,
        optim__base_lr=1e-3,
        optim__scaling_rule="sqrt_wrt_1024",
        optim__warmup_epochs=0,
        curriculum=[{"rounds": 1, "global_crops_size": 48, "local_crops_size": 32, "pooled_batch_size": 64}],
    )
    assert schedules.at(recipe, 0).lr == 1e-3 * 0.5
    assert schedules.at(recipe, 12).lr == 1e-3 * 0.25


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim__base_lr": 1e-3}, "base_lr and scaling_rule go together"),
        (
            {**BY_RULE, **ONE_SIZE},
            r"train\.batch_size: optim\.scaling_rule needs the images a step over all sites",
        ),
        ({"curriculum": [{**STAGES[0], "pooled_batch_size": 8}]}, r"curriculum\.0: give either batch_size or pooled"),
        ({"curriculum": [{**STAGES[0], "base_lr": 1.0}]}, r"curriculum\.0\.base_lr: needs optim\.scaling_rule"),
        (
            {"curriculum": [{**STAGES[0], "batch_size": None}], **BY_RULE},
            r"curriculum\.0\.lr: optim\.scaling_rule takes base_lr",
        ),
        ({"curriculum": [{**STAGES[0], "global_crops_size": 50}]}, r"curriculum\.0\.global_crops_size: must be a mult"),
        ({"curriculum": [{"rounds": 1}]}, "global_crops_size"),
        ({"curriculum": [{**STAGES[0], "round": 3}]}, r"unknown key 'curriculum\.0\.round'; did you mean"),
        ({"input__mean": [0.4, 0.4, 0.4]}, r"three channels needs student\.in_chans 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(small, overrides, message):
    with pytest.raises(ConfigError, match=message):
        small(**overrides)


def trainer(recipe, images, step):
    return Pretrainer(recipe, lambda places: images[places], len(images), 0, step=step)


def test_positions_are_interpolated_and_the_teacher_kept(staged, images):
    before = trainer(staged, images, 0)
    before.run(0, 12, 4)
    state = before.state()
    entered = positions.enter(state, staged, 12)
    after = trainer(staged, images, 12)
    after.load_state(entered)
    crops = torch.from_numpy(images[:2, :, :]).repeat_interleave(2, 1)[:, :48].repeat_interleave(2, 2)[:, :, :48]
    for whose in ("student", "teacher"):
        old, new = (one.model.eval().get_submodule(whose)["backbone"] for one in (before, after))
        assert new.pos_embed.shape == (1, 1 + 9, 24)
        seen = [model.forward_features(crops)["x_norm_clstoken"] for model in (old, new)]
        assert torch.equal(*seen)  # the old one interpolates on its way
    changed = {name for name in state if not torch.equal(state[name], entered[name])}
    assert changed == {
        "model.student.backbone.pos_embed",
        "model.teacher.backbone.pos_embed",
        "optimizer.backbone.pos_embed.exp_avg",
        "optimizer.backbone.pos_embed.exp_avg_sq",
    }
    assert (entered["optimizer.backbone.pos_embed.exp_avg_sq"] >= 0).all()
    assert not torch.equal(entered["model.student.backbone.pos_embed"], entered["model.teacher.backbone.pos_embed"])
    rows = after.run(12, 6, 2)
    assert [row["step"] for row in rows] == list(range(12, 18))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert positions.enter(after.state(), staged, 15).keys() == state.keys()


def test_resized_moments_are_moments_still(small):
    """m² ≤ 5.5 · v of Adam's (0.9, 0.99), which the coordinator holds every reply to; resized alone they are not."""
    recipe = small(curriculum=({"rounds": 1, "global_crops_size": 48, "local_crops_size": 16},))
    lots = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 1 + 4, 24, generator=lots) * torch.rand(1, 1 + 4, 1, generator=lots) ** 8
    name = "optimizer.backbone.pos_embed."
    moments = positions.enter({f"{name}exp_avg": mean, f"{name}exp_avg_sq": mean.square()}, recipe, 12)
    one, square = moments[f"{name}exp_avg"], moments[f"{name}exp_avg_sq"]
    assert one.shape == square.shape == (1, 1 + 9, 24)
    assert (one.square() <= square).all()
    alone = resize_positions(mean.square(), 3, 3)
    assert (one.square() > 5.5 * alone.clamp_min(0)).any()


def test_a_state_of_the_stage_itself_is_left_alone(staged, images):
    state = trainer(staged, images, 12).state()
    assert all(tensor is state[name] for name, tensor in positions.enter(state, staged, 12).items())


def test_steps_of_two_stages_are_not_one_run(staged, images):
    with pytest.raises(ValueError, match="not all in stage 0"):
        trainer(staged, images, 0).run(11, 2, 4)


def test_all_stages_fit_their_models(staged, images):
    weights = initial_weights(staged)
    for step in (0, 12, 18):
        one = trainer(staged, images, step)
        one.load_global(positions.enter(weights, staged, step))
    final = positions.with_grid(weights, staged.position_px // staged.student.patch_size)
    load_tensors(one.model.student, checkpoint.with_prefix(final, "student."), list(one.model.student.state_dict()))


def test_the_paper_s_preset_is_its_four_stages():
    recipe = recipes.load("vitl16-cxr1m")
    stages = curriculum.stages(recipe)
    assert [(s.crops.global_crops_size, s.crops.local_crops_size) for s in stages] == [
        (224, 96), (336, 128), (448, 128), (512, 144)
    ]  # fmt: skip
    assert [s.train.pooled_batch_size for s in stages] == [8 * 38, 8 * 12, 8 * 14, 8 * 10]
    assert [s.optim.lr for s in stages] == [pytest.approx(2e-4 * math.sqrt(8 * n / 1024)) for n in (38, 12, 14, 10)]
    assert all(s.pretrain_steps == 100 * 2500 for s in stages)
    assert schedules.at(recipe, 0).teacher_temp == 0.04
    assert schedules.at(recipe, 4 * 250_000).momentum == 1.0
