"""A site's reply, held against what it enrolled with, what it was sent and what the recipe makes of it.

These checks find the faulty site before its reply counts, so that no honest one is blamed, or fails,
in the round after.  They are no defence against poisoning: what an honest site could have sent passes.
Each raises ProtocolError; the caller names the site.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import ARM, TRAINED_ON, Reply
from chexfound.errors import ProtocolError, RefusedError
from chexfound.parsing import values
from chexfound.pretrain.bounds import UpdateBound
from chexfound.pretrain.health import measures
from chexfound.recipe.schema import ARCHS, Recipe
from server.exchange.protocol import Member

RESULT_KEYS = (
    "arm",
    "trained_on",
    "tested_on",
    "finding",
    "n",
    "positives",
    "auroc",
    "auroc_ci",
    "auprc",
    "auprc_ci",
    "reason",
)
LARGEST = float(torch.finfo(torch.float32).max)


# -- counts


def labelled_of(member: Member, findings: Sequence[str]) -> list[int]:
    """Labelled training images by finding, as enrolled; 0 if that is not told, or a class is absent."""
    result = []
    for finding in findings:
        counts = member.values["findings"].get(finding, {"positives": 0, "negatives": 0})
        numbers = [cells.known(number) for number in counts.values()]
        result.append(sum(numbers) if all(numbers) else 0)
    return result


def check_counts(phase: str, reply: Reply, member: Member, findings: Sequence[str]) -> None:
    """A reply's images, and in `adapt` its labels by finding, are those of the enrolment."""
    images, train = reply.values.get("images"), member.values["train"]
    if phase == "pretrain":
        if not values.count(images) or images != train:
            raise ProtocolError(f"a reply counts {str(images)[:40]} images, its enrolment {train} for training")
        return
    none = cells.told(0, 0, member.values["cells"])
    if not values.count(images) and images != none:
        raise ProtocolError("a reply's images must be a count")
    labelled = labelled_of(member, findings)
    expected = [number or none for number in labelled]
    if member.limits is not None and images == none and reply.values.get("labelled") == [none] * len(findings):
        return  # fewer patients or images than it works on, by its own policy: it answers as one that has none
    if reply.values.get("labelled") != expected:
        raise ProtocolError(f"a reply's labelled are not the counts enrolled, {expected}")
    fits = max(labelled) <= images <= min(train, sum(labelled)) if any(labelled) else images == none  # type: ignore[operator]
    if not fits:
        raise ProtocolError(f"a reply counts {images} labelled images, which does not fit what it enrolled")


# -- weights and moments of a round


def check_update(
    update: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    frozen: Collection[str],
    bound: UpdateBound,
    rounding: Mapping[str, float] | None = None,
) -> None:
    """An update, of the names and shapes that were sent, is one that the bound's steps can lead to.

    `rounding`: what a masked sum adds to a tensor, by name.
    """
    try:
        bound.check(update, sent, frozen, rounding)
        bound.check_moments(update)
    except RefusedError as error:
        raise ProtocolError(f"a reply's {error}") from error


# -- learning curves


def check_history(reply: Reply, recipe: Recipe, phase: str, steps: range) -> list[dict[str, float]]:
    """A row for each of the steps, in order, with the losses of the phase as finite numbers.

    Returns: the rows.  A site that trains no finding's row took no step.
    """
    rows = reply.values.get("history")
    always, at_times, probed = _history_keys(recipe, phase)
    every = recipe.health.eval_period_iterations
    if phase == "adapt" and not any(map(cells.known, reply.values["labelled"])):
        steps = range(0)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict)
        and always <= set(row) <= always | at_times | probed
        and values.count(row["step"])
        and (not probed & set(row) or not (row["step"] + 1) % every)
        and all(values.finite(value) and abs(value) <= LARGEST for value in row.values())
        for row in rows
    ):
        raise ProtocolError(f"a reply's history must be rows of finite numbers: {', '.join(sorted(always))}")
    if [row["step"] for row in rows] != list(steps):
        raise ProtocolError(f"a reply's history must have a row for each of its {len(steps)} steps, in order")
    for row in rows if phase == "pretrain" else ():
        _check_health(row, recipe)
    return rows


