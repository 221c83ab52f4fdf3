"""What docs/secure-aggregation.md says of the code is so."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from chexfound.errors import REFUSALS
from chexfound.parsing.strict_yaml import load
from chexfound.secagg.fixed import levels
from chexfound.secagg.parameters import SITES_MAX, Parameters
from client.home.policy import SecAggPolicy
from strategies import composition

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "secure-aggregation.md").read_text()


def rows(start: str) -> list[list[str]]:
    """The cells of the table that follows a line."""
    lines = PAGE[PAGE.index(start) :].split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]  # without its head


OF_MASKS = {code: text for code, text in REFUSALS.items() if code.startswith("secagg.")}


def test_every_refusal_is_explained_in_the_code_s_words() -> None:
    assert {row[0].strip("`"): row[1] for row in rows("\n## Refusals")} == OF_MASKS
    assert all(row[2] for row in rows("\n## Refusals"))


def test_every_refusal_has_its_check() -> None:
    named = set(
        re.findall(r"`(secagg\.[a-z-]+)`", PAGE[PAGE.index("### Every check") : PAGE.index("## The guarantee")])
    )
    assert named == set(OF_MASKS)


def test_every_rule_of_what_composes_is_in_the_table() -> None:
    table = " ".join(" ".join(row) for row in rows("\n## What composes"))
    for rule in composition.SECAGG:
        assert rule.key in table
        assert rule.why.split(" each ")[0] in table or rule.key == "secagg.ring"


def test_the_most_sites_of_ring_16() -> None:
    most = max(n for n in range(1, SITES_MAX) if levels(16, n) >= composition.LEVELS_MIN)
    assert f"**{most} sites** are the most" in PAGE
    assert f"up to {most} sites" in " ".join(" ".join(row) for row in rows("\n## What composes"))


def test_the_plans_are_those_of_the_code() -> None:
    found = re.findall(r"^ *(\d+) +(\d+) +(\d+) +(\d+) .* (?:GB|MB) ", PAGE, re.MULTILINE)
    assert len(found) >= 8
    for n, c, t, lost in (map(int, row) for row in found):
        plan = Parameters.of(n)
        assert (plan.c, plan.t, plan.dropouts) == (c, t, lost)


@pytest.mark.parametrize("page", ["secure-aggregation.md", "site.md"])
def test_the_policy_that_is_shown_is_one(page: str) -> None:
    text = re.search(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert text is not None
    values = load(textwrap.dedent(text[1]))["secagg"]
    shown = SecAggPolicy(**values)
    assert (shown.required, shown.minimum, shown.attempt_s) == (True, SecAggPolicy().minimum, SecAggPolicy().attempt_s)


@pytest.mark.parametrize("page", ["secure-aggregation.md", "decisions/0010-secure-aggregation.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text()
    titles = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.split("\n")}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or ((DOCS / page).parent / file).is_file(), target
        assert file or anchor in titles, target


@pytest.mark.parametrize("picture", ["secagg-masks.svg", "secagg-stages.svg"])
def test_pictures_are_svg_with_a_title(picture: str) -> None:
    assert f"({picture})" in PAGE
    root = ElementTree.parse(DOCS / picture).getroot()  # noqa: S314 (our own file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}title") is not None


def test_the_masks_of_the_picture_cancel() -> None:
    text = (DOCS / "secagg-masks.svg").read_text()
    sent = [int(number) for number in re.findall(r'sends <tspan font-weight="bold">(\d+)', text)]
    own = [int(number) for number in re.findall(r'its number <tspan font-weight="bold">(\d+)', text)]
    assert len(sent) == len(own) == 3
    assert sum(sent) % 100 == sum(own) == 49
