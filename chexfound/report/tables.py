"""The tables of the report, as plain values that the template writes out."""

from __future__ import annotations

from typing import Any

from chexfound.report import story
from chexfound.report.run import CENTRALIZED, FEDERATED, RANDOM, Interval, Run

SITES_ABREAST = 4  # columns of a results table; more sites go into a table below, so that A4 holds them


def figure(value: float | None) -> str:
    """An AUROC or AUPRC, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def between(ci: Interval, sign: bool = False) -> str:
    """An interval, or nothing."""
    if ci is None:
        return ""
    return f"[{story.signed(ci[0])}, {story.signed(ci[1])}]" if sign else f"[{ci[0]:.3f}, {ci[1]:.3f}]"


def results(run: Run) -> list[dict[str, Any]]:
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


def _of_finding(run: Run, finding: str) -> dict[str, Any]:
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


def _table(run: Run, finding: str, sites: list[str], arms: list[str]) -> dict[str, Any]:
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
                        "gap": found.reason,
                    }
                )
        lines.append({"arm": arm, "name": story.arm_name(arm), "cells": cells})
    return {"sites": heads, "lines": lines}


def said(one: story.Contrast | None) -> dict[str, str] | None:
    """A contrast in words and figures; a star where no paired interval decided."""
    if one is None:
        return None
    words = story.WORDS[one.verdict] + ("*" if one.how == "overlap" else "")
    seeds = f"{one.seeds} seeds" if one.how == "seeds" else ""
    return {
        "value": story.signed(one.value),
        "ci": between(one.ci, sign=True),
        "verdict": one.verdict,
        "words": words,
        "seeds": seeds,
    }


def differences(run: Run) -> list[dict[str, Any]]:
    """Federated against pooling, the site's own model and random weights, a line per finding and site."""
    ranked = story.ranked_findings(run)
    order = [*ranked, *(finding for finding in run.findings if finding not in ranked)]
    lines = []
    for finding in order:
        for site in run.site_names:
            own = story.contrast(run, finding, site, story.own_model(site))
            pooled, seeds = _single_seed(run, finding, site)
            random = story.contrast(run, finding, site, RANDOM)
            row = run.result(FEDERATED, site, finding)
            pair = run.paired(CENTRALIZED, site, finding)
            reason = pair.reason if pair else None
            if not (own or pooled or seeds or random or (reason and row and row.auroc is not None)):
                continue  # nothing to tell: the tables of results say why
            lines.append(
                {
                    "finding": story.shown(finding),
                    "site": site,
                    "pooled": said(pooled),
                    "seeds": said(seeds),
                    "own": said(own),
                    "random": said(random),
                    "reason": reason,
                }
            )
    return lines


def _single_seed(run: Run, finding: str, site: str) -> tuple[story.Contrast | None, story.Contrast | None]:
    """Federated against pooling: of this run's seed, and over seeds where the run has it."""
    found = story.contrast(run, finding, site, CENTRALIZED)
    if found is None or found.how != "seeds":
        return found, None
    return story.contrast(run, finding, site, CENTRALIZED, across_seeds=False), found


def seconds(run: Run) -> list[dict[str, Any]]:
    """Seconds by phase and arm, with each one's share of the longest; the total comes last."""
    parts = {name: value for name, value in run.metrics.seconds.items() if name != "total"}
    longest = max(parts.values(), default=0.0)
    lines: list[dict[str, Any]] = [
        {"name": name, "text": duration(value), "share": 100 * value / longest if longest else 0}
        for name, value in parts.items()
    ]
    if "total" in run.metrics.seconds:
        lines.append({"name": "total", "text": duration(run.metrics.seconds["total"]), "share": None})
    return lines


def traffic(run: Run) -> list[dict[str, Any]]:
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
