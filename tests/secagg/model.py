"""A symbolic model of one attempt of secure aggregation: who can open what, whatever the coordinator does.

Secrets are symbols here: a Shamir secret is known with t of its shares, a pair's mask is known with either mask key,
nothing else is. A masked input is y = x + b + the masks of its pairs, and the coordinator takes every linear
combination of the inputs in which all unknown masks vanish. A strategy is all that the coordinator can choose: what
each honest site is told (U1 with keys and requests, U2, U3), which may differ from site to site. `search` runs all.

Sets of sites are bit masks. Colluders are sites 0 to c - 1, honest sites c to n - 1, and names n to n + t - 1 are in no
roster: the coordinator invented them. Roster order is the order of the numbers.

What is not enumerated because it only helps the sites:
- Silence. An honest message more closes nothing, so a site stops only where it has nothing acceptable to go on with.
- Colluders outside a set (`colluders_leave` enumerates it too, where that is small): a colluder added to every set adds
  its shares and signatures, its masks are known, and every check allows it. What tells contexts apart stays: requests.
- Copied keys while seeds bind names (`copies` enumerates them too): such a mask has no twin that it could cancel with.

Not in the model: a second U1 in one attempt (as ONE_U2: a site that deals or masks twice is lost), what sites carry
from earlier rounds, wrong shares and blame, and anything that a sum itself says. Without U2_IN_U1 a name of U2 that is
not in U1 has no mask and no sealed share to open.

Source: Bonawitz et al. 2017 (section 6, active adversaries); Pasquini et al. 2022 (requests that differ).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import cache, cached_property
from itertools import chain, permutations, product
from typing import TypeVar

P = 1_000_003  # a prime above all coefficients: combinations are found modulo it

Vector = tuple[int, ...]
T = TypeVar("T")


class Check(StrEnum):
    """What a site does, each of which can be switched off."""

    ROSTER_N = "n and t come from the roster, not from the number told"
    U1_ROSTER = "U1 is in the roster"
    U1_SIGNED = "entries of U1 are signed by their sites"
    U1_OWN = "own entry unchanged in U1"
    U1_SIZE = "U1 >= t"
    U1_KEYS = "all keys of U1 distinct"
    CONTEXT_U1 = "the context covers U1 and its keys"
    CONTEXT_REQUEST = "the context covers the request and the weights"
    SEALS_CONTEXT = "sealed shares bind the context"
    SEALS_OPEN = "every sealed share of U2 opens"
    U2_IN_U1 = "U2 is in U1"
    U2_OWN = "itself in U2"
    U2_SIZE = "U2 >= t"
    ONE_U2 = "one masked input an attempt"
    SEEDS_CONTEXT = "seeds of pairs bind the context"
    SEEDS_U2 = "seeds of pairs bind U2"
    SEEDS_NAMES = "seeds of pairs bind both names"
    FINDING_U2 = "a finding too few of U2 declare is zeroed"
    FINDING_U3 = "no unzeroed finding that too few of U3 declare"
    U3_IN_U2 = "U3 is in U2"
    U3_OWN = "itself in U3"
    U3_SIZE = "U3 >= max(t, own minimum)"
    ONE_U3 = "one U3 an attempt"
    SIGNERS = "t signers"
    SIGNERS_DISTINCT = "signers are distinct"
    SIGNERS_IN_U3 = "signers are in U3"
    SIGNED_CONTEXT = "signatures cover the context"
    SIGNED_U2 = "signatures cover U2"
    SIGNED_U3 = "signatures cover U3"
    ONE_ANSWER = "one kind of share for a site, once"
    JOURNAL = "one U3 for the same weights, over all attempts"
    FRESH_KEYS = "fresh keys and seeds in every attempt"


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Who takes part, which checks are off, and what is enumerated.

    `declared`: the sites that label one finding, whose sum is judged in place of the whole; None judges the whole.
    `twin_keys`: two encodings of one X25519 key exist (RFC 7748, section 5, masks the top bit), so that keys can be
    copied where all must be distinct.
    """

    n: int
    c: int
    t: int
    minimum: int = 3
    off: frozenset[Check] = frozenset()
    declared: int | None = None
    twin_keys: bool = True
    copies: bool = False
    colluders_leave: bool = False

    def __hash__(self) -> int:
        return self.key  # the generated one would be computed anew at every look into a cache

    @cached_property
    def key(self) -> int:
        return hash(astuple(self))

    @cached_property
    def honest(self) -> tuple[int, ...]:
        return tuple(range(self.c, self.n))

    @cached_property
    def colluders(self) -> int:
        return (1 << self.c) - 1

    @cached_property
    def strangers(self) -> int:
        return ((1 << self.t) - 1) << self.n

    @cached_property
    def honest_mask(self) -> int:
        return ((1 << self.n) - 1) & ~self.colluders

    @cached_property
    def floor(self) -> int:
        """A finding's sum needs as many declaring sites."""
        return max(self.minimum, self.c + 2)

    @cached_property
    def least(self) -> int:
        """The fewest honest sites that a sum may hold."""
        return (max(self.t, self.minimum) if self.declared is None else self.floor) - self.c

    def on(self, check: Check) -> bool:
        return check not in self.off

    @property
    def symmetric(self) -> bool:
        """Honest sites may change places: only copied keys look at roster order, only a finding at who declares it."""
        return self.on(Check.SEEDS_NAMES) and not self.copies and self.declared is None


