"""The figures of the report, as inline SVG drawn by matplotlib, and images as data URIs.

A figure holds no text from the data (names stand in the HTML around it), only fixed words and
numbers.  Its colours are roles that the page's CSS gives a value, so that one drawing serves light,
dark and print; shapes and dashes tell the arms apart where colour does not.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from chexfound.evaluate.results import Interval, Point

# Role -> stand-in colour, replaced in the SVG by var(--role).  The values are the page's (Okabe and Ito's hues).
ROLES = {
    role: f"#0000{index:02x}"
    for index, role in enumerate(
        ("ink", "muted", "rule", "federated", "centralized", "local", "other", "floor", "paper"), start=1
    )
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # the widest in use: what fits with it fits with the reader's font
    "axes.unicode_minus": True,
    "path.simplify": True,
}
WIDTH = 340  # units of a panel, about a phone's: the page scales it to the column, and its text with it
CURVE_POINTS = 120  # of a line, at most
RUNNING = 30  # a running mean spans 1/30 of the steps
FEW_POINTS = 12  # below it each is marked: a line of one is not to be seen


@dataclass(frozen=True)
class Dot:
    """One arm's row in a panel; `auroc` None where there is no figure."""

    label: str
    role: str
    marker: str
    auroc: float | None
    ci: Interval
    filled: bool = True
    floor: bool = False


@dataclass(frozen=True)
class Line:
    """One arm's points in the learning curves."""

    role: str
    dashes: str
    pretrain: Sequence[Point]
    adapt: Sequence[Point]


