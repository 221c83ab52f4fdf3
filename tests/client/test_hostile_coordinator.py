"""A coordinator that deviates at will, with beta as a site that colludes: what it is refused, and what it gains.

Over the real message path.  After each refusal nothing of the secret has left, it is in the site's log and journal
with its code, the secrets are gone, and the next honest attempt gives the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.errors import REFUSALS
from chexfound.secagg import messages
from chexfound.secagg.keys import Secrets, public
from chexfound.secagg.messages import Advert, Attempt, Packet
from tests.secagg.federation import NAMES, STAGES, Answer, Federation, Try, identity

pytest_plugins = ("tests.secagg.fixtures",)
VICTIM, COLLUDER = "alpha", "beta"


def attempt_of(one: Try) -> Attempt:
    return Attempt(run=one.run, phase=one.request.phase, round=one.request.round, attempt=one.number)


def resigned(one: Try, name: str, **changed: Any) -> dict[str, Any]:
    """The colluder's advert, in its own name and signed by it, with what it likes in it."""
    advert = replace(one.adverts[name], signature="", **changed)
    return asdict(advert.signed(identity(one.fed, name), attempt_of(one)))


def adverts_with(one: Try, *changed: dict[str, Any]) -> list[dict[str, Any]]:
    """All adverts, these in place of those of the same name."""
    by_name = {name: asdict(advert) for name, advert in one.adverts.items()} | {c["site"]: c for c in changed}
    return [by_name[name] for name in sorted(by_name)]


def packets_with(one: Try, change: Callable[[Packet], Packet]) -> list[dict[str, Any]]:
    """The victim's packets, those of the colluder and of delta changed."""
    packets = [one.packets[dealer, VICTIM] for dealer in one.sharers]
    return [asdict(change(packet) if packet.dealer in (COLLUDER, "delta") else packet) for packet in packets]


# -- each check of the design, as an attack on one site; by name: the stage, the code, and what the victim is asked

