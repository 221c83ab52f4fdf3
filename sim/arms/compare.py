"""From the arms' scores to the figures: who reaches what at which site, and the paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.evaluate import floors
from chexfound.evaluate.rows import across_seeds, difference_rows, result_rows
from chexfound.evaluate.scores import Scores
from sim.arms.plan import FITTED_ARMS, ArmPlan, trained_on

Row = dict[str, Any]
BothScores = dict[str, dict[str, Scores]]  # arm -> site -> scores


def fitted_floors(plan: ArmPlan, arms: Sequence[str]) -> BothScores:
    """The two floors that are fitted here: site and view alone, and the grey-level histogram."""
    recipe, store = plan.recipe, Store.open(plan.store)
    findings = list(recipe.adapt.findings or ())
    views = {site: View.of(store, site, patients) for site, patients in plan.sites.items()}
    train = {site: view.split(plan.membership, "train") for site, view in views.items()}
    test = {site: view.split(plan.membership, "test") for site, view in views.items()}
    train_ids, test_ids = np.concatenate(list(train.values())), np.concatenate(list(test.values()))
    labels = store.labels(train_ids, findings)

    def site_names(parts: dict[str, np.ndarray]) -> list[str]:
        return [site for site, ids in parts.items() for _ in ids]

    fitted = {}
    if "site-view" in arms:
        fitted["site-view"] = floors.site_view_floor(
            site_names(train),
            _views(store, train_ids),
            labels,
            site_names(test),
            _views(store, test_ids),
            findings,
        )
    if "histogram" in arms:
        fitted["histogram"] = floors.histogram_floor(store.pixels(train_ids), labels, store.pixels(test_ids), findings)
    result: BothScores = {}
    for arm, (scores, unscored) in fitted.items():
        parts = np.split(scores, np.cumsum([len(ids) for ids in test.values()])[:-1])
        result[arm] = {
            site: Scores([store.keys[place] for place in ids], store.labels(ids, findings), part, findings, unscored)
            for (site, ids), part in zip(test.items(), parts, strict=True)
        }
    return result


def _views(store: Store, ids: np.ndarray) -> list[str]:
    return [store.views[place] for place in ids]


def all_scores(plan: ArmPlan, arms: Sequence[str]) -> BothScores:
    """Scores of every arm that was run, and of the fitted floors."""
    scores = {arm: plan.scores(arm) for arm in arms if arm not in FITTED_ARMS}
    return scores | fitted_floors(plan, arms)


def figures(plan: ArmPlan, scores: BothScores) -> tuple[list[Row], list[Row], list[Row]]:
    """`results`, `differences` (federated − centralized) and `comparisons` of one seed.

    A comparison is the paired difference between the federated arm and another: a site's own model
    at that site, every other site's model there, and random weights.
    """
    recipe = plan.recipe
    samples, confidence = recipe.evaluate.bootstrap_samples, recipe.evaluate.confidence
    results, differences, comparisons = [], [], []
    for arm, by_site in scores.items():
        for site, one in by_site.items():
            results += result_rows(arm, trained_on(arm), site, one, samples, confidence, recipe.seed)
    federated = scores.get("federated", {})
    for site, one in federated.items():
        if "centralized" in scores:
            differences += difference_rows(one, scores["centralized"][site], site, samples, confidence, recipe.seed)
        for arm, by_site in scores.items():
            if arm == "random" or arm.startswith("local:"):
                for row in difference_rows(
                    one, by_site[site], site, samples, confidence, recipe.seed, ("federated", "other")
                ):
                    difference = row.pop("federated_minus_other")
                    comparisons.append({"first": "federated", "second": arm, "difference": difference, **row})
    return results, differences, comparisons


def over_seeds(plans: Sequence[ArmPlan], scores: Sequence[BothScores]) -> tuple[list[Row], list[Row]]:
    """Means over seeds, a patient drawn once for all seeds: `across_seeds` and `comparisons_across_seeds`.

    The first is federated − centralized; the second federated less each other arm that all seeds have.
    """
    if len(plans) < 2 or any("federated" not in one for one in scores):
        return [], []
    recipe = plans[0].recipe
    samples, confidence = recipe.evaluate.bootstrap_samples, recipe.evaluate.confidence
    main, others = [], []
    for arm in sorted(set.intersection(*(set(one) for one in scores)) - {"federated", *FITTED_ARMS, "shuffled"}):
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