@dataclass(frozen=True)
class Strip:
    """One of a panel's small drawings over the steps: a figure of each point, and a value to hold it against."""

    title: str
    value: Callable[[Point], float | None]
    bound: Callable[[Point], float | None] = lambda _: None
    bound_says: str = ""
    above: float = math.inf  # how far above the bound is shown at least; what is farther up hides what is below
    of_head: bool = False

    def series(self, line: Line) -> tuple[np.ndarray, np.ndarray]:
        """Steps and running mean of a line's figure, at most CURVE_POINTS of them (float64, ascending)."""
        found: dict[int, list[float]] = {}
        for point in line.adapt if self.of_head else line.pretrain:
            value = self.value(point)
            if value is not None:
                found.setdefault(point.step, []).append(value)
        steps = np.array(sorted(found), float)
        values = np.array([np.mean(found[int(step)]) for step in steps], float)
        span = max(1, len(steps) // RUNNING)
        if span > 1:
            totals = np.concatenate([[0.0], np.cumsum(values)])
            values = (totals[span:] - totals[:-span]) / span
            steps = steps[span - 1 :]
        keep = np.unique(np.linspace(0, max(len(steps) - 1, 0), min(len(steps), CURVE_POINTS)).round().astype(int))
        return steps[keep], values[keep]


def _gap(point: Point) -> float | None:
    return None if point.dino is None or point.log_k is None else point.dino - point.log_k


def _entropy(point: Point) -> float | None:
    return None if point.teacher_entropy is None or not point.log_k else 100 * point.teacher_entropy / point.log_k


CURVES = (
    Strip("DINO loss", lambda point: point.dino, lambda point: point.log_k or None, "log K = {:.2f}"),
    Strip("iBOT loss", lambda point: point.ibot),
    Strip("KoLeo loss", lambda point: point.koleo),
    Strip("Head loss", lambda point: point.loss, of_head=True),
)
HEALTH = (  # each with the value that it has in the collapse that it shows
    Strip("DINO loss less log K", _gap, lambda _: 0.0, "tells nothing", above=0.1),
    Strip("Teacher’s entropy (%)", _entropy, lambda _: 100.0, "says nothing"),
    Strip("Spread of features", lambda point: point.feature_std, lambda _: 0.0, "all the same"),
    Strip("Effective rank", lambda point: point.rankme, lambda _: 1.0, "all on a line"),
    Strip("AUROC of neighbours", lambda point: point.knn_auroc, lambda _: 0.5, "chance"),
)


def axis_floor(dots: Sequence[Dot]) -> float:
    """Place the beginning of the AUROC axis: 0.4, or lower where an interval needs it."""
    lowest = min((dot.ci[0] if dot.ci else dot.auroc for dot in dots if dot.auroc is not None), default=0.4)
    return max(0.0, min(0.4, float(np.floor(lowest * 10)) / 10))


def dot_panel(dots: Sequence[Dot], low: float, name: str, alt: str, floor: float | None = None) -> str:
    """Draw AUROC with interval of each arm at one site, a row an arm, the figures written beside it.

    `floor`: an AUROC that all arms are held against, shaded from there down.
    """
    rows = [
        float(index) + (0.5 if dot.floor else 0.0) for index, dot in enumerate(dots)
    ]  # the floors stand a little apart
    pitch, top, bottom = 21.0, 6.0, 34.0
    height = top + bottom + pitch * (rows[-1] + 1)
    with rc_context(_STYLE):
        figure = _figure(height)
        axes = figure.add_axes((86 / WIDTH, bottom / height, 142 / WIDTH, 1 - (top + bottom) / height))
        axes.set(xlim=(low, 1.0), ylim=(rows[-1] + 0.5, -0.5), yticks=[])
        ticks = np.arange(np.ceil(low / 0.2 - 1e-9) * 0.2, 1.001, 0.2) + 0.0  # + 0.0: no tick at −0
        _bare(axes, ticks, [f"{tick:.1f}" for tick in ticks])
        axes.axvline(0.5, color=ROLES["muted"], linewidth=1, dashes=(3, 3), zorder=1)
        axes.set_xlabel("AUROC (0.5: chance, 1: perfect)", fontsize=11, color=ROLES["muted"], labelpad=3)
        if floor is not None:
            axes.axvspan(low, floor, color=ROLES["floor"], alpha=0.12, linewidth=0, zorder=0)
            axes.axvline(floor, color=ROLES["floor"], linewidth=1.2, dashes=(1, 2), zorder=1)
        reference = next((dot.auroc for dot in dots if dot.role == "federated"), None)
        if reference is not None:
            axes.axvline(reference, color=ROLES["federated"], linewidth=1, alpha=0.35, zorder=1)
        for dot, row in zip(dots, rows, strict=True):
            _dot(axes, dot, row)
        if any(dot.floor for dot in dots) and not dots[0].floor:
            first = next(row for dot, row in zip(dots, rows, strict=True) if dot.floor)
            axes.plot(
                [-0.6, 1.78],
                [first - 0.75] * 2,
                transform=axes.get_yaxis_transform(),
                color=ROLES["rule"],
                linewidth=1,
                clip_on=False,
            )
        return _svg(figure, name, alt)


def _dot(axes: Axes, dot: Dot, row: float) -> None:
    strong = dot.role == "federated"
    words: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center_baseline", "fontsize": 12.5}
    axes.text(-0.04, row, dot.label, ha="right", color=ROLES["ink"], weight="bold" if strong else "normal", **words)
    if dot.auroc is None:
        axes.text(1.04, row, "no figure", ha="left", color=ROLES["muted"], **words)
        return
    colour = ROLES[dot.role]
    if dot.ci:
        axes.plot(dot.ci, [row, row], color=colour, linewidth=3 if strong else 1.8, solid_capstyle="butt", zorder=2)
    axes.plot(
        [dot.auroc],
        [row],
        marker=dot.marker,
        markersize=9 if strong else 7.5,
        color=colour,
        linestyle="none",
        zorder=3,
        markerfacecolor=colour if dot.filled else ROLES["paper"],
        markeredgecolor=colour,
        markeredgewidth=1.6,
        clip_on=False,
    )
    between = f"  {dot.ci[0]:.2f}–{dot.ci[1]:.2f}" if dot.ci else ""
    axes.text(
        1.04,
        row,
        f"{dot.auroc:.2f}",
        ha="left",
        color=ROLES["ink"],
        weight="bold" if strong else "normal",
        **words,
    )
    axes.text(1.3, row, between.strip(), ha="left", color=ROLES["muted"], **{**words, "fontsize": 11.5})


def strips_panel(lines: Sequence[Line], strips: Sequence[Strip], name: str, alt: str) -> str | None:
    """The strips that have points, one below the other, the head's last; None without any."""
    strips = [strip for strip in strips if any(strip.series(line)[0].size for line in lines)]
    if not strips:
        return None
    pitch, gap, top, bottom = 62.0, 20.0, 18.0, 34.0
    extra = 26.0 if strips[-1].of_head and len(strips) > 1 else 0.0  # the head has an axis of steps of its own
    height = top + bottom + extra + len(strips) * pitch + (len(strips) - 1) * gap
    last = max([1, *(point.step for line in lines for point in line.pretrain)])  # one axis for all but the head's
    with rc_context(_STYLE):
        figure = _figure(height)
        y = height - top
        for index, strip in enumerate(strips):
            y -= pitch + (gap if index else 0) + (extra if strip.of_head and index else 0)
            axes = figure.add_axes((46 / WIDTH, y / height, (WIDTH - 46 - 8) / WIDTH, pitch / height))
            _strip(axes, lines, strip)
            if not strip.of_head:
                axes.set_xlim(-0.02 * last, 1.02 * last)
            figure.text(
                46 / WIDTH, (y + pitch + 5) / height, strip.title, fontsize=12, weight="bold", color=ROLES["ink"]
            )
            last_of_axis = index + 1 == len(strips) or strips[index + 1].of_head
            axes.tick_params(labelbottom=last_of_axis)
            if last_of_axis:
                axes.set_xlabel(
                    "step of the head" if strip.of_head else "global step of pretraining",
                    fontsize=11,
                    color=ROLES["muted"],
                    labelpad=2,
                )
        return _svg(figure, name, alt)


def _strip(axes: Axes, lines: Sequence[Line], strip: Strip) -> None:
    _bare(axes, None, None)
    axes.spines["left"].set_visible(True)
    axes.spines["left"].set_color(ROLES["rule"])
    axes.tick_params(axis="y", labelsize=10.5, labelcolor=ROLES["muted"], color=ROLES["rule"], length=3)
    axes.locator_params(axis="y", nbins=3)
    axes.locator_params(axis="x", nbins=6, integer=True)
    for line in lines:
        steps, values = strip.series(line)
        if steps.size:
            style = {"": "-", "long": (0, (6, 2)), "dots": (0, (1.2, 1.6))}[line.dashes]
            axes.plot(
                steps,
                values,
                color=ROLES[line.role],
                linewidth=2.2 if not line.dashes else 1.7,
                linestyle=style,
                solid_capstyle="round",
                marker="o" if steps.size < FEW_POINTS else "",
                markersize=3.5,
            )
    bound = next(
        (value for line in lines for point in line.pretrain if (value := strip.bound(point)) is not None), None
    )
    low, high = axes.get_ylim()
    if bound is not None:
        low, high = min(low, bound), max(min(high, bound + max(strip.above, bound - low)), bound)
    margin = max((high - low) * 0.12, abs(high) * 0.004, 1e-6)
    axes.set_ylim(low - margin, high + margin * (1.6 if bound is not None else 1))
    if bound is not None:
        axes.axhline(bound, color=ROLES["ink"], linewidth=1.2, dashes=(5, 4))
        axes.text(
            1,
            1.06,
            f"dashed: {strip.bound_says.format(bound)}",
            transform=axes.transAxes,
            ha="right",
            fontsize=11,
            color=ROLES["muted"],
        )


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    return figure


def _bare(axes: Axes, ticks: Sequence[float] | np.ndarray | None, labels: list[str] | None) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(ROLES["rule"])
    if ticks is not None:
        axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", labelsize=11, labelcolor=ROLES["muted"], color=ROLES["rule"], length=3, pad=3)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an <svg> for the middle of an HTML page: no URL, no leaking style, ids of its own."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r'<(g|path) id="[a-zA-Z][\w.]*_\d+"', r"<\1", body)
    body = re.sub(r'(id="|href="#|url\(#)([mp][0-9a-f]{10})', rf"\1{name}-\2", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), body)
    for role, colour in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"\s*\n\s*", " ", body)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">{body.strip()}'


