"""The sum is that of the survivors, whoever is lost at whichever stage; and without a threshold there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.errors import ProtocolError
from chexfound.secagg import fixed, keys, mask, shamir
from chexfound.secagg.fixed import Layout, Section
from chexfound.secagg.site import Side
from strategies.secagg import MaskedSum
from tests.secagg.cohort import Cohort, Packets, answers, deal, packets_to

SECTIONS = (
    Section("counts", (3,), 32),
    Section("wide", (2,), 64),
    Section("tensor", (2, 3), 32, 2.0),
    Section("rows", (2, 2), 16, 4.0),
)
WEIGHTS: dict[str, Any] = {"tensor": 0.75, "rows": np.array([1.0, 0.25])}


class Payloads:
    """What each site sends, and what must come out."""

    def __init__(self, n: int, names: Sequence[str]) -> None:
        self.layout, draws = Layout(sections=SECTIONS, n=n), np.random.default_rng(n)
        self.values = {
            name: {
                "counts": draws.integers(0, fixed.largest_count(32, n), 3, endpoint=True),
                "wide": draws.integers(0, fixed.largest_count(64, n), 2, np.uint64, endpoint=True),
                "tensor": draws.uniform(-2, 2, (2, 3)).astype(np.float32),
                "rows": draws.uniform(-5, 5, (2, 2)).astype(np.float32),  # some beyond the range
            }
            for name in names
        }

    def masked(self, name: str, masks: list[tuple[int, bytes]]) -> dict[int, np.ndarray]:
        arrays = self.layout.zeros()
        mask.masked(self.layout, self.values[name], WEIGHTS, masks, arrays)
        return arrays

    def holds(self, sums: dict[str, np.ndarray], survivors: Sequence[str]) -> bool:
        """Whether these are the survivors' sums: counts to the last digit, fixed point within a step a site."""
        values = [self.values[name] for name in survivors]
        right = all(
            np.array_equal(sums[name], np.sum([one[name] for one in values], axis=0, dtype=np.uint64))
            for name in ("counts", "wide")
        )
        clipped = [0, 0]
        for place, section in enumerate(one for one in SECTIONS if one.fixed):
            weights = np.asarray(WEIGHTS[section.name]).reshape(-1, 1)
            weighted = [weights * one[section.name] for one in values]
            exact = np.sum([np.clip(one, -section.range, section.range) for one in weighted], axis=0)
            step = section.range / fixed.levels(section.ring, self.layout.n)
            right &= bool((np.abs(sums[section.name] - exact) <= len(survivors) * step * (1 + 1e-9)).all())
            clipped[place] = sum(int((np.abs(one) > section.range).sum()) for one in weighted)
        return right and sums["clipped"].tolist() == clipped


def subsets(names: Sequence[str], least: int) -> Iterator[list[str]]:
    for size in range(len(names), least - 1, -1):
        yield from map(list, itertools.combinations(names, size))


class Attempts:
    """Attempts of one cohort, with what does not change from one to the next kept: the adverts, and what was dealt."""

    def __init__(self, n: int, colluders: int | None, folder: Path) -> None:
        self.cohort, self.folder = Cohort(n=n, colluders=colluders), folder
        self.least, self.t = self.cohort.parameters.survivors, self.cohort.parameters.t
        self.payloads = Payloads(n, self.cohort.names)
        self.done = 0

    def run(self, advertised: Sequence[str], u2s: Sequence[Sequence[str]]) -> None:
        """All that can follow when these advertise: each U2 of `u2s`, each U3 in it, each threshold that opens."""
        sides = self.cohort.sides(advertised)
        packets = deal(sides)
        for sharers in u2s:
            shares = {name: sides[name].check_sharers(sharers, packets_to(packets, name, sharers)) for name in sharers}
            arrays = {name: self.payloads.masked(name, sides[name].masks(sharers)) for name in sharers}
            for survivors in subsets(sharers, self.least):
                signatures = {name: sides[name].sign_survivors(sharers, survivors, []) for name in survivors}
                opened = {name: Side.answer(shares[name], survivors) for name in survivors}
                self._open(packets, advertised, sharers, survivors, opened, arrays)
                signers = dict(itertools.islice(signatures.items(), self.t))
                sides[survivors[-1]].check_signers(sharers, survivors, signers)

    def _open(
        self,
        packets: Packets,
        advertised: Sequence[str],
        sharers: Sequence[str],
        survivors: Sequence[str],
        opened: dict[str, Any],
        arrays: dict[str, dict[int, np.ndarray]],
    ) -> None:
        first: list[Any] | None = None
        for openers in itertools.combinations(survivors, self.t):
            opening = self.cohort.opening(packets, sharers, survivors, advertised)
            for name in openers:
                opening.add(name, opened[name])
            masks = opening.masks()
            if first is None:
                first = masks
                spool = MaskedSum(self.payloads.layout, self.folder / "spool")
                for name in sharers:  # of those that are lost later too, and those are not added
                    spool.add(name, arrays[name])
                sums = spool.result(survivors, masks)
                assert self.payloads.holds(sums, survivors), (advertised, sharers, survivors, openers)
            assert masks == first, (advertised, sharers, survivors, openers)  # and so the same sum
            self.done += 1