@dataclass(frozen=True)
class Told:
    """What a site is told before it deals shares.

    `u1`: the set; `forged`: honest sites of it whose keys the coordinator replaced; `keys[k]`: the site whose mask key
    colluder k shows as its own, or k; `request`: 0 for one that makes the update known (a learning rate of 0, a model
    with dead units), otherwise its number.
    """

    u1: int
    forged: int
    keys: tuple[int, ...]
    request: int


@dataclass(frozen=True)
class Strategy:
    """All that the coordinator chose; u2 and u3 are None where a site got nothing that it accepts."""

    told: tuple[Told, ...]
    u2: tuple[int | None, ...]
    u3: tuple[int | None, ...]


@dataclass(frozen=True)
class Attack:
    """A strategy that opens too much, and the coefficients of the honest sites' updates in what it opens."""

    cohort: Cohort
    strategy: Strategy
    sums: tuple[Vector, ...]

    @property
    def opened(self) -> frozenset[frozenset[int]]:
        """The sites of each sum."""
        return frozenset(frozenset(i for i, a in zip(self.cohort.honest, v, strict=True) if a) for v in self.sums)

    def __str__(self) -> str:
        n, c = self.cohort.n, self.cohort.c

        def names(mask: int | None) -> str:
            if mask is None:
                return "none"
            members = [i for i in range(mask.bit_length()) if mask >> i & 1]
            return "{" + " ".join(f"c{i}" if i < c else f"h{i}" if i < n else f"stranger{i}" for i in members) + "}"

        lines = [f"(n, c, t) = {n, c, self.cohort.t}, without: {'; '.join(sorted(self.cohort.off)) or 'nothing'}"]
        lines += [
            "opens " + " and ".join("+".join(f"x{i}" for i in sorted(s)) for s in sorted(self.opened, key=sorted))
        ]
        s = self.strategy
        for i, told, u2, u3 in zip(self.cohort.honest, s.told, s.u2, s.u3, strict=True):
            extra = [f"forged {names(told.forged)}"] * bool(told.forged)
            extra += [f"c{k} shows the key of h{key}" for k, key in enumerate(told.keys) if key != k]
            extra += ["its update is known beforehand"] * (told.request == 0)
            extra += [f"request {told.request}"] * (told.request > 1)
            lines.append("  ".join([f"h{i}: U1 {names(told.u1)} U2 {names(u2)} U3 {names(u3)}", *extra]))
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """What a search saw: strategies run, how many opened a sum, its fewest honest sites, the first attack."""

    strategies: int
    opening: int
    fewest: int | None
    attack: Attack | None