Attack = Callable[[Try], Answer]
ATTACKS: dict[str, tuple[str, str, Attack]] = {
    # share
    "other-threshold": (
        "share",
        "secagg.parameters",
        lambda t: t.ask("share", VICTIM, parameters={"n": 4, "c": 1, "t": 2}),
    ),
    "other-colluders": (
        "share",
        "secagg.parameters",
        lambda t: t.ask("share", VICTIM, parameters={"n": 4, "c": 0, "t": 3}),
    ),
    "fewer-sites": ("share", "secagg.parameters", lambda t: t.ask("share", VICTIM, parameters={"n": 3, "c": 1, "t": 3})),
    "without-its-own": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=[asdict(t.adverts[name]) for name in NAMES[1:]]),
    ),
    "own-changed": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, asdict(replace(t.adverts[VICTIM], minimum=4)))),
    ),
    "too-few-adverts": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=[asdict(t.adverts[name]) for name in NAMES[:2]]),
    ),
    "advert-twice": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=[*adverts_with(t), asdict(t.adverts[COLLUDER])]),
    ),
    "a-site-under-two-adverts": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=[*adverts_with(t), resigned(t, COLLUDER, minimum=4)]),
    ),
    "copied-mask-key": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, resigned(t, COLLUDER, mask=t.adverts[VICTIM].mask))),
    ),
    "copied-key-for-the-other": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, resigned(t, COLLUDER, mask=t.adverts["gamma"].cipher))),
    ),
    "key-of-small-order": (
        "share",
        "secagg.cohort",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, resigned(t, COLLUDER, cipher="00" * 32))),
    ),
    "nobody-of-the-roster": (
        "share",
        "secagg.cohort",
        lambda t: t.ask(
            "share", VICTIM, adverts=[*adverts_with(t), {**resigned(t, COLLUDER, **fresh_keys()), "site": "omega"}]
        ),
    ),
    "name-swapped": (
        "share",
        "secagg.signature",
        lambda t: t.ask(
            "share", VICTIM, adverts=adverts_with(t, {**resigned(t, COLLUDER, **fresh_keys()), "site": "gamma"})
        ),
    ),
    "keys-of-the-coordinator": (
        "share",
        "secagg.signature",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, asdict(replace(t.adverts["gamma"], **fresh_keys())))),
    ),
    "advert-of-another-attempt": (
        "share",
        "secagg.signature",
        lambda t: t.ask("share", VICTIM, adverts=adverts_with(t, asdict(earlier_adverts(t)["gamma"]))),
    ),
    "other-step": ("share", "secagg.weights", lambda t: t.ask("share", VICTIM, step=1)),
    "other-findings": ("share", "secagg.weights", lambda t: t.ask("share", VICTIM, findings=("Bar",))),
    # masked
    "too-few-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, [VICTIM, COLLUDER])),
    "alone-among-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, [VICTIM])),
    "not-among-the-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, list(NAMES[1:]))),
    "sharer-that-did-not-advertise": (
        "masked",
        "secagg.sharers",
        lambda t: t.ask("masked", VICTIM, sharers=[*t.sharers, "omega"]),
    ),
    "packet-missing": (
        "masked",
        "secagg.sharers",
        lambda t: t.ask("masked", VICTIM, packets=t.told("masked", VICTIM)["packets"][:-1]),
    ),
    "packet-twice": (
        "masked",
        "secagg.sharers",
        lambda t: t.ask("masked", VICTIM, packets=t.told("masked", VICTIM)["packets"] * 2),
    ),
    "packets-of-another-site": (
        "masked",
        "secagg.sharers",
        lambda t: t.ask("masked", VICTIM, packets=t.told("masked", "gamma")["packets"]),
    ),
    "packet-renamed": (
        "masked",
        "secagg.signature",
        lambda t: t.ask("masked", VICTIM, packets=packets_with(t, lambda p: replace(t.packets[p.dealer, "gamma"], holder=VICTIM))),
    ),
    "dealers-swapped": (
        "masked",
        "secagg.signature",
        lambda t: t.ask("masked", VICTIM, packets=packets_with(t, lambda p: replace(p, dealer=other(p.dealer)))),
    ),
    "ciphertexts-swapped": (
        "masked",
        "secagg.signature",
        lambda t: t.ask(
            "masked", VICTIM, packets=packets_with(t, lambda p: replace(p, sealed=t.packets[other(p.dealer), VICTIM].sealed))
        ),
    ),
    "packet-of-another-attempt": (
        "masked",
        "secagg.signature",
        lambda t: t.ask("masked", VICTIM, packets=packets_with(t, lambda p: earlier_packets(t)[p.dealer, VICTIM])),
    ),
    "other-weights": ("masked", "secagg.weights", lambda t: t.ask("masked", VICTIM, tensors={"x": torch.zeros(1)})),
    "other-steps": ("masked", "secagg.weights", lambda t: t.ask("masked", VICTIM, steps=7)),
    "other-recipe": (
        "masked",
        "secagg.weights",
        lambda t: t.ask("masked", VICTIM, message={"recipe": replace(t.fed.recipe, seed=1)}),
    ),
    # consistency
    "survivors-without-it": ("consistency", "secagg.survivors", lambda t: t.ask("consistency", VICTIM, survivors=list(NAMES[1:]))),
    "too-few-survivors": ("consistency", "secagg.survivors", lambda t: t.ask("consistency", VICTIM, survivors=[VICTIM, COLLUDER])),
    "survivor-that-did-not-share": (
        "consistency",
        "secagg.survivors",
        lambda t: t.ask("consistency", VICTIM, survivors=[*NAMES, "omega"]),
    ),
    # unmask
    "too-few-signatures": ("unmask", "secagg.signers", lambda t: t.ask("unmask", VICTIM, signatures=only(t, [VICTIM, COLLUDER]))),
    "signer-that-is-no-survivor": (
        "unmask",
        "secagg.signers",
        lambda t: t.ask("unmask", VICTIM, signatures={**only(t, [VICTIM, COLLUDER]), "omega": t.signatures["gamma"]}),
    ),
    "signature-under-another-name": (
        "unmask",
        "secagg.signature",
        lambda t: t.ask("unmask", VICTIM, signatures={**t.signatures, "gamma": t.signatures[COLLUDER]}),
    ),
    "signature-over-another-set": (
        "unmask",
        "secagg.signature",
        lambda t: t.ask("unmask", VICTIM, signatures={**t.signatures, COLLUDER: signed_over(t, COLLUDER, list(NAMES[:3]))}),
    ),
    "signature-of-another-attempt": (
        "unmask",
        "secagg.signature",
        lambda t: t.ask("unmask", VICTIM, signatures={**t.signatures, **earlier_signature(t)}),
    ),
}  # fmt: skip


