"""The tables of the report, as plain values that the template writes out."""

from __future__ import annotations

from typing import Any

from chexfound.evaluate.results import CENTRALIZED, FEDERATED, HISTOGRAM, HISTOGRAMS, LOCAL, RANDOM, Interval
from chexfound.report import story
from chexfound.report.run_folder import ReportedRun

SITES_ABREAST = 4  # columns of a results table; more sites go into a table below, so that A4 holds them


def figure(value: float | None) -> str:
    """An AUROC or AUPRC, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def between(ci: Interval, sign: bool = False) -> str:
    """An interval, or nothing."""
    if ci is None:
        return ""
    return f"[{story.signed(ci[0])}, {story.signed(ci[1])}]" if sign else f"[{ci[0]:.3f}, {ci[1]:.3f}]"


def results(run: ReportedRun) -> list[dict[str, Any]]:
    """Per finding, tables of arms × at most SITES_ABREAST sites."""
    ranked = story.ranked_findings(run)
    order = [*ranked, *(finding for finding in run.findings if finding not in ranked)]
    return [
        {
            "finding": story.shown(finding),
            "primary": ranked[:1] == [finding],
            **_of_finding(run, finding),
        }
        for finding in order
    ]


def _of_finding(run: ReportedRun, finding: str) -> dict[str, Any]:
    rows_of = {site: [row for arm in run.arms if (row := run.result(arm, site, finding))] for site in run.site_names}
    empty = [
        (site, rows[0].reason or "no reason was given")
        for site, rows in rows_of.items()
        if rows
        and all(row.auroc is None and row.auprc is None for row in rows)
        and len({row.reason for row in rows}) == 1
    ]
    sites = [site for site, rows in rows_of.items() if rows and site not in dict(empty)]
    arms = [arm for arm in run.arms if any(run.result(arm, site, finding) for site in sites)]
    chunks = [sites[start : start + SITES_ABREAST] for start in range(0, len(sites), SITES_ABREAST)]
    return {"tables": [_table(run, finding, chunk, arms) for chunk in chunks], "empty": empty}


def _table(run: ReportedRun, finding: str, sites: list[str], arms: list[str]) -> dict[str, Any]:
    heads = []
    for site in sites:
        row = next(row for arm in arms if (row := run.result(arm, site, finding)))
        heads.append({"site": site, "n": row.n, "positives": row.positives})
    lines = []
    for arm in arms:
        cells: list[dict[str, Any]] = []
        for site in sites:
            found = run.result(arm, site, finding)
            if found is None:
                cells.append({"reason": "not tested"})
            elif found.auroc is None and found.auprc is None:
                cells.append({"reason": found.reason or "no reason was given"})
            else:
                cells.append(
                    {
                        "auroc": figure(found.auroc),
                        "auroc_ci": between(found.auroc_ci),
                        "auprc": figure(found.auprc),
                        "auprc_ci": between(found.auprc_ci),
                        "own": arm == story.own_model(site),
                        "fitted": story.FITTED.get(found.variant or "", "") if arm == HISTOGRAM else "",
                        "gap": found.reason,
                    }
                )
        lines.append({"arm": arm, "name": story.arm_name(arm), "cells": cells})
    return {"sites": heads, "lines": lines}


def said(one: story.Contrast | None) -> dict[str, str] | None:
    """A contrast in words and figures; a star where no paired interval decided."""
    if one is None:
        return None
    words = story.WORDS[one.verdict] + (f" ({one.reason})" if one.reason else "*" if one.how == "overlap" else "")
    seeds = f"{one.seeds} seeds" if one.how == "seeds" else ""
    return {
        "value": story.signed(one.value),
        "ci": between(one.ci, sign=True),
        "verdict": one.verdict,
        "words": words,
        "seeds": seeds,
    }


def differences(run: ReportedRun) -> dict[str, Any]:
    """Federated against pooling, the site's own model and random weights: columns, a line per finding and site.

    A column in which nothing could be compared is left out.
    """
    ranked = story.ranked_findings(run)
    order = [*ranked, *(finding for finding in run.findings if finding not in ranked)]
    lines: list[dict[str, Any]] = []
    for finding in order:
        for site in run.site_names:
            row = run.result(FEDERATED, site, finding)
            if row is None or row.auroc is None:
                continue  # nothing to tell: the tables of results say why
            cells = _differences_at(run, finding, site)
            lines.append({"finding": story.shown(finding), "site": site, "cells": cells})
    seeds = max((len(one.seeds) for one in run.metrics.across_seeds), default=0)
    titles = {
        "pooled": "− pooled" + (f", seed {run.metrics.seed}" if seeds else ""),
        "seeds": f"− pooled, mean of {seeds} seeds",
        "own": "− own local" + _mean(run, "local:"),
        "random": "− random weights" + _mean(run, RANDOM),
    }
    columns = {name: title for name, title in titles.items() if any("value" in line["cells"][name] for line in lines)}
    return {"columns": columns, "lines": lines if columns else []}


def _mean(run: ReportedRun, arm: str) -> str:
    """The seeds that a column's figures are the mean of."""
    rows = [row for row in run.metrics.comparisons_across_seeds if row.second.startswith(arm)]
    return f", mean of {max(len(row.seeds) for row in rows)} seeds" if rows else ""


def _differences_at(run: ReportedRun, finding: str, site: str) -> dict[str, dict[str, str]]:
    own = story.own_model(site)
    pooled, seeds = _single_seed(run, finding, site)
    found = {
        "pooled": (CENTRALIZED, pooled),
        "seeds": (CENTRALIZED, seeds),
        "own": (own, story.contrast(run, finding, site, own)),
        "random": (RANDOM, story.contrast(run, finding, site, RANDOM)),
    }
    return {name: said(one) or {"reason": _lacks(run, finding, site, arm)} for name, (arm, one) in found.items()}


