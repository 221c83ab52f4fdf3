"""Masks over a payload: keystreams added to a site's integers, and taken off a sum.

A mask is a sign and a 32-byte seed.  Its bits in a ring are AES-256 in counter mode (NIST SP 800-38A, 6.5) over zeros,
from counter 0, under a key that HKDF-SHA256 (RFC 5869) makes of the seed for that ring alone.  Of a pair, one site adds
and the other subtracts; a site's self-mask is added.

Guarantee: whoever lacks the seed of one of its masks cannot tell a masked payload from noise, as long as AES-256 is a
pseudorandom permutation and **each seed masks one payload only**: of two under the same masks the difference is in
clear.  Whoever calls this sees to it, by seeds that are bound to run, round and attempt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from chexfound.errors import ProtocolError
from chexfound.secagg import fixed
from chexfound.secagg.fixed import CLIPPED, SIGNED, UNSIGNED, Layout, Section

SEED_BYTES = 32
CHUNK = 2**16  # values worked on at a time: their buffers stay in the caches, and a call costs little of a chunk
BLOCK = 16  # bytes of AES's block, which `update_into` wants free behind what it writes

Mask = tuple[int, bytes]  # +1 or −1, and the seed


class Keystream:
    """AES in counter mode from counter 0, from where the last call stopped.

    Args:
        key: 16 or 32 bytes, used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._update_into = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK))).encryptor().update_into

    def fill(self, buffer: memoryview, size: int) -> None:
        """Write the next `size` bytes, at most `8 * CHUNK`, into a buffer with a block more than that."""
        self._update_into(_ZEROS[:size], buffer)


_ZEROS = memoryview(bytes(8 * CHUNK))


def ring_key(seed: bytes, ring: int) -> bytes:
    """The key of a mask's keystream in one ring."""
    info = b"chexfound mask v1 ring %d" % ring
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(seed)


def masked(
    layout: Layout,
    values: Mapping[str, NDArray[Any]],
    weights: Mapping[str, float | NDArray[Any]],
    masks: Sequence[Mask],
    out: Mapping[int, NDArray[Any]],
) -> None:
    """Quantise a site's values and mask them, chunk by chunk, into an array for each ring.

    Beside `out` it takes a few chunks of memory.  Nothing is written before all values are looked at, and what is
    written is masked: `out` may lie on a disk.

    Args:
        layout: of the payload.
        values: by section: float32 in fixed point, integers for counts; `clipped` is counted here.
        weights: 0 … 1 for each section in fixed point: one number, or one for each row of the first axis.
        masks: at least one; seeds that have masked nothing yet.
        out: for each ring a flat little-endian array of unsigned integers, as `Layout.zeros` gives them.

    Raises: ProtocolError if names, shapes, dtypes, values or weights do not fit the layout, or masks are none.
    """
    layout.check_arrays(out)
    if not masks:
        raise ProtocolError("a payload without a mask: it would leave in clear")
    _check_masks(masks)
    parts = {part.section.name: part for part in _parts(layout, values, weights)}
    scratch, noise, clipped = _Scratch(), Keystream(os.urandom(16)), dict.fromkeys(layout.sections, 0)
    for ring in layout.sizes:  # 64 is the last, and `clipped` the last in it
        streams = _streams(masks, ring)
        for section in layout.payload:
            if section.ring != ring:
                continue
            if section.name == CLIPPED:
                counts = [number for one, number in clipped.items() if one.fixed]
                part = _Stretch(section, np.array(counts, np.uint64))
            else:
                part = parts[section.name]
            target = out[ring][layout.places[section.name]]
            for piece, scales in part.pieces():
                if part.scales is None:
                    plain = scratch.counts(part.values[piece], ring)
                else:
                    plain, beyond = scratch.rounded(part.values[piece], scales, part.limit, noise, ring)
                    clipped[section] += beyond
                scratch.mask(plain, streams, target[piece])


def add_masks(sums: Mapping[int, NDArray[Any]], layout: Layout, masks: Sequence[Mask]) -> None:
    """Add masks to a sum, in place; with the other sign they are taken off.

    Raises: ProtocolError if the arrays are not the layout's, or masks are none.
    """
    layout.check_arrays(sums)
    _check_masks(masks)
    if not masks:
        return
    scratch = _Scratch()
    for ring, array in sums.items():
        streams = _streams(masks, ring)
        for start in range(0, len(array), CHUNK):
            part = array[start : start + CHUNK]
            scratch.mask(part, streams, part)


def _check_masks(masks: Sequence[Mask]) -> None:
    for sign, seed in masks:
        if sign not in (1, -1) or len(seed) != SEED_BYTES:
            raise ProtocolError(f"a mask is +1 or -1 and a seed of {SEED_BYTES} bytes, not {sign!r} and {len(seed)}")
    if len({seed for _, seed in masks}) < len(masks):
        raise ProtocolError("two masks of the same seed")


_Add = Callable[..., Any]


def _streams(masks: Sequence[Mask], ring: int) -> list[tuple[_Add, Keystream]]:
    return [(np.add if sign > 0 else np.subtract, Keystream(ring_key(seed, ring))) for sign, seed in masks]


# -- a site's values, looked at