@pytest.mark.parametrize(
    ("n", "colluders"), [(3, 0), (4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2), (6, 1), (7, 1), (8, 2)]
)
def test_every_dropout_pattern(n: int, colluders: int, tmp_path: Path) -> None:
    attempts = Attempts(n, colluders, tmp_path)
    for advertised in subsets(attempts.cohort.names, attempts.least):
        attempts.run(advertised, list(subsets(advertised, attempts.least)))
    # Each site survives or is lost at one of three stages, and each threshold of the survivors opens.
    sizes = range(attempts.least, n + 1)
    assert attempts.done == sum(math.comb(n, k) * 3 ** (n - k) * math.comb(k, attempts.t) for k in sizes)


def test_random_dropout_patterns_of_fifty(tmp_path: Path) -> None:
    """Any of 50 sites is lost at any stage, down to the 32 that must be left."""
    attempts, draws = Attempts(50, None, tmp_path), np.random.default_rng(50)
    names = attempts.cohort.names
    lost = draws.permutation(50)
    advertised = sorted(names[place] for place in lost[: 50 - int(draws.integers(0, 5))])
    sides = attempts.cohort.sides(advertised)
    packets = deal(sides)
    for _ in range(2):
        sharers = sorted(draws.permutation(advertised)[: int(draws.integers(37, len(advertised)))].tolist())
        arrays = {name: attempts.payloads.masked(name, sides[name].masks(sharers)) for name in sharers}
        for least in (32, len(sharers) - 3):
            survivors = sorted(draws.permutation(sharers)[:least].tolist())
            openers = draws.permutation(survivors)[:32].tolist()
            opening = attempts.cohort.opening(packets, sharers, survivors, advertised)
            for name in openers:
                shares = sides[name].check_sharers(sharers, packets_to(packets, name, sharers))
                opening.add(name, Side.answer(shares, survivors))
            spool = MaskedSum(attempts.payloads.layout, tmp_path / "spool")
            for name in sharers:
                spool.add(name, arrays[name])
            assert attempts.payloads.holds(spool.result(survivors, opening.masks()), survivors)


# -- what gives no sum


@pytest.fixture
def five(tmp_path: Path) -> Attempts:
    """n = 5, c = 1, t = 4."""
    return Attempts(5, 1, tmp_path)


def sum_of(attempts: Attempts, arrays: dict[str, Any], masks: list[tuple[int, bytes]]) -> dict[str, np.ndarray]:
    spool = MaskedSum(attempts.payloads.layout, attempts.folder / "spool")
    for name, one in arrays.items():
        spool.add(name, one)
    return spool.result(list(arrays), masks)


def test_below_the_threshold_nothing_opens(five: Attempts) -> None:
    cohort, names = five.cohort, five.cohort.names
    sides = cohort.sides()
    packets = deal(sides)
    opened = answers(sides, packets, names, names)
    opening = cohort.opening(packets, names, names)
    for name in names[:3]:
        opening.add(name, opened[name])
    assert not opening.enough
    with pytest.raises(ProtocolError, match="it takes 4"):
        opening.masks()
    # And what three shares of four give when they are taken for enough is another secret.
    points = {place + 1: bytes.fromhex(opened[name]["S04"].share) for place, name in enumerate(names[:3])}
    try:
        assert shamir.join(points, 3) != cohort.secrets["S04"].seed
    except ProtocolError:
        pass  # or none at all


def test_a_mask_that_is_left_on_hides_the_sum(five: Attempts) -> None:
    names, sides = five.cohort.names, five.cohort.sides()
    arrays = {name: five.payloads.masked(name, sides[name].masks(names)) for name in names}
    masks = [sides[name].masks(names)[0] for name in names]
    assert five.payloads.holds(sum_of(five, arrays, masks), names)
    for left in range(5):
        assert not five.payloads.holds(sum_of(five, arrays, masks[:left] + masks[left + 1 :]), names)


