"""The sentences of the report: what the figures allow to be said, bad news first, and no more.

A comparison is called lower or higher only where its interval leaves 0 out; a bound of 0 does not.
Where the run left a paired interval, that one decides; elsewhere two arms are told apart only if their
own intervals do not overlap, which is stricter than pairing.  Without an interval, or with fewer than
`FEWEST` images of a class (resampling a handful of patients says little of others), nothing can be
judged: such a comparison is shown, but no sentence and no count has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chexfound.evaluate.results import CENTRALIZED, FEDERATED, HISTOGRAM, LOCAL, RANDOM, Interval, Result
from chexfound.parsing.names import ALL_SITES
from chexfound.report.run_folder import ReportedRun

FEWEST = 5  # held-out images with the finding, and without it
ZERO = 1e-9  # a bound as small as this is 0: sums of floats hit it only nearly

Verdict = Literal["lower", "unclear", "higher", "unjudged"]
ORDER: tuple[Verdict, ...] = ("lower", "unclear", "higher")
WORDS: dict[Verdict, str] = {
    "lower": "lower",
    "unclear": "no clear difference",
    "higher": "higher",
    "unjudged": "cannot be judged",
}
FITTED = {  # what a variant of the grey-level floor is
    "linear": "regression on the site’s own images",
    "boosted": "boosted trees on the site’s own images",
    "pooled": "regression on all sites’ images",
    "pooled-boosted": "boosted trees on all sites’ images",
}


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
    reason: str | None = None  # why it cannot be judged


def _verdict(ci: Interval) -> Verdict:
    if ci is None:
        return "unjudged"
    if ci[0] <= ZERO and ci[1] >= -ZERO:
        return "unclear"
    return "lower" if ci[1] < 0 else "higher"


def _why(ci: Interval, reason: str | None) -> str | None:
    """Why there is no interval, or None where there is one."""
    return None if ci else (reason or "no interval").removeprefix("no interval: ")


def contrast(run: ReportedRun, finding: str, site: str, against: str, across_seeds: bool = True) -> Contrast | None:
    """Federated against an arm; None where either has no figure.

    `across_seeds`: take the mean over seeds where there is one.
    """
    found = _contrast(run, finding, site, against, across_seeds)
    few = too_few(run.result(FEDERATED, site, finding))
    return replace(found, verdict="unjudged", reason=few) if found and found.ci and few else found


def too_few(row: Result | None) -> str | None:
    """Why a result's images are too few to judge, or None."""
    if row is None or row.n is None or row.positives is None:
        return None
    fewer, word = min((row.positives, "with"), (row.n - row.positives, "without"))
    return f"{fewer} images {word} the finding".replace("1 images", "1 image") if fewer < FEWEST else None


def _contrast(run: ReportedRun, finding: str, site: str, against: str, across_seeds: bool) -> Contrast | None:
    seeds = run.over_seeds(against, site, finding) if across_seeds else None
    if seeds is not None and seeds.value is not None:
        verdict, why = _verdict(seeds.ci), _why(seeds.ci, seeds.reason)
        return Contrast(site, against, seeds.value, seeds.ci, verdict, "seeds", len(seeds.seeds), why)
    pair = run.paired(against, site, finding)
    if pair is not None and pair.value is not None:
        why = _why(pair.ci, pair.reason)
        return Contrast(site, against, pair.value, pair.ci, _verdict(pair.ci), "paired", reason=why)
    own, other = run.result(FEDERATED, site, finding), run.result(against, site, finding)
    if own is None or other is None or own.auroc is None or other.auroc is None:
        return None
    why = _why(own.auroc_ci, own.reason) or _why(other.auroc_ci, other.reason)
    return Contrast(site, against, own.auroc - other.auroc, None, _apart(own, other), "overlap", reason=why)


def _apart(own: Result, other: Result) -> Verdict:
    """Told by their own intervals."""
    if own.auroc_ci is None or other.auroc_ci is None:
        return "unjudged"
    if own.auroc_ci[1] < other.auroc_ci[0]:
        return "lower"
    return "higher" if own.auroc_ci[0] > other.auroc_ci[1] else "unclear"


