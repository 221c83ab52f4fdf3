"""A run on the disk: the weights after each phase's last round, and the journal that says what was done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from chexfound.durable.journal import Journal
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint

Event = dict[str, Any]


class Record:
    """The folder of one run.

    Args:
        folder: where weights and journal go.
        on_event: told each journal record as it is written.
    """

    def __init__(self, folder: Path, on_event: Callable[[Event], None] | None = None) -> None:
        self.folder, self.on_event = Path(folder), on_event
        self.journal: Journal | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the journal open, and its lock."""
        with Journal(self.folder / "journal.jsonl") as self.journal:
            yield

    @property
    def entries(self) -> list[Event]:
        """Give what was recorded, oldest first."""
        assert self.journal is not None
        return self.journal.entries

    def begun(self, key: str, default: Any) -> Any:
        """Give what the journal's first record, the run's start, has under a key."""
        return self.entries[0][key] if self.entries else default

    def rounds(self, phase: str) -> list[Event]:
        """The records of a phase's rounds."""
        return [entry for entry in self.entries if entry["event"] == "round" and entry["phase"] == phase]

    def check_same(self, start: Event) -> None:
        """Hold what a run starts with against what its folder's run started with.

        Raises: ConfigError.
        """
        changed = sorted(key for key, value in start.items() if self.begun(key, value) != value)
        if changed:
            raise ConfigError(
                f"{self.folder}: this folder holds a run with another {' and '.join(changed)}; "
                "resume it with the same recipe, sites and images, or choose another folder"
            )

    def tell(self, event: Event) -> None:
        """Tell whoever listens."""
        if self.on_event is not None:
            self.on_event(event)

    def add(self, event: Event) -> None:
        """Append a record, unless it is the last already, and tell it."""
        assert self.journal is not None
        if event not in self.entries[-1:]:
            self.journal.append(event)
        self.tell(event)

    def note(self, event: Event) -> None:
        """Append what befell a site or a sum, once the run's start is in the journal, and tell it."""
        if self.journal is not None and self.entries:
            self.journal.append(event)
        self.tell(event)

    def commit(self, phase: str, number: int, weights: dict[str, Tensor], event: Event) -> None:
        """Put a round's weights on the disk, then the round into the journal, then drop the round before."""
        path = self.folder / "rounds" / f"{phase}-{number:06d}.safetensors"
        checkpoint.save(path, weights)
        place = {"event": "round", "phase": phase, "round": number}
        self.add({**place, "file": path.name, "sha256": checkpoint.digest(weights), **event})
        for old in self.folder.glob(f"rounds/{phase}-*.safetensors"):
            if old != path:
                old.unlink()

    def last(self, phase: str) -> tuple[int, dict[str, Tensor] | None]:
        """Give how many rounds of a phase are done, and the weights after the last.

        Raises: CheckpointError if those are not what the journal says.
        """
        done = self.rounds(phase)
        if not done:
            return 0, None
        path = self.folder / "rounds" / done[-1]["file"]
        weights = checkpoint.load(path)
        if checkpoint.digest(weights) != done[-1]["sha256"]:
            raise CheckpointError(f"{path}: is not what the journal says it should be; the file was changed or damaged")
        return len(done), weights
