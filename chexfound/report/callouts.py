"""The statements beside the headline: what the figures would hide, bad news first."""

from __future__ import annotations

from dataclasses import dataclass

from chexfound.evaluate.results import CENTRALIZED, FEDERATED, FLOORS, HISTOGRAM, LOCAL, RANDOM, Result
from chexfound.pretrain.health.symptoms import ADVICE, PATIENCE, symptoms
from chexfound.report.run_folder import ReportedRun
from chexfound.report.story import (
    FITTED,
    ORDER,
    amount,
    amounts,
    arm_name,
    below_random,
    best_other,
    contrast,
    contrasts,
    every_contrast,
    grouped,
    listed,
    own_model,
    ranked_findings,
    shown,
    signed,
    too_few,
)
from chexfound.secagg.parameters import MINIMUM

ENOUGH_STEPS = 300  # below it, gains of pretraining were inside the noise of the seeds
WORK = {"pretrain": "pretraining", "adapt": "training the head"}
NEAR = 0.05  # of AUROC: a floor this little below the model is near it
ABOVE_CHANCE = 0.6  # AUROC that is clearly above chance where there is no interval


@dataclass(frozen=True)
class Callout:
    """A statement beside the headline; kind `bad`, `warn`, `good` or `note`, in this order.

    One that is `first` stands above the figure, since without it the headline would mislead.
    """

    kind: str
    text: str
    first: bool = False


def callouts(run: ReportedRun) -> list[Callout]:
    """The statements beside the headline, bad ones first."""
    ranked = ranked_findings(run)
    found = [*_short(run)]
    if ranked:
        for part in (_random, _floors, _elsewhere, _others, _unjudged, _alone):
            found += part(run, ranked[0])
    found += [*_unequal(run), *_missing(run), *_summed(run), *_ailing(run)]
    kinds = ("bad", "warn", "good", "note")
    return sorted(found, key=lambda one: kinds.index(one.kind))


def _short(run: ReportedRun) -> list[Callout]:
    steps = run.pretrain_steps
    if steps is None:
        return [
            Callout(
                "note",
                "How many steps the model was pretrained for is not known: the run left neither recipe nor history.",
            )
        ]
    if steps == 0:
        return [
            Callout(
                "warn",
                "This run did no self-supervised pretraining, so it says nothing about what pretraining gives.",
                first=True,
            )
        ]
    if steps < ENOUGH_STEPS:
        return [
            Callout(
                "bad",
                f"This run pretrained for {steps} steps only: too short to show that self-supervised learning helps "
                f"(take at least {ENOUGH_STEPS}). It shows that the machinery works.",
                first=True,
            )
        ]
    return []


def _random(run: ReportedRun, finding: str) -> list[Callout]:
    found = contrasts(run, finding, lambda _: RANDOM)
    lower, unclear, higher = (grouped(found, verdict) for verdict in ORDER)
    if worse := below_random(run, finding):
        points = listed([f"{signed(one.value)} at {one.site}" for one in found])
        text = f"The federated backbone {worse} ({points}; the same head): pretraining is not shown to help."
        return [Callout("bad", text, first=True)]
    said = []
    if lower:
        by = amounts(lower, " AUROC")
        text = f"The federated backbone does worse than random weights with the same head: by {by}."
        said.append(Callout("bad", text, first=True))
    if unclear:
        points = listed([f"{signed(one.value)} at {one.site}" for one in unclear])
        text = (
            f"The federated backbone does not clearly beat random weights with the same head ({points}): "
            "a benefit of pretraining is not shown there."
        )
        said.append(Callout("warn", text, first=True))
    if higher and not lower:
        said.append(Callout("good", f"Above random weights with the same head by {amounts(higher, ' AUROC')}."))
    return said


