"""The spool of masked inputs: only the survivors' are added, in pieces, whatever else came.

That sums are right for every dropout pattern is in tests/secagg/test_sums.py.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexfound.errors import ConfigError, ProtocolError, StorageError
from chexfound.secagg.fixed import Layout, Section
from strategies import secagg
from strategies.secagg import MaskedSum

LAYOUT = Layout(sections=(Section("counts", (7,), 32), Section("values", (2, 3), 16, 1.0)), n=4)


def arrays(seed: int) -> dict[int, np.ndarray]:
    """As they come: every value of the ring, since they are masked."""
    draws = np.random.default_rng(seed)
    return {
        ring: draws.integers(0, 2**ring, size, dtype=f"u{ring // 8}", endpoint=False)
        for ring, size in LAYOUT.sizes.items()
    }


@given(st.dictionaries(st.sampled_from("ABCDEF"), st.integers(0, 99), min_size=1), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_the_survivors_are_added_modulo_the_ring(tmp_path: Path, seeds: dict[str, int], data: st.DataObject) -> None:
    spool = MaskedSum(LAYOUT, tmp_path / "spool")
    for site, seed in seeds.items():
        spool.add(site, arrays(seed))
    survivors = data.draw(st.lists(st.sampled_from(sorted(seeds)), min_size=1, unique=True))
    sums = spool.result(survivors, [])
    total = {ring: sum(arrays(seeds[site])[ring] for site in survivors) for ring in LAYOUT.sizes}
    assert sums["counts"].tolist() == total[32].tolist()
    assert sums["clipped"].tolist() == total[64].tolist()
    signed = total[16].view("<i2").reshape(2, 3)
    assert np.array_equal(sums["values"], signed * (1.0 / 8191))  # L of four sites in 16 bits


def test_arrays_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MaskedSum(LAYOUT, tmp_path / "whole")
    pieces = MaskedSum(LAYOUT, tmp_path / "pieces")
    for spool in (whole, pieces):
        for place, site in enumerate("ABC"):
            spool.add(site, arrays(place))
    expected = whole.result(["A", "C"], [(1, b"\1" * 32)])
    monkeypatch.setattr(secagg, "CHUNK", 2)
    found = pieces.result(["A", "C"], [(1, b"\1" * 32)])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_site_that_comes_again_takes_its_own_place(tmp_path: Path) -> None:
    spool = MaskedSum(LAYOUT, tmp_path / "spool")
    for site, seed in (("A", 1), ("B", 2), ("A", 3)):
        spool.add(site, arrays(seed))
    assert spool.result(["A", "B"], [])["counts"].tolist() == (arrays(3)[32] + arrays(2)[32]).tolist()


def test_a_survivor_that_sent_nothing_is_an_error_of_ours(tmp_path: Path) -> None:
    spool = MaskedSum(LAYOUT, tmp_path / "spool")
    spool.add("A", arrays(1))
    with pytest.raises(ProtocolError, match="'B'"):
        spool.result(["A", "B"], [])


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, StorageError), match="file"):
        MaskedSum(LAYOUT, tmp_path / "file" / "spool")


def test_a_disk_without_room_for_the_sum_is_told_before_anything_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later, a page without room would end the process when the sites have opened the sum already."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="no space left"):
        MaskedSum(LAYOUT, tmp_path / "spool")
