"""The sentences: bad news first, and never more than the intervals allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.evaluate.results import AcrossSeeds, Comparison, Difference, Metrics, Result
from chexfound.report import story
from chexfound.report.run_folder import ReportedRun


def row(arm, site, auroc, half=0.03, finding="Pneumonia", positives=40):
    ci = None if auroc is None or half is None else (auroc - half, auroc + half)
    return Result(arm=arm, tested_on=site, finding=finding, n=100, positives=positives, auroc=auroc, auroc_ci=ci)


def difference(site, value, half, finding="Pneumonia"):
    ci = (value - half, value + half)
    return Difference(finding=finding, tested_on=site, federated_minus_centralized=value, ci=ci)


def comparison(site, second, value, half, finding="Pneumonia"):
    ci = (value - half, value + half)
    return Comparison(first="federated", second=second, finding=finding, tested_on=site, difference=value, ci=ci)


def run(*results, differences=(), steps=300, history=None, **metrics):
    recipe = {"train": {"rounds": 1, "local_steps": steps}}
    return ReportedRun(
        out=None,
        metrics=Metrics(results=list(results), differences=list(differences), **metrics),
        recipe=recipe,
        history=history,
    )


def two_sites(own=(0.0, 0.0), pooled=(0.0, 0.0), half=0.01):
    """Sites A and B, federated at 0.8, with paired differences against own and pooled."""
    results, differences, comparisons = [], [], []
    for site, gain, loss in zip("AB", own, pooled, strict=True):
        results += [
            row("federated", site, 0.8),
            row(f"local:{site}", site, 0.8 - gain),
            row("centralized", site, 0.8 - loss),
        ]
        comparisons.append(comparison(site, f"local:{site}", gain, half))
        differences.append(difference(site, loss, half))
    return run(*results, differences=differences, comparisons=comparisons)


@pytest.mark.parametrize(
    ("own", "pooled", "said"),
    [
        (
            (-0.05, 0.1),
            (0.0, 0.0),
            "Pneumonia: federating lost 0.05 AUROC at A against the site’s own model, but gained 0.10 at B; "
            "it shows no clear difference from pooling all images at either site.",
        ),
        (
            (0.1, 0.2),
            (-0.03, 0.0),
            "Pneumonia: federating lost 0.03 AUROC at A against pooling all images, "
            "but shows no clear difference from it at B; "
            "it gained 0.20 at B and 0.10 at A over the site’s own model.",
        ),
        (
            (0.0, 0.0),
            (0.0, 0.0),
            "Pneumonia: federating shows no clear difference from the site’s own model at either site; "
            "it shows no clear difference from pooling all images at either site.",
        ),
        (
            (-0.02, -0.04),
            (-0.03, 0.05),
            "Pneumonia: federating lost 0.04 AUROC at B and 0.02 at A against the site’s own model; "
            "it lost 0.03 at A against pooling all images, but gained 0.05 at B.",
        ),
        (
            (0.1, 0.0),
            (0.02, 0.03),
            "Pneumonia: federating shows no clear difference from the site’s own model at B "
            "and gained 0.10 AUROC at A over it; "
            "it gained 0.03 at B and 0.02 at A over pooling all images.",
        ),
    ],
)
def test_headlines(own, pooled, said):
    assert story.headline(two_sites(own, pooled)) == said


@settings(deadline=None)
@given(st.tuples(*[st.floats(-0.4, 0.19)] * 4), st.floats(0.001, 0.3))
def test_the_headline_never_claims_what_an_interval_does_not(values, half):
    said = story.headline(two_sites(values[:2], values[2:], half))
    clear = [value for value in values if abs(value) > half]
    assert ("lost" in said) == any(value < 0 for value in clear)
    assert ("gained" in said) == any(value > 0 for value in clear)
    assert ("no clear difference" in said) == (len(clear) < 4)
    if "lost" in said:
        assert said.startswith("Pneumonia: federating lost")


@pytest.mark.parametrize("bound", [0.0, 1e-17, -1e-17])
def test_an_interval_that_touches_zero_is_unclear(bound):
    touching = Difference(finding="Pneumonia", tested_on="A", federated_minus_centralized=-0.1, ci=(-0.2, bound))
    one = story.contrast(
        run(row("federated", "A", 0.7), row("centralized", "A", 0.8), differences=[touching]),
        "Pneumonia",
        "A",
        "centralized",
    )
    assert (one.verdict, one.how) == ("unclear", "paired")


@pytest.mark.parametrize(
    ("other", "verdict"), [(0.85, "unclear"), (0.87, "lower"), (0.73, "higher"), (0.80, "unclear")]
)
def test_without_pairing_only_intervals_that_do_not_overlap_count(other, verdict):
    one = story.contrast(run(row("federated", "A", 0.8), row("local:A", "A", other)), "Pneumonia", "A", "local:A")
    assert (one.verdict, one.how) == (verdict, "overlap")
    assert one.value == pytest.approx(0.8 - other)
    bare = story.contrast(
        run(row("federated", "A", 0.8, half=None), row("local:A", "A", other)), "Pneumonia", "A", "local:A"
    )
    assert (bare.verdict, bare.reason) == ("unjudged", "no interval")


@pytest.mark.parametrize(
    ("positives", "reason"),
    [(4, "4 images with the finding"), (1, "1 image with the finding"), (99, "1 image without the finding"), (5, None)],
)
def test_a_handful_of_a_class_is_not_judged_whatever_the_interval(positives, reason):
    some = run(
        row("federated", "A", 0.2, positives=positives),
        row("centralized", "A", 0.8),
        differences=[difference("A", -0.6, 0.1)],
    )
    one = story.contrast(some, "Pneumonia", "A", "centralized")
    assert (one.verdict, one.reason) == ("unjudged" if reason else "lower", reason)
    assert ("federating lost" in story.headline(some)) == (reason is None)


def test_means_over_seeds_decide_against_any_arm():
    rows = [row("federated", "A", 0.8), row("random", "A", 0.7)]
    mean = AcrossSeeds(
        finding="Pneumonia", tested_on="A", first="federated", second="random", seeds=[0, 1, 2],
        mean_difference=-0.2, ci=(-0.3, -0.1),
    )  # fmt: skip
    some = run(*rows, comparisons=[comparison("A", "random", 0.1, 0.05)], comparisons_across_seeds=[mean])
    one = story.contrast(some, "Pneumonia", "A", "random")
    assert (one.verdict, one.how, one.seeds) == ("lower", "seeds", 3)
    assert "against random weights, the mean of 3 seeds" in story.subline(some)


def unjudged(site, value=0.2):
    reason = "no interval: all positives are of one patient"
    return Difference(finding="Pneumonia", tested_on=site, federated_minus_centralized=value, ci=None, reason=reason)


def test_without_an_interval_nothing_is_judged():
    arms = [row(arm, site, 0.8) for site in "ABC" for arm in ("federated", "centralized")]
    differences = [difference("A", 0.0, 0.1), difference("B", 0.0, 0.1), unjudged("C")]
    some = run(*arms, differences=differences)
    one = story.contrast(some, "Pneumonia", "C", "centralized")
    assert (one.verdict, one.reason) == ("unjudged", "all positives are of one patient")
    assert [one.site for one in story.contrasts(some, "Pneumonia", lambda _: "centralized")] == ["A", "B"]
    assert story.headline(some) == (
        "Pneumonia: federating shows no clear difference from pooling all images "
        "at either of the 2 sites that can be judged."
    )
    none = run(*arms, differences=[unjudged(site) for site in "ABC"])
    assert "no site has enough held-out patients to judge a difference" in story.headline(none)
    assert "a difference counts" not in story.subline(none)


@pytest.mark.parametrize(
    ("random", "said"),
    [
        ((0.81, 0.82, 0.81, 0.82), "is below random weights at all 4 sites, none of them significantly."),
        ((0.81, 0.95, 0.81, 0.60), "is below random weights at 3 of the 4 sites, 1 of them significantly."),
        ((0.95, 0.95, 0.95, 0.95), "is below random weights at all 4 sites, each of them significantly."),
        ((0.81, 0.95, 0.60, 0.60), None),
    ],
)
def test_random_weights_that_do_better_at_most_sites_are_in_the_headline(random, said):
    some = run(
        *(row("federated", site, 0.8) for site in "ABCD"),
        *(row("random", site, value) for site, value in zip("ABCD", random, strict=True)),
    )
    assert story.headline(some).endswith(f"The federated backbone {said}") == bool(said)
    assert ("random weights" in story.headline(some)) == bool(said)


def test_a_run_without_the_federated_arm_says_so():
    some = run(row("local:A", "A", 0.8), row("local:A", "B", 0.6))
    assert "this run trained no federated model" in story.headline(some)
    assert story.ranked_findings(some) == ["Pneumonia"]


def test_the_finding_that_leads_can_be_judged():
    bare = [row("federated", site, 0.8, half=None, finding="bare", positives=90) for site in "ABC"]
    assert story.ranked_findings(run(*bare, row("federated", "A", 0.8, finding="judged")))[0] == "judged"


def test_the_mean_over_seeds_outranks_one_seed():
    seeds = AcrossSeeds(
        finding="Pneumonia",
        tested_on="A",
        seeds=[0, 1, 2],
        mean_federated_minus_centralized=0.0,
        ci=(-0.01, 0.01),
    )
    some = run(
        row("federated", "A", 0.8),
        row("centralized", "A", 0.9),
        differences=[difference("A", -0.1, 0.01)],
        across_seeds=[seeds],
    )
    assert "lost" not in story.headline(some)
    assert "the mean of 3 seeds" in story.subline(some)
    assert story.contrast(some, "Pneumonia", "A", "centralized", across_seeds=False).verdict == "lower"


def test_the_primary_finding_has_most_sites_with_both_models_then_most_positives():
    def of(finding, sites, positives, local=True):
        rows = [row("federated", site, 0.8, finding=finding, positives=positives) for site in sites]
        return rows + [row(f"local:{site}", site, 0.7, finding=finding) for site in sites if local]

    some = run(
        *of("few", "A", 90),
        *of("alone", "ABC", 90, local=False),
        *of("less", "AB", 10),
        *of("more", "AB", 20),
        row("federated", "A", None, finding="none"),
    )
    assert story.ranked_findings(some) == ["more", "less", "few", "alone"]


def test_a_lone_federated_arm_claims_nothing():
    said = story.headline(run(row("federated", "A", 0.81), row("federated", "B", 0.9)))
    assert "0.81 at A and 0.90 at B" in said
    assert "not known" in said
    assert story.headline(run(row("federated", "A", None))).startswith("No AUROC could be computed")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (list("abcd"), "a, b, c and d"),
        (list("abcdef"), "a, b, c and 3 more"),
    ],
)
def test_lists(names, said):
    assert story.listed(names) == said


def test_amounts():
    assert [story.amount(value) for value in (-0.05, 0.0094, 0.2)] == ["0.05", "0.009", "0.20"]
    assert [story.signed(value) for value in (-0.0314, 0.0, 1e-17, 0.0004)] == ["−0.031", "0.000", "0.000", "+0.0004"]


def test_of_all_sites_together():
    """Under secure aggregation no site has a figure of its own."""
    some = run(row("federated", "all sites", 0.8), sites=["A", "B", "C"], deployed=True)
    assert "reaches an AUROC of 0.80 over all sites together" in story.headline(some)
    assert story.subline(some).startswith("AUROC on the held-out patients of all sites together")
    assert (some.together, some.n_sites) == (True, 3)
    assert not run(row("federated", "A", 0.8)).together
