"""Symptoms on real curves: honest runs, and collapses that were brought about.

`tests/vectors/health_curves.json`: rows of `Pretrainer.run` on the X-rays of ../shared/data/cxr at 64 px (preset
laptop, 96 wide, probes of 256 images every 20 steps), recorded 2026-11-24 with torch
2.14.1, four digits.  What was changed:

honest8, honest32  NIH at batches of 8 and 32; nothing
gz8                Guangzhou at a batch of 8; nothing
gz8_nocent_lin     head_centered false, linear stem, no KoLeo: one site's alike batches
center_nocent      softmax centering, head_centered false, temperature 0.07
center             softmax centering at temperature 0.02
one                softmax centering, temperature 0.02, no head_centered, KoLeo, iBOT
dim4               four prototypes, no KoLeo, iBOT
uniform            softmax centering at a teacher's temperature of 1
rise               a learning rate of 0.2 from step 120 on

Two more, of ViT-T (preset vitt16-demo without its second stage: 1,024 prototypes, linear stem) at 96 px and batches of
16, recorded 2026-11-27.  At so many prototypes an honest run rests at log K for up to 150 steps:

vitt_nih, vitt_gz  NIH; Guangzhou, whose images are more alike; nothing changed
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from chexfound.pretrain.health import symptoms as module
from chexfound.pretrain.health.symptoms import ADVICE, GRACE, PATIENCE, WINDOW, judged_from, symptoms, tail
from chexfound.recipe import load as recipes

CURVES = json.loads((Path(__file__).parents[2] / "vectors" / "health_curves.json").read_text())


def curve(name: str) -> list[dict[str, float]]:
    columns = dict(CURVES[name])
    probes, log_k = columns.pop("probes"), columns.pop("log_k")
    rows = [
        {"step": step, "log_k": log_k, **dict(zip(columns, values, strict=True))}
        for step, values in enumerate(zip(*columns.values(), strict=True))
    ]
    for step, rank, images in probes:
        rows[step] |= {"rankme": rank, "probe_images": images}
    return rows


def said(rows: list[dict[str, float]], every: int = 5, dim: int = 96) -> list[tuple[int, set[str]]]:
    """Which symptoms are told after which step, where that changes; asked round by round, as a site is."""
    before: list[str] = []
    kept: list[dict[str, float]] = []
    changes = []
    for start in range(0, len(rows), every):
        kept = tail([*kept, *rows[start : start + every]])
        now = [one.name for one in symptoms(kept, dim=dim, before=before)]
        if set(now) != set(before):
            changes.append((start + every, set(now)))
        before = now
    return changes


@pytest.mark.parametrize(
    ("name", "dim"), [("honest8", 96), ("honest32", 96), ("gz8", 96), ("vitt_nih", 192), ("vitt_gz", 192)]
)
def test_honest_runs_ail_of_nothing_after_any_step(name, dim):
    assert said(curve(name), 1, dim) == []


@pytest.mark.parametrize(
    ("name", "symptom", "rows"),
    [
        ("gz8_nocent_lin", "cls-plateau", PATIENCE),
        ("center_nocent", "cls-plateau", PATIENCE),
        ("center", "one-prototype", WINDOW),
        ("one", "constant-features", WINDOW),
        ("dim4", "dimensional-collapse", WINDOW),
        ("uniform", "uniform-teacher", WINDOW),
    ],
)
def test_a_collapse_is_called_by_its_name_as_soon_as_it_may(name, symptom, rows):
    assert said(curve(name))[0] == (GRACE + rows, {symptom})


def test_the_rank_has_a_floor_where_five_percent_of_what_could_be_is_next_to_one():
    rows = [row | ({"rankme": 2.4, "probe_images": 24} if "rankme" in row else {}) for row in curve("honest8")]
    assert [one.name for one in symptoms(rows, dim=24)] == ["dimensional-collapse"]
    rows = [row | ({"rankme": 2.6} if "rankme" in row else {}) for row in rows]
    assert symptoms(rows, dim=24) == []


def test_what_begins_later_is_told_later():
    assert said(curve("rise")) == [(150, {"loss-rises"})]


def test_the_figures_are_in_what_is_said():
    (one,) = symptoms(curve("uniform"), dim=96)
    assert one.name == "uniform-teacher"
    assert one.seen == "teacher entropy 100.0 % of log K"
    assert one.advice == ADVICE["uniform-teacher"]


def test_it_goes_only_when_it_has_cleared():
    rows = [row | {"feature_std": 0.03} for row in curve("honest8")]
    assert symptoms(rows, dim=96) == []  # not yet one …
    (one,) = symptoms(rows, dim=96, before=["constant-features"])  # … but one that was there stays
    assert one.name == "constant-features"


def test_nothing_is_judged_before_the_warm_up_ends():
    rows = curve("uniform")
    assert symptoms(rows[: GRACE + WINDOW - 1], dim=96) == []
    assert symptoms(rows, dim=96, judged_from=160) == []
    recipe = recipes.load("laptop", {"optim.warmup_epochs": 30})
    assert judged_from(recipe, 0) == 300
    assert judged_from(recipes.load("laptop"), 0) == GRACE
    staged = recipes.load("laptop", {"curriculum": [{"rounds": 5, "global_crops_size": 128, "local_crops_size": 48}]})
    assert judged_from(staged, 310) == 300 + GRACE


def test_a_curve_without_figures_is_not_judged():
    bare = [{name: row[name] for name in ("step", "loss")} for row in curve("uniform")]
    assert symptoms(bare, dim=96) == []


def test_the_guide_has_the_thresholds_of_the_code():
    guide = (Path(__file__).parents[3] / "docs" / "health.md").read_text()
    told = {line.split("`")[1]: line.split("|")[2:4] for line in guide.splitlines() if line.startswith("| `")}
    for name, pairs in {
        "cls-plateau": [module.AT_LOG_K],
        "uniform-teacher": [module.UNIFORM],
        "one-prototype": [module.FEW_PROTOTYPES, module.FEW_USED],
        "constant-features": [module.SAME_FEATURES],
        "dimensional-collapse": [module.FEW_DIMENSIONS, module.LOW_RANK, module.SHRUNK],
        "loss-rises": [module.RISES],
    }.items():
        for words, values in zip(told[name], zip(*pairs, strict=True), strict=True):
            assert {f"{value:g}" for value in values} <= set(re.findall(r"\d+(?:\.\d+)?", words)), name
    assert set(ADVICE) <= set(told)
    assert f"{module.FALLS:g}" in told["cls-plateau"][0]
    assert f"mean over {WINDOW} steps (`cls-plateau`: {PATIENCE})" in guide
    assert f"is after {GRACE + WINDOW} steps, of a plateau after {GRACE + PATIENCE}" in guide
