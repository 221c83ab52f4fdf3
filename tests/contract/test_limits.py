"""What a site grants, and a recipe held against it: the same judgement at both ends."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import yaml

from chexfound.contract import limits
from chexfound.contract.limits import Limits, judge, refused
from chexfound.errors import REFUSALS, ProtocolError
from chexfound.recipe import load
from client.home.policy import Policy

PRESETS = [(name, load.load(name)) for name in load.presets()]


@pytest.mark.parametrize("name", load.presets())
@pytest.mark.parametrize("n_sites", [2, 4])
def test_every_preset_is_granted_by_a_policy_that_nobody_wrote(name: str, n_sites: int) -> None:
    plain = replace(Policy().limits(n_sites), masked=False)
    assert refused(judge(load.load(name), plain, n_sites)) == []


@pytest.mark.parametrize("name", load.presets())
@pytest.mark.parametrize("n_sites", [3, 4])
def test_from_three_sites_on_a_preset_is_refused_in_the_clear_alone(name: str, n_sites: int) -> None:
    against = refused(judge(load.load(name), Policy().limits(n_sites), n_sites))
    assert [one.code for one in against] == ["secagg.plain"]
    masked = load.load(name, {"aggregation": "secagg"})
    assert refused(judge(masked, Policy().limits(n_sites), n_sites)) == []


def test_what_travels_is_of_the_policy_field_by_field() -> None:
    policy = Policy(max_steps=7, phases=("pretrain",))
    told = policy.limits(2)
    for field in fields(Limits):
        if field.name != "masked":
            assert getattr(told, field.name) == getattr(policy, field.name)
    assert Limits.parse(told.as_dict(), "it") == told
    assert "findings" not in told.as_dict()


@pytest.mark.parametrize(
    "change", [{"x": 1}, {"masked": "yes"}, {"max_steps": 0}, {"model": {"x": 1}}, {"phases": ["x"]}]
)
def test_what_arrives_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Limits.parse(Policy().limits(2).as_dict() | change, "it")


def test_a_verdict_has_the_line_of_the_file_the_code_and_both_numbers() -> None:
    asked = load.load("demo", {"optim.lr": 0.5})
    (one,) = refused(judge(asked, Policy().limits(2), 2))
    assert (one.line, one.asked, one.code) == ("model: {max_lr: 0.002}", "optim.lr 0.5", "policy.rate")
    for one in judge(asked, Policy().limits(2), 2):
        assert one.code in REFUSALS
        section, _, key = one.key.rpartition(".")
        values = yaml.safe_load(one.line)
        assert key in (values[section] if section else values)


def test_rates_are_those_of_each_stage_with_scaling_and_multipliers() -> None:
    over = {"curriculum": [{"rounds": 1, "global_crops_size": 96, "local_crops_size": 48, "lr": 0.01}]}
    scaled = {"optim.base_lr": 0.004, "optim.scaling_rule": "sqrt_wrt_1024", "train.pooled_batch_size": 1024}
    for change in (over, scaled, {"optim.patch_embed_lr_mult": 1.5}):
        codes = [one.code for one in refused(judge(load.load("demo", change), Policy().limits(2), 2))]
        assert codes == ["policy.rate"]
    below = scaled | {"train.pooled_batch_size": 256}
    assert refused(judge(load.load("demo", below), Policy().limits(2), 2)) == []


def test_a_normalisation_is_known_by_its_mean_and_its_deviation() -> None:
    """A deviation of one's own makes a threshold of any mean."""
    for std, ok in ((0.25, True), (0.001, False)):
        given = {"input.normalization": "mean_std", "input.mean": 0.5, "input.std": std}
        against = refused(judge(load.load("demo", given), Policy().limits(2), 2))
        assert [one.key for one in against] == ["model.normalizations"] * (not ok)


def test_a_head_s_gradients_are_clipped_too() -> None:
    for clip, ok in ((3.0, True), (3.1, False), (0.0, False)):
        against = refused(judge(load.load("demo", {"adapt.clip_grad": clip}), Policy().limits(2), 2))
        assert [one.key for one in against] == ["model.max_clip_grad"] * (not ok)


