"""Draws docs/architecture.svg: the packages as bands, their rooms as boxes, and arrows from who imports to what.

    python docs/draw_architecture.py

Rooms, lines and arrows are measured in the source, so the picture cannot say what the code does not do.
A room is a folder of modules; a module that lies beside the rooms is a small room of its own.  Arrows that
follow from others are left out, and so are those from a package's rooms to another package's: one broad arrow
between two packages stands for all of them.
"""

from __future__ import annotations

import ast
import html
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
REDRAW = "python docs/draw_architecture.py"

ABOUT = {
    "sim": "the simulation on one machine",
    "server": "the coordinator",
    "client": "a site",
    "strategies": "how updates become one",
    "chexfound": "what all of them share",
}
SPLIT = ("chexfound.data",)  # rooms whose own folders are rooms
FRONT = "chexfound"  # the package itself, imported by its parts for `__version__` only

Graph = dict[str, set[str]]


# ---- what the source says


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Give the file of each module of the five packages, but for `__main__`, which only starts a command."""
    files = {}
    for package in ABOUT:
        for file in sorted((root / package).rglob("*.py")):
            if "_app" not in file.parts and file.name != "__main__.py":
                parts = file.relative_to(root).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def room_of(module: str, file: Path) -> str:
    """Name the room that a module lies in."""
    parts = module.split(".")
    if parts[0] == "strategies":
        return parts[0]
    depth = 3 if ".".join(parts[:2]) in SPLIT else 2
    is_folder = file.name == "__init__.py"
    return ".".join(parts[: min(depth, len(parts))]) + ("" if is_folder or len(parts) > depth else ".py")


def imported(file: Path, known: Mapping[str, Path]) -> set[str]:
    """Give the modules of ours that a file imports anywhere in it, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in whole}
    return {name for name in names if name in known}


def measure(root: Path = ROOT) -> tuple[dict[str, int], Graph]:
    """Count the lines of each room, and say which rooms it imports."""
    known = modules(root)
    rooms = {module: room_of(module, file) for module, file in known.items()}
    lines: dict[str, int] = defaultdict(int)
    imports: Graph = defaultdict(set)
    for module, file in known.items():
        lines[rooms[module]] += len(file.read_text(encoding="utf-8").splitlines())
        imports[rooms[module]] |= {rooms[other] for other in imported(file, known) if other != FRONT}
    kept = {room: number for room, number in lines.items() if number}
    return kept, {room: {other for other in imports[room] if other in kept and other != room} for room in kept}


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Give all rooms that one leads to by way of others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def circles(graph: Graph) -> list[tuple[str, str]]:
    """Give each import that leads back to where it starts."""
    return sorted((a, b) for a in graph for b in graph[a] if a in reachable(graph, b))


def reduced(graph: Graph) -> Graph:
    """Leave out each arrow that follows from others."""
    below = {room: reachable(graph, room) for room in graph}
    return {room: {b for b in graph[room] if not any(b in below[c] for c in graph[room] - {b})} for room in graph}


# ---- where everything stands

WIDTH, HEIGHT, GAP, ROW = 116, 40, 18, 84  # of a box; between two boxes; from a row to the next
LANE = 12  # what an arrow takes that passes through a row
PAD, HEAD = 20, 42  # inside a band; the height of its title


@dataclass
class Band:
    """A package's rooms in rows, the lowest first; an arrow that passes a row has a place (`from>to`) in it."""

    name: str
    rows: list[list[str]]
    links: list[list[str]] = field(default_factory=list)  # the way of each arrow, downwards
    x: dict[str, float] = field(default_factory=dict)
    left: float = 0.0
    top: float = 0.0
    width: float = 0.0
    height: float = 0.0

    @property
    def needed(self) -> float:
        """The height that the rows take."""
        return HEAD + (len(self.rows) - 1) * ROW + HEIGHT + PAD

    def y(self, row: int) -> float:
        """The upper edge of a row."""
        rest = self.height - self.needed
        return self.top + HEAD + rest / 2 + (len(self.rows) - 1 - row) * ROW


def breadth(item: str) -> float:
    """Say how wide a room, or an arrow that passes, is in its row."""
    return LANE if ">" in item else WIDTH


