"""Every random stream, derived from what it is for and from nothing else.

A stream is named by (seed, phase, global step, roster index, purpose); node ids, process ids, the
clock and the order of replies have no part in it.  So a run repeats, resumes and moves between
engines without a change in its bits.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


def derive(*name: int | str) -> int:
    """A 63-bit seed from the parts of a stream's name (SHA-256 over the length-prefixed parts)."""
    digest = hashlib.sha256()
    for part in name:
        text = str(part).encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_generator(*name: int | str) -> np.random.Generator:
    """A NumPy generator for the named stream."""
    return np.random.Generator(np.random.PCG64(derive(*name)))


@contextlib.contextmanager
def torch_stream(*name: int | str) -> Iterator[None]:
    """Torch's global generator set to the named stream inside, put back after.

    For what takes no generator of its own: parameter initialisation and dropout.
    """
    import torch

    # Of a machine's GPUs only the one that is used: to save the others' state would take memory on each.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(*name))
        yield


def unit_interval(*name: int | str) -> float:
    """A number in [0, 1) that depends on the name alone (53 bits)."""
    return (derive(*name) >> 10) / (1 << 53)
