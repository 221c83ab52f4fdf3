"""OUT/report.html from what a run left in OUT: one file, no network, no script.

Every text that comes from data is escaped by jinja2; the page's policy forbids scripts and any
address but data URIs, so that even a name that slipped through could do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from chexfound.contract import cells
from chexfound.durable.files import write_bytes
from chexfound.evaluate.results import CENTRALIZED, FEDERATED, FLOORS, HISTOGRAM, LOCAL, RANDOM, Point
from chexfound.parsing.names import ALL_SITES
from chexfound.report import callouts, figures, story, tables
from chexfound.report.run_folder import AttentionMaps, ReportedRun, read

FINDINGS_DRAWN = 4
SAMPLES = 8  # of a site
ATTENDED = 12  # images with attention


def build(out: Path) -> Path:
    """Write OUT/report.html and return its path.

    Raises: DataError if OUT/metrics.json is missing, damaged or of another schema; StorageError.
    """
    path = Path(out) / "report.html"
    page = render(read(out))
    write_bytes(path, page.encode("utf-8", "replace"))  # a lone surrogate in a name becomes "?"
    return path


def render(run: ReportedRun) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ranked = story.ranked_findings(run)
    said = callouts.callouts(run)
    curves = _curves(run, figures.CURVES, "c", "Learning curves")
    health = _curves(run, figures.HEALTH, "h", "Health of pretraining")
    drawn = [_finding(run, finding, index) for index, finding in enumerate(ranked[:FINDINGS_DRAWN])]
    return environment.get_template("template.html.j2").render(
        run=run,
        metrics=run.metrics,
        headline=story.headline(run),
        subline=story.subline(run),
        first=[one for one in said if one.first],
        further=[one for one in said if not one.first],
        percent=f"{100 * run.confidence:g} %",
        drawn=drawn,
        n_findings=len(run.findings),
        starred=any(
            "*" in one["words"] for finding in drawn for panel in finding["panels"] for _, one in panel["verdicts"]
        ),
        samples=_samples(run),
        curves=curves,
        health=health,
        hidden=[part for part in ("samples", "attention") if run.metrics.deployed and getattr(run, part) is None],
        results=tables.results(run),
        differences=tables.differences(run),
        floors=any(arm in FLOORS for arm in run.arms),
        floor=tables.floor(run),
        fewest=story.FEWEST,
        arms=_kinds(run),
        attention=_attention(run.attention),
        left_out=tables.left_out(run),
        work=tables.work(run),
        seconds=tables.seconds(run),
        side_by_side=tables.side_by_side(run),
        traffic=tables.traffic(run),
        versions=tables.flat(run.metrics.versions),
        machine=tables.flat(run.metrics.machine),
        shown=story.shown,
        told=cells.shown,
        by_site="all sites together" if run.together else "site by site",
        arm_name=story.arm_name,
    )


def _kinds(run: ReportedRun) -> set[str]:
    """Which arms the run has; the page speaks of no other.  `local`: a site's own; `other`: another site's here."""
    kinds = {"local" if arm.startswith(LOCAL) else arm for arm in run.trained}
    found = (story.best_other(run, finding, site) for finding in run.findings for site in run.site_names)
    return kinds | ({"other"} if any(found) else set())


def _dots(run: ReportedRun, finding: str, site: str) -> list[figures.Dot]:
    other = story.best_other(run, finding, site)
    kinds = [
        (FEDERATED, "Federated", "federated", "o", True),
        (CENTRALIZED, "Pooled", "centralized", "s", True),
        (LOCAL + site, "Own local", "local", "D", True),
        (other, "Best other", "other", "D", False),
        (RANDOM, "Random", "other", "v", False),
        ("shuffled", "Shuffled", "floor", "o", False),
        ("site-view", "Site + view", "floor", "s", False),
        (HISTOGRAM, "Grey levels", "floor", "^", False),
    ]
    found = []
    for arm, label, role, marker, filled in kinds:
        row = run.result(arm, site, finding) if arm else None
        if row is not None:
            found.append(figures.Dot(label, role, marker, row.auroc, row.auroc_ci, filled, role == "floor"))
    return found


def _finding(run: ReportedRun, finding: str, number: int) -> dict[str, Any]:
    """A finding's panels, one per site with any figure, on one AUROC axis."""
    dots = {site: _dots(run, finding, site) for site in run.site_names}
    blank = [site for site, rows in dots.items() if all(dot.auroc is None for dot in rows)]
    dots = {site: rows for site, rows in dots.items() if site not in blank}
    low = figures.axis_floor([dot for rows in dots.values() for dot in rows])
    panels = []
    for index, (site, rows) in enumerate(dots.items()):
        row = next(row for arm in run.arms if (row := run.result(arm, site, finding)) and row.auroc is not None)
        alt = f"AUROC for {story.shown(finding)} at {site}: " + "; ".join(_spoken(dot) for dot in rows)
        other = story.best_other(run, finding, site)
        compared = [("own model", LOCAL + site), ("pooling", CENTRALIZED), ("random weights", RANDOM)]
        compared += [(f"best other: {_short(other.removeprefix(LOCAL))}", other)] if other else []
        compared.append(("grey levels alone", HISTOGRAM))
        floor = run.result(HISTOGRAM, site, finding)
        panels.append(
            {
                "site": site,
                "n": row.n,
                "positives": row.positives,
                "svg": Markup(  # noqa: S704 (drawn here; its alt text is escaped)
                    figures.dot_panel(rows, low, f"d{number}-{index}", alt, floor.auroc if floor else None)
                ),
                "verdicts": [
                    (name, tables.said(one))
                    for name, arm in compared
                    if (one := story.contrast(run, finding, site, arm))
                ],
            }
        )
    reasons = [(site, row.reason if (row := story.lead_row(run, site, finding)) else None) for site in blank]
    return {"name": story.shown(finding), "panels": panels, "blank": [] if run.together else reasons}


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _spoken(dot: figures.Dot) -> str:
    if dot.auroc is None:
        return f"{dot.label} no figure"
    return f"{dot.label} {dot.auroc:.2f}" + (f" ({dot.ci[0]:.2f} to {dot.ci[1]:.2f})" if dot.ci else "")