def test_a_sum_over_others_than_the_masks_are_for_is_none(five: Attempts) -> None:
    """Masks that were opened for all five do not open four of them."""
    names, sides = five.cohort.names, five.cohort.sides()
    arrays = {name: five.payloads.masked(name, sides[name].masks(names)) for name in names}
    masks = [sides[name].masks(names)[0] for name in names]
    four = {name: arrays[name] for name in names[:4]}
    for taken in (masks, masks[:4]):
        assert not five.payloads.holds(sum_of(five, four, taken), names[:4])


@pytest.mark.parametrize("victim", ["S00", "S02", "S04"])
def test_a_site_that_was_told_another_context_spoils_the_sum(five: Attempts, victim: str) -> None:
    """Even to who has every secret: with each site's own mask taken off, those of its pairs are left."""
    cohort, names = five.cohort, five.cohort.names
    sides = cohort.sides()
    told = {**sides, victim: cohort.side(victim, context=cohort.context(weights="1" * 64))}
    arrays = {name: five.payloads.masked(name, told[name].masks(names)) for name in names}
    own = [told[name].masks(names)[0] for name in names]
    sums = sum_of(five, arrays, own)
    assert not five.payloads.holds(sums, names)
    rest = [name for name in names if name != victim]
    for some in (rest, [victim]):
        assert not five.payloads.holds(sum_of(five, {name: arrays[name] for name in some}, own), some)


@pytest.mark.parametrize("other", [["S00", "S01", "S02", "S03"], ["S00", "S02", "S03", "S04"]])
def test_a_site_that_was_told_other_sharers_spoils_the_sum(five: Attempts, other: list[str]) -> None:
    names, sides = five.cohort.names, five.cohort.sides()
    told = dict.fromkeys(names, names) | {"S00": other}
    masks = {name: sides[name].masks(told[name]) for name in names}
    arrays = {name: five.payloads.masked(name, masks[name]) for name in names}
    assert not five.payloads.holds(sum_of(five, arrays, [masks[name][0] for name in names]), names)
    # None of the first's pairs has the seed that the other end has.
    assert not {seed for _, seed in masks["S00"]} & {seed for name in names[1:] for _, seed in masks[name]}


def test_keys_of_another_attempt_open_nothing(five: Attempts) -> None:
    names, sides = five.cohort.names, five.cohort.sides()
    arrays = {name: five.payloads.masked(name, sides[name].masks(names)) for name in names}
    again = Cohort(n=5, colluders=1)
    masks = [again.side(name).masks(names)[0] for name in names]
    assert not five.payloads.holds(sum_of(five, arrays, masks), names)
    assert keys.own_seed(bytes(32), again.attempt, bytes(32), names, "S00")  # the seeds themselves are in test_keys.py


# -- the spool


def test_what_is_not_of_the_layout_is_refused_and_not_added(five: Attempts, tmp_path: Path) -> None:
    names, sides = five.cohort.names, five.cohort.sides()
    arrays = {name: five.payloads.masked(name, sides[name].masks(names)) for name in names}
    spool = MaskedSum(five.payloads.layout, tmp_path / "spool")
    good = arrays["S00"]
    hostile: list[dict[int, np.ndarray]] = [
        {},
        {ring: array for ring, array in good.items() if ring != 64},
        good | {8: np.zeros(3, np.uint8)},
        good | {32: good[32][:-1]},
        good | {32: np.append(good[32], good[32][:1])},
        good | {32: good[32].astype(np.uint64)},
        good | {32: good[32].view(np.float32)},
        good | {32: good[32].view(np.int32)},
    ]
    for one in hostile:
        with pytest.raises(ProtocolError, match="not of the layout"):
            spool.add("S00", one)
    for name in names:
        spool.add(name, arrays[name])
    assert five.payloads.holds(spool.result(names, [sides[name].masks(names)[0] for name in names]), names)


def test_the_spool_is_gone_with_the_sum(five: Attempts, tmp_path: Path) -> None:
    folder, layout = tmp_path / "spool", five.payloads.layout
    folder.mkdir()
    (folder / "left-over.bin").write_bytes(b"of an attempt that died")
    spool = MaskedSum(layout, folder)
    assert {path.name[:4] for path in folder.iterdir()} == {"sum-"}  # room for it
    masks = [(1, bytes([number]) * 32) for number in (1, 2)]
    for name, one in zip(("A/../..", "B"), masks, strict=True):  # no name of a file
        array = layout.zeros()
        mask.add_masks(array, layout, [one])
        spool.add(name, array)
    assert len(list(folder.iterdir())) == 3 * len(layout.sizes)
    assert not any(array.any() for array in spool.result(["A/../..", "B"], masks).values())
    assert not folder.exists()
    spool.close()  # again does no harm
