"""Which sums this site has helped to open, what it refused, and its operator's word that lets one more be opened.

All of it is in HOME/secagg (client/masked/attempts.py); the journal has digests only, and no times.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chexfound.errors import REFUSALS, ConfigError
from chexfound.identity.roster import Roster, read_json
from chexfound.parsing.names import counted, shown
from chexfound.secagg.parameters import MINIMUM
from client.home import membership
from client.home.policy import PLAIN, REQUIRED, Policy
from client.masked.ledger import Entry, read_entries, same_sum, waiting, without

SCHEMA = 1  # of what --json prints
SHOWN = 5  # opened sums, the latest
STAGES = ("advertise", "share", "masked", "consistency", "unmask")


def read(name: str, home: Path) -> dict[str, Any]:
    """All of it, as `secagg show --json` prints it.

    Raises: ConfigError for a file that was damaged, or numbers in site.yaml that do not protect; CheckpointError for a
    damaged journal.
    """
    policy, federation = Policy.load(home), membership.present(home)
    n, entries = len(federation.sites.sites), read_entries(home)
    return {
        "schema": SCHEMA,
        "site": name,
        "sites": n,
        "required": policy.masked(n),
        "required_from_three": policy.masked(max(n, MINIMUM)),
        "attempt_s": policy.secagg.attempt_s,
        "parameters": _parameters(policy, n) if n >= MINIMUM else None,
        "federation": {"name": federation.name, "roster": federation.sites.serial},
        "attempt": _attempt(home / "secagg" / "attempt"),
        "sums": [_sum(entry, federation.sites) for entry in entries if entry["event"] in ("opened", "released")],
        "refused": [
            {"code": entry["code"], "phase": entry.get("phase"), "weights": entry.get("weights")}
            for entry in entries
            if entry["event"] == "refused"
        ],
        "waiting": _waiting(entries, federation.sites),
    }


def _parameters(policy: Policy, n: int) -> dict[str, int]:
    own = policy.parameters(n)
    return {
        **own.shared(),
        "minimum": own.minimum,
        "survivors": own.survivors,
        "dropouts": own.dropouts,
    }


def _sum(entry: Entry, sites: Roster) -> Entry:
    found = {name: entry.get(name) for name in ("event", "phase", "weights", "place")}
    if entry["event"] == "opened":
        found |= {"over": entry["over"], "without": without(entry["over"], sites)}
    return found


def _attempt(folder: Path) -> dict[str, Any] | None:
    """The attempt on the disk: of what, since and until when (UTC), which stages it has answered, how it ended."""
    if not (folder / "attempt.json").exists():
        return None
    values = read_json(folder / "attempt.json")
    try:
        moments = {key: _moment(values[key]) for key in ("began", "until")}
        about = {key: values["attempt"][key] for key in ("run", "phase", "round", "attempt")}
        stages = [stage for stage in STAGES if (folder / f"{stage}.json").exists()]
        open_ = "ended" not in values and "unmask" not in stages
        return about | moments | {"answered": stages, "refused": values.get("ended"), "open": open_}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{folder / 'attempt.json'}: not what this release writes; the next attempt replaces it"
        ) from error


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _waiting(entries: Sequence[Mapping[str, Any]], sites: Roster) -> Entry | None:
    found = waiting(entries)
    if found is not None and found["over"] is not None:
        found["without"] = without(found["over"], sites)
    return found


def question(found: Mapping[str, Any], chosen: Entry) -> list[str]:
    """Say what a release means, for whoever has to say yes."""
    before = [one for one in found["sums"] if one["event"] == "opened" and same_sum(one, chosen)]
    said = [
        f"sum       {chosen['phase']} on weights {chosen['weights'][:12]}…",
        *(f"  opened  over {_over(one)}{_on_others(one, chosen)}" for one in before),
    ]
    asked = found["waiting"] if chosen.get("over") else None
    if asked is not None:
        said.append(f"  asked   over {_over(asked)}; your word is for this sum alone")
    if asked is not None and before and before[-1]["over"] == asked["over"]:
        return [
            *said,
            "The same sites, but other work: another recipe with the same seed, or images that came since. One sum",
            "taken from the other is what changed at all of them together; where only one site's part changed, it is",
            "that change, in clear. Release it only if you know what changed.",
        ]
    return [
        *said,
        "If one more sum on these weights, or near ones, is opened over other sites, one can be taken from the other:",
        "the difference is what the sites have sent that are in one of them only; where that is one site, it is that",
        "site's own update, in clear. Release it only if the coordinator's people told you why the first sum was lost.",
    ]


def lines(found: Mapping[str, Any]) -> list[str]:
    """For people."""
    federation = found["federation"]
    said = [
        f"site {found['site']}: secure aggregation in federation {federation['name']}, roster {federation['roster']}",
        *(_few(found) if found["parameters"] is None else _numbers(found)),
        f"  attempt       {_said_attempt(found['attempt'])}",
    ]
    opened = [one for one in found["sums"] if one["event"] == "opened"]
    said.append(
        f"  opened        {counted(len(opened), 'sum')}" + (f", the last {SHOWN}:" if len(opened) > SHOWN else "")
    )
    for one in found["sums"][-SHOWN:]:
        what = f"over {_over(one)}" if one["event"] == "opened" else "RELEASED by this site's operator"
        said.append(f"    {shown(one['phase']):<9} on weights {shown(one['weights'])[:12]}… {what}")
    if absent := _absent(opened):
        said.append(
            f"  without       {absent}: two sums that differ in one site tell of it, the more alike their weights are"
        )
    codes = Counter(one["code"] for one in found["refused"])
    said.append(f"  refused       {counted(codes.total(), 'request')}")
    said += [f"    {times} × {code}: {REFUSALS.get(code, 'of another release')}" for code, times in codes.items()]
    if found["waiting"] is not None:
        said.append("  WAITING       for this operator's word: chexfound-client secagg release --last")
    return said


def _numbers(found: Mapping[str, Any]) -> list[str]:
    """Those in force."""
    own = found["parameters"]
    return [
        f"  sites         {own['n']}; {own['c']} may collude with the coordinator; {own['t']} must agree to a sum",
        f"  a sum         is over {own['survivors']} sites or more; {own['dropouts']} may be lost",
        "  runs          "
        + (
            "that do not aggregate under masks are refused"
            if found["required"]
            else "in the clear are accepted too; site.yaml: secagg: {required: true} refuses them, of two sites as well"
        ),
    ]


def _few(found: Mapping[str, Any]) -> list[str]:
    """Say what holds where there are too few sites for masks."""
    said = [f"  sites         {found['sites']}; masks need {MINIMUM} or more, so no sum is masked here"]
    if found["required"]:
        return [*said, f"  runs          are all refused: site.yaml says {REQUIRED}"]
    said.append("  an update     is seen by the coordinator as this site sends it")
    later = (
        f"with {MINIMUM} sites they are refused, unless site.yaml says '{PLAIN}'"
        if found["required_from_three"]
        else f"with {MINIMUM} sites too, by site.yaml ({PLAIN}, or secagg: {{required: false}})"
    )
    return [
        *said,
        f"  runs          in the clear are accepted; {later};",
        f"                {REQUIRED} refuses every run",
    ]


def _on_others(one: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    return "" if one["weights"] == chosen["weights"] else ", on other weights of the same step of this training"


def _absent(opened: Sequence[Mapping[str, Any]]) -> str:
    """Which sites were missing in how many sums."""
    times = Counter(site for one in opened for site in one["without"] or ())
    return ", ".join(f"{shown(site)} in {number}" for site, number in sorted(times.items()))


def _over(one: Mapping[str, Any]) -> str:
    without = one["without"]
    if without is None:
        return f"sites of digest {one['over'][:12]}…"
    return "all sites" if not without else f"all sites but {', '.join(map(shown, without))}"


def _said_attempt(attempt: Mapping[str, Any] | None) -> str:
    if attempt is None:
        return "none yet"
    what = shown(attempt["phase"])
    what += f", round {attempt['round'] + 1}" if attempt["phase"] in ("pretrain", "adapt") else ""
    what += f", attempt {attempt['attempt']}"
    what += f", begun {attempt['began']}"
    if attempt["refused"]:
        return f"{what}: refused, {attempt['refused']}"
    if not attempt["open"]:
        return f"{what}: done"
    stage = attempt["answered"][-1] if attempt["answered"] else "nothing"
    return f"{what}: OPEN, {stage} answered; its secrets are dropped at {attempt['until']}"


def as_json(found: Mapping[str, Any]) -> str:
    """For programs."""
    return json.dumps(found, indent=2)