def _floors(run: ReportedRun, finding: str) -> list[Callout]:
    said = []
    names = {
        HISTOGRAM: "grey-level histogram alone, which sees no anatomy,",
        "site-view": "site and view alone, without the image,",
    }
    for arm, name in names.items():
        near = []
        for site in run.site_names:
            floor, own = run.result(arm, site, finding), run.result(FEDERATED, site, finding)
            if floor is None or own is None or floor.auroc is None or own.auroc is None or too_few(own):
                continue
            if _above_chance(floor) and floor.auroc >= own.auroc - NEAR:
                fitted = f"{FITTED[floor.variant]}; " if floor.variant in FITTED else ""
                near.append(f"{floor.auroc:.2f} at {site} ({fitted}federated {own.auroc:.2f})")
        if near:
            said.append(
                Callout(
                    "warn",
                    f"The {name} reaches {listed(near)}: "
                    "what is measured there may be the scanner or the clinic, not the lung.",
                )
            )
    odd = [
        f"{row.auroc:.2f} at {site}"
        for site in run.site_names
        if (row := run.result("shuffled", site, finding))
        and row.auroc is not None
        and row.auroc_ci
        and row.auroc_ci[0] > 0.5
    ]
    if odd:
        said.append(
            Callout(
                "warn",
                f"A head trained on shuffled labels should be near 0.5 and reaches {listed(odd)}: "
                "look for a leak or a chance hit.",
            )
        )
    return said


def _above_chance(row: Result) -> bool:
    if row.auroc_ci:
        return row.auroc_ci[0] > 0.5
    return row.auroc is not None and row.auroc >= ABOVE_CHANCE


def _elsewhere(run: ReportedRun, finding: str) -> list[Callout]:
    found = contrasts(run, finding, lambda site: best_other(run, finding, site))
    lower, _, higher = (grouped(found, verdict) for verdict in ORDER)
    said = []
    if lower:
        said.append(
            Callout(
                "bad",
                f"A model of another site alone does better than the federated one: by {amounts(lower, ' AUROC')} "
                "(the best of them, picked on the same patients).",
                first=True,
            )
        )
    if higher:
        said.append(Callout("good", f"Above the best model of any other single site by {amounts(higher, ' AUROC')}."))
    return said


def _others(run: ReportedRun, finding: str) -> list[Callout]:
    said = []
    for against, name in ((own_model, "the site’s own model"), (lambda _: CENTRALIZED, "pooling")):
        found = [(other, one) for other in run.findings if other != finding for one in contrasts(run, other, against)]
        lost = [
            f"{shown(other)} at {one.site} (by {amount(one.value)})" for other, one in found if one.verdict == "lower"
        ]
        if lost:
            said.append(
                Callout(
                    "warn",
                    f"Among the other findings, federated is clearly below {name} in {len(lost)} of {len(found)} "
                    f"comparisons: {listed(lost, 5)}.",
                )
            )
    return said


def _unjudged(run: ReportedRun, finding: str) -> list[Callout]:
    """Sites that have figures of both models and yet are not in the headline."""
    found = every_contrast(run, finding, own_model) + every_contrast(run, finding, lambda _: CENTRALIZED)
    reasons = {one.site: one.reason for one in found if one.verdict == "unjudged"}
    if not reasons:
        return []
    where = listed([f"{site} ({reason})" for site, reason in reasons.items()])
    return [Callout("note", f"Differences that cannot be judged are left out above: at {where}.")]


def _alone(run: ReportedRun, finding: str) -> list[Callout]:
    if not any(arm.startswith(LOCAL) for arm in run.arms):
        return []
    alone = [
        site
        for site in run.site_names
        if (row := run.result(FEDERATED, site, finding))
        and row.auroc is not None
        and contrast(run, finding, site, LOCAL + site) is None
    ]
    if not alone:
        return []
    text = (
        f"{listed(alone)} trained no model of its own for this finding, so what federating gained there is not known."
    )
    return [Callout("note", text)]


