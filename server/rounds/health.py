"""How pretraining fares, round by round: the sites' figures as one, and what ails each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from chexfound.pretrain.health.measures import PROBE_FIGURES, STEP_FIGURES, dino_gap
from chexfound.pretrain.health.symptoms import ADVICE, Row, judged_from, symptoms, tail
from chexfound.recipe.schema import ARCHS, Recipe

LOSSES = ("loss", "dino", "ibot", "koleo")


def averages(replies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each figure of a round: the mean over a site's rows that have it, then over the sites, by images.

    A site without a figure (no labels, say) has no part in it.  `probe_images` adds up.

    Args:
        replies: of each site, its images (above 0) and history.
    """
    result: dict[str, float] = {}
    for name in ("log_k", *LOSSES, *STEP_FIGURES, *PROBE_FIGURES):
        told = [
            (reply["images"], fmean(values))
            for reply in replies
            if (values := [row[name] for row in reply["history"] if name in row])
        ]
        if told and name == "probe_images":
            result[name] = round(sum(value for _, value in told))
        elif told:
            result[name] = round(sum(n * value for n, value in told) / sum(n for n, _ in told), 6)
    if "dino" in result:
        result["dino_gap"] = round(dino_gap(result), 6)
    return result


class Watch:
    """Follows the curve of each site of a run.

    Args:
        rounds: the journal's records of the rounds that are done.
    """

    def __init__(self, recipe: Recipe, rounds: Sequence[Mapping[str, Any]]) -> None:
        self.recipe = recipe
        self._curves: dict[str, list[Row]] = {}
        self._since: dict[tuple[str, str], int] = {}  # (site, symptom) -> the round in which it was first seen
        for entry in rounds:
            self._follow(entry["sites"])
        if rounds:
            self._since = {(one["site"], one["symptom"]): one["since"] for one in rounds[-1]["health"]["symptoms"]}

    def _follow(self, replies: Sequence[Mapping[str, Any]]) -> None:
        for reply in replies:
            self._curves[reply["site"]] = tail([*self._curves.get(reply["site"], ()), *reply["history"]])

    def look(self, number: int, step: int, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The record of a round: `figures` of all sites, and `symptoms`, each with its site and since which round.

        Args:
            number: of the round.
            step: its first global step.
            replies: of each site, its name, images and history.
        """
        self._follow(replies)
        found = []
        for reply in replies:
            site = reply["site"]
            before = [name for where, name in self._since if where == site]
            found += [
                {
                    "site": site,
                    "symptom": one.name,
                    "seen": one.seen,
                    "since": self._since.get((site, one.name), number),
                }
                for one in symptoms(
                    self._curves[site],
                    dim=ARCHS[self.recipe.student.arch][0],
                    judged_from=judged_from(self.recipe, step),
                    before=before,
                )
            ]
        self._since = {(one["site"], one["symptom"]): one["since"] for one in found}
        return {"figures": averages(replies), "symptoms": found}


def warnings(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give what a round's record warns of for the first time: site, symptom, seen, advice."""
    found = event.get("health", {}).get("symptoms", ())
    return [{**one, "advice": ADVICE[one["symptom"]]} for one in found if one["since"] == event["round"]]


def line(figures: Mapping[str, float]) -> str:
    """The figures of a round in short, key=value; the entropy as share of log K."""
    short = dict(figures)
    if short.get("log_k") and "teacher_entropy" in short:
        short["teacher_entropy"] /= short["log_k"]
    names = ("dino_gap", *STEP_FIGURES, "rankme", "knn_auroc")
    return " ".join(f"{name}={short[name]:.3f}" for name in names if name in short)