def _lacks(run: ReportedRun, finding: str, site: str, arm: str) -> str:
    """Why an arm cannot be compared."""
    row = run.result(arm, site, finding)
    absent = next((one.reason for one in run.metrics.not_trained if one.arm == arm), None)
    return (row.reason if row else absent) or "not in this run"


def _single_seed(run: ReportedRun, finding: str, site: str) -> tuple[story.Contrast | None, story.Contrast | None]:
    """Federated against pooling: of this run's seed, and over seeds where the run has it."""
    found = story.contrast(run, finding, site, CENTRALIZED)
    if found is None or found.how != "seeds":
        return found, None
    return story.contrast(run, finding, site, CENTRALIZED, across_seeds=False), found


def floor(run: ReportedRun) -> list[dict[str, str]]:
    """The pooled model against HOG and a logistic regression."""
    return [
        {
            "finding": story.shown(row.finding),
            "site": row.tested_on,
            "seeds": ", ".join(map(str, row.seeds)),
            "ours": figure(row.ours),
            "rival": figure(row.rival),
            "difference": story.signed(row.ours - row.rival),
        }
        for row in run.metrics.floor or ()
    ]


def left_out(run: ReportedRun) -> list[tuple[str, str]]:
    """Give what has no figure, and why: arms, then an arm's findings, then sites' findings."""
    arms = [
        (story.arm_name(one.arm), f"was not trained: {one.reason or 'no reason was given'}")
        for one in run.metrics.not_trained
    ]
    by_arm: dict[tuple[str, str], list[str]] = {}
    by_site: dict[tuple[str, str], list[str]] = {}
    for finding in run.findings:
        for site in run.site_names:
            rows = [row for arm in run.arms if (row := run.result(arm, site, finding))]
            told = {row.reason for row in rows if row.auroc is None}
            if len(told) == 1 and all(row.auroc is None for row in rows):
                by_site.setdefault((site, told.pop() or "no reason was given"), []).append(finding)
                continue
            for row in (row for row in rows if row.arm not in HISTOGRAMS):  # the best of them has its own row
                names = by_arm.setdefault((row.arm, row.reason or "no reason was given"), [])
                if row.auroc is None and finding not in names:
                    names.append(finding)
    return [
        *arms,
        *((story.arm_name(arm), f"{_no_figure(names)}: {why}") for (arm, why), names in by_arm.items() if names),
        *((site, f"{_no_figure(names)}: {why}") for (site, why), names in by_site.items()),
    ]


def _no_figure(findings: list[str]) -> str:
    return f"has no figure for {story.listed([story.shown(name) for name in findings], len(findings))}"


def work(run: ReportedRun) -> list[dict[str, str]]:
    """Images that each arm's steps were taken on, over its sites, in pretraining and for the head."""
    return [
        {"name": story.arm_name(arm)}
        | {phase: f"{sum(phases[phase].values()):,}" if phase in phases else "–" for phase in ("pretrain", "adapt")}
        for arm, phases in run.metrics.drawn.items()
    ]


def seconds(run: ReportedRun) -> list[dict[str, Any]]:
    """Seconds by arm, below it those of its phases, with each one's share of the longest; the total comes last."""
    found = {name: value for name, value in run.metrics.seconds.items() if name != "total"}
    longest = max(found.values(), default=0.0)
    parts = {name: name.split("/")[0] for name in found if "/" in name and name.split("/")[0] in found}
    order = [one for name in found if name not in parts for one in (name, *(p for p in parts if parts[p] == name))]
    lines: list[dict[str, Any]] = [
        {
            "name": name.split("/", 1)[1] if name in parts else _timed(name),
            "part": name in parts,
            "text": duration(found[name]),
            "share": 100 * found[name] / longest if longest else 0,
        }
        for name in order
    ]
    if "total" in run.metrics.seconds:
        total = duration(run.metrics.seconds["total"])
        lines.append({"name": "total", "part": False, "text": total, "share": None})
    return lines


def _timed(name: str) -> str:
    """`arm`, `arm@seed` or `arm/phase` in words."""
    arm, _, seed = name.partition("@")
    arm, _, phase = arm.partition("/")
    return story.arm_name(arm) + (f": {phase}" if phase else "") + (f", seed {seed}" if seed else "")


def side_by_side(run: ReportedRun) -> bool:
    """Whether the rows of `seconds` add up to more than the total since arms ran at the same time."""
    wholes = {name: value for name, value in run.metrics.seconds.items() if "/" not in name and name != "total"}
    several = sum(name.startswith((CENTRALIZED, LOCAL)) for name in wholes) > 1  # a federated arm runs alone
    return several and sum(wholes.values()) > run.metrics.seconds.get("total", float("inf"))


def traffic(run: ReportedRun) -> list[dict[str, Any]]:
    """Bytes by phase, down to the sites and up from them, with their share of the largest; the sum comes last."""
    moved = run.metrics.bytes
    longest = max((count for ways in moved.values() for count in ways.values()), default=0)

    def way_of(ways: dict[str, int], way: str) -> dict[str, Any] | None:
        return {"text": size(ways[way]), "share": 100 * ways[way] / max(longest, 1)} if way in ways else None

    lines = [{"name": name, "down": way_of(ways, "down"), "up": way_of(ways, "up")} for name, ways in moved.items()]
    if len(lines) > 1:
        total = {way: sum(ways.get(way, 0) for ways in moved.values()) for way in ("down", "up")}
        lines.append({"name": "total", **{way: {"text": size(total[way]), "share": None} for way in total}})
    return lines


def duration(value: float) -> str:
    """Seconds as a person reads them."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names and texts."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines
