"""What a reply is held against; the refusals with their site are in test_run.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from chexfound.contract import cells
from chexfound.contract.request import Reply
from chexfound.errors import ProtocolError
from chexfound.pretrain import optimizer, schedules
from chexfound.pretrain.bounds import UpdateBound
from chexfound.recipe import load as recipes
from server.exchange.protocol import Member
from server.rounds import validation
from server.rounds.validation import check_history, check_update


@pytest.mark.parametrize("moment", [0.0, 1e-3])
def test_the_worst_that_passes_leads_no_honest_site_astray(moment: float) -> None:
    """A step of 0 and the largest first moment for its second: the next step is within the box."""
    recipe = recipes.load("demo")
    bound, beta1, beta2 = UpdateBound.of(recipe, "pretrain", range(1)), recipe.optim.adamw_beta1, 0.99
    sent = {"w": torch.ones(1)} | {f"optimizer.w.{key}": torch.zeros(1) for key in ("exp_avg", "exp_avg_sq")}
    sent |= {"optimizer.w.step": torch.zeros(())}
    worst = sent | {
        "optimizer.w.step": torch.ones(()),
        "optimizer.w.exp_avg": torch.tensor([moment * math.sqrt(bound.squared)]),
        "optimizer.w.exp_avg_sq": torch.tensor([moment**2]),
    }
    check_update(worst, sent, set(), bound)
    beyond = worst | {"optimizer.w.exp_avg": 1.01 * worst["optimizer.w.exp_avg"] + 1e-14}
    with pytest.raises(ProtocolError, match="a reply's 'optimizer.w.exp_avg' .* cannot be a moment"):
        check_update(beyond, sent, set(), bound)
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(worst["w"].clone())})
    lr = schedules.at(recipe, 1).lr
    one = torch.optim.AdamW(module.parameters(), lr=lr, betas=(beta1, beta2), weight_decay=0.0, fused=True)
    optimizer.set_moments(one, optimizer.checked_moments(module, {n: t for n, t in worst.items() if n != "w"}))
    module["w"].grad = torch.zeros(1)
    one.step()
    update = {"w": module["w"].detach().clone()} | optimizer.moments(one, module)
    check_update(update, worst, set(), UpdateBound.of(recipe, "pretrain", range(1, 2)))


def test_a_tensor_is_held_against_its_own_weights_not_the_largest_of_all() -> None:
    bound = UpdateBound.of(recipes.load("demo"), "pretrain", range(5))
    sent = {"student.backbone.a": torch.full((4, 4), 3.0), "student.backbone.b": torch.zeros(4, 4)}
    with pytest.raises(ProtocolError, match="a reply's 'student.backbone.b' holds a weight that is"):
        check_update(sent | {"student.backbone.b": torch.full((4, 4), 0.5)}, sent, set(), bound)
    with pytest.raises(ProtocolError, match="a reply's 'student.backbone.a', which is not trained"):
        check_update(sent | {"student.backbone.a": torch.full((4, 4), 3.0001)}, sent, {"student.backbone.a"}, bound)


def test_a_masked_mean_may_be_off_by_its_fixed_point() -> None:
    bound = UpdateBound.of(recipes.load("demo"), "pretrain", range(5))
    sent = {"student.backbone.a": torch.zeros(4)}
    moved = {"student.backbone.a": (bound.box("student.backbone.a", torch.zeros(4)) + 1e-5).float()}
    check_update(moved, sent, set(), bound, {"student.backbone.a": 2e-5})
    with pytest.raises(ProtocolError, match="beyond where 5 steps can lead"):
        check_update(moved, sent, set(), bound)


healthy = {
    "step": 3,
    "loss": 1.0,
    "dino": 1.0,
    "log_k": math.log(256),
    "teacher_entropy": 2.0,
    "prototype_perplexity": 0.5,
    "prototype_usage": 1.0,
    "feature_std": 0.6,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_entropy": 5.6}, "teacher_entropy"),
        ({"teacher_entropy": -0.1}, "teacher_entropy"),
        ({"prototype_usage": 1.2}, "prototype_usage"),
        ({"feature_std": -0.5}, "feature_std"),
        ({"log_k": 5.0, "teacher_entropy": 1.0}, "log_k"),
        ({"probe_images": 19, "rankme": 3.0}, "probe_images"),
        ({"probe_images": 101, "rankme": 3.0}, "probe_images"),
        ({"probe_images": 100, "rankme": 97.0}, "rankme"),
        ({"probe_images": 100, "rankme": 0.5}, "rankme"),
        ({"probe_images": 100, "rankme": 9.0, "knn_auroc": 1.1}, "knn_auroc"),
        ({"knn_auroc": 0.7}, "knn_auroc|probe_images"),
    ],
)
def test_figures_of_health_that_cannot_be(change: dict[str, float], named: str) -> None:
    recipe = recipes.load("demo", {"health.eval_period_iterations": 4, "health.probe_images": 100})
    sound = healthy | {"koleo": 0.0, "probe_images": 100, "rankme": 9.0, "knn_auroc": 0.7}
    assert check_history(Reply(values={"history": [sound]}), recipe, "pretrain", range(3, 4)) == [sound]
    rows = [healthy | {"koleo": 0.0} | change]
    with pytest.raises(ProtocolError, match=named):
        check_history(Reply(values={"history": rows}), recipe, "pretrain", range(3, 4))


def test_a_probe_at_another_step_than_asked() -> None:
    row = healthy | {"koleo": 0.0, "probe_images": 100, "rankme": 9.0}
    for every in (0, 3):
        recipe = recipes.load("demo", {"health.eval_period_iterations": every})
        with pytest.raises(ProtocolError, match="rows of finite numbers"):
            check_history(Reply(values={"history": [row]}), recipe, "pretrain", range(3, 4))


def test_a_batch_without_masked_patches_has_no_ibot() -> None:
    recipe = recipes.load("demo")
    row = healthy | {"koleo": -0.5}
    for rows in ([row], [row | {"ibot": 2.0}]):
        assert check_history(Reply(values={"history": rows}), recipe, "pretrain", range(3, 4)) == rows
    bare = recipes.load("demo", {"dino.koleo_loss_weight": 0.0, "ibot.loss_weight": 0.0})
    with pytest.raises(ProtocolError, match="rows of finite numbers: dino, feature_std, log_k, loss"):
        check_history(Reply(values={"history": [row]}), bare, "pretrain", range(3, 4))


def test_counts_of_a_site_without_a_finding() -> None:
    both = {"A": {"positives": 2, "negatives": 3}, "B": {"positives": 4, "negatives": 0}}
    member = Member(name="x", values={"train": 9, "cells": 0, "findings": both})
    assert validation.labelled_of(member, ["A", "B", "C"]) == [5, 0, 0]
    validation.check_counts("adapt", Reply(values={"images": 5, "labelled": [5, 0, 0]}), member, ["A", "B", "C"])
    validation.check_counts("adapt", Reply(values={"images": 0, "labelled": [0]}), member, ["C"])


def test_an_interval_may_be_absent_with_a_reason() -> None:
    row: dict[str, Any] = dict.fromkeys(validation.RESULT_KEYS)
    row |= {"arm": "federated", "trained_on": "all sites, federated", "tested_on": "x", "finding": "A"}
    row |= {
        "n": 4,
        "positives": 2,
        "auroc": 1.0,
        "auprc": 1.0,
        "reason": "no interval: all positives are of one patient",
    }
    member = Member(name="x", values={"test": 4, "cells": 0})
    assert validation.check_results(Reply(values={"results": [row]}), member, ["A"]) == [row]


# -- what a site does not tell

FEW = {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
CAREFUL = Member(
    name="x",
    values={"train": 40, "test": 30, "cells": 10, "findings": {"A": {"positives": 12, "negatives": 20}, "B": FEW}},
)


def row_of(finding: str, **figures: Any) -> dict[str, Any]:
    row = dict.fromkeys(validation.RESULT_KEYS)
    return row | {
        "arm": "federated", "trained_on": "all sites, federated", "tested_on": "x", "finding": finding, **figures
    }  # fmt: skip


def test_a_suppressed_finding_is_one_that_the_site_does_not_train() -> None:
    """Its weight is 0 to the coordinator, and its word in the reply the one of the enrolment."""
    names = ["A", "B", "C"]
    assert validation.labelled_of(CAREFUL, names) == [32, 0, 0]
    labelled = [32, cells.SUPPRESSED, cells.SUPPRESSED]
    validation.check_counts("adapt", Reply(values={"images": 32, "labelled": labelled}), CAREFUL, names)
    validation.check_counts(
        "adapt", Reply(values={"images": cells.SUPPRESSED, "labelled": labelled[1:]}), CAREFUL, ["B", "C"]
    )
    for odd in ([32, 0, 0], [32, cells.SUPPRESSED, 3], [32, "few", cells.SUPPRESSED], [32, None, cells.SUPPRESSED]):
        with pytest.raises(ProtocolError, match="labelled are not the counts enrolled"):
            validation.check_counts("adapt", Reply(values={"images": 32, "labelled": odd}), CAREFUL, names)
    for images in (0, "few", None, 32, -1):
        with pytest.raises(ProtocolError):
            validation.check_counts(
                "adapt", Reply(values={"images": images, "labelled": labelled[1:]}), CAREFUL, ["B", "C"]
            )


def test_a_row_is_suppressed_as_a_whole() -> None:
    """And only by a site that said at enrolment that it suppresses."""
    told = row_of("A", n=20, positives=10, auroc=0.5, auprc=0.5, auroc_ci=[0.4, 0.6], auprc_ci=[0.4, 0.6])
    few = cells.row(row_of("B"))
    assert validation.check_results(Reply(values={"results": [told, few]}), CAREFUL, ["A", "B"]) == [told, few]
    for key in cells.FIGURES:
        for half in ({**few, key: 1}, {**told, key: cells.SUPPRESSED}):
            with pytest.raises(ProtocolError):
                validation.check_results(Reply(values={"results": [half]}), CAREFUL, [half["finding"]])
    plain = Member(name="x", values={**CAREFUL.values, "cells": 0})
    with pytest.raises(ProtocolError, match="without counts"):
        validation.check_results(Reply(values={"results": [few]}), plain, ["B"])
