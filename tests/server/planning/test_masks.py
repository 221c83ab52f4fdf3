from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

import pytest

from chexfound.recipe.load import load
from chexfound.secagg.parameters import Parameters
from server import cli
from server.planning import cost, masks
from server.planning.cost import Speeds
from strategies import composition

MEASURE = cost.measure  # as it is, for the one test that measures
ONE = Speeds(quantise=1.0, mask=10.0, add=100.0, hash=0.0, agree=0.0, sign=0.0, verify=0.0)


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measure", lambda ring: ONE)


def plans(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main(["plan-secagg", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_parameters_of_each_number_of_sites(capsys) -> None:
    found = plans(capsys, "--values", "1000")
    assert found["schema"] == 1
    assert [(one["n"], one["c"], one["t"], one["dropouts"]) for one in found["plans"]] == [
        (3, 0, 2, 0),
        (4, 1, 3, 1),
        (5, 1, 4, 1),
        (8, 2, 6, 2),
        (16, 4, 11, 5),
        (32, 8, 21, 11),
        (64, 16, 41, 23),
        (128, 32, 81, 47),
    ]


def test_a_larger_minimum_leaves_fewer_to_lose(capsys) -> None:
    assert plans(capsys, "--sites", "8", "--minimum", "7", "--values", "1")["plans"][0]["dropouts"] == 1


def test_seconds_count_the_masks(capsys) -> None:
    one = plans(capsys, "--sites", "8", "--values", "2")["plans"][0]
    # A mask with each of 7 peers and its own; shares and keys take next to nothing.
    assert one["site_s"] == pytest.approx(2 * (1 + 8 * 10), abs=1)
    assert one["lost"] == 1
    # Of 7 survivors their own masks, and with the lost one a pair's each.
    assert one["unmask_s"] == pytest.approx(2 * (7 * 100 + 14 * 10), abs=1)
    assert one["payload_bytes"] == 8


def test_no_more_sites_are_lost_than_may_be(capsys) -> None:
    found = plans(capsys, "--sites", "3", "128", "--values", "1")
    assert [one["lost"] for one in found["plans"]] == [0, 13]


def test_messages_grow_with_the_sites_and_are_counted_as_they_are_written() -> None:
    few = cost.cost(Parameters.of(4), 1, 0, 32, ONE)
    many = cost.cost(Parameters.of(40), 1, 0, 32, ONE)
    assert 8 < many.up_bytes / few.up_bytes < 10  # of ten times the sites
    side = cost._Attempt(Parameters.of(4)).side
    packets = len(json.dumps([asdict(packet) for packet in side.deal()]))
    assert packets < few.up_bytes < 2.5 * packets


def test_a_recipe_is_counted_and_its_ring_taken(tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\naggregation: secagg\nsecagg: {ring: 16, colluders: 0}\nteacher: {policy: rederive}\n"
        "train: {optimizer_state: local}\n"
    )
    found = plans(capsys, "--recipe", str(path), "--sites", "8")
    assert (found["ring"], found["plans"][0]["c"], found["plans"][0]["levels"]) == (16, 0, 4095)
    both = plans(capsys, "--recipe", "demo", "--sites", "8")
    assert both["ring"] == 32
    assert both["values"] == 4 * found["values"]  # the teacher travels too, and two moments


def test_the_count_is_that_of_the_tensors_that_a_run_sums(capsys) -> None:
    from chexfound.contract.request import MOMENTS
    from chexfound.pretrain.beginning import frozen_gains
    from chexfound.pretrain.train import initial_weights

    weights = initial_weights(load("demo"))
    left = set(weights) - frozen_gains(load("demo"), weights)
    steps = {name for name in left if name.startswith(MOMENTS) and name.endswith(".step")}
    expected = sum(
        weights[name].numel() for name in left - steps
    )  # of which one is counted, and not masked in the ring
    assert plans(capsys, "--recipe", "demo", "--sites", "3")["values"] == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--sites", "2"], "for 3 to 128 sites; this federation has 2"),
        (["--sites", "129"], "for 3 to 128 sites"),
        (["--sites", "3", "--colluders", "2"], r"cannot hold against c = 2 colluders.*c is at most 1"),
        (["--sites", "4", "--minimum", "2"], "secagg.minimum must be 3 to 4"),
        (["--sites", "32", "--ring", "16"], "leaves 1023 levels of a value to each of 32 sites"),
        (["--values", "0"], "--values: give a number from 1"),
        (["--recipe", "dem", "--sites", "3"], "did you mean 'demo'"),
    ],
)
def test_what_does_not_protect_is_refused_with_the_reason(capsys, options: list[str], reason: str) -> None:
    values = [] if {"--values", "--recipe"} & set(options) else ["--values", "1"]
    assert cli.main(["plan-secagg", *options, *values]) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_every_refusal_is_told_at_once(capsys) -> None:
    assert cli.main(["plan-secagg", "--sites", "2", "8", "200", "--values", "1"]) == 2
    error = capsys.readouterr().err
    assert "n = 2:" in error
    assert "n = 200:" in error
    assert "n = 8" not in error


def test_of_the_usual_numbers_those_that_cannot_be_are_named_below(capsys) -> None:
    assert cli.main(["plan-secagg", "--ring", "16", "--values", "1000"]) == 0
    out = capsys.readouterr().out
    assert "not for n = 64: a ring of 16 bits" in out
    assert "\n  16   4  11" in out
    assert "\n  32   8" not in out


def test_the_least_levels_are_those_of_the_table_of_what_composes() -> None:
    from chexfound.recipe.curriculum import changed

    recipe = load("demo", {"aggregation": "secagg", "train.optimizer_state": "local", "adapt.optimizer_state": "local"})
    recipe = changed(recipe, secagg=changed(recipe.secagg, ring=16))
    composition.check(recipe, 31)
    with pytest.raises(masks.ConfigError, match=r"secagg\.ring"):
        composition.check(recipe, 32)


def test_what_is_measured_is_positive() -> None:
    speeds = asdict(MEASURE(32))
    assert set(speeds) == set(asdict(ONE))
    assert all(seconds > 0 for seconds in speeds.values())
