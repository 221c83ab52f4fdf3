"""How a run stands, from what its folder holds and from what Flower says of it; and its events, a line each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chexfound.errors import CODES, ChexfoundError, SiteError
from chexfound.names import counted, shown
from server import flower, runs, weight
from server.federation import CONNECTION
from server.records import count, figure, read, rows, site, texts
from server.runs import Event, RunFolder

ENDED = ("done", "failed", "stopped", "died", "unsubmitted")
CALLED = {
    "unsubmitted": "made, not submitted",
    "submitted": "submitted, not begun",
    "waiting": "waits for sites to connect",
    "enrol": "asks the sites who they are",
    "running": "begins",
    "died": "died without a word",
}
FAILED_LINE = re.compile(r"event=failed error=(\S+) exit_code=\d+ (.*)")


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
        """As --json has it."""
        return asdict(self)


def look(run: RunFolder, statuses: Mapping[str, str] | None, journal: Sequence[Event] | None = None) -> Standing:
    """How a run stands.

    Args:
        run: its folder.
        statuses: Flower's word for its runs by number; None while the SuperLink is down.
        journal: the run's, if it has been read already.

    Raises: CheckpointError if the folder is damaged.
    """
    left = runs.left(run)  # first: what is read after it is the last word of one that has ended
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
    if runs.ended(status):
        return "died"
    if said is not None:
        return "finishing" if said == "done" else str(said)
    return "running" if status == "running" else "submitted"


def withholding(events: Sequence[Event]) -> list[str]:
    """The sites that have findings whose names they do not let out, by a run's first event."""
    return [site(one) for one in rows(events, 0, "roster") if one.get("withheld") is True]


def withheld(name: str) -> str:
    """What is said of such a site."""
    return f"{name} withholds findings that are in no vocabulary"


def sent(event: Event) -> dict[str, int]:
    """Bytes of a record, down and up."""
    return {way: count(event, "bytes", way) or 0 for way in ("down", "up")}


def cohort(event: Event) -> list[str]:
    """The sites of a round; under secure aggregation it has their sum's figures alone."""
    named = texts(event, "cohort")
    return [site(one) for one in rows(event, "sites")] if named is None else named


def loss(event: Event) -> float | None:
    """A round's loss: the mean over the sites of their last steps; of those that have one."""
    return _mean(figure(one, "history", -1, "loss") for one in rows(event, "sites"))


def auroc(event: Event) -> float | None:
    """Of a round of pretraining, that of its kNN probe, if it had one; of the end, the mean over sites and findings."""
    if event.get("event") == "done":
        return _mean(figure(row, "auroc") for row in rows(event, "results"))
    return figure(event, "health", "figures", "knn_auroc")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
    """What to do about a run that ended before its end."""
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
        text = flower.show(run.federation, ["log", number, CONNECTION, "--show"])
    except SiteError:
        return None
    found = FAILED_LINE.search(text)
    return {"code": found[1], "text": found[2]} if found else None


# -- lines


def line(event: Event, of: Mapping[str, int | None]) -> str:
    """An event of a run's journal, as it is told.

    Args:
        event: as the journal has it.
        of: rounds by phase.
    """
    kind = str(event.get("event"))
    if kind == "start":
        members, whole = rows(event, "roster"), count(event, "totals", "train")
        images = [count(one, "train") for one in members]
        sites = ", ".join(
            site(one) + (f" ({number} images)" if number is not None else "")
            for one, number in zip(members, images, strict=True)
        )
        both = f"; together {whole} images" if whole is not None else ""
        findings = ", ".join(texts(event, "findings") or ()) or "-"
        begun = f"start     {counted(len(members), 'site')}: {sites}{both}; findings: {findings}"
        return shown(f"{begun}{_held(event)}{_weighty(event)}", 600)
    if kind == "round":
        probed, phase = auroc(event), str(event.get("phase"))
        parts = [
            f"{_round(event)} of {of.get(phase) or '?'}",
            counted(len(cohort(event)), "site"),
            _loss(event),
            *([f"kNN AUROC {probed:.3f}"] if probed is not None else []),
            *_cost(event),
        ]
        return f"{shown(phase):<9} {', '.join(parts)}{_without(event)}{_weighty(event)}{_symptoms(event)}"
    if kind == "features":
        return f"features  {', '.join(_cost(event))}{_without(event)}"
    if kind in ("lost", "refused"):
        return shown(f"{kind:<9} {site(event)} in {_where(event)}: {event.get('reason', '')}")
    if kind == "back":
        return shown(f"back      {site(event)} in {_where(event)}")
    if kind == "attempt":
        return shown(f"attempt   {_where(event)} gave no sum: {event.get('failed')}", 600)
    if kind == "done":
        reached = auroc(event)
        told = f"mean AUROC {reached:.3f}; " if reached is not None else ""
        return f"done      {told}model {shown(event.get('model_sha256'))}{_without(event)}"
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
    return shown(f"{kind:<9} {rest}")


def _loss(event: Event) -> str:
    value = loss(event)
    if value is not None:
        return f"loss {value:.4f}"
    return "loss not known" if any(read(one, "history") for one in rows(event, "sites")) else "no step"


def _cost(event: Event) -> list[str]:
    seconds, moved = figure(event, "seconds"), sent(event)
    took = [f"{seconds:.1f} s"] if seconds is not None else []
    return [*took, f"up {size(moved['up'])}", f"down {size(moved['down'])}"]


def _round(event: Event) -> str:
    place = count(event, "round")
    return f"round {'?' if place is None else place + 1}"


def _where(event: Event) -> str:
    numbered = event.get("phase") in ("pretrain", "adapt") and event.get("round") is not None
    return f"{event.get('phase')}, {_round(event)}" if numbered else str(event.get("phase"))


def _without(event: Event) -> str:
    gone = ", ".join(shown(f"{site(one)} ({one.get('reason')})") for one in rows(event, "missing"))
    return f"; without {gone}" if gone else ""


def _held(event: Event) -> str:
    return "".join(f"; {withheld(name)}" for name in withholding([event]))


def _weighty(event: Event) -> str:
    return shown("".join(f"; {text}" for text in weight.warnings(event)))


def _symptoms(event: Event) -> str:
    """What ails a site for the first time."""
    found = rows(event, "health", "symptoms")
    new = [
        f"{one.get('symptom')} at {site(one)}: {one.get('seen')}"
        for one in found
        if one.get("since") == event.get("round")
    ]
    return shown(f"; {'; '.join(new)} (docs/health.md)") if new else ""


def size(number: int) -> str:
    """Bytes, as a person reads them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


def moment(since: str) -> str:
    """A time as Flower writes them."""
    return since.replace("T", " ").replace("+00:00", "Z")


def sentence(standing: Standing) -> str:
    """What a run does now, in one line."""
    what = CALLED.get(standing.state, standing.state)
    if standing.round is not None:
        what += f", round {standing.round} of {standing.rounds or '?'}"
    if standing.waiting_for:
        what += f", waiting for {', '.join(standing.waiting_for)}"
    if standing.lost:
        what += f"; lost: {', '.join(standing.lost)}"
    return shown(what)
