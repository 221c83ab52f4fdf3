"""Memory that was freed is the system's again."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import re
import numpy as np
from chexfound.host import processes


def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024


np.ones(2**22).sum()  # freed: the heap's blocks may then be as large
{first}
before, blocks = resident(), [np.ones(2**19) for _ in range(50)]  # 4 MB each
held = resident() - before
del blocks[:-1]
{then}
print(held, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("first", "then"), [("processes.map_large()", ""), ("", "processes.trim()")])
def test_what_is_freed_below_what_is_held_goes_back(first: str, then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES.format(first=first, then=then)], capture_output=True, text=True, check=True
    )
    held, left = map(float, done.stdout.split())
    assert held > 195
    assert left < 20
