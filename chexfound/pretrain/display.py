"""What `chexfound pretrain` shows of itself: a bar on a terminal, and lines; the first rank's only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from chexfound.parallel import group


def say(text: str) -> None:
    """Print a line."""
    if group.first():
        print(text, flush=True)


def line(rows: list[dict[str, Any]], total: int, batch: int, seconds: float) -> str:
    """What is said of some steps: means of the loss and its parts, the last probe's figures, and the speed."""
    parts = [name for name in ("loss", "dino", "koleo", "ibot") if name in rows[-1]]
    means = " ".join(f"{name}={sum(row[name] for row in rows) / len(rows):.4f}" for name in parts)
    for row in [row for row in rows if "rankme" in row][-1:]:
        means += "".join(f" {name}={row[name]:.3g}" for name in ("rankme", "knn_auroc") if name in row)
    return f"step={rows[-1]['step'] + 1} of={total} {means} images_per_s={len(rows) * batch / seconds:.1f}"


class Display:
    """A bar while it runs, on a terminal, and lines above it."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        shown = group.first() and sys.stdout.isatty()
        columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True, disable=not shown)
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if group.first():
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, before: int) -> Callable[[int, int], None]:
        """The callback of a run that begins at a step."""
        return lambda done, _: self._bar.update(self._task, completed=before + done)