def _unequal(run: ReportedRun) -> list[Callout]:
    """Say where arms were not trained on equally many images, by what their sites counted."""
    said = []
    for phase, what in WORK.items():
        drawn = {arm: phases[phase] for arm, phases in run.metrics.drawn.items() if phase in phases}
        totals = {arm: sum(sites.values()) for arm, sites in drawn.items()}
        if len(set(totals.values())) < 2:
            continue
        idle = list(dict.fromkeys(site for sites in drawn.values() for site, images in sites.items() if not images))
        full = {totals[arm] for arm, sites in drawn.items() if all(sites.values())}
        by_total = {total: [arm_name(arm) for arm in totals if totals[arm] == total] for total in totals.values()}
        counts = listed([f"{total:,} ({', '.join(names)})" for total, names in by_total.items()], len(by_total))
        if idle and len(full) == 1 and max(totals.values()) in full:
            text = f"{listed(idle)} took no step in {what}, so the arms drew different numbers of images: {counts}."
            said.append(Callout("note", text))
        else:
            text = f"The arms did not do equal work: in {what} they drew {counts} images"
            said.append(Callout("bad", f"{text}, so their figures differ by that too.", first=True))
    return said


def _missing(run: ReportedRun) -> list[Callout]:
    if run.metrics.deployed:
        text = (
            "A deployed run trains the federated arm only: what pooling the images, a site alone or "
            "random weights would reach is not known."
        )
        return [Callout("note", text)]
    lacking = [
        name
        for name, there in (
            ("federated", FEDERATED in run.arms),
            ("pooled", CENTRALIZED in run.arms),
            ("local", any(arm.startswith(LOCAL) for arm in run.arms)),
            ("random-weights", RANDOM in run.arms),
            ("floor", any(arm in run.arms for arm in FLOORS)),
        )
        if not there
    ]
    if not lacking or not run.arms:
        return []
    text = f"Not in this run: the {listed(lacking, 5)} {'arms' if len(lacking) > 1 else 'arm'}. "
    return [Callout("note", f"{text}What those would have shown is not known.")]


def _summed(run: ReportedRun) -> list[Callout]:
    """Give what the coordinator saw of a run under secure aggregation, and what that cost."""
    how = run.metrics.secagg
    if how is None:
        return []
    helped = f"whatever it did with up to {how.c} of them" if how.c else "as long as no site helped it to another’s"
    text = (
        f"Secure aggregation: of the {how.n} sites’ updates, losses and counts the coordinator saw sums over at least "
        f"{max(how.t, MINIMUM)} sites and no site’s own, {helped} ({how.ring} bits a value)."
    )
    if not run.metrics.deployed:
        text += " Figures by site are the simulation’s own, which has all images."
    said = [Callout("note", text)]
    if how.failed:
        times = "once" if how.failed == 1 else f"{how.failed} times"
        said.append(Callout("note", f"An attempt at a sum gave none {times}, and was made anew with fresh keys."))
    if how.clipped:
        said.append(
            Callout("note", f"{how.clipped:,} values of the sites’ updates were beyond their range and were cut to it.")
        )
    return said


def _ailing(run: ReportedRun) -> list[Callout]:
    """One warning for each symptom that pretraining ended with; a note if it was too short to tell of a plateau."""
    pretrain = {
        arm: [point for point in points if point.log_k]
        for arm, points in (run.history.pretrain if run.history else {}).items()
    }
    last = max((point.step for points in pretrain.values() for point in points), default=None)
    if last is None:
        return []
    first = run.judged_from(last)
    told: dict[str, list[str]] = {}
    for arm, points in pretrain.items():
        seen: dict[str, list[str]] = {}
        sites = dict.fromkeys(point.site for point in points)
        for site in sites:
            rows = [point.row() for point in sorted(points, key=lambda point: point.step) if point.site == site]
            for one in symptoms(rows, dim=run.width, judged_from=first):
                seen.setdefault(one.name, []).append(f"{site}: {one.seen}" if len(sites) > 1 else one.seen)
        for name, where in seen.items():
            told.setdefault(name, []).append(f"{arm_name(arm)} ({'; '.join(where)})")
    said = [
        Callout("warn", f"Pretraining ended ailing, {name}: {listed(where, len(where))}. {_remedy(name)}")
        for name, where in told.items()
    ]
    if last + 1 < first + PATIENCE:
        text = (
            f"{last + 1} steps are too few to judge whether the DINO loss leaves log K "
            f"(take at least {first + PATIENCE})."
        )
        said.append(Callout("note", text))
    return said


def _remedy(name: str) -> str:
    text = ADVICE[name]
    return f"{text[0].upper()}{text[1:]}."
