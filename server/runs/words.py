"""A run's events and figures as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from chexfound.parsing.names import counted, shown
from server.runs import weight
from server.runs.folders import Event
from server.runs.records import count, figure, read, rows, site, texts


def withholding(events: Sequence[Event]) -> list[str]:
    """The sites that have findings whose names they do not let out, by a run's first event."""
    return [site(one) for one in rows(events, 0, "roster") if one.get("withheld") is True]


def withheld(name: str) -> str:
    """Say that a site withholds names."""
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
    """Give the AUROC of a pretraining round's kNN probe, if any; at the end, the mean over sites and findings."""
    if event.get("event") == "done":
        return _mean(figure(row, "auroc") for row in rows(event, "results"))
    return figure(event, "health", "figures", "knn_auroc")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
    """Say what ails a site for the first time."""
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
