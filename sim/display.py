"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVERY_S = 60.0  # without a line: then one that says what is going on, where there are no bars


class Display:
    """One bar for each site or arm that is at work; finished bars make room.

    Without a terminal (a log file, CI) each arm is a line when it ends, and who is at work is one now and then.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.arm = ""  # whose sites are at work
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("  {task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, who: str, phase: str, done: int, total: int) -> None:
        """A site, or a lone arm, has done `done` of `total` in a phase."""
        who = f"{self.arm}: {who}" if self.arm else who
        key = f"{who} · {phase}"
        if key not in self._bars:
            for old in [name for name in self._bars if name.startswith(f"{who} · ")]:
                self._progress.remove_task(self._bars.pop(old))
            self._bars[key] = self._progress.add_task(key, total=total)
        self._progress.update(self._bars[key], completed=done, total=total)
        if not self.console.is_terminal and time.monotonic() > self._said + EVERY_S:
            self.say(f"{escape(key)}: {done} of {total}")

    def say(self, text: str) -> None:
        """A line that stays, with the time since the start before it."""
        self._said = time.monotonic()
        elapsed = int(self._said - self._started)
        self.console.print(f"[dim]{elapsed // 60:3d}:{elapsed % 60:02d}[/dim]  {text}", highlight=False, soft_wrap=True)

    def clear(self) -> None:
        """Take all bars away."""
        for task in self._bars.values():
            self._progress.remove_task(task)
        self._bars.clear()