@pytest.mark.parametrize("phase", ["train", "adapt"])
def test_moments_leave_in_whichever_phase_they_are_averaged(phase: str) -> None:
    states = {"train.optimizer_state": "local", "adapt.optimizer_state": "local", f"{phase}.optimizer_state": "average"}
    kept = replace(Policy().limits(2), tensors=("student", "teacher", "head"))
    (against,) = refused(judge(load.load("demo", states), kept, 2))
    assert (against.key, against.code) == ("tensors", "policy.tensors")
    local = load.load("demo", states | {f"{phase}.optimizer_state": "local"})
    assert refused(judge(local, kept, 2)) == []


# What a recipe asks under each line of numbers, and the next number that does not grant it.
AT_THE_WALL: list[tuple[dict[str, Any], str, float, float]] = [
    ({}, "model.min_patch_px", 16, 17),
    ({}, "model.max_patch_px", 16, 15),
    ({}, "model.min_tokens", 64, 65),  # of 128 px by patches of 16
    ({}, "model.min_crop_tokens", 9, 10),
    ({"crops.global_crops_size": 32}, "model.min_crop_tokens", 4, 5),
    ({}, "model.max_layerscale", 0.1, 0.0999),
    ({}, "model.max_registers", 4, 3),
    ({}, "model.min_image_px", 128, 129),
    ({}, "model.max_image_px", 128, 127),
    ({"crops.global_crops_size": 160}, "model.max_image_px", 160, 159),
    ({"crops.local_crops_size": 160}, "model.max_image_px", 160, 159),
    ({}, "model.max_lr", 2e-3, 1.999e-3),
    ({}, "model.max_adapt_lr", 4e-3, 3.999e-3),
    ({"optim.clip_grad": 2.0, "adapt.clip_grad": 1.0}, "model.max_clip_grad", 2.0, 1.999),
    ({}, "min_batch", 16, 17),  # of two sites
    ({"adapt.pooled_batch_size": 24}, "min_batch", 12, 13),
    ({}, "max_batch", 32, 31),
    ({"train.pooled_batch_size": 80}, "max_batch", 40, 39),
    ({"train.local_steps": 4}, "min_steps", 4, 5),
    ({"adapt.local_steps": 4}, "min_steps", 4, 5),
    ({"train.local_steps": 6}, "max_steps", 6, 5),
    ({"adapt.local_steps": 6}, "max_steps", 6, 5),
    ({"train.rounds": 21}, "max_rounds", 21, 20),
    ({"adapt.rounds": 21}, "max_rounds", 21, 20),
    ({}, "min_bootstrap", 1000, 1001),
]


@pytest.mark.parametrize(("change", "key", "held", "beyond"), AT_THE_WALL, ids=str)
def test_a_line_grants_its_own_number_and_no_next_one(
    change: dict[str, Any], key: str, held: float, beyond: float
) -> None:
    """Of whichever phase, stage or crop asks for most."""
    asked = load.load("demo", change)
    loose = limits.Model(min_crop_tokens=1)
    for number, keys in ((held, []), (beyond, [key])):
        section, _, name = key.rpartition(".")
        policy = Policy(model=replace(loose, **{name: number})) if section else Policy(model=loose, **{name: number})
        assert [one.key for one in refused(judge(asked, policy.limits(2), 2))] == keys


def test_images_a_step_are_those_of_one_site() -> None:
    for n_sites, codes in ((8, []), (16, ["policy.work"])):
        plain = replace(Policy().limits(n_sites), masked=False)
        assert [one.code for one in refused(judge(load.load("demo"), plain, n_sites))] == codes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_steps": 5, "max_steps": 4}, "min_steps 5 is above max_steps 4"),
        ({"phases": ()}, "phases: none is granted"),
        ({"model": limits.Model(min_patch_px=17)}, "model.min_patch_px 17 is above model.max_patch_px 16"),
        ({"model": limits.Model(max_image_px=64)}, "model.min_tokens 49 are more than"),
        ({"min_steps": 9_000}, "none of the presets demo,"),
        ({"model": limits.Model(max_lr=1e-9)}, r"is refused by model: \{max_lr: 1e-09\}"),
    ],
)
def test_a_policy_that_no_recipe_can_meet_is_found(change: dict[str, Any], said: str) -> None:
    (found,) = limits.contradictions(Policy(**change).limits(2), PRESETS, 2)
    assert re.search(said, found)


def test_the_defaults_contradict_nothing() -> None:
    for n_sites in (1, 2, 3, 8):
        assert limits.contradictions(Policy().limits(n_sites), PRESETS, n_sites) == []