def subsets(mask: int) -> list[int]:
    """All subsets, the largest first."""
    found, sub = [mask], mask
    while sub:
        sub = (sub - 1) & mask
        found.append(sub)
    return sorted(found, key=lambda s: (-s.bit_count(), s))


@cache
def echelon(rows: tuple[Vector, ...]) -> tuple[Vector, ...]:
    """The reduced basis of what the rows span."""
    basis: list[list[int]] = []
    for row in rows:
        left = [v % P for v in row]
        for b in basis:
            lead = next(k for k, v in enumerate(b) if v)
            left = [(v - left[lead] * w) % P for v, w in zip(left, b, strict=True)]
        if any(left):
            lead = next(k for k, v in enumerate(left) if v)
            scale = pow(left[lead], -1, P)
            left = [v * scale % P for v in left]
            basis = [[(v - b[lead] * w) % P for v, w in zip(b, left, strict=True)] for b in basis]
            basis.append(left)
    return tuple(sorted((tuple(b) for b in basis), reverse=True))


@cache
def null_space(rows: frozenset[Vector], width: int) -> tuple[Vector, ...]:
    """A basis of the vectors that all rows map to 0."""
    basis = echelon(tuple(sorted(rows)))
    lead = [next(k for k, v in enumerate(b) if v) for b in basis]
    found = []
    for free in sorted(set(range(width)) - set(lead)):
        v = [0] * width
        v[free] = 1
        for b, k in zip(basis, lead, strict=True):
            v[k] = -b[free] % P
        found.append(tuple(v))
    return tuple(found)


def too_much(sums: tuple[Vector, ...], least: int) -> bool:
    """More than one sum, or one over fewer than `least` honest sites."""
    return len(sums) > 1 or (len(sums) == 1 and sum(map(bool, sums[0])) < least)


