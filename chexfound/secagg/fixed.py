"""The layout of a masked payload, and fixed point: from values to elements of a ring of integers and back.

A value v with weight w in a section of range R travels as x = clip(w·v·L/R, ±L), rounded to one of the two integers
beside it, by chance, so that its mean is x: floor(x + u) with u uniform in [0, 1).  u has 16 bits and the sum is
taken in float64, so that the mean is off by 2**-16 of a step at most, at every magnitude up to L = 2**22.  In float32
it would be 0.25 of a step there.

Overflow is impossible by construction: L = min(2**22, (2**(ring-1) - 1)//n), so n sites of ±L fit in a signed ring.
Without clipping the weighted mean of a set of sites is off by at most its size · (R/L) / Σw, plus float64's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chexfound.errors import ChexfoundError, ConfigError, Problems, ProtocolError

RINGS = (16, 32, 64)
LEVELS = 2**22
CLIPPED = "clipped"
RANGES = (2.0**-126, 2.0**127)  # so that no product leaves float64
ONE = 2.0**16  # a step, in the units in which chunks are rounded
# Added to a float64 below 2**67 it leaves a float64 whose last bit is one step: rounded, and the integer is in its
# lowest bits (Hacker's Delight, 17-3).  Those of ROUNDER itself are zero.
ROUNDER = 1.5 * 2.0**68

UNSIGNED: dict[int, np.dtype[Any]] = {16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}
SIGNED: dict[int, np.dtype[Any]] = {16: np.dtype("<i2"), 32: np.dtype("<i4"), 64: np.dtype("<i8")}


def levels(ring: int, n: int) -> int:
    """L: the largest integer that a value of one of n sites becomes.

    Raises: ConfigError if the ring is none, or too small for so many sites.
    """
    if ring not in RINGS:
        raise ConfigError(f"a ring of {ring!r} bits: there are {', '.join(map(str, RINGS))}")
    if n < 1 or (2 ** (ring - 1) - 1) // n < 1:
        raise ConfigError(f"a ring of {ring} bits does not hold the sum of {n!r} sites")
    return min(LEVELS, int(2 ** (ring - 1) - 1) // n)


def largest_count(ring: int, n: int) -> int:
    """The largest count that one of n sites may send."""
    return int((2**ring - 1) // n)


@dataclass(frozen=True)
class Section:
    """One named array of a payload.

    Args:
        name: in the payload.
        shape: () for a single number.
        ring: 16, 32 or 64 bits for each value.
        range: of w·v, above 0: float32 in fixed point.  0: counts, integers that are not negative.
    """

    name: str
    shape: tuple[int, ...]
    ring: int
    range: float = 0.0

    @property
    def fixed(self) -> bool:
        """Tell whether the section's values are in fixed point; else they are counts."""
        return self.range != 0

    @property
    def size(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The sections of a payload, in order, for the sum of up to n sites.

    In each ring the sections stand one after the other in a flat array.  Where any is in fixed point the payload has
    one more, `clipped`: how many values of each of those were outside the range, in their order.

    Raises: ConfigError that names all that is wrong.
    """

    sections: tuple[Section, ...]
    n: int

    def __post_init__(self) -> None:
        problems = Problems(ConfigError, "the layout of a masked payload")
        if type(self.n) is not int or self.n < 1:
            problems.add(f"n = {self.n!r}: how many sites there are")
        if not self.sections:
            problems.add("no section")
        names: set[str] = set()
        for section in self.sections:
            for problem in _wrong(section):
                problems.add(f"section {section.name!r}: {problem}")
            if str(section.name) in names:
                problems.add(f"section {section.name!r} is there twice")
            names.add(str(section.name))
        problems.check()
        for ring in {section.ring for section in self.sections}:
            levels(ring, self.n)

    @cached_property
    def payload(self) -> tuple[Section, ...]:
        """The sections that travel: those given, and `clipped`."""
        fixed = sum(section.fixed for section in self.sections)
        return (*self.sections, Section(CLIPPED, (fixed,), 64)) if fixed else self.sections

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The values in each ring's flat array, rings in rising order."""
        rings = sorted({section.ring for section in self.payload})
        return {ring: sum(section.size for section in self.payload if section.ring == ring) for ring in rings}

    @cached_property
    def places(self) -> dict[str, slice]:
        """Tell where each section stands in its ring's flat array."""
        found, ends = {}, dict.fromkeys(self.sizes, 0)
        for section in self.payload:
            start = ends[section.ring]
            ends[section.ring] = start + section.size
            found[section.name] = slice(start, start + section.size)
        return found

    @property
    def payload_bytes(self) -> int:
        """Count the bytes of all rings together."""
        return sum(size * ring // 8 for ring, size in self.sizes.items())

    def zeros(self) -> dict[int, NDArray[Any]]:
        """An array of zeros for each ring, as `masked` fills and `add_masks` takes them."""
        return {ring: np.zeros(size, UNSIGNED[ring]) for ring, size in self.sizes.items()}

    def check_arrays(self, arrays: Mapping[int, NDArray[Any]]) -> None:
        """Raise ProtocolError unless that is a flat little-endian array for each ring, of its size."""
        if set(arrays) != set(self.sizes):
            raise ProtocolError(f"arrays for the rings {sorted(arrays)} where the layout has {sorted(self.sizes)}")
        for ring, size in self.sizes.items():
            array, kind = arrays[ring], UNSIGNED[ring]
            if array.shape != (size,) or array.dtype != kind or not array.flags.c_contiguous:
                raise ProtocolError(
                    f"ring {ring}: {array.dtype.str} {array.shape} where a flat array of {size} {kind.str} belongs"
                )

    def as_list(self) -> list[dict[str, Any]]:
        """The sections as JSON has them: what `from_list` takes, and what goes into a hash."""
        return [
            {"name": one.name, "shape": list(one.shape), "ring": one.ring, "range": float(one.range)}
            for one in self.sections
        ]

    @classmethod
    def from_list(cls, sections: Sequence[Mapping[str, Any]], n: int) -> Layout:
        """The layout of such a list.

        Raises: ProtocolError if it is none.
        """
        if not isinstance(sections, Sequence) or any(
            not isinstance(one, Mapping) or set(one) != {"name", "shape", "ring", "range"}
            or not isinstance(one["shape"], Sequence)
            for one in sections
        ):  # fmt: skip
            raise ProtocolError("a layout is a list of sections, each with name, shape, ring and range")
        try:
            return cls(
                tuple(Section(one["name"], tuple(one["shape"]), one["ring"], one["range"]) for one in sections), n
            )
        except ChexfoundError as error:
            raise ProtocolError(str(error)) from error


def _wrong(section: Section) -> list[str]:
    problems = []
    if not isinstance(section.name, str) or not section.name:
        problems.append("a name is a text that is not empty")
    if section.name == CLIPPED:
        problems.append("this name is kept for the counts of clipped values")
    if type(section.shape) is not tuple or any(type(axis) is not int or axis < 1 for axis in section.shape):
        problems.append(f"shape {section.shape!r}: give a tuple of integers from 1")
    if type(section.ring) is not int or section.ring not in RINGS:
        problems.append(f"ring {section.ring!r}: give one of {', '.join(map(str, RINGS))}")
    least, most = RANGES
    if type(section.range) not in (int, float) or not (section.range == 0 or least <= section.range <= most):
        problems.append(f"range {section.range!r}: give 0 for counts, or {least:g} to {most:g} for fixed point")
    return problems


# -- from values to integers


def scale(section: Section, n: int, weight: float | NDArray[Any]) -> NDArray[np.float64]:
    """Give what a value is multiplied by before `quantise`: w·L/R, in units of 2**-16 of a step.

    Returns: shape (), or (rows,) if each row of the first axis has its own weight.

    Raises: ProtocolError if a weight is not in 0 … 1, or is not one for each row.
    """
    weights = np.asarray(weight, np.float64)
    if weights.shape not in ((), section.shape[:1]):
        raise ProtocolError(f"section {section.name!r}: weights {weights.shape} for values {section.shape}")
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ProtocolError(f"section {section.name!r}: a weight is between 0 and 1")
    # A hair less, so that a value at the end of the range is not rounded out of it, and counted as clipped.
    return weights * (levels(section.ring, n) / section.range * ONE * (1 - 2.0**-45))


def quantise(
    values: NDArray[np.float32],
    scales: NDArray[np.float64],
    limit: int | None,
    noise: NDArray[np.int16],
    steps: NDArray[np.float64],
) -> int:
    """Round a chunk; `integers` takes it from there.

    Args:
        values: (m,), or (rows, m) with a scale for each row.
        scales: as `scale` gives them: (), or (rows, 1).
        limit: L, to clip at; None where `reaches` says that nothing in the section comes near.
        noise: as values, uniform over all int16: the u of x + u, less a half.
        steps: as values, overwritten.

    Returns: how many values were clipped.
    """
    clipped = 0
    # Twice as fast as to multiply with the conversion in it.
    np.copyto(steps, values)
    np.multiply(steps, scales, out=steps)
    if limit is not None:
        clipped = int(np.count_nonzero(np.abs(steps) > limit * ONE))
        np.clip(steps, -_inside(limit), _inside(limit), out=steps)
    np.add(steps, noise, out=steps)
    np.add(steps, ROUNDER, out=steps)
    return clipped


def reaches(peak: float, scales: NDArray[np.float64], limit: int) -> bool:
    """Tell whether a section whose largest value is `peak` has to be clipped at L."""
    return peak * float(scales.max()) > _inside(limit)


def _inside(limit: int) -> float:
    # From -L itself the largest noise leads half a step on, where an odd L would be rounded to the even L + 1.
    return limit * ONE - 2.0**-8


def integers(steps: NDArray[np.float64], out: NDArray[Any]) -> None:
    """Write the integers of a chunk that `quantise` rounded into a ring's array of that size; steps are overwritten."""
    bits = steps.view(np.int64)
    if out.itemsize == 8:  # else what else is in ROUNDER falls off
        np.subtract(bits, np.float64(ROUNDER).view(np.int64), out=bits)
    np.copyto(out, bits, casting="unsafe")


# -- and back


def decode(layout: Layout, sums: Mapping[int, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The sums of a layout's sections, once all masks are off: `decode_section` of each.

    Raises: ProtocolError if the arrays are not the layout's.
    """
    layout.check_arrays(sums)
    return {section.name: decode_section(layout, section, sums) for section in layout.payload}


def decode_section(layout: Layout, section: Section, sums: Mapping[int, NDArray[Any]]) -> NDArray[Any]:
    """One of the payload's sections: Σ w·v in float64 in fixed point, or Σ of counts in uint64; in its shape."""
    part = sums[section.ring][layout.places[section.name]]
    if section.fixed:
        step = section.range / levels(section.ring, layout.n)
        return (part.view(SIGNED[section.ring]) * np.float64(step)).reshape(section.shape)
    return part.astype(np.uint64).reshape(section.shape)
