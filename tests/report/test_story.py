"""The sentences: bad news first, and never more than the intervals allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.report import story
from chexfound.report.run import AcrossSeeds, Comparison, Difference, History, Metrics, Point, Result, Run


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
    return Run(
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


def test_an_interval_that_touches_zero_is_unclear():
    touching = Difference(finding="Pneumonia", tested_on="A", federated_minus_centralized=-0.1, ci=(-0.2, 0.0))
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
    assert bare.verdict == "unclear"


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
        *of("few", "A", 900),
        *of("alone", "ABC", 900, local=False),
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


def kinds(some):
    return [(one.kind, one.text.split(":")[0]) for one in story.callouts(some)]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (299, "This run pretrained for 299 steps only: too short to show"),
        (0, "This run did no self-supervised pretraining"),
        (300, None),
    ],
)
def test_short_runs_are_told(steps, said):
    texts = [one.text for one in story.callouts(run(row("federated", "A", 0.8), steps=steps)) if one.first]
    assert [text.startswith(said) for text in texts] == [True] if said else texts == []


@pytest.mark.parametrize(
    ("random", "kind", "said"),
    [
        (0.9, "bad", "does worse than random weights"),
        (0.79, "warn", "does not clearly beat random weights"),
        (0.6, "good", "Above random weights"),
    ],
)
def test_random_weights_are_told(random, kind, said):
    found = story.callouts(run(row("federated", "A", 0.8), row("random", "A", random)))
    assert [one.kind for one in found if said in one.text] == [kind]
    assert [one.first for one in found if said in one.text] == [kind != "good"]


def test_bad_callouts_come_before_good_ones():
    some = run(row("federated", "A", 0.8), row("random", "A", 0.6), row("local:B", "A", 0.9), steps=10)
    assert [one.kind for one in story.callouts(some)] == sorted(
        (one.kind for one in story.callouts(some)), key=["bad", "warn", "good", "note"].index
    )
    assert any("A model of another site alone does better" in one.text for one in story.callouts(some) if one.first)


def test_floors_near_the_model_and_odd_shuffles_are_told():
    texts = [
        one.text
        for one in story.callouts(
            run(
                row("federated", "A", 0.8),
                row("histogram", "A", 0.78),
                row("site-view", "A", 0.6),
                row("shuffled", "A", 0.6),
            )
        )
    ]
    assert any(
        "grey-level histogram alone, which sees no anatomy, reaches 0.78 at A (federated 0.80)" in text
        for text in texts
    )
    assert any("shuffled labels should be near 0.5 and reaches 0.60 at A" in text for text in texts)
    assert not any("site and view alone" in text for text in texts)


def test_a_loss_in_another_finding_is_told():
    some = run(
        row("federated", "A", 0.8),
        row("local:A", "A", 0.8),
        row("federated", "A", 0.6, finding="Mass_x"),
        row("local:A", "A", 0.9, finding="Mass_x"),
    )
    assert any(
        "below the site’s own model in 1 of 1 comparisons: Mass x at A (by 0.30)" in one.text
        for one in story.callouts(some)
    )


@pytest.mark.parametrize(("end", "warned"), [(5.545, True), (5.50, True), (5.48, False), (6.2, True)])
def test_dino_at_log_k_is_told(end, warned):
    points = [Point(step=step, site="A", dino=5.0 if step < 90 else end, log_k=5.545) for step in range(100)]
    some = run(
        row("federated", "A", 0.8),
        history=History(pretrain={"federated": points, "local:A": [Point(step=0, site="A", ibot=1.0)]}),
    )
    assert [("at log K" in text and "at A" in text) for text in story.stuck(some)] == [True] * warned


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
    assert story.signed(-0.0314) == "−0.031"
