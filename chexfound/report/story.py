"""The sentences of the report: what the figures allow to be said, bad news first, and no more.

A comparison is called lower or higher only where its interval leaves 0 out.  Where the run left a
paired interval, that one decides; elsewhere two
arms are told apart only if their own intervals do not overlap, which is stricter than pairing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from chexfound.report.run import CENTRALIZED, FEDERATED, FLOORS, LOCAL, RANDOM, Interval, Run

ENOUGH_STEPS = 300  # below it, gains of pretraining were inside the noise of the seeds
STUCK = 0.01  # of log K

Verdict = Literal["lower", "unclear", "higher"]
ORDER: tuple[Verdict, ...] = ("lower", "unclear", "higher")
WORDS: dict[Verdict, str] = {"lower": "lower", "unclear": "no clear difference", "higher": "higher"}


@dataclass(frozen=True)
class Contrast:
    """Federated minus another arm on one site's held-out patients, in AUROC."""

    site: str
    against: str
    value: float
    ci: Interval
    verdict: Verdict
    how: Literal["paired", "seeds", "overlap"]
    seeds: int = 1


@dataclass(frozen=True)
class Callout:
    """A statement beside the headline; kind `bad`, `warn`, `good` or `note`, in this order.

    One that is `first` stands above the figure, since without it the headline would mislead.
    """

    kind: str
    text: str
    first: bool = False


def _verdict(ci: Interval) -> Verdict:
    if ci is None or ci[0] <= 0 <= ci[1]:
        return "unclear"
    return "lower" if ci[1] < 0 else "higher"


def contrast(run: Run, finding: str, site: str, against: str, across_seeds: bool = True) -> Contrast | None:
    """Federated against an arm; None where either has no figure.

    `across_seeds`: against the centralized arm, take the mean over seeds where there is one.
    """
    if against == CENTRALIZED and across_seeds:
        for seeds in run.metrics.across_seeds:
            if (seeds.finding, seeds.tested_on) == (finding, site) and seeds.value is not None:
                return Contrast(site, against, seeds.value, seeds.ci, _verdict(seeds.ci), "seeds", len(seeds.seeds))
    pair = run.paired(against, site, finding)
    if pair is not None and pair.value is not None:
        return Contrast(site, against, pair.value, pair.ci, _verdict(pair.ci), "paired")
    own, other = run.result(FEDERATED, site, finding), run.result(against, site, finding)
    if own is None or other is None or own.auroc is None or other.auroc is None:
        return None
    apart: Verdict = "unclear"
    if own.auroc_ci and other.auroc_ci:
        apart = (
            "lower"
            if own.auroc_ci[1] < other.auroc_ci[0]
            else "higher"
            if own.auroc_ci[0] > other.auroc_ci[1]
            else "unclear"
        )
    return Contrast(site, against, own.auroc - other.auroc, None, apart, "overlap")


def contrasts(run: Run, finding: str, against: Callable[[str], str | None]) -> list[Contrast]:
    """Over the sites, against the arm that `against(site)` names; where there are figures."""
    found = []
    for site in run.site_names:
        arm = against(site)
        one = contrast(run, finding, site, arm) if arm is not None else None
        if one is not None:
            found.append(one)
    return found


def own_model(site: str) -> str:
    """The arm that a site trained alone."""
    return LOCAL + site


def best_other(run: Run, finding: str, site: str) -> str | None:
    """Of the arms trained at one other site alone, the one that does best on this site's patients."""
    found = [
        (row.auroc, arm)
        for arm in run.arms
        if arm.startswith(LOCAL) and arm != LOCAL + site
        if (row := run.result(arm, site, finding)) is not None and row.auroc is not None
    ]
    return max(found)[1] if found else None


def ranked_findings(run: Run) -> list[str]:
    """Findings with a federated figure somewhere; the first is the primary one.

    Order: sites at which both federated and the site's own model have figures, then sites with a
    federated figure, then positives among the patients tested, then the run's order.
    """

    def figures(finding: str) -> tuple[int, int, int]:
        rows = [
            (site, row)
            for site in run.site_names
            if (row := run.result(FEDERATED, site, finding)) and row.auroc is not None
        ]
        both = sum(1 for site, _ in rows if (own := run.result(LOCAL + site, site, finding)) and own.auroc is not None)
        return both, len(rows), sum(row.positives or 0 for _, row in rows)

    keyed = [(figures(finding), finding) for finding in run.findings]
    return [finding for key, finding in sorted(keyed, key=lambda pair: pair[0], reverse=True) if key[1]]


