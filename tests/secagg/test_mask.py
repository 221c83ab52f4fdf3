from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import ProtocolError
from chexfound.secagg import mask
from chexfound.secagg.fixed import Layout, Section, decode, levels
from chexfound.secagg.mask import Keystream, add_masks, masked, ring_key

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "secagg.json").read_text())
hexed = bytes.fromhex


# -- the primitives of the installed `cryptography`, against published vectors


def test_aes_ctr_gives_nists_vector():
    vector = VECTORS["aes256_ctr"]
    cipher = Cipher(algorithms.AES256(hexed(vector["key"])), modes.CTR(hexed(vector["counter"]))).encryptor()
    plain = hexed(vector["plaintext"])
    out = bytearray(len(plain) + 15)
    # In unequal parts, as chunks are.
    done = sum(
        cipher.update_into(plain[start:stop], memoryview(out)[start:])
        for start, stop in itertools.pairwise((0, 20, 64))
    )
    assert out[:done].hex() == vector["ciphertext"]


@pytest.mark.parametrize("vector", VECTORS["hkdf_sha256"], ids=lambda vector: vector["origin"])
def test_hkdf_gives_the_rfcs_vectors(vector):
    kdf = HKDF(SHA256(), len(vector["okm"]) // 2, hexed(vector["salt"]) or None, hexed(vector["info"]))
    assert kdf.derive(hexed(vector["ikm"])).hex() == vector["okm"]


def test_x25519_gives_the_rfcs_vector():
    vector = VECTORS["x25519"]
    keys = [X25519PrivateKey.from_private_bytes(hexed(one)) for one in vector["private"]]
    assert [key.public_key().public_bytes_raw().hex() for key in keys] == vector["public"]
    others = [X25519PublicKey.from_public_bytes(hexed(one)) for one in reversed(vector["public"])]
    assert [key.exchange(other).hex() for key, other in zip(keys, others, strict=True)] == [vector["shared"]] * 2


def test_ed25519_gives_the_rfcs_vector():
    vector = VECTORS["ed25519"]
    key = Ed25519PrivateKey.from_private_bytes(hexed(vector["private"]))
    assert key.public_key().public_bytes_raw().hex() == vector["public"]
    assert key.sign(hexed(vector["message"])).hex() == vector["signature"]
    with pytest.raises(InvalidSignature):
        key.public_key().verify(hexed(vector["signature"]), b"\x73")


# -- keystreams


def by_hand(seed, ring, size):
    """The first bytes of a mask: HKDF of RFC 5869 by HMAC, and AES over the counters one by one."""
    extracted = hmac.digest(bytes(32), seed, hashlib.sha256)
    key = hmac.digest(extracted, b"chexfound mask v1 ring %d\x01" % ring, hashlib.sha256)
    blocks = b"".join(number.to_bytes(16, "big") for number in range(-(-size // 16)))
    return Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(blocks)[:size]  # noqa: S305


@pytest.mark.parametrize("ring", [16, 32, 64])
def test_a_mask_is_what_its_description_says(ring, monkeypatch):
    monkeypatch.setattr(mask, "CHUNK", 50)
    seed = bytes(range(32))
    held = Layout((Section("a", (333,), ring),), 3)
    sums = held.zeros()
    add_masks(sums, held, [(1, seed)])
    assert sums[ring].tobytes() == by_hand(seed, ring, 333 * ring // 8)
    add_masks(sums, held, [(-1, seed)])
    assert not sums[ring].any()


def test_a_keystream_goes_on_where_it_stopped():
    buffer, parts = np.zeros(200, np.uint8), b""
    stream = Keystream(bytes(32))
    for size in (1, 15, 16, 17, 40, 7):
        stream.fill(buffer.data, size)
        parts += buffer[:size].tobytes()
    Keystream(bytes(32)).fill(buffer.data, len(parts))
    assert buffer[: len(parts)].tobytes() == parts


def test_each_ring_has_its_key():
    assert len({ring_key(bytes(32), ring) for ring in (16, 32, 64)} | {bytes(32)}) == 4


# -- masked payloads

SECTIONS = (
    Section("a", (300, 7), 32, 0.5),
    Section("b", (5, 130), 16, 0.25),
    Section("rows", (30, 3), 32, 1.0),
    Section("scalar", (), 32, 2.0),
    Section("seen", (4,), 32),
    Section("wide", (2, 2), 64, 1.0),
    Section("hours", (), 64),
)
FIXED = [section for section in SECTIONS if section.fixed]


def values_of(rng, scale=1.0):
    values = {
        section.name: (rng.uniform(-1, 1, section.shape) * section.range * scale).astype(np.float32)
        for section in FIXED
    }
    return {**values, "seen": rng.integers(0, 1000, 4), "hours": np.asarray(rng.integers(0, 2**40))}


def weights_of(rng):
    return {section.name: float(rng.uniform(0, 1)) for section in FIXED} | {
        "rows": rng.uniform(0, 1, 30), "b": np.array([0.0, 1.0, 0.5, 0.25, 0.1])
    }  # fmt: skip


def weighted(values, weights):
    return {
        name: values[name].astype(np.float64) * np.reshape(weight, (-1,) + (1,) * (values[name].ndim - 1))
        if np.ndim(weight) else values[name].astype(np.float64) * weight
        for name, weight in weights.items()
    }  # fmt: skip


@pytest.fixture(params=[mask.CHUNK, 64])
def chunk(request, monkeypatch):
    monkeypatch.setattr(mask, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_masks_come_off_and_leave_each_value_within_a_step(chunk, seed):
    rng, held = np.random.default_rng(seed), Layout(SECTIONS, 4)
    values, weights, masks, out = values_of(rng), weights_of(rng), some_masks(5), held.zeros()
    masked(held, values, weights, masks, out)
    add_masks(out, held, [(-sign, key) for sign, key in masks])
    found = decode(held, out)
    for section in FIXED:
        off = np.abs(found[section.name] - weighted(values, weights)[section.name])
        assert off.max() <= section.range / levels(section.ring, 4) * (1 + 1e-9)
    assert found["seen"].tolist() == values["seen"].tolist()
    assert int(found["hours"]) == int(values["hours"])
    assert found["clipped"].tolist() == [0] * len(FIXED)


def some_masks(count):
    return [((-1) ** number, os.urandom(32)) for number in range(count)]


@pytest.mark.parametrize("sites", [2, 5])
def test_pair_masks_cancel_in_the_sum_of_all_and_self_masks_come_off(sites):
    rng, held = np.random.default_rng(sites), Layout(SECTIONS, sites)
    pairs = {pair: os.urandom(32) for pair in itertools.combinations(range(sites), 2)}
    own = [os.urandom(32) for _ in range(sites)]
    total, exact, counts = held.zeros(), {section.name: 0.0 for section in FIXED}, 0
    for site in range(sites):
        values, weights = values_of(rng), weights_of(rng)
        masks = [(1 if site == pair[0] else -1, seed) for pair, seed in pairs.items() if site in pair]
        out = held.zeros()
        masked(held, values, weights, [*masks, (1, own[site])], out)
        for ring, array in out.items():
            total[ring] += array
        exact = {name: exact[name] + part for name, part in weighted(values, weights).items()}
        counts = counts + values["seen"]
    add_masks(total, held, [(-1, seed) for seed in own])
    found = decode(held, total)
    assert found["seen"].tolist() == counts.tolist()
    for section in FIXED:
        step = section.range / levels(section.ring, sites)
        assert np.abs(found[section.name] - exact[section.name]).max() <= sites * step * (1 + 1e-9)


def test_what_is_left_of_one_missing_mask_is_noise():
    held = Layout((Section("a", (100_000,), 32, 1.0),), 3)
    masks, out = some_masks(3), held.zeros()
    masked(held, {"a": np.full(100_000, 0.5, np.float32)}, {"a": 1.0}, masks, out)
    add_masks(out, held, [(-sign, seed) for sign, seed in masks[1:]])
    spread = decode(held, out)["a"] * levels(32, 3) / 2**31
    assert abs(spread.mean()) < 0.02
    assert abs(spread.std() - 3**-0.5) < 0.02


@pytest.mark.parametrize("ring", [16, 32])
def test_a_masked_vector_is_uniform(ring):
    """Chi-squared of each of its bytes over 256 bins, of a constant input: P < 1e-9 above 410."""
    held = Layout((Section("a", (200_000,), ring, 1.0),), 4)
    out = held.zeros()
    masked(held, {"a": np.full(200_000, 0.75, np.float32)}, {"a": 1.0}, some_masks(4), out)
    for place in range(ring // 8):
        counts = np.bincount(out[ring].view(np.uint8)[place :: ring // 8], minlength=256)
        assert float(((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum()) < 410


def test_what_is_clipped_is_counted_section_by_section(chunk):
    held = Layout((*SECTIONS[:3], Section("seen", (), 64)), 4)
    values = {
        "a": np.linspace(-1, 1, 2100, dtype=np.float32).reshape(300, 7), "b": np.full((5, 130), 0.25, np.float32),
        "rows": np.full((30, 3), -4.0, np.float32), "seen": np.asarray(3),
    }  # fmt: skip
    rows = np.linspace(0, 1, 30)
    masks, out = some_masks(2), held.zeros()
    masked(held, values, {"a": 0.8, "b": 1.0, "rows": rows}, masks, out)
    add_masks(out, held, [(-sign, seed) for sign, seed in masks])
    found = decode(held, out)
    assert found["clipped"].tolist() == [int((np.abs(values["a"]) * 0.8 > 0.5).sum()), 0, int((rows > 0.25).sum()) * 3]
    assert np.abs(found["a"] - np.clip(values["a"] * 0.8, -0.5, 0.5)).max() <= 0.5 / levels(32, 4) * 1.1
    assert found["rows"][-1].tolist() == pytest.approx([-1.0] * 3, abs=2 / levels(32, 4))
    assert int(found["seen"]) == 3


def test_rounding_differs_from_call_to_call():
    """Its bits are drawn afresh, and are none of a mask's."""
    held = Layout((Section("a", (1000,), 32, 1.0),), 3)
    found = []
    for _ in range(2):
        out = held.zeros()
        masked(held, {"a": np.full(1000, 0.3, np.float32)}, {"a": 1.0}, [(1, bytes(32))], out)
        found.append(out[32])
    assert (found[0] != found[1]).any()
    assert np.abs(found[0].view(np.int32).astype(np.int64) - found[1].view(np.int32)).max() <= 1


@given(st.floats(2.0**-20, 1.0), st.sampled_from([1e-6, 1e-3, 1.0]))
@settings(max_examples=10, deadline=None)
def test_the_mean_of_many_small_values_is_theirs(weight, size):
    """Values of a fraction of a step and of many: six standard errors, one value's being half a step at most."""
    held = Layout((Section("a", (200_000,), 32, 1.0),), 100)
    step, out = 1 / levels(32, 100), held.zeros()
    masked(held, {"a": np.full(200_000, size * 0.9, np.float32)}, {"a": weight}, [(1, bytes(32))], out)
    add_masks(out, held, [(-1, bytes(32))])
    assert abs(decode(held, out)["a"].mean() - float(np.float32(size * 0.9)) * weight) < 6 * step / 2 / 200_000**0.5


# -- what is refused, before anything is written


def changed(**changes):
    rng = np.random.default_rng(0)
    return {**values_of(rng), **changes}


def weights(**changes):
    return {**weights_of(np.random.default_rng(0)), **changes}


NAN, INF = np.full((300, 7), 0.1, np.float32), np.full((300, 7), 0.1, np.float32)
NAN[299, 6], INF[0, 0] = np.nan, -np.inf
GOOD = [(1, b"k" * 32)]


@pytest.mark.parametrize(
    ("values", "weights", "masks", "match"),
    [
        (changed(extra=np.zeros(1)), weights(), GOOD, r"names: \['extra'\]"),
        ({"a": NAN}, weights(), GOOD, "names"),
        (changed(clipped=np.zeros(5, int)), weights(), GOOD, r"names: \['clipped'\]"),
        (changed(a=np.zeros((7, 300), np.float32)), weights(), GOOD, r"'a': shape \(7, 300\) where \(300, 7\)"),
        (changed(a=np.zeros((300, 7))), weights(), GOOD, "'a': float64 where float32"),
        (changed(a=NAN), weights(), GOOD, "'a' holds a value that is not a finite number"),
        (changed(a=INF), weights(), GOOD, "'a' holds a value that is not a finite number"),
        (changed(seen=np.zeros(4, np.float32)), weights(), GOOD, "'seen': float32 where counts"),
        (changed(seen=np.ones(4, bool)), weights(), GOOD, "'seen': bool where counts"),
        (changed(seen=np.array([0, -1, 0, 0])), weights(), GOOD, "'seen': a count is between 0 and 1073741823"),
        (changed(seen=np.array([2**30, 0, 0, 0])), weights(), GOOD, "'seen': a count is between"),
        (changed(hours=np.asarray(2**62, np.uint64)), weights(), GOOD, "'hours': a count is between"),
        (changed(), weights(a=1.5), GOOD, "'a': a weight is between 0 and 1"),
        (changed(), weights(a=np.full(7, 0.5)), GOOD, "'a': weights"),
        (changed(), weights(seen=1.0), GOOD, r"fixed point, and for all of them: \['seen'\]"),
        (changed(), {"a": 1.0}, GOOD, "weights are for"),
        (changed(), weights(), [], "without a mask"),
        (changed(), weights(), [(0, b"k" * 32)], "a mask is"),
        (changed(), weights(), [(2, b"k" * 32)], "a mask is"),
        (changed(), weights(), [(1, b"k" * 31)], "a mask is"),
        (changed(), weights(), [(1, b"k" * 32), (-1, b"k" * 32)], "two masks of the same seed"),
    ],
)
def test_nothing_is_written_of_what_does_not_fit(values, weights, masks, match):
    held = Layout(SECTIONS, 4)
    out = {ring: np.full_like(array, 7) for ring, array in held.zeros().items()}
    with pytest.raises(ProtocolError, match=match):
        masked(held, values, weights, masks, out)
    assert all((array == 7).all() for array in out.values())


def test_the_largest_counts_fit():
    held = Layout((Section("seen", (2,), 16), Section("wide", (), 64)), 3)
    out = held.zeros()
    masked(held, {"seen": np.array([0, 21845]), "wide": np.asarray((2**64 - 1) // 3, np.uint64)}, {}, GOOD, out)
    add_masks(out, held, [(-1, b"k" * 32)])
    assert decode(held, out)["seen"].tolist() == [0, 21845]
    assert int(decode(held, out)["wide"]) == (2**64 - 1) // 3


def test_arrays_and_masks_of_a_sum_are_looked_at():
    held = Layout(SECTIONS, 4)
    with pytest.raises(ProtocolError, match="a mask is"):
        add_masks(held.zeros(), held, [(3, bytes(32))])
    with pytest.raises(ProtocolError, match="rings"):
        add_masks({32: held.zeros()[32]}, held, GOOD)


def test_no_plain_value_is_ever_written_to_out(tmp_path, monkeypatch):
    """It may be a file that a crash leaves behind: each place is written once, with all masks on it."""
    held, values = Layout((Section("a", (200_000,), 32, 1.0),), 3), np.full(200_000, 0.25, np.float32)
    out = {
        32: np.memmap(tmp_path / "32", "<u4", "w+", shape=200_000),
        64: np.memmap(tmp_path / "64", "<u8", "w+", shape=1),
    }
    before = Keystream.fill

    def watched(stream, buffer, size):
        seen = out[32][out[32] != 0].view(np.int32)
        assert not (np.abs(seen.astype(np.int64) - 2**20) <= 1).any()
        before(stream, buffer, size)

    monkeypatch.setattr(Keystream, "fill", watched)
    masked(held, {"a": values}, {"a": 1.0}, some_masks(3), out)
    assert (np.asarray(out[32]) != 0).all()


def test_memory_beside_out_is_a_few_chunks():
    held = Layout((Section("a", (4, 2**21), 32, 1.0), Section("b", (2**20,), 16, 1.0)), 5)
    out = held.zeros()
    values = {"a": np.full((4, 2**21), 0.5, np.float32), "b": np.full(2**20, 2.0, np.float32)}
    tracemalloc.start()
    try:
        masked(held, values, {"a": np.linspace(0, 1, 4), "b": 1.0}, some_masks(5), out)
        add_masks(out, held, some_masks(5))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * mask.CHUNK
    assert peak < held.payload_bytes / 6