def _check_health(row: dict[str, float], recipe: Recipe) -> None:
    """Its figures can be, and are of no more images than the recipe allows."""
    name = measures.problem(row, ARCHS[recipe.student.arch][0])
    if abs(row["log_k"] - math.log(recipe.dino.head_n_prototypes)) > 1e-6:
        name = "log_k"
    if row.get("probe_images", 0) > recipe.health.probe_images:
        name = "probe_images"
    if name is not None:
        raise ProtocolError(f"a reply's history has a {name} that cannot be")


def _history_keys(recipe: Recipe, phase: str) -> tuple[set[str], set[str], set[str]]:
    """Names in every row, names that a row may lack, names in the rows of a probe only."""
    if phase == "adapt":
        return {"step", "loss"}, set(), set()
    koleo = {"koleo"} if recipe.dino.koleo_loss_weight else set()
    # A batch may have no masked patch, and then no iBOT.
    at_times = {"ibot"} if recipe.ibot.loss_weight else set()
    probed = set(measures.PROBE_FIGURES) if recipe.health.eval_period_iterations else set()
    return {"step", "loss", "dino", "log_k", *measures.STEP_FIGURES} | koleo, at_times, probed


# -- features


def check_nothing(reply: Reply) -> None:
    """A reply to `features` says by its coming that they are made, and holds nothing."""
    if reply.values or reply.tensors or reply.masked:
        raise ProtocolError("a reply holds something where nothing was asked for")


# -- results


def check_results(reply: Reply, member: Member, findings: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each finding, of this site and of the federated model, with figures that can be.

    Returns: the rows.
    """
    rows = reply.values.get("results")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(RESULT_KEYS) for row in rows):
        raise ProtocolError(f"its results are not rows of {', '.join(RESULT_KEYS)}")
    if [row["finding"] for row in rows] != list(findings):
        raise ProtocolError("its results are not for the findings asked")
    for row in rows:
        if (row["arm"], row["trained_on"], row["tested_on"]) != (ARM, TRAINED_ON, member.name):
            raise ProtocolError("a result is not its own, or not of the federated model")
        if member.values["cells"] and row == cells.row(row):
            continue
        if (
            not values.count(row["n"])
            or not values.count(row["positives"])
            or member.values["test"] == cells.SUPPRESSED
        ):
            raise ProtocolError("a result is without counts, or has some of a test set that is suppressed")
        if not row["positives"] <= row["n"] <= member.values["test"]:
            raise ProtocolError(
                f"a result counts {row['positives']} positives of {row['n']} images; "
                f"{member.values['test']} are enrolled for the test"
            )
        _check_figures(row)
    return rows


def _check_figures(row: dict[str, Any]) -> None:
    """Both figures where both classes are, both intervals or none, and a reason where one is absent."""
    figures, limits = [row["auroc"], row["auprc"]], [row["auroc_ci"], row["auprc_ci"]]
    if not 0 < row["positives"] < row["n"]:
        if any(value is not None for value in figures + limits):
            raise ProtocolError("a result has figures, but not both classes")
    elif not all(_share(figure) for figure in figures):
        raise ProtocolError("a figure is not a number between 0 and 1")
    if (limits[0] is None) != (limits[1] is None) or not all(limit is None or _interval(limit) for limit in limits):
        raise ProtocolError("an interval must be two numbers between 0 and 1, the lower first, or null as its fellow")
    reason = row["reason"]
    if (reason is None) != (limits[0] is not None):
        raise ProtocolError("a result has a reason exactly where its intervals are null")
    if reason is not None and not (isinstance(reason, str) and len(reason) <= 400 and reason.isprintable()):
        raise ProtocolError("a result's reason is not text, or too long")


def _share(value: object) -> bool:
    return values.finite(value) and 0 <= value <= 1  # type: ignore[operator]


def _interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_share, value)) and value[0] <= value[1]
