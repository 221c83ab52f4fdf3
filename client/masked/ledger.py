"""Which sums this site has helped to open, and which its operator released."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chexfound.durable.journal import Journal, held, read_journal
from chexfound.errors import ConfigError
from chexfound.identity.roster import Roster
from chexfound.secagg.messages import names_digest

LOST_MAX = 2  # sites that a sum is tried to have been without, to say which
DIFFERENCING = "secagg.differencing"
# Of an entry: on which weights a sum is, of which step of a training, over which sites, of what work, and how images
# count in it.  Entries of before a place was noted have none.
WORK = ("phase", "weights", "place", "over", "asked", "counted")

Entry = dict[str, Any]


def read_entries(home: Path) -> list[Entry]:
    """Read the journal of sums at a site, oldest first."""
    path = home / "secagg" / "journal.jsonl"
    return in_force(read_journal(path)) if path.exists() else []


def in_force(entries: Sequence[Entry]) -> list[Entry]:
    """A journal's entries without the releases that were taken back, and their withdrawals."""
    kept: list[Entry] = []
    for entry in entries:
        if entry["event"] != "withdrawn":
            kept.append(entry)
        elif (place := _unused(kept)) is not None:
            del kept[place]
    return kept


def _unused(entries: Sequence[Entry]) -> int | None:
    """Give the place of the last release since which no sum on its weights was opened."""
    for place in reversed(range(len(entries))):
        one = entries[place]
        if one["event"] == "released" and not any(
            later["event"] == "opened" and same_sum(later, one) for later in entries[place + 1 :]
        ):
            return place
    return None


def without(over: str, sites: Roster) -> list[str] | None:
    """The sites of the present roster that a sum was without; None if that cannot be told."""
    names = sorted(sites.sites)
    for lost in range(LOST_MAX + 1):
        for gone in itertools.combinations(names, lost):
            if names_digest([name for name in names if name not in gone]).hex() == over:
                return list(gone)
    return None


def waiting(entries: Sequence[Mapping[str, Any]]) -> Entry | None:
    """The sum that was last refused for differencing, unless it was released, or one on its weights opened, since."""
    found: Entry | None = None
    for entry in entries:
        if entry["event"] == "refused" and entry["code"] == DIFFERENCING:
            found = {name: entry.get(name) for name in WORK}
        elif found is not None and entry["event"] in ("released", "opened") and same_sum(entry, found):
            found = None
    return found


def same_sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sums are on the same weights, or of the same step of the same training on whichever weights."""
    if one["phase"] != other["phase"]:
        return False
    return one["weights"] == other["weights"] or bool(one.get("place") and one["place"] == other.get("place"))


def differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two sums that `same_sum` pairs differ in sites or work; together they tell more than each.

    On other weights the work has other numbers too: how far each weight may lie from what was sent.  What a site's
    images count for is held alike.
    """
    by = ("over", "asked") if one["weights"] == other["weights"] else ("over", "counted")
    return any(one.get(name) != other.get(name) for name in by)


def choose(home: Path, *, last: bool, phase: str | None, weights: str | None) -> Entry:
    """Which sum is meant: the one that was refused last, or that of a phase and the first digits of weights.

    Raises: ConfigError if there is no such one, or it was released already.
    """
    entries = read_entries(home)
    found = waiting(entries)
    if last:
        if found is None:
            raise ConfigError(f"no sum waits for a release: none was refused for {DIFFERENCING}, or it was done since")
        if found["phase"] is None or found["weights"] is None:
            raise ConfigError(
                "the journal does not tell which sum was refused; give PHASE and WEIGHTS of it, as "
                "chexfound-client secagg show lists them"
            )
        phase, weights = found["phase"], found["weights"]
    if not weights or phase is None:
        raise ConfigError("say which sum: --last, or PHASE and WEIGHTS as chexfound-client secagg show lists them")
    of_phase = [entry for entry in entries if entry["event"] in ("opened", "released") and entry["phase"] == phase]
    digests = {entry["weights"] for entry in of_phase if entry["weights"].startswith(weights)}
    if len(digests) != 1:
        raise ConfigError(
            f"{phase} {weights}: the phase and first digits of {len(digests)} sums that were opened here; "
            "see chexfound-client secagg show"
        )
    digest = digests.pop()
    of_phase = [entry for entry in of_phase if entry["weights"] == digest]
    chosen: Entry = {name: of_phase[-1].get(name) for name in ("phase", "weights", "place")}
    if found is not None and same_sum(found, chosen) and found["over"] is not None:
        return found  # what was asked, and nothing else
    if of_phase[-1]["event"] == "released":
        raise ConfigError(f"{phase} {digest[:12]}: released already, and not opened since; the run can go on")
    return chosen


def release(home: Path, chosen: Entry) -> None:
    """Let one more sum be opened on those weights: the one that was refused, or, if none was, over whichever sites.

    Raises: ConfigError while the site is answering a stage, and has the journal open.
    """
    _note(home, "released", chosen)


def _note(home: Path, event: str, chosen: Entry) -> None:
    path = home / "secagg" / "journal.jsonl"
    if held(path):
        raise ConfigError("the site is answering a stage; try again once chexfound-client status says that it waits")
    with Journal(path) as journal:
        journal.append({**chosen, "event": event})


def withdraw(home: Path) -> Entry:
    """Take back the last release by which no sum was opened yet; what it was of.

    Raises: ConfigError if there is none, or while the site is answering a stage.
    """
    entries = read_entries(home)
    place = _unused(entries)
    if place is None:
        raise ConfigError("no release is left to be taken back: none was given, or its sum has been opened since")
    _note(home, "withdrawn", entries[place])
    return entries[place]
