"""How a run stands, from what its folder holds and from what Flower says of it; and its events, a line each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chexfound.errors import CODES, ChexfoundError, SiteError
from chexfound.parsing.names import shown
from server.federation import flower_cli
from server.federation.settings import CONNECTION
from server.runs import folders, weight
from server.runs.folders import Event, RunFolder
from server.runs.words import auroc, loss, sent, withholding

ENDED = ("done", "failed", "stopped", "died", "unsubmitted")
FAILED_LINE = re.compile(r"event=failed error=(\S+) exit_code=\d+ (.*)")
CALLED = {
    "unsubmitted": "made, not submitted",
    "submitted": "submitted, not begun",
    "waiting": "waits for sites to connect",
    "enrol": "asks the sites who they are",
    "running": "begins",
    "died": "died without a word",
}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands.

    Args:
        state: unsubmitted (the SuperLink did not take it), submitted, running (it has said nothing yet), waiting,
            enrol, pretrain, features, adapt, evaluate, finishing,
            done, failed (it said why), stopped, died (it did not), unknown.
        round: the round that is under way, from 1; None outside of rounds.
        rounds: how many its phase has.
        done: finished rounds by phase, with how many there are in all (None if that is not known).
        since: when the state began, ISO 8601.
        loss: the last round's, the mean over the sites of their last steps.
        lost: of those that are waited for, the sites that were lost and are not back.
        bytes: payload so far, of all sites.
        error: of a run that failed: its code and text.
        withholding: sites that have findings whose names they do not let out.
        warnings: sentences of what the coordinator's people should look at.
    """

    run: str
    state: str
    round: int | None
    rounds: int | None
    done: Mapping[str, Sequence[int | None]]
    since: str | None
    waiting_for: Sequence[str]
    replied: Sequence[str]
    lost: Sequence[str]
    loss: float | None
    auroc: float | None
    bytes: Mapping[str, int]
    flower_run: str | None
    error: Mapping[str, str] | None
    model_sha256: str | None
    withholding: Sequence[str]
    warnings: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give a run's standing as `--json` has it."""
        return asdict(self)


def look(run: RunFolder, statuses: Mapping[str, str] | None, journal: Sequence[Event] | None = None) -> Standing:
    """How a run stands.

    Args:
        run: its folder.
        statuses: Flower's word for its runs by number; None while the SuperLink is down.
        journal: the run's, if it has been read already.

    Raises: CheckpointError if the folder is damaged.
    """
    left = folders.left(run)  # first: what is read after it is the last word of one that has ended
    events = run.journal() if journal is None else journal
    number, live, about = run.flower_run(), run.live(), run.about()
    ours = live if live is not None and live["flower_run"] == number else None
    state = _state(run, ours, None if statuses is None or number is None else statuses.get(number, "unknown"), left)
    of = about["rounds"] if about else {}
    rounds = [event for event in events if event.get("event") == "round"]
    counts = {phase: sum(event.get("phase") == phase for event in rounds) for phase in ("pretrain", "adapt")}
    busy = ours is not None and state not in ENDED
    end = events[-1] if events and events[-1].get("event") == "done" else {}
    return Standing(
        run=run.name,
        state=state,
        round=ours.get("round") if ours and busy else None,
        rounds=ours.get("rounds") if ours and busy else None,
        done={phase: [count, of.get(phase)] for phase, count in counts.items() if count or phase in of},
        since=ours.get("since") if ours else None,
        waiting_for=ours["waiting_for"] if ours and busy else [],
        replied=ours["replied"] if ours and busy else [],
        lost=[name for name in ours["lost"] if name in ours["waiting_for"]] if ours and busy else [],
        loss=loss(rounds[-1]) if rounds else None,
        auroc=last(auroc(event) for event in events),
        bytes={way: sum(sent(event)[way] for event in events) for way in ("down", "up")},
        flower_run=number,
        error=ours.get("error") if ours and state == "failed" else None,
        model_sha256=end.get("model_sha256") if state == "done" else None,
        withholding=withholding(events),
        warnings=list(dict.fromkeys(text for event in events for text in weight.warnings(event))),
    )


def _state(run: RunFolder, live: Mapping[str, Any] | None, status: str | None, left: bool) -> str:
    said = live["state"] if live else None
    if run.done:
        return "done"
    if status == "finished:stopped":  # which its ServerApp feels as an error
        return "stopped"
    if said == "failed":
        return "failed"
    if live and left:
        return "died"
    if run.flower_run() is None:
        return "unsubmitted" if run.about() else "unknown"
    if status is None:  # the SuperLink cannot be asked; the ServerApp may go on by itself
        return "finishing" if said == "done" else said or "unknown"
    if folders.ended(status):
        return "died"
    if said is not None:
        return "finishing" if said == "done" else str(said)
    return "running" if status == "running" else "submitted"


def last(values: Any) -> Any:
    """The last that is not None."""
    return next((value for value in reversed(list(values)) if value is not None), None)


def resumable(standing: Standing) -> bool:
    """Whether a run ended before its end, and `resume` may lead further.

    A recipe that cannot be is found out before anything is done, and submitted again it fails again.
    """
    begun = any(count for count, _ in standing.done.values())
    by_recipe = standing.error is not None and standing.error["code"] == "config" and not begun
    return standing.state in ENDED and standing.state != "done" and not by_recipe


def next_step(run: RunFolder, standing: Standing) -> str:
    """Say what to do about a run that ended before its end."""
    folder = shlex.quote(str(run.federation.folder))
    if resumable(standing):
        return f"go on with: chexfound-server resume {folder} {shlex.quote(run.name)}"
    return f"start a new run with other values: chexfound-server run {folder} RECIPE --set KEY=VALUE"


def failure(run: RunFolder, standing: Standing) -> ChexfoundError:
    """The error of a run that ended before its end, with what to do.

    It is the ServerApp's own, by live.json or by Flower's log of it; one that was killed said nothing.
    """
    kept = "what is done is kept; " if resumable(standing) else ""
    again = f"{kept}{next_step(run, standing)}"
    if standing.state == "unsubmitted":
        return SiteError(f"run {run.name} was not taken by the SuperLink; {again}")
    if standing.state == "stopped":
        return SiteError(f"run {run.name} was stopped; {again}")
    told = standing.error or _logged(run, standing.flower_run)
    if told:
        return CODES.get(told["code"], ChexfoundError)(f"run {run.name} failed: {told['text']}\n{again}")
    return SiteError(
        f"run {run.name}: its ServerApp (Flower's run {standing.flower_run}) ended without a word: killed, or out of "
        f"memory; {run.federation.path('logs') / 'superexec.log'} may say more. {again}"
    )


def _logged(run: RunFolder, number: str | None) -> dict[str, str] | None:
    if number is None:
        return None
    try:
        text = flower_cli.show(run.federation, ["log", number, CONNECTION, "--show"])
    except SiteError:
        return None
    found = FAILED_LINE.search(text)
    return {"code": found[1], "text": found[2]} if found else None


def sentence(standing: Standing) -> str:
    """Say what a run does now, in one line."""
    what = CALLED.get(standing.state, standing.state)
    if standing.round is not None:
        what += f", round {standing.round} of {standing.rounds or '?'}"
    if standing.waiting_for:
        what += f", waiting for {', '.join(standing.waiting_for)}"
    if standing.lost:
        what += f"; lost: {', '.join(standing.lost)}"
    return shown(what)
