"""The preflight: what a site is checked for, one by one, each with its cause and its remedy.

A check that stands on another one is left out if that failed: one cause is told once.
"""

from __future__ import annotations

import datetime
import functools
import ssl
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError
from chexfound.identity.roster import Address
from client.home import link
from client.home.membership import ApprovedFederation

SCHEMA = 1
State = Literal["ok", "warning", "failed", "skipped"]
_SHOWN = {"ok": "ok", "warning": "warning", "failed": "FAILED", "skipped": "-"}


@dataclass(frozen=True)
class Diagnosis:
    """Hold what a check found: its state, what was measured, and what to do about it."""

    state: State
    text: str
    remedy: str = ""


def ok(text: str) -> Diagnosis:
    """Nothing to do."""
    return Diagnosis("ok", text)


def warning(text: str, remedy: str) -> Diagnosis:
    """It will work, but."""
    return Diagnosis("warning", text, remedy)


def failed(text: str, remedy: str) -> Diagnosis:
    """It will not work."""
    return Diagnosis("failed", text, remedy)


@dataclass
class Subject:
    """The site that is looked at, and what checks have found out for later ones.

    Args:
        name: of the site.
        home: its folder.
        data: where its images are, if it was told.
        gpus: how many are asked for, if it was told.
    """

    name: str
    home: Path
    data: Path | None = None
    gpus: str | None = None
    federation: ApprovedFederation | None = None
    store: Store | None = None
    clock_offset: datetime.timedelta = datetime.timedelta()  # to be added to this machine's to get the coordinator's

    @functools.cached_property
    def contact(self) -> link.Contact:
        """The one request on which the checks of the network stand."""
        return link.ask(self.server, self.trust)

    @property
    def trust(self) -> ssl.SSLContext:
        """By which the coordinator is believed."""
        assert self.federation is not None  # `roster` has been well
        return link.trust(self.federation.authority)

    @property
    def server(self) -> Address:
        """Give the coordinator's address."""
        assert self.federation is not None
        return self.federation.server


@dataclass(frozen=True)
class Check:
    """A function, what it is called, and which others have to be well for it to mean anything."""

    name: str
    function: Callable[[Subject], Diagnosis]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """A finding with the name of its check."""

    name: str
    state: State
    text: str
    remedy: str


def run(
    subject: Subject, checks: Iterable[Check], tell: Callable[[CheckResult], None] = lambda _: None
) -> list[CheckResult]:
    """Do all checks, whatever they find; each result is told as it comes."""
    results: dict[str, CheckResult] = {}
    for check in checks:
        unwell = [name for name in check.needs if results[name].state in ("failed", "skipped")]
        finding = Diagnosis("skipped", f"not checked, for want of {unwell[0]}") if unwell else _done(check, subject)
        results[check.name] = CheckResult(check.name, **asdict(finding))
        tell(results[check.name])
    return list(results.values())


def _done(check: Check, subject: Subject) -> Diagnosis:
    try:
        return check.function(subject)
    except (ChexfoundError, OSError) as error:
        return failed(str(error), "do what it says, then check again")
    except Exception as error:  # a fault of one check must not hide what the others find
        return failed(f"the check itself failed: {type(error).__name__}: {error}", "report this to the developers")


def lines(result: CheckResult) -> str:
    """For people."""
    text = f"{_SHOWN[result.state]:<8} {result.name:<12} {result.text}"
    if result.remedy:
        text += "\n" + textwrap.indent(f"to do: {result.remedy}", " " * 22)
    return text


def summary(results: Sequence[CheckResult]) -> str:
    """The last line."""
    count = Counter(result.state for result in results)
    parts = [f"{count['ok']} ok"]
    parts += [f"{count['warning']} with a warning"] * bool(count["warning"])
    parts += [f"{count['failed']} FAILED"] * bool(count["failed"])
    parts += [f"{count['skipped']} not checked"] * bool(count["skipped"])
    return f"{len(results)} checks: " + ", ".join(parts)


def passed(results: Iterable[CheckResult]) -> bool:
    """Whether nothing failed."""
    return not any(result.state == "failed" for result in results)


def as_dict(subject: Subject, results: Sequence[CheckResult]) -> dict[str, Any]:
    """For programs."""
    return {
        "schema": SCHEMA,
        "site": subject.name,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "passed": passed(results),
        "checks": [asdict(result) for result in results],
    }