def contrasts(run: ReportedRun, finding: str, against: Callable[[str], str | None]) -> list[Contrast]:
    """Over the sites, against the arm that `against(site)` names; where it can be judged."""
    return [one for one in every_contrast(run, finding, against) if one.verdict != "unjudged"]


def every_contrast(run: ReportedRun, finding: str, against: Callable[[str], str | None]) -> list[Contrast]:
    """Give the contrasts over the sites, also those that have a figure but cannot be judged."""
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


def best_other(run: ReportedRun, finding: str, site: str) -> str | None:
    """Pick, of the arms trained at one other site alone, the one that does best on this site's patients.

    It is picked by the AUROC that is then shown, so it flatters that arm; the report says so.
    """
    found = [
        (row.auroc, arm)
        for arm in run.arms
        if arm.startswith(LOCAL) and arm != LOCAL + site
        if (row := run.result(arm, site, finding)) is not None and row.auroc is not None
    ]
    return max(found)[1] if found else None


def ranked_findings(run: ReportedRun) -> list[str]:
    """Findings with a figure of the federated model (in a run without one: of any) somewhere; the first leads.

    Order: sites at which both it and the site's own model have an interval, then sites at which it
    has one, then positives among the patients tested, then the run's order.
    """
    keyed = [(_weight(run, finding), finding) for finding in run.findings]
    return [finding for key, finding in sorted(keyed, key=lambda pair: pair[0], reverse=True) if key[3]]


def _weight(run: ReportedRun, finding: str) -> tuple[int, int, int, bool]:
    rows = [row for site in run.site_names if (row := lead_row(run, site, finding)) and row.auroc is not None]
    judged = [row for row in rows if row.auroc_ci and not too_few(row)]
    own = [run.result(LOCAL + row.tested_on, row.tested_on, finding) for row in judged]
    both = sum(row is not None and row.auroc_ci is not None for row in own)
    return both, len(judged), sum(row.positives or 0 for row in rows), bool(rows)


def lead_row(run: ReportedRun, site: str, finding: str) -> Result | None:
    """The federated row; in a run without that arm, the first one that has a figure."""
    if FEDERATED in run.arms:
        return run.result(FEDERATED, site, finding)
    rows = [row for arm in run.arms if (row := run.result(arm, site, finding))]
    return next((row for row in rows if row.auroc is not None), rows[0] if rows else None)


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
    """An AUROC difference with its sign; "0.000" is nothing but 0."""
    if abs(value) <= ZERO:
        return "0.000"
    return (f"{value:+.3f}" if abs(value) >= 0.0005 else f"{value:+.1g}").replace("-", "−")


def grouped(found: Sequence[Contrast], verdict: Verdict) -> list[Contrast]:
    """Those of one verdict; what differs, largest first."""
    return sorted(
        (one for one in found if one.verdict == verdict),
        key=lambda one: -abs(one.value) if verdict != "unclear" else 0,
    )


def amounts(group: Sequence[Contrast], unit: str) -> str:
    """Say how large these contrasts are and at which sites, the unit once."""
    parts = [f"{amount(one.value)}{unit if index == 0 else ''} at {one.site}" for index, one in enumerate(group)]
    return listed(parts)


def clause(found: Sequence[Contrast], other: str, sites: int, unit: str = " AUROC") -> str:
    """Say what `found`, of so many sites, tells against `other`: losses, then what is unclear, then gains."""
    lower, unclear, higher = (grouped(found, verdict) for verdict in ORDER)
    parts = []
    if lower:
        parts.append(f"lost {amounts(lower, unit)} against {other}")
    if unclear:
        where = f"at {listed([one.site for one in unclear])}"
        if len(unclear) == len(found) > 1:
            where = f"at {'either' if len(found) == 2 else 'any'} {_of_sites(len(found), sites)}"
        parts.append(f"shows no clear difference from {'it' if lower else other} {where}")
    if higher:
        over = "" if lower else " over it" if unclear else f" over {other}"
        parts.append(f"gained {amounts(higher, unit if not lower else '')}{over}")
    joint = ", but " if lower and len(parts) == 2 else " and "
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{joint}{parts[-1]}"


def _of_sites(judged: int, sites: int) -> str:
    """`either …` or `any …`: of all sites, or of those that can be judged."""
    if judged < sites:
        return f"of the {judged} sites that can be judged"
    return "site" if judged == 2 else f"of {judged} sites"