def _samples(run: ReportedRun) -> list[dict[str, Any]]:
    samples = run.samples or {}
    order = [site for site in run.site_names if site in samples] + [
        site for site in samples if site not in run.site_names
    ]
    return [{"site": site, "images": [figures.jpeg(image) for image in samples[site][:SAMPLES]]} for site in order]


def _curves(run: ReportedRun, strips: Sequence[figures.Strip], name: str, title: str) -> list[dict[str, Any]]:
    """A panel a site, with its own arms and the pooled one; none of a site that has no such figure."""
    if run.history is None:
        return []
    pretrain, adapt = run.history.pretrain, run.history.adapt
    points = [*pretrain.get(FEDERATED, []), *adapt.get(FEDERATED, [])]
    own = [arm.removeprefix(LOCAL) for arm in (*pretrain, *adapt) if arm.startswith(LOCAL)]
    named = list(dict.fromkeys([*(point.site for point in points if point.site not in (None, ALL_SITES)), *own]))
    order = [site for site in run.site_names if site in named] + [site for site in named if site not in run.site_names]
    panels = []
    for index, site in enumerate(order or [None]):

        def of(phase: dict[str, list[Point]], arm: str, site: str | None = site) -> list[Point]:
            same = (site, ALL_SITES)  # whose sum is all that is known under secure aggregation
            return [point for point in phase.get(arm, []) if arm != FEDERATED or site is None or point.site in same]

        lines = [
            figures.Line(role, dashes, of(pretrain, arm), of(adapt, arm))
            for role, dashes, arm in (
                ("centralized", "dots", CENTRALIZED),
                ("local", "long", f"{LOCAL}{site}"),
                ("federated", "", FEDERATED),
            )
        ]
        alt = f"{title} at {site or 'all sites'}: {_ends(lines, strips)}"
        svg = figures.strips_panel(lines, strips, f"{name}{index}", alt)
        if svg:
            roles = [line.role for line in lines if any(len(strip.series(line)[0]) for strip in strips)]
            panel = {"site": site, "roles": roles, "own": "local" in roles}
            panels.append({**panel, "svg": Markup(svg)})  # noqa: S704 (drawn here; its alt text is escaped)
    return panels


def _ends(lines: list[figures.Line], strips: Sequence[figures.Strip]) -> str:
    """Say where each curve begins and ends, for those who cannot see it."""
    said = []
    for strip in strips:
        ends = [(line.role, *values[[0, -1]]) for line in lines if len(values := strip.series(line)[1])]
        if ends:
            said.append(f"{strip.title} " + ", ".join(f"{role} from {a:.3f} to {b:.3f}" for role, a, b in ends))
    return "; ".join(said)


def _attention(attention: AttentionMaps | None) -> dict[str, Any] | None:
    """Tiles of image and overlay; one scale for all, in multiples of even attention, up to the highest peak."""
    if attention is None:
        return None
    chosen = [(index, _telling(attention, index)) for index in range(min(len(attention.images), ATTENDED))]
    heats = [figures.relative(attention.maps[index, finding]) for index, finding in chosen]
    top = max(2.0, *(float(heat.max()) for heat in heats))
    tiles = []
    for (index, finding), heat in zip(chosen, heats, strict=True):
        bare, covered = figures.overlay(attention.images[index], heat, top)
        tiles.append(
            {
                "bare": figures.jpeg(bare),
                "heat": figures.jpeg(covered),
                "site": attention.sites[index],
                "where": _where(attention.sites[index], attention.captions[index]),
                "finding": story.shown(attention.findings[finding]),
                "score": f"{attention.scores[index, finding]:.2f}",
                "label": {1: "present", 0: "absent"}.get(int(attention.labels[index, finding]), "unknown"),
                "peak": f"{heat.max():.1f}",
            }
        )
    return {
        "tiles": tiles,
        "top": f"{top:.1f}",
        "gradient": figures.heat_css(),
        "shown": len(tiles),
        "of": len(attention.images),
    }


def _where(site: str, caption: str) -> str:
    """Site and caption, the site named once."""
    return caption if caption.startswith(site) else " · ".join(part for part in (site, caption) if part)


def _telling(attention: AttentionMaps, index: int) -> int:
    """The finding to show: the present one with the highest score, else the absent one, else any."""
    labels, scores = attention.labels[index], attention.scores[index]
    return max(range(len(labels)), key=lambda finding: (int(labels[finding]), float(scores[finding])))
