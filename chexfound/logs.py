"""Lines of our loggers on the terminal of a process that Flower started: it shows only its own."""

from __future__ import annotations

import logging
import sys
import time

logging.getLogger("chexfound").addHandler(logging.NullHandler())  # or Python writes warnings to a terminal by itself


def show() -> None:
    """Write what is logged under "chexfound", from INFO on, to standard error; once, however often it is called."""
    logger = logging.getLogger("chexfound")
    if not any(handler.get_name() == __name__ for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name(__name__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class Steps:
    """A progress callback that logs a line every so often, for phases that take minutes."""

    def __init__(self, logger: logging.Logger, every_s: float = 15.0) -> None:
        self.logger, self.every_s, self._next = logger, every_s, time.monotonic() + every_s

    def __call__(self, site: str, phase: str, done: int, total: int) -> None:
        """The site has done `done` of `total` in a phase."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.every_s
            self.logger.info("phase=%s site=%s done=%d of=%d", phase, site, done, total)