@dataclass(frozen=True)
class _Stretch:
    """A section's values, flat, and how they are quantised; scales None: counts, that are taken as they are."""

    section: Section
    values: NDArray[Any]
    scales: NDArray[np.float64] | None = None
    limit: int | None = None  # to clip at; None: nothing comes near

    def pieces(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Up to a chunk at a time, with a scale for all of it, or (rows, 1) for the rows in it."""
        scales = np.ones(()) if self.scales is None else self.scales
        if not scales.ndim:
            yield from ((piece, scales) for piece in _cut(0, self.section.size))
            return
        row = self.section.size // len(scales)
        if row > CHUNK:
            for number, one in enumerate(scales):
                yield from ((piece, np.asarray(one)) for piece in _cut(number * row, (number + 1) * row))
            return
        together = CHUNK // row
        for first in range(0, len(scales), together):
            some = scales[first : first + together, None]
            yield slice(first * row, (first + len(some)) * row), some


def _cut(start: int, stop: int) -> Iterator[slice]:
    return (slice(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK))


def _parts(
    layout: Layout, values: Mapping[str, NDArray[Any]], weights: Mapping[str, float | NDArray[Any]]
) -> list[_Stretch]:
    if odd := sorted(set(values) ^ {section.name for section in layout.sections}):
        raise ProtocolError(f"values that do not fit the layout's names: {odd[:3]}")
    if odd := sorted(set(weights) ^ {section.name for section in layout.sections if section.fixed}):
        raise ProtocolError(f"weights are for the sections in fixed point, and for all of them: {odd[:3]}")
    return [
        _fixed_part(section, layout.n, _flat(section, values), weights[section.name])
        if section.fixed
        else _count_part(section, layout.n, _flat(section, values))
        for section in layout.sections
    ]


def _flat(section: Section, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    array = np.asarray(values[section.name])
    if array.shape != section.shape:
        raise ProtocolError(f"section {section.name!r}: shape {array.shape} where {section.shape} belongs")
    return array.reshape(-1)


def _fixed_part(section: Section, n: int, array: NDArray[Any], weight: float | NDArray[Any]) -> _Stretch:
    if array.dtype != np.float32:
        raise ProtocolError(f"section {section.name!r}: {array.dtype} where float32 belongs")
    scales, limit = fixed.scale(section, n, weight), fixed.levels(section.ring, n)
    peak = _peak(array)
    if not math.isfinite(peak):
        raise ProtocolError(f"section {section.name!r} holds a value that is not a finite number")
    return _Stretch(section, array, scales, limit if fixed.reaches(peak, scales, limit) else None)


def _peak(array: NDArray[Any]) -> float:
    """The largest magnitude; not finite if a value is not."""
    peak = 0.0
    for piece in _cut(0, len(array)):
        # Both are NaN if a value is, and Python's max would let it pass.
        least, most = float(array[piece].min()), float(array[piece].max())
        if not math.isfinite(least) or not math.isfinite(most):
            return math.inf
        peak = max(peak, most, -least)
    return peak


def _count_part(section: Section, n: int, array: NDArray[Any]) -> _Stretch:
    if array.dtype.kind not in "iu":
        raise ProtocolError(f"section {section.name!r}: {array.dtype} where counts, integers, belong")
    most = fixed.largest_count(section.ring, n)
    if int(array.min()) < 0 or int(array.max()) > most:
        raise ProtocolError(f"section {section.name!r}: a count is between 0 and {most} there")
    return _Stretch(section, array)


# -- chunks


class _Scratch:
    """Buffers for a chunk, used again and again."""

    def __init__(self) -> None:
        self._steps = np.empty(CHUNK, np.float64)
        self._sum, self._bits = np.empty(8 * CHUNK, np.uint8), np.empty(8 * CHUNK + BLOCK, np.uint8)
        self._sink = self._bits.data

    def counts(self, values: NDArray[Any], ring: int) -> NDArray[Any]:
        """Counts in the ring's type."""
        plain = _view(self._sum, len(values), UNSIGNED[ring])
        np.copyto(plain, values, casting="unsafe")  # that they fit has been looked at
        return plain

    def rounded(
        self, values: NDArray[Any], scales: NDArray[np.float64], limit: int | None, noise: Keystream, ring: int
    ) -> tuple[NDArray[Any], int]:
        """A chunk in fixed point, modulo 2**ring, and how many values were clipped."""
        count, shape = len(values), (len(scales), -1) if scales.ndim else (-1,)
        steps, plain = self._steps[:count], _view(self._sum, count, UNSIGNED[ring])
        noise.fill(self._sink, 2 * count)
        bits = _view(self._bits, count, SIGNED[16])
        clipped = fixed.quantise(values.reshape(shape), scales, limit, bits.reshape(shape), steps.reshape(shape))
        fixed.integers(steps, plain)
        return plain, clipped

    def mask(self, plain: NDArray[Any], streams: Sequence[tuple[_Add, Keystream]], out: NDArray[Any]) -> None:
        """Add a chunk of each keystream; only the last addition writes to `out`, so that nothing plain gets there."""
        size = plain.nbytes
        bits, held = _view(self._bits, len(plain), plain.dtype), _view(self._sum, len(plain), plain.dtype)
        for add, stream in streams[:-1]:
            stream.fill(self._sink, size)
            add(plain, bits, out=held)
            plain = held
        add, stream = streams[-1]
        stream.fill(self._sink, size)
        add(plain, bits, out=out)


def _view(buffer: NDArray[np.uint8], count: int, kind: np.dtype[Any]) -> NDArray[Any]:
    return buffer[: count * kind.itemsize].view(kind)
