"""Follows a run while its ServerApp works, whichever process started it: by its folder, and now and then by Flower."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from chexfound.errors import SiteError
from server.runs import folders, standing, words
from server.runs.folders import Event, RunFolder
from server.runs.standing import ENDED, Standing

LOOK_S = 0.5  # between two looks at the folder
ASK_S = 15.0  # between two questions to Flower, which takes a second of a processor for each
BEAT_S = 60.0  # without an event, after which a line says what is waited for


class Follower:
    """Hold what is known of a run, brought up to date by `look`.

    Attributes:
        events: its journal.
        statuses: Flower's word for its runs; None while the SuperLink is down.
        standing: how it stands.
    """

    def __init__(self, run: RunFolder, on_link: Callable[[bool], None] = lambda up: None) -> None:
        self.run, self._on_link = run, on_link
        self.events: list[Event] = []
        self.statuses: dict[str, str] | None = {}
        self._size, self._asked = -1, -ASK_S
        self.look()

    def look(self) -> None:
        """Read what has changed; ask Flower if it is time.

        Raises: CheckpointError if the folder is damaged.
        """
        path = self.run.path / "journal.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            self.events, self._size = self.run.journal(), size
        if time.monotonic() - self._asked >= ASK_S:
            self._ask()
        self.standing: Standing = standing.look(self.run, self.statuses, self.events)
        if self.ended:
            if not self.run.done:  # stopped, or resumed, since Flower was asked?
                self._ask()
            self.events = self.run.journal()  # the end may have come after it was read
            self.standing = standing.look(self.run, self.statuses, self.events)

    def _ask(self) -> None:
        before = self.statuses
        try:
            self.statuses = folders.statuses(self.run.federation)
        except SiteError:
            self.statuses = None
        self._asked = time.monotonic()
        if (before is None) != (self.statuses is None):
            self._on_link(self.statuses is not None)

    @property
    def ended(self) -> bool:
        """Tell whether the run has ended, so that nothing more will come of it."""
        return self.standing.state in ENDED

    def until_it_ends(self) -> Iterator[Standing]:
        """A look every half second; the last one when it has ended."""
        while not self.ended:
            yield self.standing
            time.sleep(LOOK_S)
            self.look()
        yield self.standing


def tell(run: RunFolder, say: Callable[[str], None], *, after: int = 0) -> Standing:
    """Say each event of a run in a line, until it ends.

    Args:
        run: its folder.
        say: told a line.
        after: events that are left out, the first of its journal.  Those that are there already have no time.

    Raises: ChexfoundError, the run's own, if it ended before its end; CheckpointError if its folder is damaged.
    """

    def timed(text: str, at: str | None = None) -> None:
        say(f"{time.strftime('%H:%M:%S') if at is None else at:8}  {text}")

    def link(up: bool) -> None:
        timed("the SuperLink answers again" if up else "the SuperLink does not answer; still watching the run")

    about = run.about()
    of: dict[str, Any] = about["rounds"] if about else {}
    follower = Follower(run, link)
    for event in follower.events[after:]:  # when they happened is not known
        timed(words.line(event, of), at="")
    told, doing, spoken = len(follower.events), "", time.monotonic()
    for now in follower.until_it_ends():
        new = follower.events[told:]
        for event in new:
            timed(words.line(event, of))
        told += len(new)
        what = standing.sentence(now)
        changed = now.state != doing and now.state in ("submitted", "waiting", "enrol")
        if changed or (not new and now.state not in ENDED and time.monotonic() - spoken > BEAT_S):
            timed(f"…         {what}")
        elif not new:
            continue
        doing, spoken = now.state, time.monotonic()
    if now.state != "done":
        raise standing.failure(run, now)
    return now
