"""What no honest site is refused for, whatever it was sent; the refusals are in test_run.py, with their site."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound import cells
from chexfound import recipe as recipes
from chexfound.errors import ProtocolError
from chexfound.phases import Reply
from chexfound.pretrain import optimizer
from server import checks
from server.checks import Pace, check_history, check_update
from server.exchange import Member
from strategies.aggregate import Fold

gradients = st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1e-30, 1e-20, -1e-6, 1e3])


def pace_of(kind: str, beta1: float, beta2: float, clip: float) -> Pace:
    overrides = {"optim.optimizer": kind, "optim.adamw_beta1": beta1, "optim.adamw_beta2": beta2}
    return Pace.of(recipes.load("demo", {**overrides, "optim.clip_grad": clip}), "pretrain")


@settings(max_examples=60)
@given(
    st.sampled_from(
        [("adamw", 0.9, 0.99), ("adamw", 0.9, 0.999), ("adamw", 0.0, 0.9), ("adamw", 0.9, 0.5), ("sgd", 0, 0)]
    ),
    st.sampled_from([0.0, 3.0, 1e200]),
    st.lists(st.lists(gradients, min_size=4, max_size=4), min_size=2, max_size=2),
)
def test_no_honest_site_is_refused(kind: Any, clip: float, wild: list[list[float]]) -> None:
    """Two sites, three rounds of four steps, any gradients: every update passes, from their means on too."""
    pace = pace_of(*kind, clip)
    config = recipes.load("demo").optim
    sent = {"w": torch.linspace(-1, 1, 3)}
    if kind[0] == "adamw":
        sent |= {f"{optimizer.PREFIX}w.{key}": torch.zeros(3) for key in ("exp_avg", "exp_avg_sq")}
        sent[f"{optimizer.PREFIX}w.step"] = torch.zeros(())
    for number in range(3):
        fold, steps = Fold(sent), range(4 * number, 4 * number + 4)
        for site in range(2):
            module = torch.nn.ParameterDict({"w": torch.nn.Parameter(sent["w"].clone())})
            given_state = {name: tensor for name, tensor in sent.items() if name != "w"}
            one: Any = torch.optim.SGD(module.parameters(), lr=config.lr)
            if kind[0] == "adamw":
                one = torch.optim.AdamW(
                    module.parameters(), lr=config.lr, betas=kind[1:], weight_decay=0.04, fused=True
                )
                optimizer.set_moments(one, optimizer.checked_moments(module, given_state))
            for gradient in wild[site]:
                module["w"].grad = torch.tensor([gradient, gradient * 1e-3, -gradient])
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
                one.step()
            update = {"w": module["w"].detach().clone()} | optimizer.moments(one, module)
            check_update(update, sent, set(), pace, steps)
            fold.add(update, 3 + site)
        sent = fold.result()


@pytest.mark.parametrize("moment", [0.0, 1e-3])
def test_the_worst_that_passes_leads_no_honest_site_astray(moment: float) -> None:
    """A step of 0 and the largest first moment for its second: the next step is within the pace."""
    pace = pace_of("adamw", 0.9, 0.999, 3.0)
    sent = {"w": torch.ones(1)} | {f"optimizer.w.{key}": torch.zeros(1) for key in ("exp_avg", "exp_avg_sq")}
    sent |= {"optimizer.w.step": torch.zeros(())}
    worst = sent | {
        "optimizer.w.exp_avg": torch.tensor([moment * math.sqrt(pace.squared)]),
        "optimizer.w.exp_avg_sq": torch.tensor([moment**2]),
    }
    check_update(worst, sent, set(), pace, range(1))
    beyond = worst | {"optimizer.w.exp_avg": 1.01 * worst["optimizer.w.exp_avg"] + 1e-14}
    with pytest.raises(ProtocolError, match="cannot be a moment"):
        check_update(beyond, sent, set(), pace, range(1))
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(worst["w"].clone())})
    one = torch.optim.AdamW(module.parameters(), lr=recipes.load("demo").optim.lr, fused=True)
    optimizer.set_moments(one, optimizer.checked_moments(module, {n: t for n, t in worst.items() if n != "w"}))
    module["w"].grad = torch.zeros(1)
    one.step()
    update = {"w": module["w"].detach().clone()} | optimizer.moments(one, module)
    check_update(update, worst, set(), pace, range(1, 2))


@pytest.mark.parametrize("kind", [("sgd", 0.9, 0.99, 0.0), ("adamw", 0.99, 0.9, 0.0)])
def test_without_a_bound_of_the_optimizer_a_weight_has_one(kind: Any) -> None:
    pace, sent = pace_of(*kind), {"w": torch.ones(2)}
    check_update({"w": torch.full((2,), 1e3)}, sent, set(), pace, range(1))
    with pytest.raises(ProtocolError, match="'w' holds a weight of 3e.38, beyond"):
        check_update({"w": torch.full((2,), 3e38)}, sent, set(), pace, range(1))


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
    assert checks.labelled_of(member, ["A", "B", "C"]) == [5, 4, 0]
    assert checks.labelled_of(member, ["A", "B", "C"], both=True) == [5, 0, 0]
    checks.check_counts("adapt", Reply(values={"images": 5, "labelled": [5, 0, 0]}), member, ["A", "B", "C"])
    checks.check_counts("adapt", Reply(values={"images": 0, "labelled": [0]}), member, ["C"])


def test_an_interval_may_be_absent_with_a_reason() -> None:
    row: dict[str, Any] = dict.fromkeys(checks.RESULT_KEYS)
    row |= {"arm": "federated", "trained_on": "all sites, federated", "tested_on": "x", "finding": "A"}
    row |= {
        "n": 4,
        "positives": 2,
        "auroc": 1.0,
        "auprc": 1.0,
        "reason": "no interval: all positives are of one patient",
    }
    member = Member(name="x", values={"test": 4, "cells": 0})
    assert checks.check_results(Reply(values={"results": [row]}), member, ["A"]) == [row]


# -- what a site does not tell

FEW = {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
CAREFUL = Member(
    name="x",
    values={"train": 40, "test": 30, "cells": 10, "findings": {"A": {"positives": 12, "negatives": 20}, "B": FEW}},
)


def row_of(finding: str, **figures: Any) -> dict[str, Any]:
    row = dict.fromkeys(checks.RESULT_KEYS)
    return row | {
        "arm": "federated", "trained_on": "all sites, federated", "tested_on": "x", "finding": finding, **figures
    }  # fmt: skip


def test_a_suppressed_finding_is_one_that_the_site_does_not_train() -> None:
    """Its weight is 0 to the coordinator, and its word in the reply the one of the enrolment."""
    names = ["A", "B", "C"]
    assert checks.labelled_of(CAREFUL, names, both=True) == [32, 0, 0]
    labelled = [32, cells.SUPPRESSED, cells.SUPPRESSED]
    checks.check_counts("adapt", Reply(values={"images": 32, "labelled": labelled}), CAREFUL, names)
    checks.check_counts(
        "adapt", Reply(values={"images": cells.SUPPRESSED, "labelled": labelled[1:]}), CAREFUL, ["B", "C"]
    )
    for odd in ([32, 0, 0], [32, cells.SUPPRESSED, 3], [32, "few", cells.SUPPRESSED], [32, None, cells.SUPPRESSED]):
        with pytest.raises(ProtocolError, match="labelled are not the counts enrolled"):
            checks.check_counts("adapt", Reply(values={"images": 32, "labelled": odd}), CAREFUL, names)
    for images in (0, "few", None, 32, -1):
        with pytest.raises(ProtocolError):
            checks.check_counts(
                "adapt", Reply(values={"images": images, "labelled": labelled[1:]}), CAREFUL, ["B", "C"]
            )


def test_a_row_is_suppressed_as_a_whole() -> None:
    """And only by a site that said at enrolment that it suppresses."""
    told = row_of("A", n=20, positives=10, auroc=0.5, auprc=0.5, auroc_ci=[0.4, 0.6], auprc_ci=[0.4, 0.6])
    few = cells.row(row_of("B"))
    assert checks.check_results(Reply(values={"results": [told, few]}), CAREFUL, ["A", "B"]) == [told, few]
    for key in cells.FIGURES:
        for half in ({**few, key: 1}, {**told, key: cells.SUPPRESSED}):
            with pytest.raises(ProtocolError):
                checks.check_results(Reply(values={"results": [half]}), CAREFUL, [half["finding"]])
    plain = Member(name="x", values={**CAREFUL.values, "cells": 0})
    with pytest.raises(ProtocolError, match="without counts"):
        checks.check_results(Reply(values={"results": [few]}), plain, ["B"])
