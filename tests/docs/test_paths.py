"""Files that the documentation names are there: as links, as paths, and by the bare names of modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(path for folder in ("docs", "benchmarks", "deploy", "examples") for path in (ROOT / folder).rglob("*.md")),
]
ROOMS = {  # first folders of a path of ours; others are of who runs this
    *("benchmarks", "chexfound", "client", "deploy", "docs", "examples", "server", "sim", "strategies", "tests"),
    *(path.name for path in (ROOT / "chexfound").iterdir() if (path / "__init__.py").exists()),
}
BESIDE = ("", "chexfound", "docs")  # where a path may begin: this repository, the package, the pages
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")
PLACEHOLDER = re.compile(r"[A-Z]{2,}[\w-]*|<[^>]*>|…")  # docs/decisions/NNNN-title.md
OURS = re.compile(r"[a-z_]\w*\.py|[a-z_]+(?:/[\w.-]+)+\.(?:py|md|yaml|svg)")  # wherever it begins
GONE = {"client/weights.py", "parts.py", "utils.py"}  # told of as what there is not
KUBECTL = {"deploy/site"}  # its name of a deployment
MADE = {"docs/report.png"}  # by `make pictures`


def words(text: str) -> Iterator[str]:
    """Every word in backticks, and in blocks of commands; without the test or the line that it ends with."""
    spans = [*FENCED.findall(text), *QUOTED.findall(FENCED.sub("", text))]
    for word in " ".join(spans).split():
        yield re.split(r"::|:\d|#", word.strip("\"'(),;:").rstrip("./…"))[0]


def named(text: str) -> set[str]:
    """What of it names a file or a folder of this repository."""
    ours = (word for word in words(text) if OURS.fullmatch(word) or "/" in word and word.split("/")[0] in ROOMS)
    return {word for word in ours if re.fullmatch(r"[\w./*<>…-]+", word)} - GONE - KUBECTL


@cache
def modules() -> frozenset[str]:
    """The names of all modules."""
    folders = (path for path in ROOT.iterdir() if path.name in ROOMS)
    return frozenset(path.name for folder in folders for path in folder.rglob("*.py"))


def there(name: str, page: Path) -> bool:
    """Whether a path leads somewhere from one of the places where it may begin; `a/b` may be the module a/b.py."""
    if "/" not in name:
        return name in modules()
    pattern = PLACEHOLDER.sub("*", name)
    places = [*(ROOT / base for base in BESIDE), page.parent]
    return any(True for place in places for ending in ("", ".py") for _ in place.glob(pattern + ending))


def missing(text: str, page: Path) -> set[str]:
    """What a page with this text names and there is not."""
    links = {link for link in LINK.findall(FENCED.sub("", text)) if ":" not in link}
    files = {(page.parent / link).resolve() for link in links} - {ROOT / name for name in MADE}
    absent = {file.relative_to(ROOT).as_posix() for file in files if not file.exists()}
    return absent | {name for name in named(text) if not there(name, page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8"), page) == set()


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("`pretrain/curriculum.py`, `learning/load.py`", {"pretrain/curriculum.py", "learning/load.py"}),
        ("`chexfound/data/crops.py`", {"chexfound/data/crops.py"}),
        ("`curriculums.py`, and `load.py`", {"curriculums.py"}),
        ("```\n$ python benchmarks/nothing.py --data DIR\n```", {"benchmarks/nothing.py"}),
        ("`tests/docs/test_paths.py::test_x`, `tests/docs/test_nothing.py::test_x`", {"tests/docs/test_nothing.py"}),
        ("[there](../README.md), [not there](nothing.md#top)", {"docs/nothing.md"}),
        ("`docs/decisions/NNNN-title.md`, `docs/decisions/00*.md`, `docs/nothing/*.md`", {"docs/nothing/*.md"}),
        ("`client/home/policy`, `client/home/police`", {"client/home/police"}),
        ("`/srv/nothing.py`, `out/mine/report.html`, `DIR/x.yaml`", set()),
    ],
    ids=["moved", "now-a-folder", "bare", "command", "test", "link", "placeholder", "module", "not-ours"],
)
def test_a_path_that_leads_nowhere_is_told(text: str, absent: set[str]) -> None:
    assert missing(text, ROOT / "docs" / "page.md") == absent


def test_paths_are_looked_for() -> None:
    assert sum(len(named(page.read_text(encoding="utf-8"))) for page in PAGES) > 300
