"""The statements beside the headline: each fires where the figures ask for it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chexfound.evaluate.results import Comparison, History, Metrics, Point, Result
from chexfound.pretrain.health.symptoms import ADVICE
from chexfound.report import callouts
from chexfound.report.run_folder import ReportedRun

LOG_K = 5.545


def row(arm, site, auroc, half=0.03, finding="Pneumonia", reason=None, positives=40):
    ci = None if half is None else (auroc - half, auroc + half)
    return Result(
        arm=arm, tested_on=site, finding=finding, n=100, positives=positives, auroc=auroc, auroc_ci=ci, reason=reason
    )


def comparison(site, second, value, half=0.5, finding="Pneumonia"):
    ci = None if half is None else (value - half, value + half)
    reason = "no interval: all positives are of one patient" if half is None else None
    return Comparison(
        first="federated", second=second, finding=finding, tested_on=site, difference=value, ci=ci, reason=reason
    )


def run(*results, steps=300, history=None, **metrics):
    recipe = {"train": {"rounds": 1, "local_steps": steps}}
    return ReportedRun(out=None, metrics=Metrics(results=list(results), **metrics), recipe=recipe, history=history)


def texts(some, kind=None):
    return [one.text for one in callouts.callouts(some) if kind in (None, one.kind)]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (299, "This run pretrained for 299 steps only: too short to show"),
        (0, "This run did no self-supervised pretraining"),
        (300, None),
    ],
)
def test_short_runs_are_told(steps, said):
    found = [one.text for one in callouts.callouts(run(row("federated", "A", 0.8), steps=steps)) if one.first]
    assert [text.startswith(said) for text in found] == [True] if said else found == []


@pytest.mark.parametrize(
    ("random", "kind", "said"),
    [
        (0.9, "bad", "is below random weights at A, significantly (−0.100 at A; the same head)"),
        (0.81, "bad", "is below random weights at A, not significantly"),
        (0.79, "warn", "does not clearly beat random weights"),
        (0.6, "good", "Above random weights"),
    ],
)
def test_random_weights_are_told(random, kind, said):
    found = callouts.callouts(run(row("federated", "A", 0.8), row("random", "A", random)))
    assert [one.kind for one in found if said in one.text] == [kind]
    assert [one.first for one in found if said in one.text] == [kind != "good"]


def test_a_loss_to_random_weights_at_few_sites_is_still_bad_news():
    others = [one for site in "BC" for one in (row("federated", site, 0.8), row("random", site, 0.6))]
    found = texts(run(row("federated", "A", 0.8), row("random", "A", 0.9), *others), "bad")
    assert found == ["The federated backbone does worse than random weights with the same head: by 0.10 AUROC at A."]


def test_bad_callouts_come_before_good_ones():
    some = run(row("federated", "A", 0.8), row("random", "A", 0.6), row("local:B", "A", 0.9), steps=10)
    kinds = [one.kind for one in callouts.callouts(some)]
    assert kinds == sorted(kinds, key=["bad", "warn", "good", "note"].index)
    (other,) = (text for text in texts(some, "bad") if text.startswith("A model of another site alone does better"))
    assert "picked on the same patients" in other


@pytest.mark.parametrize(
    ("floor", "half", "told"),
    [
        (0.78, 0.03, True),  # near and above chance
        (0.90, 0.03, True),  # above the model
        (0.78, 0.30, False),  # its interval holds 0.5
        (0.70, 0.03, False),  # far below the model
        (0.41, 0.03, False),  # below chance
        (0.78, None, True),  # no interval, but clearly above chance
    ],
)
def test_a_floor_is_told_where_it_is_above_chance_and_near_the_model(floor, half, told):
    some = run(row("federated", "A", 0.8, half=0.4), row("histogram", "A", floor, half))
    assert [text.startswith("The grey-level histogram alone") for text in texts(some, "warn")] == [True] * told


def test_a_grey_level_floor_is_told_with_its_variant_and_none_but_the_best():
    floor = replace(row("histogram", "A", 0.8), variant="boosted")
    some = run(row("federated", "A", 0.82), floor, row("histogram:pooled", "A", 0.9))
    (said,) = texts(some, "warn")
    assert "reaches 0.80 at A (boosted trees on the site’s own images; federated 0.82)" in said


def test_a_weak_floor_near_a_weak_model_needs_to_be_clearly_above_chance():
    def told(floor, half):
        return texts(run(row("federated", "A", 0.55), row("site-view", "A", floor, half)), "warn")

    assert told(0.55, None) == []
    assert told(0.55, 0.2) == []
    assert "site and view alone, without the image, reaches 0.55 at A (federated 0.55)" in told(0.55, 0.02)[0]


def test_no_floor_is_told_on_a_handful_of_images():
    def told(positives):
        some = run(row("federated", "A", 0.6, positives=positives), row("site-view", "A", 0.6, positives=positives))
        return any("site and view alone" in text for text in texts(some, "warn"))

    assert [told(positives) for positives in (99, 96, 95, 5, 4)] == [False, False, True, True, False]


def test_odd_shuffles_are_told():
    some = run(row("federated", "A", 0.8), row("shuffled", "A", 0.6))
    assert any("shuffled labels should be near 0.5 and reaches 0.60 at A" in text for text in texts(some))


def test_a_loss_in_another_finding_is_told_among_those_that_can_be_judged():
    results = [
        row(arm, site, auroc, half, finding="Mass_x")
        for site, half in (("A", 0.03), ("B", None))
        for arm, auroc in (("federated", 0.6), (f"local:{site}", 0.9))
    ]
    lead = [one for site in "AB" for one in (row("federated", site, 0.8), row(f"local:{site}", site, 0.8))]
    assert any(
        "below the site’s own model in 1 of 1 comparisons: Mass x at A (by 0.30)" in text
        for text in texts(run(*lead, *results))
    )


def test_what_cannot_be_judged_is_named_with_its_reason():
    some = run(
        *(row(arm, site, 0.8) for site in "AB" for arm in ("federated", f"local:{site}")),
        comparisons=[comparison("A", "local:A", 0.0), comparison("B", "local:B", 0.1, half=None)],
    )
    assert "Differences that cannot be judged are left out above: at B (all positives are of one patient)." in texts(
        some, "note"
    )


def points(values, site="A", name="dino", **others):
    return [Point(step=step, site=site, log_k=LOG_K, **{name: value}, **others) for step, value in enumerate(values)]


def with_history(**pretrain):
    return run(row("federated", "A", 0.8), history=History(pretrain=pretrain))


def ailing(some):
    return [text for text in texts(some, "warn") if text.startswith("Pretraining ended ailing")]


FLAT, LEARNS = [5.54] * 220, [6.2] * 20 + [5.0] * 200


def test_a_run_too_short_to_judge_is_noted():
    def noted(steps):
        some = with_history(federated=points([LOG_K] * steps))
        return [text for text in texts(some, "note") if "too few" in text], len(ailing(some))

    said = "199 steps are too few to judge whether the DINO loss leaves log K (take at least 200)."
    assert noted(199) == ([said], 0)
    assert noted(200) == ([], 1)


def test_a_warm_up_is_not_judged_nor_a_recipe_that_cannot_be_read():
    some = with_history(federated=points(FLAT))
    some.recipe["optim"] = {"warmup_epochs": 8}  # of ten steps
    assert [text for text in texts(some, "note") if "take at least 230" in text]
    some.recipe["optim"] = {"warmup_epochs": "eight"}
    assert len(ailing(some)) == 1


def test_one_warning_a_symptom_names_every_arm_and_site_and_no_other():
    some = with_history(
        federated=[*points(FLAT, "A"), *points(LEARNS, "B")],
        centralized=points(FLAT, "all sites, pooled"),
        **{
            "local:A": points(FLAT, "A"),
            "local:B": points([0.01] * 220, "B", "feature_std"),
        },
    )
    plateau, constant = ailing(some)
    seen = "DINO loss 5.540, log K 5.545"
    where = f"Federated (A: {seen}), Pooled (centralized) ({seen}) and Local: A ({seen})."
    assert plateau == f"Pretraining ended ailing, cls-plateau: {where} {_sentence('cls-plateau')}"
    assert constant.startswith("Pretraining ended ailing, constant-features: Local: B (feature std 0.010 of 1). ")


def _sentence(name):
    return f"{ADVICE[name][0].upper()}{ADVICE[name][1:]}."


def test_a_healthy_run_and_one_without_figures_are_not_warned_of():
    assert ailing(with_history(federated=points(LEARNS))) == []
    bare = with_history(federated=[Point(step=step, loss=1.0) for step in range(20)])
    assert [text for text in texts(bare) if "too few" in text] == []


@pytest.mark.parametrize(
    ("drawn", "kind", "said"),
    [
        ({"federated": {"A": 24, "B": 24}, "centralized": {"all": 48}}, None, ""),
        ({"federated": {"A": 24, "B": 24}, "centralized": {"all": 24}}, "bad", "48 (Federated) and 24 (Pooled"),
        ({"federated": {"A": 24, "B": 0}, "centralized": {"all": 48}}, "note", "B took no step in training the head"),
        ({"federated": {"A": 24, "B": 0}, "centralized": {"all": 20}}, "bad", "24 (Federated) and 20 (Pooled"),
        (
            {"federated": {"A": 24, "B": 0}, "local:A": {"A": 24}, "centralized": {"all": 48}},
            "bad",
            "24 (Federated, Local",
        ),
    ],
    ids=["equal", "a share", "an idle site", "an idle site and too little", "a share at a lone site"],
)
def test_unequal_work_is_told(drawn, kind, said):
    some = run(row("federated", "A", 0.8), drawn={arm: {"adapt": sites} for arm, sites in drawn.items()})
    found = [one for one in callouts.callouts(some) if "training the head" in one.text]
    assert [(one.kind, said in one.text) for one in found] == ([(kind, True)] if kind else [])


def test_a_deployed_run_is_not_told_to_lack_arms():
    (text,) = texts(run(row("federated", "A", 0.8), deployed=True), "note")
    assert text.startswith("A deployed run trains the federated arm only")
    (text,) = texts(run(row("federated", "A", 0.8)), "note")
    assert text.startswith("Not in this run: the pooled, local, random-weights and floor arms.")


@pytest.mark.parametrize(("deployed", "failed", "clipped"), [(True, 0, 0), (False, 1, 0), (False, 2, 1234)])
def test_secure_aggregation_is_told(deployed, failed, clipped):
    how = {"n": 4, "c": 1, "t": 3, "ring": 16, "failed": failed, "clipped": clipped}
    said = " ".join(texts(run(row("federated", "A", 0.8), secagg=how, deployed=deployed), "note"))
    assert "sums over at least 3 sites and no site’s own, whatever it did with up to 1 of them (16 bits" in said
    assert ("the simulation’s own" in said) == (not deployed)
    assert ("gave none once" in said, "gave none 2 times" in said) == (failed == 1, failed == 2)
    assert ("1,234 values" in said) == bool(clipped)


def test_without_it_nothing_is_told():
    assert not [text for text in texts(run(row("federated", "A", 0.8))) if "Secure aggregation" in text]