class Attempt:
    """The coordinator's choices up to U1, made; what follows from them for a choice of U2 and U3."""

    def __init__(self, cohort: Cohort, told: Sequence[Told]) -> None:
        self.cohort, self.told = cohort, tuple(told)
        self.place = {i: k for k, i in enumerate(cohort.honest)}
        self.t = tuple(threshold(cohort, one) for one in told)
        covers_u1, covers_request = cohort.on(Check.CONTEXT_U1), cohort.on(Check.CONTEXT_REQUEST)
        self.context = tuple(
            ((one.u1, one.forged, one.keys) if covers_u1 else None, one.request if covers_request else None)
            for one in told
        )
        self.seen: dict[tuple[int | None, ...], tuple[tuple[int, ...], tuple[tuple[int, Vector], ...]]] = {}
        self.live = tuple(one.request != 0 for one in told)

    def opens(self, i: int, j: int) -> bool:
        """Whether site i can open a share sealed to it in the name of j, whom it knows from its U1."""
        if i == j or j not in self.place or self.told[self.place[i]].forged >> j & 1:
            return True  # its own, or the coordinator has the keys that seal it
        there = self.told[self.place[j]]
        same = self.context[self.place[i]] == self.context[self.place[j]] or not self.cohort.on(Check.SEALS_CONTEXT)
        return same and bool(there.u1 >> i & 1) and not there.forged >> i & 1

    @cached_property
    def openable(self) -> tuple[int, ...]:
        """For each honest site the sites of its U1 whose sealed shares it can open."""
        return tuple(
            sum(1 << j for j in range(one.u1.bit_length()) if one.u1 >> j & 1 and self.opens(i, j))
            for i, one in zip(self.cohort.honest, self.told, strict=True)
        )

    @cached_property
    def dealt(self) -> tuple[int, ...]:
        """For each honest site i the honest sites whose true shares i holds if they are in its U2."""
        return tuple(
            sum(
                1 << j
                for j in self.cohort.honest
                if able >> j & 1
                and not (one.forged >> j & 1)
                and self.told[self.place[j]].u1 >> i & 1
                and not (self.told[self.place[j]].forged >> i & 1)
            )
            for i, one, able in zip(self.cohort.honest, self.told, self.openable, strict=True)
        )

    @cached_property
    def held(self) -> tuple[int, ...]:
        """For each honest site how many of its shares the coordinator holds from the start."""
        given = self.cohort.colluders | self.cohort.strangers
        return tuple((one.u1 & given).bit_count() + one.forged.bit_count() for one in self.told)

    @cached_property
    def u2_options(self) -> tuple[list[int | None], ...]:
        """For each honest site the U2 that it accepts."""
        cohort, on = self.cohort, self.cohort.on
        options: list[list[int | None]] = []
        for i, one, able, t in zip(cohort.honest, self.told, self.openable, self.t, strict=True):
            base = one.u1 if on(Check.U2_IN_U1) else (1 << cohort.n) - 1
            foreign = one.u1 & cohort.strangers if on(Check.U2_IN_U1) else cohort.strangers
            own = 1 << i
            found: list[int | None] = []
            for u2 in parts(cohort, base & cohort.honest_mask, base & cohort.colluders, foreign):
                if on(Check.U2_OWN) and not u2 & own:
                    continue
                if on(Check.U2_SIZE) and u2.bit_count() < t:
                    continue
                if on(Check.SEALS_OPEN) and u2 & one.u1 & ~able:
                    continue
                found.append(u2)
            options.append(found or [None])
        return tuple(options)

    def u3_options(self, k: int, u2: int | None) -> list[int | None]:
        """The U3 that the k-th honest site signs after this U2."""
        return u3_options(self.cohort, self.cohort.honest[k], u2, self.told[k].u1, self.t[k])

    def digest(self, k: int, u2: int | None, u3: int | None) -> tuple[object, ...]:
        on = self.cohort.on
        return (
            self.context[k] if on(Check.SIGNED_CONTEXT) else None,
            u2 if on(Check.SIGNED_U2) else None,
            u3 if on(Check.SIGNED_U3) else None,
        )

    def answers(self, u2: Sequence[int | None], u3: Sequence[int | None]) -> list[tuple[int, ...]]:
        """For each honest site the U3 for which it hands out shares: those that enough signers stand behind."""
        cohort, on = self.cohort, self.cohort.on
        signable = [
            tuple(one for one in ([chosen] if on(Check.ONE_U3) else self.u3_options(k, a)) if one is not None)
            for k, (a, chosen) in enumerate(zip(u2, u3, strict=True))
        ]
        signed = [{self.digest(k, u2[k], one) for one in every} for k, every in enumerate(signable)]
        answered: list[tuple[int, ...]] = []
        for k, chosen in enumerate(u3):
            asked = signable[k] if not on(Check.ONE_ANSWER) else () if chosen is None else (chosen,)
            given = []
            for one in asked:
                wanted = self.digest(k, u2[k], one)
                signers = cohort.colluders | (self.told[k].u1 & cohort.strangers)
                signers |= sum(1 << i for i, theirs in zip(cohort.honest, signed, strict=True) if wanted in theirs)
                if on(Check.SIGNERS_IN_U3):
                    signers &= one
                enough = signers.bit_count() >= self.t[k] or (not on(Check.SIGNERS_DISTINCT) and signers > 0)
                if enough or not on(Check.SIGNERS):
                    given.append(one)
            answered.append(tuple(given))
        return answered

    def secrets(self, u2: Sequence[int | None], answered: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """The honest sites whose self-mask seed is known, and those whose mask key is."""
        selves, keys = list(self.held), list(self.held)
        for k, given in enumerate(answered):
            if not given:
                continue
            known = (u2[k] or 0) & self.dealt[k]
            survivors = dropped = 0
            for u3 in given:
                survivors |= u3 & known
                dropped |= ~u3 & known
            for j, i in enumerate(self.cohort.honest):
                selves[j] += survivors >> i & 1
                keys[j] += dropped >> i & 1
        return self.reached(selves), self.reached(keys)

    def reached(self, counts: Sequence[int]) -> int:
        return sum(1 << i for i, have, t in zip(self.cohort.honest, counts, self.t, strict=True) if have >= t)

    def inputs(self, u2: tuple[int | None, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, Vector], ...]]:
        """The honest site of each masked input, and each pair mask: (sites whose key opens it, its coefficients)."""
        if u2 not in self.seen:
            self.seen[u2] = self.masked(u2)
        return self.seen[u2]

    def masked(self, u2: tuple[int | None, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, Vector], ...]]:
        on = self.cohort.on
        sent = [
            (k, one)
            for k, chosen in enumerate(u2)
            for one in ([chosen] if on(Check.ONE_U2) or chosen is None else self.u2_options[k])
            if one is not None
        ]
        masks: dict[tuple[int, object, object, object], list[int]] = {}
        for column, (k, peers) in enumerate(sent):
            i, told = self.cohort.honest[k], self.told[k]
            for j in range(self.cohort.n):
                if j == i or not (peers & told.u1) >> j & 1 or told.forged >> j & 1:
                    continue
                owner = told.keys[j] if j < self.cohort.c else j
                if owner < self.cohort.c:
                    continue  # a colluder's true key: the mask is known
                seed = (
                    1 << i | 1 << owner,
                    self.context[k] if on(Check.SEEDS_CONTEXT) else None,
                    peers if on(Check.SEEDS_U2) else None,
                    frozenset((i, j)) if on(Check.SEEDS_NAMES) else None,
                )
                masks.setdefault(seed, [0] * len(sent))[column] += 1 if i < j else -1
        pairs = ((seed[0], tuple(v)) for seed, v in masks.items())
        return tuple(k for k, _ in sent), tuple(pairs)

    def sums(self, u2: tuple[int | None, ...], self_masks: int, mask_keys: int) -> tuple[Vector, ...]:
        """A basis of what the coordinator learns: coefficients of the honest sites' unknown updates."""
        if not self_masks:
            return ()
        sites, masks = self.inputs(u2)
        rows = {v for owners, v in masks if not owners & mask_keys}
        for k, i in enumerate(self.cohort.honest):
            if not self_masks >> i & 1 and k in sites:
                rows.add(tuple(int(site == k) for site in sites))
        kept = [self.live[k] and self.declares(k, u2[k]) for k in range(len(u2))]
        found = []
        for v in null_space(frozenset(rows), len(sites)):
            total = [0] * len(u2)
            for site, a in zip(sites, v, strict=True):
                total[site] += a if kept[site] else 0
            found.append(tuple(total))
        return echelon(tuple(found))

    def declares(self, k: int, u2: int | None) -> bool:
        """Whether the k-th honest site's value for the finding is in its input (always, if the whole is judged)."""
        cohort = self.cohort
        if cohort.declared is None:
            return True
        return bool(cohort.declared >> cohort.honest[k] & 1) and not zeroed(cohort, u2 or 0)