def fresh_keys() -> dict[str, str]:
    return {"cipher": public(Secrets.fresh().cipher), "mask": public(Secrets.fresh().mask)}


def other(dealer: str) -> str:
    return {COLLUDER: "delta", "delta": COLLUDER}[dealer]


def sharers(one: Try, names: list[str]) -> Answer:
    packets = [asdict(one.packets[dealer, VICTIM]) for dealer in names]
    return one.ask("masked", VICTIM, sharers=names, packets=packets)


def only(one: Try, names: list[str]) -> dict[str, str]:
    return {name: one.signatures[name] for name in names}


def signed_over(one: Try, name: str, survivors: list[str]) -> str:
    from chexfound import signing

    fields = messages.survivors_fields(attempt_of(one), one.context(), one.sharers, survivors)
    return signing.sign(identity(one.fed, name), signing.SURVIVORS, fields).hex()


def earlier_adverts(one: Try) -> dict[str, Advert]:
    adverts: dict[str, Advert] = one.fed.kept.adverts
    return adverts


def earlier_packets(one: Try) -> dict[tuple[str, str], Packet]:
    packets: dict[tuple[str, str], Packet] = one.fed.kept.packets
    return packets


def earlier_signature(one: Try) -> dict[str, str]:
    return {"gamma": one.fed.kept.signatures["gamma"]}


def check_refused(fed: Federation, answer: Answer, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """That the victim gave a code and nothing else, and has it in its log and journal, and the secrets are gone."""
    assert answer == code
    assert fed.refused(VICTIM)[-1] == code
    assert f"code={code}" in caplog.text
    left = {path.name for path in fed.attempt_folder(VICTIM).iterdir()}
    assert left == {"attempt.json"}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_by_its_name_and_the_next_attempt_is_not(
    name: str, fed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage, code, attack = ATTACKS[name]
    if "another-attempt" in name:
        fed.kept = fed.attempt(number=1).until(STAGES[STAGES.index(stage)])
    one = fed.attempt(number=2).until(stage)
    check_refused(fed, attack(one), code, caplog)
    for later in STAGES:  # the attempt is over for this site, whatever it is asked
        assert one.ask(later, VICTIM) == "secagg.attempt"
    sums = fed.attempt(number=3).finish() if name in WITH_SUM else {"images": np.array(96)}
    assert sums["images"] == 96


WITH_SUM = ("copied-mask-key", "too-few-sharers", "too-few-survivors", "signature-over-another-set")


def test_codes_of_all_refusals_are_tried() -> None:
    elsewhere = {
        "secagg.plain", "secagg.attempt", "secagg.order", "secagg.repeat", "secagg.late", "secagg.incomplete",
        "secagg.shares", "secagg.survivors-twice", "secagg.findings", "secagg.differencing",
    }  # fmt: skip
    assert {code for _, code, _ in ATTACKS.values()} | elsewhere == set(REFUSALS)
