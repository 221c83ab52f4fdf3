from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from chexfound.errors import ConfigError, SiteError
from chexfound.secagg import mask
from chexfound.secagg.fixed import decode

ROOT = Path(__file__).parents[2]
SHAPES = [(30, 20), (7,)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import secagg

    return secagg


def test_the_rival_masks_what_flowers_client_would(bench):
    """Its masks taken off again, as Flower's workflow does, the weighted values are there."""
    from flwr.common.secure_aggregation.quantization import dequantize

    values, seeds = bench.normal(SHAPES), [bytes([number]) * 28 for number in range(5)]
    masked = bench.theirs(values, seeds)
    shapes = [one.shape for one in masked]
    assert shapes == [(1,), *SHAPES]
    for number, seed in enumerate(seeds):
        sign = -1 if number % 2 or number == 4 else 1
        noise = bench.pseudo_rand_gen(seed, bench.MOD_RANGE, shapes)
        masked = [one + sign * other for one, other in zip(masked, noise, strict=True)]
    plain = bench.parameters_mod(masked, bench.MOD_RANGE)
    assert int(plain[0][0]) == round(0.7 * bench.TARGET_RANGE)
    found = dequantize(plain[1:], bench.CLIPPING_RANGE, bench.TARGET_RANGE)
    for one, value in zip(found, values, strict=True):
        assert np.abs(one - 0.7 * value).max() < 2 * bench.CLIPPING_RANGE / bench.TARGET_RANGE * 1.1


def test_ours_masks_the_same_values(bench, monkeypatch):
    values, seeds = bench.normal(SHAPES), []
    before = bench.fresh_masks
    monkeypatch.setattr(bench, "fresh_masks", lambda count: seeds.append(before(count)) or seeds[-1])
    ours = bench.Ours(values, bench.RANGE)
    ours()
    assert len(seeds[0]) == bench.PEERS + 1
    mask.add_masks(ours.out, ours.layout, [(-sign, seed) for sign, seed in seeds[0]])
    found = decode(ours.layout, ours.out)
    for place, value in enumerate(values):
        assert np.abs(found[str(place)] - 0.7 * value).max() < 1e-6
    assert not found["clipped"].any()
    ours()
    assert not {seed for _, seed in seeds[0]} & {seed for _, seed in seeds[1]}


def test_sides_take_turns_and_the_first_of_each_does_not_count(bench, monkeypatch):
    calls, times = [], iter([9.0, 9.0, 9.0, *[1.0, 2.0, 24.0] * 2, *[2.0, 3.0, 30.0]])

    def seconds(work):
        work()
        return next(times) * 607e-9

    monkeypatch.setattr(bench, "processor_seconds", seconds)
    monkeypatch.setattr(bench, "theirs", lambda values, seeds: calls.append(len(seeds)))
    row = bench.client(SHAPES, rounds=3)
    assert calls == [5] * 4
    assert row == {
        "ours": 1.0, "rival": 24.0, "ours_clipping": 2.0, "ratio": 24.0, "ratios": [15.0, 24.0],
        "unit": "ns of processor time a value", "peers": 4, "values": 607, "rounds": 3,
    }  # fmt: skip


def test_the_clipping_side_has_values_to_clip(bench):
    values = bench.normal([(100, 100)])
    assert 0 < (np.abs(values[0]) * 0.7 > bench.NARROW).mean() < 0.01
    assert not (np.abs(values[0]) * 0.7 > bench.RANGE).any()


def test_a_process_of_its_own_measures_seconds_and_memory(bench):
    row = bench.vitl([(2**21,), (5, 3)], rounds=2)
    assert row["values"] == 2**21 + 15
    assert row["payload_bytes"] == 4 * (2**21 + 15) + 16
    assert 0.9 < row["extra_memory"] < 3
    assert row["rounds"] == 2


def test_what_ends_that_process_is_told(bench):
    with pytest.raises(SiteError, match=r"(?s)process of its own failed.*negative"):
        bench.vitl([(-1,)], rounds=1)


def test_the_shapes_are_vitls(bench):
    shapes = bench.vitl_shapes()
    assert sum(int(np.prod(shape)) for shape in shapes) == bench.FULL
    assert (131072, 384) in shapes
    assert set(bench.BLOCK) & set(shapes)


@pytest.mark.parametrize(("n", "t", "missing"), [(8, 6, 1), (32, 22, 3)])
def test_the_coordinator_takes_off_every_mask_that_is_left(bench, n, t, missing):
    row = bench.server(n, t, values=1000, full=2000)
    there = n - missing
    assert (row["missing"], row["masks"]) == (missing, there + missing * there)
    assert row["ours"] >= row["keystream_s"] >= 0  # so short may be none, to the clock
    assert (row["values"], row["measured_values"]) == (2000, 1000)


def test_cohorts_are_such_that_a_tenth_may_be_missing(bench):
    for n, t in bench.COHORTS.items():
        assert n - max(1, round(n / 10)) >= t
        assert 2 * t > n


def test_lines_are_json(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "client", lambda shapes, rounds: {"ours": 1.0, "values": len(shapes)})
    monkeypatch.setattr(sys, "argv", ["secagg.py", "--only", "client", "--json"])
    assert bench.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["values"]) for line in lines] == [("secagg_client", 64), ("secagg_client_block", 8)]
    assert {"machine", "versions", "date"} <= set(lines[0])


def test_a_line_that_there_is_not(bench):
    with pytest.raises(ConfigError, match="'cleint': there are client, vitl, server"):
        list(bench.measure(["cleint"], 1))