def headline(run: ReportedRun) -> str:
    """Say what federating gained each site, what it lost against pooling, and whether random weights do better."""
    ranked = ranked_findings(run)
    if not ranked:
        return (
            "No AUROC could be computed for any finding at any site, "
            "so nothing can be said of what federating gained or lost."
        )
    finding = ranked[0]
    if FEDERATED not in run.arms:
        return f"{shown(finding)}: this run trained no federated model, so what federating gains or loses is not known."
    worse = below_random(run, finding)
    return _compared(run, finding) + (f" The federated backbone {worse}." if worse else "")


def _compared(run: ReportedRun, finding: str) -> str:
    own = contrasts(run, finding, own_model)
    pooled = contrasts(run, finding, lambda _: CENTRALIZED)
    if not own and not pooled:
        rows = [
            (site, row.auroc)
            for site in run.site_names
            if (row := run.result(FEDERATED, site, finding)) and row.auroc is not None
        ]
        where = {ALL_SITES: "over all sites together"}
        figures = listed([f"{value:.2f} {where.get(site, f'at {site}')}" for site, value in rows])
        rivals = every_contrast(run, finding, own_model) + every_contrast(run, finding, lambda _: CENTRALIZED)
        why = (
            "no site has enough held-out patients to judge a difference"
            if rivals
            else "this run trained no site’s own model and no pooled one"
        )
        return (
            f"{shown(finding)}: the federated model reaches an AUROC of {figures}; "
            f"{why}, so what federating gained or lost is not known."
        )
    sides = [(own, "the site’s own model"), (pooled, "pooling all images")]
    sides = [side for side in sides if side[0]]
    sides.sort(key=lambda side: not any(one.verdict == "lower" for one in side[0]))  # stable: own model first
    n = run.n_sites
    first = f"federating {clause(*sides[0], n)}"
    rest = f"; it {clause(*sides[1], n, unit='' if 'AUROC' in first else ' AUROC')}" if len(sides) > 1 else ""
    return f"{shown(finding)}: {first}{rest}."


def below_random(run: ReportedRun, finding: str) -> str | None:
    """Says that the point estimate is below random weights at most judged sites, where it is."""
    found = contrasts(run, finding, lambda _: RANDOM)
    below, lower = [one for one in found if one.value < 0], [one for one in found if one.verdict == "lower"]
    if 2 * len(below) <= len(found):
        return None
    judged = "" if len(found) == len(run.site_names) else " that can be judged"
    where = f"at {below[0].site}"
    if len(found) > 1:
        all_of = "both" if len(found) == 2 else f"all {len(found)}"
        where = f"at {all_of if len(below) == len(found) else f'{len(below)} of the {len(found)}'} sites{judged}"
    how = "significantly" if lower else "not significantly"
    if len(below) > 1:
        how = "each" if len(lower) == len(below) else str(len(lower)) if lower else "none"
        how = f"{how} of them significantly"
    return f"is below random weights {where}, {how}"


def subline(run: ReportedRun) -> str:
    """Say what the figures of the headline are."""
    finding = (ranked_findings(run) or [""])[0]
    arms = {"pooling": lambda _: CENTRALIZED, "the site’s own model": own_model, "random weights": lambda _: RANDOM}
    by_arm = {name: contrasts(run, finding, against) for name, against in arms.items()}
    seeds = max((one.seeds for found in by_arm.values() for one in found), default=1)
    means = [name for name, found in by_arm.items() if any(one.how == "seeds" for one in found)]
    over = f"; against {listed(means)}, the mean of {seeds} seeds" if means else ""
    if run.together:
        return (
            "AUROC on the held-out patients of all sites together, whose scores were counted into one histogram: no "
            "site’s own figure left it."
        )
    if not any(by_arm.values()):
        return "AUROC on each site’s own held-out patients."
    return (
        f"AUROC on each site’s own held-out patients{over}; "
        f"a difference counts where its {100 * run.confidence:g} % interval leaves 0 out."
    )


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
        HISTOGRAM: "Grey levels alone",
        **{f"{HISTOGRAM}:{name}": f"Grey levels: {words}" for name, words in FITTED.items()},
    }.get(arm, arm)
