"""`chexfound pretrain` in which rank $FAULTY_RANK does $FAULT in its third step: see test_pretrain_processes.py.

The process that starts the ranks makes this file theirs, too.
"""

from __future__ import annotations

import itertools
import math
import os
import runpy
import sys
from typing import Any

from chexfound import _launch
from chexfound.parallel import launch
from chexfound.parallel.environment import to_come


class Ranks(launch.Ranks):
    def __init__(self, arguments: list[str], *rest: Any) -> None:
        super().__init__([__file__, *arguments[2:]], *rest)


def break_it(fault: str) -> None:
    from chexfound.pretrain.meta_arch import SSLMetaArch

    forward, steps = SSLMetaArch.forward, itertools.count()

    def faulty(self: SSLMetaArch, *given: Any) -> Any:
        loss, parts = forward(self, *given)
        if next(steps) == 2:
            if fault == "error":
                raise RuntimeError("a fault of one rank")
            loss = loss * math.nan
        return loss, parts

    SSLMetaArch.forward = faulty  # type: ignore[method-assign]


if to_come() == 1:
    launch.Ranks = Ranks  # type: ignore[misc]
    sys.exit(_launch.chexfound())
if os.environ["RANK"] == os.environ["FAULTY_RANK"]:
    break_it(os.environ["FAULT"])
runpy.run_module("chexfound.phases.gpus", run_name="__main__", alter_sys=True)