def shown(finding: str) -> str:
    """A finding's name as a person writes it."""
    return finding.replace("_", " ")


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a, b and c`; beyond `most`, the rest is counted."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def amount(value: float) -> str:
    """An AUROC difference without its sign, short."""
    return f"{abs(value):.2f}" if abs(value) >= 0.0095 else f"{abs(value):.3f}"


def signed(value: float) -> str:
    """An AUROC difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def _group(found: Sequence[Contrast], verdict: Verdict) -> list[Contrast]:
    return sorted(
        (one for one in found if one.verdict == verdict),
        key=lambda one: -abs(one.value) if verdict != "unclear" else 0,
    )


def _amounts(group: Sequence[Contrast], unit: str) -> str:
    parts = [f"{amount(one.value)}{unit if index == 0 else ''} at {one.site}" for index, one in enumerate(group)]
    return listed(parts)


def clause(found: Sequence[Contrast], other: str, unit: str = " AUROC") -> str:
    """What `found` says of federating against `other`: losses, then what is unclear, then gains."""
    lower, unclear, higher = (_group(found, verdict) for verdict in ORDER)
    parts = []
    if lower:
        parts.append(f"lost {_amounts(lower, unit)} against {other}")
    if unclear:
        where = f"at {listed([one.site for one in unclear])}"
        if len(unclear) == len(found) > 1:
            where = "at either site" if len(found) == 2 else f"at any of {len(found)} sites"
        parts.append(f"shows no clear difference from {'it' if lower else other} {where}")
    if higher:
        over = "" if lower else " over it" if unclear else f" over {other}"
        parts.append(f"gained {_amounts(higher, unit if not lower else '')}{over}")
    joint = ", but " if lower and len(parts) == 2 else " and "
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{joint}{parts[-1]}"


def headline(run: Run) -> str:
    """The one sentence: what federating gained each site, and what it lost against pooling."""
    ranked = ranked_findings(run)
    if not ranked:
        return (
            "No AUROC could be computed for any finding at any site, "
            "so nothing can be said of what federating gained or lost."
        )
    finding = ranked[0]
    own = contrasts(run, finding, own_model)
    pooled = contrasts(run, finding, lambda _: CENTRALIZED)
    if not own and not pooled:
        rows = [
            (site, row.auroc)
            for site in run.site_names
            if (row := run.result(FEDERATED, site, finding)) and row.auroc is not None
        ]
        figures = listed([f"{value:.2f} at {site}" for site, value in rows])
        return (
            f"{shown(finding)}: the federated model reaches an AUROC of {figures}; "
            "this run has nothing to compare it with, so what federating gained or lost is not known."
        )
    sides = [(own, "the site’s own model"), (pooled, "pooling all images")]
    sides = [side for side in sides if side[0]]
    sides.sort(key=lambda side: not any(one.verdict == "lower" for one in side[0]))  # stable: own model first
    first = f"federating {clause(*sides[0])}"
    rest = f"; it {clause(*sides[1], unit='' if 'AUROC' in first else ' AUROC')}" if len(sides) > 1 else ""
    return f"{shown(finding)}: {first}{rest}."


def subline(run: Run) -> str:
    """What the figures of the headline are."""
    found = contrasts(run, (ranked_findings(run) or [""])[0], lambda _: CENTRALIZED)
    seeds = max((one.seeds for one in found if one.how == "seeds"), default=1)
    over = f"; against pooling, the mean of {seeds} seeds" if seeds > 1 else ""
    if not found and not any(arm.startswith(LOCAL) for arm in run.arms):
        return "AUROC on each site’s own held-out patients."
    return (
        f"AUROC on each site’s own held-out patients{over}; "
        f"a difference counts where its {100 * run.confidence:g} % interval leaves 0 out."
    )


def callouts(run: Run) -> list[Callout]:
    """The statements beside the headline, bad ones first."""
    ranked = ranked_findings(run)
    found = [*_short(run)]
    if ranked:
        for part in (_random, _floors, _elsewhere, _others, _missing):
            found += part(run, ranked[0])
    found += [Callout("warn", text) for text in stuck(run, [FEDERATED])]
    kinds = ("bad", "warn", "good", "note")
    return sorted(found, key=lambda one: kinds.index(one.kind))


def _short(run: Run) -> list[Callout]:
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


def _random(run: Run, finding: str) -> list[Callout]:
    found = contrasts(run, finding, lambda _: RANDOM)
    lower, unclear, higher = (_group(found, verdict) for verdict in ORDER)
    said = []
    if lower:
        said.append(
            Callout(
                "bad",
                f"The federated backbone does worse than random weights with the same head: "
                f"by {_amounts(lower, ' AUROC')}.",
                first=True,
            )
        )
    if unclear:
        points = listed([f"{signed(one.value)} at {one.site}" for one in unclear])
        said.append(
            Callout(
                "warn",
                f"The federated backbone does not clearly beat random weights with the same head ({points}): "
                "a benefit of pretraining is not shown there.",
                first=True,
            )
        )
    if higher and not lower:
        said.append(Callout("good", f"Above random weights with the same head by {_amounts(higher, ' AUROC')}."))
    return said


def _floors(run: Run, finding: str) -> list[Callout]:
    said = []
    names = {
        "histogram": "grey-level histogram alone, which sees no anatomy,",
        "site-view": "site and view alone, without the image,",
    }
    for arm, name in names.items():
        near = []
        for site in run.site_names:
            floor, own = run.result(arm, site, finding), run.result(FEDERATED, site, finding)
            if (
                floor
                and own
                and floor.auroc is not None
                and own.auroc is not None
                and floor.auroc >= (own.auroc_ci or (own.auroc,))[0]
            ):
                near.append(f"{floor.auroc:.2f} at {site} (federated {own.auroc:.2f})")
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


def _elsewhere(run: Run, finding: str) -> list[Callout]:
    found = contrasts(run, finding, lambda site: best_other(run, finding, site))
    lower, _, higher = (_group(found, verdict) for verdict in ORDER)
    said = []
    if lower:
        said.append(
            Callout(
                "bad",
                f"A model of another site alone does better than the federated one: by {_amounts(lower, ' AUROC')}.",
                first=True,
            )
        )
    if higher:
        said.append(Callout("good", f"Above the best model of any other single site by {_amounts(higher, ' AUROC')}."))
    return said


def _others(run: Run, finding: str) -> list[Callout]:
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


def _missing(run: Run, finding: str) -> list[Callout]:
    said = []
    arms = set(run.arms)
    lacking = [
        name
        for name, there in (
            ("pooled", CENTRALIZED in arms),
            ("local", any(arm.startswith(LOCAL) for arm in arms)),
            ("random-weights", RANDOM in arms),
            ("floor", any(arm in arms for arm in FLOORS)),
        )
        if not there
    ]
    if lacking:
        said.append(
            Callout(
                "note",
                f"Not in this run: the {listed(lacking)} {'arms' if len(lacking) > 1 else 'arm'}. "
                "What those would have shown is not known.",
            )
        )
    if any(arm.startswith(LOCAL) for arm in arms):
        alone = [
            site
            for site in run.site_names
            if (row := run.result(FEDERATED, site, finding))
            and row.auroc is not None
            and contrast(run, finding, site, LOCAL + site) is None
        ]
        if alone:
            said.append(
                Callout(
                    "note",
                    f"{listed(alone)} trained no model of its own for this finding, "
                    "so what federating gained there is not known.",
                )
            )
    return said


def stuck(run: Run, arms: Sequence[str] | None = None) -> list[str]:
    """A plain warning for each of `arms` (default: all) whose DINO loss ended within 1 % of log K, or above it."""
    said = []
    history = run.history.pretrain if run.history else {}
    for arm, points in history.items():
        if arms is not None and arm not in arms:
            continue
        where = []
        for site in dict.fromkeys(point.site for point in points):
            pairs = [
                (point.dino, point.log_k)
                for point in sorted(points, key=lambda point: point.step)
                if point.site == site and point.dino is not None and point.log_k
            ]
            last = pairs[-max(1, len(pairs) // 10) :]
            if last and (end := sum(dino for dino, _ in last) / len(last)) >= (1 - STUCK) * (log_k := last[-1][1]):
                where.append(f"{end:.3f} of {log_k:.3f}" + (f" at {site}" if site and arm != LOCAL + site else ""))
        if where:
            said.append(
                f"{arm_name(arm)}: the DINO loss ended at log K, its value for a model that tells no images apart "
                f"({listed(where)}). "
                "Its image-level objective learned nothing, even where iBOT and KoLeo still fall."
            )
    return said


def arm_name(arm: str) -> str:
    """An arm in words."""
    if arm.startswith(LOCAL):
        return f"Local: {arm.removeprefix(LOCAL)}"
    return {
        FEDERATED: "Federated",
        CENTRALIZED: "Pooled (centralized)",
        RANDOM: "Random weights",
        "shuffled": "Labels shuffled",
        "site-view": "Site and view alone",
        "histogram": "Grey levels alone",
    }.get(arm, arm)