def band(name: str, graph: Graph) -> Band:
    """Lay out one package."""
    own = {room: {other for other in graph[room] if other in graph} for room in graph}
    level: dict[str, int] = {}

    def level_of(room: str) -> int:
        if room not in level:
            level[room] = 1 + max((level_of(other) for other in own[room]), default=-1)
        return level[room]

    rows: list[list[str]] = [[] for _ in range(1 + max(map(level_of, own)))]
    for room in sorted(own):
        rows[level[room]].append(room)
    links = []
    for room, others in sorted(reduced(own).items()):
        for other in sorted(others):
            between = list(range(level[room] - 1, level[other], -1))
            lanes = [f"{room}>{other}@{row}" for row in between]
            for row, lane in zip(between, lanes, strict=True):
                rows[row].append(lane)
            links.append([room, *lanes, other])
    result = Band(name, rows, links)
    _order(result)
    _place(result)
    return result


def _neighbours(one: Band) -> tuple[Graph, Graph]:
    """Say which items each item's arrows go to in the row below, and come from in the row above."""
    down: Graph = defaultdict(set)
    up: Graph = defaultdict(set)
    for way in one.links:
        for a, b in itertools.pairwise(way):
            down[a].add(b)
            up[b].add(a)
    return down, up


def _order(one: Band) -> None:
    """Order each row so that few arrows cross, by the means of their neighbours' places."""
    down, up = _neighbours(one)
    best = (crossings(one, down), [list(row) for row in one.rows])
    for turn in range(40):
        sweep = range(1, len(one.rows)) if turn % 2 == 0 else range(len(one.rows) - 2, -1, -1)
        for row in sweep:
            beside, links = (one.rows[row - 1], down) if turn % 2 == 0 else (one.rows[row + 1], up)
            place = {item: number for number, item in enumerate(beside)}
            stands = {item: number for number, item in enumerate(one.rows[row])}

            def mean(
                item: str, links: Graph = links, place: dict[str, int] = place, s: dict[str, int] = stands
            ) -> float:
                told = [place[other] for other in links[item]]
                return sum(told) / len(told) if told else float(s[item])

            one.rows[row].sort(key=mean)
        _swap(one, down)
        if (now := crossings(one, down)) < best[0]:
            best = (now, [list(row) for row in one.rows])
    one.rows = best[1]


def _swap(one: Band, down: Graph) -> None:
    """Swap two that stand side by side wherever fewer arrows cross then."""
    for row in one.rows:
        for left in range(len(row) - 1):
            before = crossings(one, down)
            row[left], row[left + 1] = row[left + 1], row[left]
            if crossings(one, down) >= before:
                row[left], row[left + 1] = row[left + 1], row[left]


def crossings(one: Band, down: Graph) -> int:
    """Count the arrows that cross."""
    found = 0
    for upper, lower in zip(one.rows[1:], one.rows[:-1], strict=True):
        place = {item: number for number, item in enumerate(lower)}
        ends = [place[b] for a in upper for b in sorted(down[a], key=place.__getitem__)]
        starts = [number for number, a in enumerate(upper) for _ in down[a]]
        found += sum(
            starts[i] < starts[j] and ends[i] > ends[j] for i, j in itertools.combinations(range(len(ends)), 2)
        )
    return found


def _place(one: Band) -> None:
    """Put each item as near to its neighbours as the order allows."""
    down, up = _neighbours(one)
    for row in one.rows:
        _settle(one, row, [0.0] * len(row))
    for turn in range(60):
        middle = sum(one.x.values()) / len(one.x)
        for row in one.rows if turn % 2 else reversed(one.rows):
            wanted = []
            for item in row:
                beside = [one.x[other] for other in (*down[item], *up[item])]
                wanted.append(sum(beside) / len(beside) if beside else middle)
            _settle(one, row, wanted)
    least = min(one.x[item] - breadth(item) / 2 for row in one.rows for item in row)
    most = max(one.x[item] + breadth(item) / 2 for row in one.rows for item in row)
    one.x = {item: x - least for item, x in one.x.items()}
    one.width = most - least + 2 * PAD


