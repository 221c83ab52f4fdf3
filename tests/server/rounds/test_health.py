from __future__ import annotations

from typing import Any

import pytest

from chexfound.recipe import load as recipes
from server.rounds import health
from server.rounds.health import Watch


def reply(site: str, images: int, *rows: dict[str, float]) -> dict[str, Any]:
    return {"site": site, "images": images, "history": list(rows)}


def test_figures_of_sites_are_weighed_by_images() -> None:
    row = {"log_k": 5.0, "loss": 8.0, "dino": 4.5}
    figures = health.averages(
        [
            reply("a", 30, row | {"step": 0}, row | {"step": 1, "loss": 6.0, "rankme": 20.0, "probe_images": 40}),
            reply("b", 10, row | {"step": 0, "dino": 5.5}, row | {"step": 1, "dino": 5.5}),
        ]
    )
    assert figures["loss"] == pytest.approx((30 * 7.0 + 10 * 8.0) / 40)
    assert figures["dino"] == pytest.approx((30 * 4.5 + 10 * 5.5) / 40)
    assert figures["dino_gap"] == pytest.approx(4.75 - 5.0)
    assert (figures["rankme"], figures["probe_images"]) == (20.0, 40)  # b has none, and no part in it
    assert "knn_auroc" not in figures


def flat(step: int) -> dict[str, float]:
    figures = {"teacher_entropy": 5.0, "prototype_perplexity": 1.0, "prototype_usage": 1.0, "feature_std": 0.5}
    return {"step": step, "loss": 8.0, "dino": 4.0, "log_k": 5.0, **figures}


def rounds(watch: Watch, first: int, last: int) -> list[dict[str, Any]]:
    found = []
    for number in range(first, last):
        rows = [flat(step) for step in range(5 * number, 5 * number + 5)]
        well = [row | {"teacher_entropy": 3.0} for row in rows]
        replies = [reply("ill", 10, *rows), reply("well", 10, *well)]
        found.append({"round": number, "sites": replies, "health": watch.look(number, 5 * number, replies)})
    return found


def test_a_symptom_is_told_once_with_its_site_and_resumed_alike() -> None:
    recipe = recipes.load("laptop")
    whole = rounds(Watch(recipe, []), 0, 24)
    told = [(entry["round"], one["site"], one["symptom"]) for entry in whole for one in health.warnings(entry)]
    assert told == [(19, "ill", "uniform-teacher")]
    assert [one["since"] for one in whole[-1]["health"]["symptoms"]] == [19]
    first = rounds(Watch(recipe, []), 0, 21)
    assert [*first, *rounds(Watch(recipe, first), 21, 24)] == whole


def test_the_line_of_a_round() -> None:
    figures = {"log_k": 5.0, "dino_gap": -0.25, "teacher_entropy": 2.5, "feature_std": 0.61}
    assert health.line(figures) == "dino_gap=-0.250 teacher_entropy=0.500 feature_std=0.610"