def zeroed(cohort: Cohort, u2: int) -> bool:
    """Whether the finding's holders zero it."""
    return cohort.on(Check.FINDING_U2) and (u2 & (cohort.declared or 0)).bit_count() < cohort.floor


def threshold(cohort: Cohort, told: Told) -> int:
    """The t that a site deals with: the roster's, or the least that is lawful for the number told."""
    if cohort.on(Check.ROSTER_N):
        return cohort.t
    return max((told.u1.bit_count() + cohort.c) // 2 + 1, cohort.c + 2)


@cache
def parts(cohort: Cohort, honest: int, colluders: int, strangers: int) -> list[int]:
    """Subsets to try: every one of honest sites, the colluders (or every subset), no stranger or all."""
    taken = subsets(colluders) if cohort.colluders_leave else [colluders]
    return [a | b | s for a in subsets(honest) for b in taken for s in ((0, strangers) if strangers else (0,))]


@cache
def u3_options(cohort: Cohort, i: int, u2: int | None, u1: int, t: int) -> list[int | None]:
    if u2 is None:
        return [None]
    on = cohort.on
    base = u2 if on(Check.U3_IN_U2) else u1 | u2 | ((1 << cohort.n) - 1)
    foreign = u2 & cohort.strangers if on(Check.U3_IN_U2) else cohort.strangers
    found: list[int | None] = []
    for u3 in parts(cohort, base & cohort.honest_mask, base & cohort.colluders, foreign):
        if on(Check.U3_OWN) and not u3 >> i & 1:
            continue
        if on(Check.U3_SIZE) and u3.bit_count() < max(t, cohort.minimum):
            continue
        if cohort.declared is not None and on(Check.FINDING_U3) and not zeroed(cohort, u2):
            if (u3 & cohort.declared).bit_count() < cohort.floor:
                continue
        found.append(u3)
    return found or [None]


@cache
def told_options(cohort: Cohort, i: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """(U1, forged, keys) that honest site i accepts, what an honest coordinator would say first."""
    on = cohort.on
    others = cohort.honest_mask & ~(1 << i)
    found = []
    for u1 in parts(cohort, cohort.honest_mask, cohort.colluders, 0 if on(Check.U1_ROSTER) else cohort.strangers):
        if on(Check.U1_OWN) and not u1 >> i & 1:
            continue
        forgeable = (0 if on(Check.U1_SIGNED) else others) | (0 if on(Check.U1_OWN) else 1 << i)
        for forged in reversed(subsets(u1 & forgeable)):
            for keys in key_options(cohort, u1):
                if on(Check.U1_SIZE) and u1.bit_count() < threshold(cohort, Told(u1, 0, (), 1)):
                    continue
                found.append((u1, forged, keys))
    return found


def key_options(cohort: Cohort, u1: int) -> Iterator[tuple[int, ...]]:
    """Whose mask keys the colluders show."""
    own = tuple(range(cohort.c))
    if cohort.on(Check.SEEDS_NAMES) and not cohort.copies:
        yield own
        return
    for keys in product(*([k, *cohort.honest] for k in own)):
        shown = [key for k, key in enumerate(keys) if key != k]
        doubled = len(set(shown)) < len(shown) or any(u1 >> key & 1 for key in shown)
        if doubled and cohort.on(Check.U1_KEYS) and not cohort.twin_keys:
            continue
        yield keys


def requests(cohort: Cohort) -> list[Vector]:
    """Which sites are told the same, 0 first: the update is known. One for each way up to names where names matter not.

    An honest coordinator's (all 1) comes first, then those that leave one site apart.
    """
    h = len(cohort.honest)
    found = set()
    for pattern in product(range(h + 1), repeat=h):
        seen: dict[int, int] = {0: 0}
        labels = [seen.setdefault(label, len(seen)) for label in pattern]
        if cohort.symmetric:
            sizes = sorted((labels.count(label) for label in set(labels) - {0}), reverse=True)
            labels = [0] * labels.count(0) + [k + 1 for k, size in enumerate(sizes) for _ in range(size)]
        found.add(tuple(labels))
    return sorted(found, key=lambda v: (v != (1,) * h, len(set(v)), v))


def attempts(cohort: Cohort, patterns: Sequence[Vector]) -> Iterator[tuple[Attempt, list[Vector]]]:
    """All choices up to U1, up to names of honest sites where these do not matter, and the renamings that keep each.

    What is told to all alike comes first: most attacks begin so.
    """
    options = [told_options(cohort, i) for i in cohort.honest]
    common = [(one,) * len(options) for one in options[0] if all(one in theirs for theirs in options)]
    for pattern in patterns:
        names = [p for p in permutations(range(len(pattern))) if cohort.symmetric and alike(pattern, p)]
        for chosen in chain(common, (each for each in product(*options) if len(set(each)) > 1)):
            kept = []
            for p in names:
                image = renamed(cohort, chosen, p)
                if image < chosen:
                    break
                if image == chosen:
                    kept.append(p)
            else:
                yield Attempt(cohort, [Told(*one, label) for one, label in zip(chosen, pattern, strict=True)]), kept


def first_of_kind(
    cohort: Cohort, options: Sequence[list[int | None]], names: Sequence[Vector]
) -> Iterator[tuple[tuple[int | None, ...], list[Vector]]]:
    """One choice of sets for each site out of those that only differ by a renaming, and the renamings that keep it."""
    for chosen in product(*options):
        kept = []
        for p in names:
            image = list(chosen)
            for k, one in enumerate(chosen):
                image[p[k]] = None if one is None else swap(cohort.c, p, one)
            ranks = [(-1 if a is None else a, -1 if b is None else b) for a, b in zip(chosen, image, strict=True)]
            order = next((a - b for a, b in ranks if a != b), 0)
            if order > 0:
                break
            if order == 0:
                kept.append(p)
        else:
            yield chosen, kept


def alike(pattern: Vector, p: Sequence[int]) -> bool:
    """Whether renaming the sites by p leaves who is told the same as whom."""
    moved = [0] * len(pattern)
    for k, label in enumerate(pattern):
        moved[p[k]] = label
    pairs = set(zip(pattern, moved, strict=True))
    live = {a for a, _ in pairs}, {b for _, b in pairs}
    return len(pairs) == len(live[0]) == len(live[1]) and all((a == 0) == (b == 0) for a, b in pairs)


def renamed(
    cohort: Cohort, chosen: Sequence[tuple[int, int, tuple[int, ...]]], p: Vector
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """What is told if the k-th honest site takes the name of the p[k]-th."""
    moved: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())] * len(chosen)
    for k, (u1, forged, keys) in enumerate(chosen):
        moved[p[k]] = (swap(cohort.c, p, u1), swap(cohort.c, p, forged), keys)
    return tuple(moved)


@cache
def swap(c: int, p: Vector, mask: int) -> int:
    kept = mask & ~(((1 << len(p)) - 1) << c)
    return kept | sum(1 << (c + p[k]) for k in range(len(p)) if mask >> (c + k) & 1)


def search(cohort: Cohort) -> Result:
    """Run every strategy; the first that opens too much ends it."""
    strategies = opening = 0
    fewest: int | None = None
    for attempt, names in attempts(cohort, requests(cohort)):
        for u2, kept in first_of_kind(cohort, attempt.u2_options, names):
            u3_options = [attempt.u3_options(k, one) for k, one in enumerate(u2)]
            for u3, _ in first_of_kind(cohort, u3_options, kept):
                strategies += 1
                sums = attempt.sums(u2, *attempt.secrets(u2, attempt.answers(u2, u3)))
                if not sums:
                    continue
                opening += 1
                if too_much(sums, cohort.least):
                    strategy = Strategy(attempt.told, u2, u3)
                    return Result(strategies, opening, fewest, Attack(cohort, strategy, sums))
                size = sum(map(bool, sums[0]))
                fewest = size if fewest is None else min(fewest, size)
    return Result(strategies, opening, fewest, None)


def judge(cohort: Cohort, strategy: Strategy) -> tuple[Vector, ...]:
    """What one strategy opens.

    Raises: ValueError if a site would not accept what the strategy tells it.
    """
    attempt = Attempt(cohort, strategy.told)
    for k, (i, told) in enumerate(zip(cohort.honest, strategy.told, strict=True)):
        if (told.u1, told.forged, told.keys) not in told_options(cohort, i):
            raise ValueError(f"site {i} refuses its U1")
        if strategy.u2[k] is not None and strategy.u2[k] not in attempt.u2_options[k]:
            raise ValueError(f"site {i} refuses its U2")
        if strategy.u3[k] is not None and strategy.u3[k] not in attempt.u3_options(k, strategy.u2[k]):
            raise ValueError(f"site {i} refuses its U3")
    answered = attempt.answers(strategy.u2, strategy.u3)
    return attempt.sums(strategy.u2, *attempt.secrets(strategy.u2, answered))


def sample(cohort: Cohort, tries: int, draw: random.Random) -> Result:
    """As `search`, over random strategies, in which many sites are told the same."""
    opening, fewest = 0, None
    patterns = requests(cohort)
    for strategies in range(1, tries + 1):
        told = alike_mostly([told_options(cohort, i) for i in cohort.honest], draw)
        pattern = patterns[0] if draw.random() < 0.7 else draw.choice(patterns)
        pattern = tuple(draw.sample(pattern, len(pattern)))
        attempt = Attempt(cohort, [Told(*one, label) for one, label in zip(told, pattern, strict=True)])
        u2 = tuple(alike_mostly(attempt.u2_options, draw))
        u3 = tuple(alike_mostly([attempt.u3_options(k, one) for k, one in enumerate(u2)], draw))
        sums = attempt.sums(u2, *attempt.secrets(u2, attempt.answers(u2, u3)))
        if sums:
            opening += 1
            if too_much(sums, cohort.least):
                return Result(strategies, opening, fewest, Attack(cohort, Strategy(attempt.told, u2, u3), sums))
            fewest = min(fewest or cohort.n, sum(map(bool, sums[0])))
    return Result(tries, opening, fewest, None)


def alike_mostly(options: Sequence[Sequence[T]], draw: random.Random) -> list[T]:
    """A choice for each site: a favourite (often the largest) wherever it is accepted, but for one site or for some."""
    favourite = draw.choice(options)[0] if draw.random() < 0.5 else draw.choice(draw.choice(options))
    apart = draw.randrange(2 * len(options))  # half of the time no site
    loyal = draw.choice((0.5, 1.0, 1.0))
    return [
        favourite if favourite in own and k != apart and draw.random() < loyal else draw.choice(own)
        for k, own in enumerate(options)
    ]


def honest_attempts(cohort: Cohort) -> Iterator[tuple[Attempt, tuple[int | None, ...], tuple[tuple[int, ...], ...]]]:
    """All strategies with one request, and in each every choice of whom to ask for shares: (attempt, U2, answers)."""
    for attempt, _ in attempts(cohort, [(1,) * len(cohort.honest)]):
        for u2 in product(*attempt.u2_options):
            seen = set()
            for u3 in product(*(attempt.u3_options(k, one) for k, one in enumerate(u2))):
                ready = attempt.answers(u2, u3)
                for answered in product(*([given, ()] if given else [()] for given in ready)):
                    if answered not in seen:
                        seen.add(answered)
                        yield attempt, u2, answered


def differencing(cohort: Cohort) -> tuple[int, tuple[Vector, ...] | None]:
    """Two attempts on the same weights, so the same updates: (pairs tried, what the first bad pair opens).

    The journal's check is on the answer: a site that answered for one U3 answers for no other, whatever it signed.
    """
    left = set()
    for attempt, u2, answered in honest_attempts(cohort):
        opened = attempt.sums(u2, *attempt.secrets(u2, answered))
        left.add((tuple(given[0] if given else None for given in answered), opened))
    tried = 0
    for (a, one), (b, other) in product(sorted(left, key=repr), repeat=2):
        bound = cohort.on(Check.JOURNAL)
        if bound and any(x is not None and y is not None and x != y for x, y in zip(a, b, strict=True)):
            continue
        tried += 1
        both = echelon(one + other)
        if too_much(both, cohort.least):
            return tried, both
    return tried, None


def kept_keys(cohort: Cohort) -> tuple[int, tuple[Vector, ...] | None]:
    """Two attempts on different weights: (pairs tried, what the first bad pair opens of the first attempt).

    Without fresh keys a secret that the second attempt opens is a secret of the first.
    """
    known = {a.secrets(u2, answered) for a, u2, answered in honest_attempts(cohort)}
    later = sorted(known) if not cohort.on(Check.FRESH_KEYS) else [(0, 0)]
    tried = 0
    for attempt, u2, answered in honest_attempts(cohort):
        selves, keys = attempt.secrets(u2, answered)
        for more_selves, more_keys in later:
            tried += 1
            opened = attempt.sums(u2, selves | more_selves, keys | more_keys)
            if too_much(opened, cohort.least):
                return tried, opened
    return tried, None