def _settle(one: Band, row: Sequence[str], wanted: Sequence[float]) -> None:
    """Place a row's items nearest to where they are wanted, in order and apart (pool adjacent violators)."""
    offsets, at = [], 0.0
    for number, item in enumerate(row):
        at += (breadth(row[number - 1]) + breadth(item)) / 2 + GAP if number else 0.0
        offsets.append(at)
    pools: list[list[float]] = []  # sum, count
    for want, offset in zip(wanted, offsets, strict=True):
        pools.append([want - offset, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    places = [total / count for total, count in pools for _ in range(int(count))]
    for item, place, offset in zip(row, places, offsets, strict=True):
        one.x[item] = place + offset


def bands(graph: Graph) -> dict[str, Band]:
    """Lay out all packages: the simulation above coordinator and site, and below them what they share."""
    split: dict[str, Graph] = defaultdict(dict)
    for room in sorted(graph):
        split[room.partition(".")[0]][room] = graph[room]
    made = {name: band(name, split[name]) for name in ABOUT}
    space = 46
    sim, server, client, strategies, shared = (made[name] for name in ABOUT)
    whole = max(shared.width, server.width + space + client.width, sim.width)
    sim.top, sim.width, sim.height = 10, whole, sim.needed
    server.top = client.top = sim.top + sim.height + space
    grow = (whole - space - server.width - client.width) / 2
    server.width, client.width = server.width + grow, client.width + grow
    server.height = server.needed
    strategies.top, strategies.width = server.top + server.height + space, server.width
    strategies.height = strategies.needed
    client.left = server.width + space
    client.height = strategies.top + strategies.height - client.top
    if client.height < client.needed:
        server.height += client.needed - client.height
        strategies.top += client.needed - client.height
        client.height = client.needed
    shared.top, shared.width, shared.height = client.top + client.height + space, whole, shared.needed
    for one in made.values():
        least = min(one.x[item] - breadth(item) / 2 for item in one.x)
        most = max(one.x[item] + breadth(item) / 2 for item in one.x)
        shift = one.left + 10 + one.width / 2 - (least + most) / 2
        one.left += 10
        one.x = {item: x + shift for item, x in one.x.items()}
    return made


# ---- the picture

STYLE = """
  .page{fill:#ffffff} .band{fill:#f3f6fa;stroke:#c3ccd8} .box{fill:#ffffff;stroke:#3b6ea5;stroke-width:1.3}
  .title{fill:#1f2933;font-size:16px;font-weight:bold} .about{fill:#52606d;font-size:13px}
  .name{fill:#1f2933;font-size:13px;font-weight:bold} .lines{fill:#52606d;font-size:11px}
  .arrow{fill:none;stroke:#7b8a9b;stroke-width:1.2} .head{fill:#7b8a9b} .broad{stroke:#3b6ea5;stroke-width:5}
  .broadhead{fill:#3b6ea5}
  @media (prefers-color-scheme:dark){
  .page{fill:#0d1117} .band{fill:#161b22;stroke:#3d444d} .box{fill:#0d1117;stroke:#6ea8e0}
  .title,.name{fill:#e6edf3} .about,.lines{fill:#9aa7b4} .arrow{stroke:#8492a2} .head{fill:#8492a2}
  .broad{stroke:#6ea8e0} .broadhead{fill:#6ea8e0}}
"""


def label(room: str) -> str:
    """Write a room's name as a path below its package."""
    if room == f"{FRONT}.py" or room == FRONT:
        return "__init__.py"
    package, _, rest = room.partition(".")
    if not rest:
        return package
    return rest if rest.endswith(".py") else rest.replace(".", "/")


def counted(lines: int) -> str:
    """Round a number of lines to fifty, so that few commits change the picture."""
    return f"{max(50, round(lines / 50) * 50):,} lines"


def _ports(one: Band) -> dict[tuple[str, str], tuple[float, float]]:
    """Spread the arrows that leave or reach a box along its edge: (x of the start, x of the end) of each piece."""
    down, up = _neighbours(one)
    starts: dict[tuple[str, str], float] = {}
    ends: dict[tuple[str, str], float] = {}
    for links, places, turned in ((down, starts, False), (up, ends, True)):
        for item in links:
            others = sorted(links[item], key=one.x.__getitem__)
            step = min(16.0, (breadth(item) - 24) / max(1, len(others) - 1)) if ">" not in item else 0.0
            for number, other in enumerate(others):
                key = (other, item) if turned else (item, other)
                places[key] = one.x[item] + (number - (len(others) - 1) / 2) * step
    return {key: (starts[key], ends[key]) for key in starts}


def _arrows(one: Band) -> Iterable[str]:
    row_of = {item: number for number, row in enumerate(one.rows) for item in row}
    ports = _ports(one)
    for way in one.links:
        path, last = "", ""
        for a, b in itertools.pairwise(way):
            x1, x2 = ports[a, b]
            y1, y2 = one.y(row_of[a]) + HEIGHT, one.y(row_of[b])
            y2 -= 6 if b == way[-1] else 0
            path += f"M{x1:.0f} {y1:.0f}" if not path else f"V{y1:.0f}"
            middle = (y1 + y2) / 2
            path += f"C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
            last = f"{x2 - 4:.0f},{y2:.0f} {x2 + 4:.0f},{y2:.0f} {x2:.0f},{y2 + 6:.0f}"
        yield f'<path class="arrow" d="{path}"/><polygon class="head" points="{last}"/>'


def _boxes(one: Band, lines: Mapping[str, int]) -> Iterable[str]:
    for number, row in enumerate(one.rows):
        for room in row:
            if ">" in room:
                continue
            x, y = one.x[room], one.y(number)
            yield (
                f'<rect class="box" x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
                f'<g text-anchor="middle">'
                f'<text class="name" x="{x:.0f}" y="{y + 17:.0f}">{html.escape(label(room))}</text>'
                f'<text class="lines" x="{x:.0f}" y="{y + 32:.0f}">{counted(lines[room])}</text></g>'
            )


def _broad(made: Mapping[str, Band], graph: Graph) -> Iterable[str]:
    """Draw one arrow from each package to each that it imports, where that does not follow from others."""
    packages: Graph = {name: set() for name in made}
    for room, others in graph.items():
        packages[room.partition(".")[0]] |= {other.partition(".")[0] for other in others}
    packages = {name: others - {name} for name, others in packages.items()}
    for name, others in sorted(reduced(packages).items()):
        for other in sorted(others):
            a, b = made[name], made[other]
            left, right = max(a.left, b.left), min(a.left + a.width, b.left + b.width)
            x, y1, y2 = (left + right) / 2, a.top + a.height, b.top
            yield (
                f'<path class="arrow broad" d="M{x:.0f} {y1 + 3:.0f}V{y2 - 15:.0f}"/>'
                f'<path class="broadhead" d="M{x - 9:.0f} {y2 - 16:.0f}h18L{x:.0f} {y2 - 3:.0f}z"/>'
            )


def draw(lines: Mapping[str, int], graph: Graph) -> str:
    """Draw what `measure` gives as SVG.

    Raises: ValueError if rooms import each other in a circle, naming the imports.
    """
    if found := circles(graph):
        raise ValueError("rooms that import each other in a circle: " + ", ".join(f"{a} -> {b}" for a, b in found))
    made = bands(graph)
    width = max(one.left + one.width for one in made.values()) + 10
    height = max(one.top + one.height for one in made.values()) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>The packages, their rooms, and which room imports which</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
    ]
    for one in made.values():
        out.append(
            f'<rect class="band" x="{one.left:.0f}" y="{one.top:.0f}" width="{one.width:.0f}" '
            f'height="{one.height:.0f}" rx="8"/>'
            f'<text x="{one.left + 14:.0f}" y="{one.top + 25:.0f}"><tspan class="title">{one.name}/</tspan>'
            f'<tspan class="about" dx="8">{ABOUT[one.name]}</tspan></text>'
        )
        out += [*_arrows(one), *_boxes(one, lines)]
    out += _broad(made, graph)
    out.append(
        f'<text class="about" x="14" y="{height - 14:.0f}">An arrow goes from who imports to what is imported; '
        "arrows that follow from others are left out. Lines of Python, rounded to 50.</text>"
    )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(*measure()), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
