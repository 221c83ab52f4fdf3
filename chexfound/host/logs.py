"""Lines of our loggers on the terminal of a process that Flower started: it shows only its own."""

from __future__ import annotations

import logging
import os
import sys
import time
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

logging.getLogger("chexfound").addHandler(logging.NullHandler())  # or Python writes warnings to a terminal by itself
REASONS = "reasons.log"  # in a site's folder
REASONS_BYTES = 1_000_000  # before an older one is dropped


def show(reasons: Path | None = None) -> None:
    """Write what is logged under "chexfound", from INFO on, to standard error; once, however often it is called.

    Args:
        reasons: a file for this account only, for records that have `told` (`logging`'s extra): their text may name
            patients, and a terminal's is kept by the machine for others to read.  There `told` stands in its place.
    """
    logger = logging.getLogger("chexfound")
    if not any(handler.get_name() == __name__ for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name(__name__)
        handler.setFormatter(_Told(reasons))
        logger.addHandler(handler)
        if reasons is not None:
            logger.addHandler(_Reasons(reasons))
    logger.setLevel(logging.INFO)


class _Told(logging.Formatter):
    def __init__(self, reasons: Path | None) -> None:
        super().__init__("%(asctime)s %(name)s %(message)s", "%H:%M:%S")
        self.reasons = reasons

    def format(self, record: logging.LogRecord) -> str:
        """One line, of a record that has its text elsewhere."""
        told = getattr(record, "told", None)
        if self.reasons is None or told is None:
            return super().format(record)
        line = f"{told}; the reason may name patients or files, and is in {self.reasons}"
        return f"{self.formatTime(record, self.datefmt)} {record.name} {line}"


class _Reasons(RotatingFileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=REASONS_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self.addFilter(lambda record: hasattr(record, "told"))
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))

    def _open(self) -> TextIOWrapper:
        opened = open(  # noqa: SIM115 (the handler's)
            self.baseFilename, self.mode, encoding=self.encoding, opener=lambda path, how: os.open(path, how, 0o600)
        )
        assert isinstance(opened, TextIOWrapper)
        return opened

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        """Lose it where the disk is full: logging's own would show the text on the terminal."""


class Steps:
    """A progress callback that logs a line every so often, for phases that take minutes."""

    def __init__(self, logger: logging.Logger, every_s: float = 15.0) -> None:
        self.logger, self.every_s, self._next = logger, every_s, time.monotonic() + every_s

    def __call__(self, site: str, phase: str, done: int, total: int) -> None:
        """The site has done `done` of `total` in a phase."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.every_s
            self.logger.info("phase=%s site=%s done=%d of=%d", phase, site, done, total)
