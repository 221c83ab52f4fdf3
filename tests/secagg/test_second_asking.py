"""Checks of the model that a site makes between messages: over the real message path, with the model's verdict beside.

The roster is the model's (4, 1, 3); the requests are those of tests/client/test_hostile_coordinator.py.
"""

from __future__ import annotations

import json

import pytest

from chexfound.contract.request import Reply
from tests.client.test_hostile_coordinator import ATTACKS, DIFFERENT, VICTIM
from tests.secagg.federation import NAMES, Federation
from tests.secagg.model import Attempt, Check, Cohort, Told, differencing, kept_keys
from tests.secagg.test_model_is_the_code import REFUSED

pytest_plugins = ("tests.secagg.fixtures",)

K = Check
ALL = 0b1111
TWICE = {K.ONE_U2: "masked", K.ONE_U3: "consistency", K.ONE_ANSWER: "unmask"}  # each with the stage that it is of


def cohort(*off: Check) -> Cohort:
    return Cohort(n=4, c=1, t=3, off=frozenset(off))


def given(*off: Check) -> dict[Check, int]:
    """How many inputs, and answers, a site of the model gives where it is asked for as many as it accepts."""
    told = [Told(ALL, 0, (0,), 1)] * 3
    attempt = Attempt(cohort(*off), told)
    inputs, answers = attempt.inputs((ALL,) * 3)[0], attempt.answers((ALL,) * 3, (ALL,) * 3)
    return {K.ONE_U2: inputs.count(0), K.ONE_U3: len(answers[0]), K.ONE_ANSWER: len(answers[0])}


@pytest.mark.parametrize("check", TWICE, ids=lambda check: check.name)
def test_what_the_model_gives_once_the_site_gives_once(check: Check, fed: Federation) -> None:
    # One U3 and one answer back each other in the model: more is given where both are off.
    off = {K.ONE_U2} if check is K.ONE_U2 else {K.ONE_U3, K.ONE_ANSWER}
    assert given()[check] == 1 < given(*off)[check]
    stage = TWICE[check]
    one = fed.attempt().until(stage)
    assert isinstance(one.ask(stage, VICTIM), Reply)
    assert isinstance(one.ask(stage, VICTIM), Reply)  # the same again is the same answer
    assert one.ask(stage, VICTIM, **DIFFERENT[stage](one)) == REFUSED[check]


@pytest.mark.parametrize("attack", ["fewer-sites", "other-threshold", "other-colluders"])
def test_other_numbers_than_the_rosters_are_refused(attack: str, fed: Federation) -> None:
    """ROSTER_N: no number told gives the model's site another threshold."""
    stage, code, ask = ATTACKS[attack]
    assert code == REFUSED[K.ROSTER_N]
    assert ask(fed.attempt().until(stage)) == code


def test_a_second_sum_on_the_same_weights_is_refused(fed: Federation) -> None:
    """JOURNAL: of two lawful attempts on the same weights the model opens one sum, and two without it."""
    opened = [differencing(cohort(*off))[1] for off in ((), (K.JOURNAL,))]
    assert [sums is None for sums in opened] == [True, False]
    fed.attempt().finish()
    second = fed.attempt(number=2).until("unmask", NAMES[:3])
    assert second.ask("unmask", VICTIM) == REFUSED[K.JOURNAL]


def test_keys_are_of_one_attempt(fed: Federation) -> None:
    """FRESH_KEYS: with those of the last one the model opens a single site's update."""
    opened = [kept_keys(cohort(*off))[1] for off in ((), (K.FRESH_KEYS,))]
    assert [sums is None for sums in opened] == [True, False]
    secrets = []
    for number in (1, 2):
        assert isinstance(fed.attempt(number=number).ask("advertise", VICTIM), Reply)
        secrets.append(set(json.loads(fed.secrets(VICTIM).read_text()).values()))
    assert not secrets[0] & secrets[1]
