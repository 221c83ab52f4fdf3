"""`chexfound-server watch` on a terminal: rounds, sites, bytes, curves, drawn anew each half second."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chexfound.errors import SiteError
from chexfound.parsing.names import ALL_SITES, shown
from server.federation import members
from server.federation.members import Node
from server.runs import records, standing, words
from server.runs.folders import Event, RunFolder
from server.runs.follow import ASK_S, Follower
from server.runs.standing import ENDED

CURVE = (56, 6)  # characters of a curve
LAST_EVENTS = 5  # that are shown
BRAILLE = (
    (0x01, 0x08),
    (0x02, 0x10),
    (0x04, 0x20),
    (0x40, 0x80),
)  # a dot of the 4 x 2 in a character, by row and column


def show(run: RunFolder) -> None:
    """Draw a run until it ends.

    Raises: ChexfoundError, the run's own, if it ended before its end.
    """
    console = Console()
    follower = Follower(run)
    nodes: dict[str, Node] = {}
    asked = -ASK_S
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for _ in follower.until_it_ends():
            if time.monotonic() - asked >= ASK_S:
                nodes, asked = _nodes(run), time.monotonic()
            live.update(page(follower, nodes, plain=not console.encoding.startswith("utf")), refresh=True)
    if follower.standing.state != "done":
        raise standing.failure(run, follower.standing)


def _nodes(run: RunFolder) -> dict[str, Node]:
    try:
        return members.nodes(run.federation)
    except SiteError:
        return {}


def page(follower: Follower, nodes: dict[str, Node], *, plain: bool = False) -> RenderableType:
    """All that is shown of a run; `plain` for a terminal that has no other characters than ASCII."""
    now = follower.standing
    head = Text.assemble(
        (shown(now.run), "bold"),
        f" in {shown(follower.run.federation.name)}: ",
        (standing.sentence(now), _colour(now.state)),
    )
    if now.since:
        head.append(f", for {_ago(now.since)}", "dim")
    parts: list[RenderableType] = [head]
    if follower.statuses is None:
        parts.append(Text("the SuperLink does not answer: the sites wait for it, and so does the run", "red"))
    parts += [Text(), _bars(follower), Text(), _sites(follower, nodes)]
    moved = ", ".join(f"{way} {words.size(number)}" for way, number in now.bytes.items())
    parts += [Text(), Text(f"payload of all sites: {moved}", "dim")]
    parts += curves(follower.events, plain=plain)
    about = follower.run.about()
    of = about["rounds"] if about else {}
    parts += [Text(), *(Text(words.line(event, of), "dim") for event in follower.events[-LAST_EVENTS:])]
    if now.state not in ENDED:
        parts.append(Text("Ctrl-C ends this, and not the run", "dim"))
    return Group(*parts)


def _colour(state: str) -> str:
    return {"done": "green", "failed": "red", "died": "red", "stopped": "yellow"}.get(state, "cyan")


def _ago(since: str) -> str:
    then = datetime.datetime.fromisoformat(since)
    seconds = max(0, round((datetime.datetime.now(datetime.UTC) - then).total_seconds()))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _bars(follower: Follower) -> Table:
    bars = Table.grid(padding=(0, 1))
    for phase, (done, of) in follower.standing.done.items():
        count = Text(f"{done} of {of or '?'} rounds")
        bars.add_row(phase, ProgressBar(total=of or 1, completed=done or 0, width=CURVE[0] - 20), count)
    return bars


def _sites(follower: Follower, nodes: dict[str, Node]) -> Table:
    """A row a site: its images and last loss, whether it is connected, and what it is waited for."""
    now, events = follower.standing, follower.events
    enrolled = {records.site(one): one for one in records.rows(events, 0, "roster")}
    rounds = [event for event in events if event.get("event") == "round"]
    last = {records.site(row): row for row in records.rows(rounds, -1, "sites")}
    names = sorted({*enrolled, *now.waiting_for, *now.replied} or follower.run.federation.sites().sites)
    if totals := records.read(events, 0, "totals"):  # under secure aggregation nothing else is known
        names, enrolled[ALL_SITES] = [*names, ALL_SITES], totals
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("site", "images", "loss", "node", "this round"):
        table.add_column(title, justify="right" if title in ("images", "loss") else "left")
    for name in names:
        node = nodes.get(name)
        loss = records.figure(last, name, "history", -1, "loss")
        table.add_row(
            shown(name),
            "" if (images := records.count(enrolled, name, "train")) is None else str(images),
            f"{loss:.4f}" if loss is not None else "",
            f"{node.status} since {node.since}" if node else "" if name == ALL_SITES else "not known",
            _doing(name, now),
        )
    return table


def _doing(name: str, now: standing.Standing) -> Text:
    if name in now.lost:
        return Text("lost", "red")
    if name in now.waiting_for:
        return Text("waited for", "yellow")
    return Text("replied", "green") if name in now.replied else Text()


# -- curves


def curves(events: Sequence[Event], *, plain: bool = False) -> list[RenderableType]:
    """Loss by round of each phase, and AUROC of the kNN probe; nothing of what has fewer than two points."""
    rounds = [event for event in events if event.get("event") == "round"]
    found = []
    for phase in ("pretrain", "adapt"):
        found.append((f"loss, {phase}", [words.loss(event) for event in rounds if event.get("phase") == phase]))
    found.append(("AUROC, kNN", [words.auroc(event) for event in rounds]))
    parts: list[RenderableType] = []
    for title, values in found:
        known = [value for value in values if value is not None]
        if len(known) > 1:
            parts += [Text(), Text(f"{title}: {known[0]:.4f} to {known[-1]:.4f}"), *_axes(known, plain)]
    return parts


def _axes(values: Sequence[float], plain: bool) -> list[Text]:
    """The curve with its highest and lowest value at the left."""
    lines = draw(values, *CURVE, plain=plain)
    labels = [f"{max(values):.4f}", *[""] * (len(lines) - 2), f"{min(values):.4f}"]
    wide = max(map(len, labels))
    edge = "|" if plain else "│"
    return [Text.assemble((f"{label:>{wide}} {edge}", "dim"), line) for label, line in zip(labels, lines, strict=True)]


def draw(values: Sequence[float], width: int, height: int, *, plain: bool = False) -> list[str]:
    """A curve in `height` lines of `width` characters, its points evenly apart and joined; the highest on top.

    A character has 4 x 2 dots (Unicode's braille patterns), or is "*" if `plain`.
    """
    high, wide = 4 * height, 2 * width
    low, span = min(values), max(values) - min(values)
    rows = [round((value - low) / span * (high - 1)) if span else high // 2 for value in values]
    columns = [round(place * (wide - 1) / max(len(values) - 1, 1)) for place in range(len(values))]
    cells = [[0] * width for _ in range(height)]
    for (left, from_row), (right, to_row) in pairwise(zip(columns, rows, strict=True)):
        steps = max(right - left, abs(to_row - from_row), 1)
        for step in range(steps + 1):
            column = left + round((right - left) * step / steps)
            row = high - 1 - (from_row + round((to_row - from_row) * step / steps))
            cells[row // 4][column // 2] |= BRAILLE[row % 4][column % 2]
    if plain:
        return ["".join("*" if cell else " " for cell in line).rstrip() for line in cells]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in line).rstrip() for line in cells]
