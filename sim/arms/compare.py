"""From the arms' scores to the figures: who reaches what at which site, and the paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, Part, View
from chexfound.evaluate import floors
from chexfound.evaluate.floors import FloorImages, FloorScores
from chexfound.evaluate.results import FLOORS, HISTOGRAM, LOCAL, RANDOM
from chexfound.evaluate.rows import across_seeds, difference_rows, result_rows
from chexfound.evaluate.scores import Scores
from chexfound.recipe.schema import Recipe
from sim.arms.plan import FITTED_ARMS, ArmPlan, trained_on

Row = dict[str, Any]
BothScores = dict[str, Mapping[str, Scores]]  # arm -> site -> scores


def fitted_floors(plan: ArmPlan, arms: Sequence[str]) -> BothScores:
    """Fit the floors that need no backbone: site and view alone, and the grey-level histogram with its variants."""
    store = Store.open(plan.store)
    views = {site: View.of(store, site, patients) for site, patients in plan.sites.items()}
    result: BothScores = {}
    if "site-view" in arms:
        result["site-view"] = _site_view_scores(plan, store, views)
    if HISTOGRAM in arms:
        result |= histogram_scores(plan.recipe, store, views, plan.membership)
    return result


def histogram_scores(
    recipe: Recipe, store: Store, views: Mapping[str, View], membership: Membership
) -> dict[str, dict[str, FloorScores]]:
    """Fit and choose the grey-level floors of these sites: arm -> site -> scores, as `floors.histogram_floors`."""
    findings = list(recipe.adapt.findings or ())

    def images(which: Part) -> dict[str, FloorImages]:
        ids = {site: view.split(membership, which) for site, view in views.items()}
        return {
            site: FloorImages(
                patients=[store.keys[place] for place in own],
                features=floors.histogram_features(store.pixels(own)),
                labels=store.labels(own, findings),
            )
            for site, own in ids.items()
        }

    return floors.histogram_floors(images("train"), images("val"), images("test"), findings, recipe.seed)


def _site_view_scores(plan: ArmPlan, store: Store, views: Mapping[str, View]) -> dict[str, Scores]:
    findings = list(plan.recipe.adapt.findings or ())
    train = {site: view.split(plan.membership, "train") for site, view in views.items()}
    test = {site: view.split(plan.membership, "test") for site, view in views.items()}

    def traits(parts: Mapping[str, np.ndarray]) -> tuple[list[str], list[str]]:
        return (
            [site for site, ids in parts.items() for _ in ids],
            [store.views[place] for ids in parts.values() for place in ids],
        )

    labels = store.labels(np.concatenate(list(train.values())), findings)
    scores, unscored = floors.site_view_floor(*traits(train), labels, *traits(test), findings)
    parts = np.split(scores, np.cumsum([len(ids) for ids in test.values()])[:-1])
    return {
        site: Scores([store.keys[place] for place in ids], store.labels(ids, findings), part, findings, unscored)
        for (site, ids), part in zip(test.items(), parts, strict=True)
    }


def all_scores(plan: ArmPlan, arms: Sequence[str]) -> BothScores:
    """Scores of every arm that was run, and of the fitted floors."""
    scores: BothScores = {arm: plan.scores(arm) for arm in arms if arm not in FITTED_ARMS}
    return scores | fitted_floors(plan, arms)


def figures(plan: ArmPlan, scores: BothScores) -> tuple[list[Row], list[Row], list[Row]]:
    """`results`, `differences` (federated − centralized) and `comparisons` of one seed.

    A comparison is the paired difference between the federated arm and another: a site's own model
    at that site, every other site's model there, random weights, and the best grey-level floor.
    """
    recipe = plan.recipe
    samples, confidence = recipe.evaluate.bootstrap_samples, recipe.evaluate.confidence
    results, differences, comparisons = [], [], []
    for arm, by_site in scores.items():
        for site, one in by_site.items():
            rows = result_rows(arm, trained_on(arm), site, one, samples, confidence, recipe.seed)
            results += [_fitted_by(row, one) for row in rows] if isinstance(one, FloorScores) else rows
    federated = scores.get("federated", {})
    for site, one in federated.items():
        if "centralized" in scores:
            differences += difference_rows(one, scores["centralized"][site], site, samples, confidence, recipe.seed)
        for arm, by_site in scores.items():
            if arm in (RANDOM, HISTOGRAM) or arm.startswith(LOCAL):
                for row in difference_rows(
                    one, by_site[site], site, samples, confidence, recipe.seed, ("federated", "other")
                ):
                    difference = row.pop("federated_minus_other")
                    comparisons.append({"first": "federated", "second": arm, "difference": difference, **row})
    return results, differences, comparisons


def _fitted_by(row: Row, scores: FloorScores) -> Row:
    """Say in a row of results which variant of the floor it is of, and what that reached on validation."""
    variant, area = (told.get(row["finding"]) for told in (scores.variants, scores.validation))
    own = {"trained_on": row["tested_on"]} if variant in floors.OWN else {}
    return row | own | {"variant": variant, "validation_auroc": area}


def over_seeds(plans: Sequence[ArmPlan], scores: Sequence[BothScores]) -> tuple[list[Row], list[Row]]:
    """Means over seeds, a patient drawn once for all seeds: `across_seeds` and `comparisons_across_seeds`.

    The first is federated − centralized; the second federated less each other arm that all seeds have.
    """
    if len(plans) < 2 or any("federated" not in one for one in scores):
        return [], []
    recipe = plans[0].recipe
    samples, confidence = recipe.evaluate.bootstrap_samples, recipe.evaluate.confidence
    main, others = [], []
    floors_apart = set(FLOORS) - {HISTOGRAM}
    for arm in sorted(set.intersection(*(set(one) for one in scores)) - {"federated"} - floors_apart):
        for site in plans[0].sites:
            triples = [
                (plan.recipe.seed, one["federated"][site], one[arm][site])
                for plan, one in zip(plans, scores, strict=True)
            ]
            if arm == "centralized":
                main += across_seeds(triples, site, samples, confidence)
                continue
            for row in across_seeds(triples, site, samples, confidence, ("federated", "other")):
                mean = row.pop("mean_federated_minus_other")
                others.append({"first": "federated", "second": arm, "mean_difference": mean, **row})
    return main, others