def jpeg(image: np.ndarray, quality: int = 88) -> str:
    """An image, (h, w) or (h, w, 3) uint8, as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


HEAT_PX = 320
_HEAT = colormaps["inferno"](np.linspace(0.35, 1.0, 256))[:, :3]  # (256, 3) in [0, 1]


def heat_css() -> str:
    """The colours of the heat map as stops of a CSS gradient."""
    return ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in _HEAT[::51] * 255)


def relative(attention: np.ndarray) -> np.ndarray:
    """Attention (h, w) that sums to 1, as multiples of even attention, upsampled to HEAT_PX smoothly."""
    scaled = attention.astype(np.float32) * attention.size / max(float(attention.sum()), 1e-12)
    grown = Image.fromarray(scaled).resize((HEAT_PX, HEAT_PX), Image.Resampling.BICUBIC)
    heat: np.ndarray = np.clip(np.asarray(grown), 0, None)
    return heat


def overlay(image: np.ndarray, heat: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray]:
    """The image (px, px) uint8 at HEAT_PX, bare and under its heat: clear at 1 × even attention, full at `top` ×.

    The colour goes with the logarithm of the heat, so that one high peak does not pale the others.
    """
    bare = np.asarray(Image.fromarray(image).resize((HEAT_PX, HEAT_PX), Image.Resampling.LANCZOS))
    share = np.clip(np.log(np.maximum(heat, 1)) / np.log(top), 0, 1)[..., None]
    colour = _HEAT[(share[..., 0] * 255).astype(int)] * 255
    alpha = 0.78 * share**0.7
    return bare, (bare[..., None] * (1 - alpha) + colour * alpha).round().astype(np.uint8)
