"""Cost of a sum under masks: bytes of the messages as they are written, seconds measured here and scaled.

Seconds are of one thread that has a processor to itself, in memory: disks, links, training and the checks that the
coordinator makes while replies come are not in them.  A site with n − 1 peers adds n keystreams to its values; with d
sites lost of n the coordinator takes n − d keystreams of survivors' own masks off their sum, and (n − d)·d of pairs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.errors import ConfigError, Problems
from chexfound.identity import signing
from chexfound.identity.roster import Keys, Roster
from chexfound.secagg import keys, messages, shamir
from chexfound.secagg.fixed import UNSIGNED, Layout, Section, levels
from chexfound.secagg.keys import Secrets
from chexfound.secagg.mask import add_masks, masked
from chexfound.secagg.messages import Attempt
from chexfound.secagg.parameters import MINIMUM, Parameters
from chexfound.secagg.site import Side, advertise, point

SITES = (3, 4, 5, 8, 16, 32, 64, 128)
LOST = 0.1  # of the sites, in the coordinator's seconds
SAMPLE = 2**21  # values that are masked to measure, under so many masks at a time
MASKS = 5
ROUNDS = 7
NAME_BYTES = 12  # of a site's name, in the messages


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds on this machine: of one value, but for the last three."""

    quantise: float
    mask: float  # a keystream, and adding it
    add: float  # one masked input to the sum
    hash: float
    agree: float  # X25519 and HKDF
    sign: float
    verify: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold the cost of one sum, all sites of the federation in it.

    Args:
        lost: sites, in `unmask_s`: a tenth, but one where one may be, and no more than may.
        site_s: of quantising, masking, hashing and keys, at each site.
        unmask_s: at the coordinator, from the shares to the sum.
        payload_bytes: that a site sends, in place of its update.
        up_bytes: of a site's other messages.
        down_bytes: that it is sent beside the weights.
    """

    parameters: Parameters
    lost: int
    site_s: float
    unmask_s: float
    payload_bytes: int
    up_bytes: int
    down_bytes: int


def possible(
    sites: list[int], colluders: int | None, minimum: int, ring: int, least: int
) -> tuple[list[Parameters], dict[int, str]]:
    """The parameters for each number of sites, and why there are none for the others.

    Args:
        sites: numbers of them.
        colluders: as in `Parameters.of`.
        minimum: likewise.
        ring: of the values.
        least: levels that a site's value must have in it.
    """
    found, refused = [], {}
    for n in sites:
        try:
            parameters = Parameters.of(n, colluders, minimum)
            if (left := levels(ring, n)) < least:
                raise ConfigError(
                    f"a ring of {ring} bits leaves {left} levels of a value to each of {n} sites, of {least}"
                )
            found.append(parameters)
        except ConfigError as error:
            refused[n] = str(error)
    return found, refused


def check(refused: dict[int, str]) -> None:
    """Raise ConfigError with every reason, if there is one."""
    problems = Problems(ConfigError, "plan-secagg")
    for n, reason in refused.items():
        problems.add(f"n = {n}: {reason}")
    problems.check()


def measure(ring: int) -> Speeds:
    """Take a second to measure this machine, by processor time; the shortest of a few rounds."""
    layout = Layout((Section("values", (SAMPLE,), ring, 1.0),), MINIMUM)
    values = {"values": np.random.default_rng(0).normal(0, 0.1, SAMPLE).astype(np.float32)}
    out, total = layout.zeros(), np.zeros(SAMPLE, UNSIGNED[ring])
    whole = _seconds(lambda: masked(layout, values, {"values": 0.5}, _masks(), out))
    masks = _seconds(lambda: add_masks(out, layout, _masks()))
    private, peer = os.urandom(32), keys.public(os.urandom(32))
    signer = Ed25519PrivateKey.generate()
    signature = signer.sign(b"of a length")
    return Speeds(
        quantise=max(whole - masks, 0.0) / SAMPLE,
        mask=masks / MASKS / SAMPLE,
        add=_seconds(lambda: np.add(total, out[ring], out=total)) / SAMPLE,
        hash=_seconds(lambda: hashlib.sha256(out[ring].data).digest()) / SAMPLE,
        agree=_seconds(lambda: keys.agree(private, peer, "chexfound secagg pair v1", []), 50),
        sign=_seconds(lambda: signer.sign(b"of a length"), 50),
        verify=_seconds(lambda: signer.public_key().verify(signature, b"of a length"), 50),
    )


def _masks() -> list[tuple[int, bytes]]:
    return [(1, os.urandom(32)) for _ in range(MASKS)]


def _seconds(what: Callable[[], object], times: int = 1) -> float:
    what()
    took = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(times):
            what()
        took.append((time.thread_time() - started) / times)
    return min(took)


def cost(parameters: Parameters, values: int, told_bytes: int, ring: int, speeds: Speeds) -> Cost:
    """Reckon the cost of a sum of so many values.

    Args:
        parameters: of the federation.
        values: of a site, in the ring.
        told_bytes: of the tensors' shapes and ranges, as a site is told them.
        ring: bits.
        speeds: of this machine.
    """
    n, lost = parameters.n, min(parameters.dropouts, max(1, round(LOST * parameters.n)))
    left = n - lost
    attempt = _Attempt(parameters)
    split, join = attempt.shamir_seconds()
    # A site opens the shares dealt to it twice: before it masks, and again before it answers.
    site = values * (speeds.quantise + n * speeds.mask + 2 * speeds.hash)
    site += 2 * split + (4 * n - 1) * speeds.agree + (n + 3) * speeds.sign + 4 * n * speeds.verify
    unmask = values * (left * speeds.add + (left + left * lost) * speeds.mask) + join + left * lost * speeds.agree
    up, down = attempt.message_bytes()
    return Cost(
        parameters=parameters,
        lost=lost,
        site_s=site,
        unmask_s=unmask,
        payload_bytes=values * ring // 8,
        up_bytes=up,
        down_bytes=down + told_bytes,
    )


class _Attempt:
    """One of so many sites, of which one says its part."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        key = Ed25519PrivateKey.generate()
        names = [f"{number:0{NAME_BYTES}d}" for number in range(parameters.n)]
        lines = Keys("ecdsa-sha2-nistp384 ".ljust(204, "A"), signing.public_line(key.public_key()))
        self.sites = Roster(federation="federation", serial=1, sites=dict.fromkeys(names, lines))
        attempt = Attempt(run=2**63, phase="pretrain", round=999, attempt=1)
        secrets = Secrets.fresh()
        advert = advertise(key, attempt, names[0], secrets, findings=[], minimum=parameters.minimum, state="0" * 64)
        self.side = Side(
            key=key, site=names[0], attempt=attempt, sites=self.sites, parameters=parameters, secrets=secrets,
            adverts=dict.fromkeys(names, advert), context=bytes(32),
        )  # fmt: skip

    def shamir_seconds(self) -> tuple[float, float]:
        """Time the dealing of one secret, and the rebuilding of one of each site."""
        n, t = self.parameters.n, self.parameters.t
        points = [point(self.sites, name) for name in self.sites.sites]
        started = time.thread_time()
        shares = shamir.split(os.urandom(32), points, t)
        dealt = time.thread_time()
        kept = {place: shares[place] for place in points[:t]}
        for _ in range(n):
            shamir.join(kept, t)
        return dealt - started, time.thread_time() - dealt

    def message_bytes(self) -> tuple[int, int]:
        """Up and down, at one site: all stages' JSON, and the roster that comes with each request."""
        names = sorted(self.sites.sites)
        advert, signature = _bytes(asdict(self.side.adverts[names[0]])), _bytes("0" * 128)
        packets = sum(_bytes(asdict(packet)) for packet in self.side.deal())
        opened = messages.Opened(kind="seed", share="0" * 2 * shamir.SHARE_BYTES, salt="0" * 64)
        n, name = len(names), _bytes(names[0])
        up = advert + packets + 2 * signature + n * (name + _bytes(asdict(opened)))
        down = n * advert + packets + 2 * n * name + n * (name + signature) + 5 * _bytes(self.sites.as_dict())
        return up, down


def _bytes(value: object) -> int:
    return len(json.dumps(value)) + 2  # with what stands between it and the next
