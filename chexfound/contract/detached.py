"""A message's arrays apart from it: as one string of bytes, which travels in parts of some MB.

Flower puts a message together in memory from what came, and takes it apart to send it: one with a model in it is there
several times at either end.  So a message with more in it than a part travels as a message without arrays, which names
their hash, and the bytes in messages of their own (`deliver` to a site, `collect` from it).  Each end has them on its
disk; where they are read, it is from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from chexfound.contract.request import Reply, Request

M = TypeVar("M", bound="Request | Reply", covariant=True)
STAGES = ("deliver", "collect")
PIECE = 2**22  # bytes that are looked at at a time
PART_MAX = 2**30  # bytes of a part
WHOLE_MAX = 2**40  # of all


@dataclass(frozen=True, kw_only=True)
class Detached:
    """Hold what of a message comes apart from it.

    Args:
        sha256: of all bytes; hex.
        arrays: bytes by dtype; they lie there in the order of its name.
        table: name, dtype and shape of each tensor, in the order in which they lie in the array of their dtype.
    """

    sha256: str
    arrays: Mapping[str, int]
    table: Sequence[tuple[str, str, Sequence[int]]]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(self.arrays.values())


@dataclass(frozen=True, kw_only=True)
class Envelope(Generic[M]):
    """A request or a reply as it travels.

    Args:
        message: without its arrays, where they are detached.
        detached: what of it comes apart.
        part_bytes: of a reply's arrays, from which on they are to come apart; 0: never.
    """

    message: M
    detached: Detached | None = None
    part_bytes: int = 0


class ByteView:
    """Arrays one after the other as one string of bytes, little-endian; where they are, without a copy of the whole.

    Args:
        arrays: by the name of their dtype, each in pieces of any shape.
    """

    def __init__(self, arrays: Mapping[str, Sequence[np.ndarray]]) -> None:
        ordered = sorted((name, pieces) for name, pieces in arrays.items() if any(piece.size for piece in pieces))
        self.arrays = {name: sum(piece.nbytes for piece in pieces) for name, pieces in ordered}
        self._pieces = [_bytes(piece) for _, pieces in ordered for piece in pieces]
        self.size = sum(self.arrays.values())

    def read(self, start: int, size: int) -> np.ndarray:
        """Bytes from `start` on, uint8; fewer than `size` at the end."""
        part, filled = np.empty(max(0, min(size, self.size - start)), np.uint8), 0
        for piece in self._pieces:
            if start < piece.size and filled < part.size:
                taken = piece[start : start + part.size - filled]
                part[filled : filled + taken.size] = taken
                filled += taken.size
            start = max(0, start - piece.size)
        return part

    def __iter__(self) -> Iterator[memoryview]:
        """All bytes, in pieces that are small."""
        for piece in self._pieces:
            for start in range(0, piece.size, PIECE):
                yield piece[start : start + PIECE].data

    def sha256(self) -> str:
        """SHA-256 of all bytes; hex."""
        whole = hashlib.sha256()
        for piece in self:
            whole.update(piece)
        return whole.hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8)
