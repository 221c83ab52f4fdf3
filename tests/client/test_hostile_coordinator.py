"""A coordinator that deviates at will, with beta as a site that colludes: what it is refused, and what it gains.

Over the real message path.  After each refusal nothing of the secret has left, it is in the site's log and journal
with its code, the secrets are gone, and the next honest attempt gives the sum.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.detached import Envelope
from chexfound.contract.request import PartRequest, Reply, Request
from chexfound.durable.journal import Journal
from chexfound.errors import REFUSALS
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.phases import parted
from chexfound.phases.payload import Settings
from chexfound.pretrain.health import measures
from chexfound.recipe.schema import Recipe
from chexfound.secagg import messages
from chexfound.secagg.keys import Secrets, public
from chexfound.secagg.messages import Advert, Attempt, Packet
from client.answer import hospital as client_site
from client.answer import lineage
from server.rounds import loop as server_run
from tests.secagg.federation import NAMES, RARE, STAGES, Answer, Federation, Try, identity
from tests.staged import staged

pytest_plugins = ("tests.secagg.fixtures",)
VICTIM, COLLUDER = "alpha", "beta"
TESTS = Path(__file__).resolve().parents[1]


def attempt_of(one: Try) -> Attempt:
    return Attempt(run=one.run, phase=one.request.phase, round=one.request.round, attempt=one.number)


# -- each check of the design, as an attack on one site; by name: the stage, the code, and what the victim is asked

Attack = Callable[[Try], Answer]
ATTACKS: dict[str, tuple[str, str, Attack]] = {
    "other-threshold": ("share", "secagg.parameters", lambda t: parameters(t, n=4, c=1, t=2)),
    "other-colluders": ("share", "secagg.parameters", lambda t: parameters(t, n=4, c=0, t=3)),
    "fewer-sites": ("share", "secagg.parameters", lambda t: parameters(t, n=3, c=1, t=3)),
    "without-its-own": ("share", "secagg.cohort", lambda t: share(t, some(t, NAMES[1:]))),
    "own-changed": ("share", "secagg.cohort", lambda t: share(t, [own_changed(t), *some(t, NAMES[1:])])),
    "too-few-adverts": ("share", "secagg.cohort", lambda t: share(t, some(t, NAMES[:2]))),
    "advert-twice": ("share", "secagg.cohort", lambda t: share(t, some(t, (*NAMES, COLLUDER)))),
    "two-adverts-of-one-site": ("share", "secagg.cohort", lambda t: share(t, [*some(t), colluders(t, minimum=4)])),
    "copied-mask-key": ("share", "secagg.cohort", lambda t: swapped(t, colluders(t, mask=t.adverts[VICTIM].mask))),
    "copied-as-the-other-key": (
        "share", "secagg.cohort", lambda t: swapped(t, colluders(t, mask=t.adverts["gamma"].cipher)),
    ),
    "key-of-small-order": ("share", "secagg.cohort", lambda t: swapped(t, colluders(t, cipher="00" * 32))),
    "nobody-of-the-roster": ("share", "secagg.cohort", lambda t: share(t, [*some(t), renamed(t, "omega")])),
    "name-swapped": ("share", "secagg.signature", lambda t: swapped(t, renamed(t, "gamma"))),
    "keys-of-the-coordinator": ("share", "secagg.signature", lambda t: swapped(t, own_keys(t, "gamma"))),
    "advert-of-another-attempt": ("share", "secagg.signature", lambda t: swapped(t, earlier(t).adverts["gamma"])),
    "other-step": ("share", "secagg.weights", lambda t: t.ask("share", VICTIM, step=1)),
    "other-findings": ("share", "secagg.weights", lambda t: t.ask("share", VICTIM, findings=("Bar",))),
    "too-few-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, [VICTIM, COLLUDER])),
    "alone-among-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, [VICTIM])),
    "not-among-the-sharers": ("masked", "secagg.sharers", lambda t: sharers(t, list(NAMES[1:]))),
    "sharer-that-did-not-advertise": (
        "masked", "secagg.sharers", lambda t: t.ask("masked", VICTIM, sharers=[*NAMES, "omega"]),
    ),
    "packet-missing": ("masked", "secagg.sharers", lambda t: packets(t, NAMES[:3])),
    "packet-twice": ("masked", "secagg.sharers", lambda t: packets(t, NAMES * 2)),
    "packets-of-another-site": ("masked", "secagg.sharers", lambda t: packets(t, NAMES, "gamma")),
    "packet-renamed": ("masked", "secagg.signature", lambda t: changed(t, lambda p: moved(t, p))),
    "dealers-swapped": ("masked", "secagg.signature", lambda t: changed(t, lambda p: replace(p, dealer=other(p)))),
    "ciphertexts-swapped": (
        "masked", "secagg.signature",
        lambda t: changed(t, lambda p: replace(p, sealed=t.packets[other(p), VICTIM].sealed)),
    ),
    "packet-of-another-attempt": (
        "masked", "secagg.signature", lambda t: changed(t, lambda p: earlier(t).packets[p.dealer, VICTIM]),
    ),
    "other-weights": ("masked", "secagg.weights", lambda t: t.ask("masked", VICTIM, tensors={"x": torch.zeros(1)})),
    "other-steps": ("masked", "secagg.weights", lambda t: t.ask("masked", VICTIM, steps=7)),
    "other-recipe": (
        "masked", "secagg.weights", lambda t: t.ask("masked", VICTIM, message={"recipe": reseeded(t)}),
    ),
    "survivors-without-it": ("consistency", "secagg.survivors", lambda t: survivors(t, NAMES[1:])),
    "too-few-survivors": ("consistency", "secagg.survivors", lambda t: survivors(t, NAMES[:2])),
    "survivor-that-did-not-share": ("consistency", "secagg.survivors", lambda t: survivors(t, (*NAMES, "omega"))),
    "too-few-signatures": ("unmask", "secagg.signers", lambda t: unmask(t, only(t, NAMES[:2]))),
    "signer-that-is-no-survivor": (
        "unmask", "secagg.signers", lambda t: unmask(t, t.signatures | {"omega": t.signatures["gamma"]}),
    ),
    "signature-under-another-name": (
        "unmask", "secagg.signature", lambda t: unmask(t, t.signatures | {"gamma": t.signatures[COLLUDER]}),
    ),
    "signature-over-another-set": (
        "unmask", "secagg.signature", lambda t: unmask(t, t.signatures | signed_over(t, COLLUDER, NAMES[:3])),
    ),
    "signature-of-another-attempt": (
        "unmask", "secagg.signature",
        lambda t: unmask(t, t.signatures | {"gamma": earlier(t).signatures["gamma"]}),
    ),
}  # fmt: skip


def parameters(one: Try, **told: int) -> Answer:
    return one.ask("share", VICTIM, parameters=told)


def some(one: Try, names: Sequence[str] = NAMES) -> list[Advert]:
    return [one.adverts[name] for name in names]


def share(one: Try, adverts: Sequence[Advert]) -> Answer:
    return one.ask("share", VICTIM, adverts=[asdict(advert) for advert in adverts])


def swapped(one: Try, advert: Advert) -> Answer:
    """One advert in place of that of its name."""
    return share(one, [advert if name == advert.site else one.adverts[name] for name in NAMES])


def colluders(one: Try, **changed: Any) -> Advert:
    """The colluder's advert, signed by it, with what it likes in it."""
    advert = replace(one.adverts[COLLUDER], signature="", **changed)
    return advert.signed(identity(one.fed, COLLUDER), attempt_of(one))


def own_changed(one: Try) -> Advert:
    return replace(one.adverts[VICTIM], minimum=4)


def own_keys(one: Try, name: str) -> Advert:
    keys = {"cipher": public(Secrets.fresh().cipher), "mask": public(Secrets.fresh().mask)}
    return replace(one.adverts[name], **keys)


def renamed(one: Try, name: str) -> Advert:
    """The colluder's, with keys of its own, under another name."""
    keys = own_keys(one, COLLUDER)
    return replace(colluders(one, cipher=keys.cipher, mask=keys.mask), site=name)


def earlier(one: Try) -> Try:
    """An attempt before this one, all of whose messages the coordinator still has."""
    kept: Try = one.fed.kept
    return kept


def sharers(one: Try, names: list[str]) -> Answer:
    return one.ask("masked", VICTIM, sharers=names, packets=[asdict(one.packets[dealer, VICTIM]) for dealer in names])


def packets(one: Try, dealers: Sequence[str], holder: str = VICTIM) -> Answer:
    return one.ask("masked", VICTIM, packets=[asdict(one.packets[dealer, holder]) for dealer in dealers])


def changed(one: Try, change: Callable[[Packet], Packet]) -> Answer:
    """The victim's packets, those of the colluder and of delta changed."""
    dealt = [one.packets[dealer, VICTIM] for dealer in NAMES]
    told = [asdict(change(packet) if packet.dealer in (COLLUDER, "delta") else packet) for packet in dealt]
    return one.ask("masked", VICTIM, packets=told)


def reseeded(one: Try) -> Recipe:
    return replace(one.fed.recipe, seed=1)


def moved(one: Try, packet: Packet) -> Packet:
    """What the same dealer dealt to gamma, as if it were the victim's."""
    return replace(one.packets[packet.dealer, "gamma"], holder=VICTIM)


def other(packet: Packet) -> str:
    return {COLLUDER: "delta", "delta": COLLUDER}[packet.dealer]


def survivors(one: Try, names: Sequence[str]) -> Answer:
    return one.ask("consistency", VICTIM, survivors=list(names))


def unmask(one: Try, signatures: dict[str, str]) -> Answer:
    return one.ask("unmask", VICTIM, signatures=signatures)


def only(one: Try, names: Sequence[str]) -> dict[str, str]:
    return {name: one.signatures[name] for name in names}


def signed_over(one: Try, name: str, names: Sequence[str]) -> dict[str, str]:
    fields = messages.survivors_fields(attempt_of(one), one.context(), one.sharers, names)
    return {name: signing.sign(identity(one.fed, name), signing.SURVIVORS, fields).hex()}


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
        fed.kept = fed.attempt(number=1).until(stage)
    one = fed.attempt(number=2).until(stage)
    check_refused(fed, attack(one), code, caplog)
    for later in STAGES:  # the attempt is over for this site, whatever it is asked
        assert one.ask(later, VICTIM) == "secagg.attempt"
    if name in FIRST.values():
        assert fed.attempt(number=3).finish()["images"] == 96


FIRST = {(stage, code): name for name, (stage, code, _) in ATTACKS.items()}  # one of each kind


def test_codes_of_all_refusals_are_tried() -> None:
    elsewhere = {
        "secagg.plain", "secagg.attempt", "secagg.order", "secagg.repeat", "secagg.late", "secagg.incomplete",
        "secagg.shares", "secagg.survivors-twice", "secagg.findings", "secagg.differencing",
    }  # fmt: skip
    assert {code for _, code, _ in ATTACKS.values()} | elsewhere == {code for code in REFUSALS if is_masked(code)}


def is_masked(code: str) -> bool:
    return code.startswith("secagg.")


@pytest.mark.parametrize("code", [code for code in REFUSALS if not is_masked(code)])
def test_every_other_refusal_is_met_in_a_test_of_an_adversary_or_of_the_site(code: str) -> None:
    """By name: as the answer that a test compares with."""
    files = [*(TESTS / "hostile").glob("test_*.py"), *(TESTS / "client").glob("test_*.py")]
    assert [path.name for path in files if f'"{code}"' in path.read_text()], f"no test is refused with {code}"


# -- everyone must have trained from the same thing


def pretraining(fed: Federation, number: int = 1, **changed: Any) -> Try:
    """An attempt at a round of pretraining, with an honest coordinator's settings."""
    travels = server_run.initial_weights(fed.recipe)
    gains = server_run.frozen_gains(fed.recipe, travels)
    shapes = {name: list(tensor.shape) for name, tensor in travels.items() if name not in gains}
    settings = Settings(ring=32, images=60, ranges=dict.fromkeys(shapes, 1.0))
    given = {"steps": 1, "batch_size": 2, "tensors": travels, "settings": settings, "shapes": shapes} | changed
    return fed.attempt("pretrain", number, **given)


def adapting(fed: Federation, number: int = 1, **changed: Any) -> Try:
    """The same of a head."""
    findings = changed.pop("findings", ("Bar", "Blob"))
    head = build_head(fed.recipe, len(findings))
    shapes = {name: list(value.shape) for name, value in head.named_parameters() if value.requires_grad}
    ranges = dict.fromkeys(shapes, 1.0)
    settings = Settings(ring=32, images=60, labelled=[60] * len(findings), ranges=ranges)
    tensors = {name: value.clone() for name, value in head.state_dict().items()}
    given = {"steps": 2, "batch_size": 2, "tensors": tensors, "settings": settings, "shapes": shapes}
    return fed.attempt("adapt", number, findings=findings, **(given | changed))


def featuring(fed: Federation, names: Sequence[str] = NAMES, run: int = 1, **changed: Any) -> None:
    """Have these sites take a backbone, of which there is no sum."""
    weights = server_run.initial_weights(fed.recipe)
    given = {"findings": ("Bar", "Blob"), "tensors": checkpoint.with_prefix(weights, "student.backbone.")} | changed
    for name in names:
        assert fed.ask(name, Request(phase="features", **given), run=run) == Reply()


def widened(settings: Settings) -> Settings:
    return replace(settings, ranges={name: 2 * value for name, value in settings.ranges.items()})


CONTEXTS: dict[str, Callable[[Try], Try]] = {  # what one site is told otherwise, from the first stage on
    "round": lambda t: replace(t, request=replace(t.request, round=1)),
    "step": lambda t: replace(t, request=replace(t.request, step=3)),
    "steps": lambda t: replace(t, request=replace(t.request, steps=2)),
    "batch size": lambda t: replace(t, request=replace(t.request, batch_size=3)),
    "findings": lambda t: replace(t, request=replace(t.request, findings=("Blob", "Bar"))),
    "weights": lambda t: replace(t, request=replace(t.request, tensors={"x": torch.ones(1)})),
    "recipe": lambda t: replace(t, recipe=replace(t.fed.recipe, optim=replace(t.fed.recipe.optim, lr=1e-12))),
    "attempt": lambda t: replace(t, number=2),
    "run": lambda t: replace(t, run=2),
    "ring": lambda t: replace(t, settings=replace(t.settings, ring=16)),
    "images of a weight of 1": lambda t: replace(t, settings=replace(t.settings, images=1)),
    "ranges": lambda t: replace(t, settings=widened(t.settings)),
    "fewer tensors": lambda t: fewer(t),
}


def fewer(one: Try) -> Try:
    name = min(one.shapes)
    ranges = {key: value for key, value in one.settings.ranges.items() if key != name}
    shapes = {key: value for key, value in one.shapes.items() if key != name}
    return replace(one, shapes=shapes, settings=replace(one.settings, ranges=ranges))


@pytest.mark.parametrize("what", CONTEXTS)
def test_a_site_that_is_told_something_else_is_in_no_sum_with_the_others(what: str, fed: Federation) -> None:
    honest = pretraining(fed)
    honest.stage("advertise", NAMES[1:])
    victim = CONTEXTS[what](pretraining(fed))
    victim.stage("advertise", [VICTIM])
    if victim.run == honest.run and victim.number == honest.number and victim.request.round == honest.request.round:
        honest.adverts |= victim.adverts
        victim.adverts |= honest.adverts
        honest.stage("share", NAMES[1:])
        victim.stage("share", [VICTIM])
        told = {stage["alpha"].values["context"] for stage in [victim.answers["share"]]}
        assert told != {honest.answers["share"][name].values["context"] for name in NAMES[1:]}
        # And none takes a packet of the other, so that no masks of both are ever made.
        honest.packets |= victim.packets
        victim.packets |= honest.packets
        honest.sharers = victim.sharers = list(NAMES)
        assert honest.ask("masked", "gamma") == "secagg.signature"
        assert victim.ask("masked", VICTIM) == "secagg.signature"
    else:  # not even its advert counts for them
        honest.adverts |= victim.adverts
        assert honest.ask("share", "gamma") == "secagg.signature"


def test_weights_of_findings_are_in_the_context(fed: Federation) -> None:
    featuring(fed)
    one, other = adapting(fed), adapting(fed)
    other.settings = replace(one.settings, labelled=[60, 1])
    one.stage("advertise")
    other.adverts = dict(one.adverts)
    contexts = [t.ask("share", name).values["context"] for t, name in ((one, "beta"), (other, VICTIM))]
    assert len(set(contexts)) == 2


def test_other_adverts_are_in_the_context(fed: Federation) -> None:
    one = fed.attempt()
    one.stage("advertise")
    fewer = [asdict(one.adverts[name]) for name in NAMES[:3]]
    contexts = {one.ask("share", VICTIM, adverts=fewer).values["context"]} | {
        one.ask("share", "beta").values["context"]
    }
    assert len(contexts) == 2


def test_a_victim_alone_with_weight_cannot_be_made(fed: Federation) -> None:
    """The attack that the settings in the context end: one image of the victim's counts as 60, of the others' as 1."""
    one = pretraining(fed)
    one.stage("advertise")
    for name in NAMES:
        images = 1 if name == VICTIM else 2**29
        one.ask("share", name, settings=asdict(replace(one.settings, images=images)))
    assert {one.ask("masked", name) for name in NAMES} == {"secagg.signature"}


# -- no sum over one site


def test_adapting_a_finding_that_one_site_labels_moves_nothing(fed: Federation) -> None:
    """Else all but the victim would train nothing, and the head's common tensors were the victim's."""
    featuring(fed, findings=(RARE,))
    sums = adapting(fed, findings=(RARE,)).finish()
    assert sums["images"] == 0
    assert not any(np.any(value) for value in sums.values())


def test_a_rare_finding_leaves_the_head_as_it_would_be_without_its_labels(fed: Federation) -> None:
    findings = ("Bar", "Blob", RARE)
    featuring(fed, findings=findings)
    sums = adapting(fed, findings=findings).finish()
    assert sums["images"] == training_images(fed)  # all are labelled with another
    assert sums["labelled"][2] == 0
    assert sums["labelled"][1] > 0


def training_images(fed: Federation) -> int:
    here = [client_site.site_of(node, fed.recipe.image_px, enrolling=False) for node in fed.nodes.values()]
    return sum(len(site.training_ids(fed.recipe)) for site in here)


def test_counts_and_histograms_of_a_finding_that_one_site_labels_are_zero(fed: Federation) -> None:
    featuring(fed)
    counts = fed.attempt(findings=("Bar", "Blob", RARE)).finish()
    assert counts["positives"][2] == counts["negatives"][2] == 0
    head = {f"head.{name}": value for name, value in build_head(fed.recipe, 1).state_dict().items()}
    sums = fed.attempt("evaluate", findings=(RARE,), tensors=head).finish()
    assert not np.any(sums["histograms"])


def test_a_probes_figure_that_one_site_gives_is_none(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at the victim are there enough images for it."""
    monkeypatch.setattr(measures, "FEWEST_PATIENTS", 2)
    monkeypatch.setattr(measures, "FEWEST_IMAGES", 4)
    fed.recipe = replace(fed.recipe, health=replace(fed.recipe.health, eval_period_iterations=1))
    sums = pretraining(fed, findings=(RARE,)).finish()
    assert sums["figure/rankme/images"][0] == sums["images"] == training_images(fed)  # all look at their images
    assert sums["figure/knn_auroc/images"][0] == 0
    assert sums["figure/knn_auroc"][0] == 0


def test_survivors_that_leave_a_finding_to_too_few_are_refused(
    fed: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fed.attempt()
    gamma = fed.nodes["gamma"]  # whose images tell nothing of Bar
    monkeypatch.setattr("chexfound.phases.parted.declared", declared_without(gamma["site"], "Bar"))
    one.until("consistency")
    answer = one.ask("consistency", VICTIM, survivors=[VICTIM, "beta", "gamma"])
    check_refused(fed, answer, "secagg.findings", caplog)


def declared_without(site: str, finding: str) -> Callable[..., list[str]]:
    declared = parted.declared

    def changed(here: Any, recipe: Recipe, request: Any) -> list[str]:
        return [name for name in declared(here, recipe, request) if here.name != site or name != finding]

    return changed


# -- what a phase stands on


def test_features_of_another_recipe_are_not_adapted_on(fed: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """The backbone is the same, what the head sees is not."""
    featuring(fed)
    blind = replace(fed.recipe, adapt=replace(fed.recipe.adapt, views=0))
    own, fed.recipe = fed.recipe, blind
    featuring(fed)
    fed.recipe = own
    one = adapting(fed)
    one.stage("advertise")
    check_refused(fed, one.ask("share", VICTIM), "secagg.weights", caplog)
    featuring(fed)
    assert adapting(fed, 2).finish()["images"] > 0


def test_features_of_other_findings_are_not_adapted_on(fed: Federation) -> None:
    featuring(fed, findings=("Bar", "Blob", RARE))
    one = adapting(fed)
    one.stage("advertise")
    assert one.stage("share") == dict.fromkeys(NAMES, "secagg.weights")


def test_heads_need_a_backbone(fed: Federation) -> None:
    one = adapting(fed)
    one.stage("advertise")
    assert one.ask("share", VICTIM) == "secagg.weights"


def test_state_of_other_rounds_is_started_afresh(fed: Federation) -> None:
    """Three sites did a round that the other did not: in the next one nobody carries anything."""
    pretraining(fed).finish(NAMES[:3])
    second = pretraining(fed, round=1, step=1)
    second.request = replace(second.request, tensors=server_run.initial_weights(fed.recipe))
    second.until("unmask")
    states = {advert.state for advert in second.adverts.values()}
    assert "" in states and len(states) == 2  # noqa: PT018
    third = pretraining(fed, round=2, step=2)
    assert len({third.ask("advertise", name).values["advert"]["state"] for name in NAMES}) == 1


def test_a_state_whose_round_was_not_finished_is_not_claimed(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the state is on the disk and before what it includes is: it may be another round's by then."""
    pretraining(fed).finish()
    pretraining(fed, round=1, step=1).until("consistency")
    weights = {name: tensor + 1e-3 for name, tensor in pretraining(fed).request.tensors.items()}
    again = pretraining(fed, 2, round=1, step=1, tensors=weights).until("masked")
    with monkeypatch.context() as patch:
        patch.setattr(lineage, "record", killed)
        with pytest.raises(Killed):
            again.ask("masked", VICTIM)
    fed.kill()
    states = [pretraining(fed, round=2, step=2).ask("advertise", name).values["advert"]["state"] for name in NAMES]
    assert states[0] == ""
    assert "" not in states[1:]
    assert len(set(states[1:])) == 1


class Killed(BaseException):
    """The process of a site ends here."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


# -- a second sum


@pytest.mark.parametrize("changed", [{"number": 2}, {"round": 5}, {"run": 9}])
def test_a_second_sum_on_the_same_weights_over_other_sites(
    changed: dict[str, int], fed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    fed.attempt().finish()
    second = fed.attempt(**changed).until("unmask", NAMES[:3])
    answer = second.ask("unmask", VICTIM)
    check_refused(fed, answer, "secagg.differencing", caplog)
    same = fed.attempt(**{"number": 7, **{key: value + 1 for key, value in changed.items()}})
    assert same.finish()["images"] == 96  # over the same sites it is the same sum
    (opened,) = [entry for entry in fed.journal(VICTIM) if entry["event"] == "opened"]
    for name in NAMES[:3]:
        with Journal(fed.homes[name] / "secagg" / "journal.jsonl") as journal:
            journal.append({"event": "released", "phase": opened["phase"], "weights": opened["weights"]})
    assert fed.attempt(number=20).finish(NAMES[:3])["images"] == 72
    third = fed.attempt(number=21).until("unmask")  # a release is for one sum
    assert third.ask("unmask", VICTIM) == "secagg.differencing"


@pytest.mark.parametrize("phase", ["counts", "evaluate"])
def test_equal_weights_cannot_hide_behind_a_tensor_without_a_part(phase: str, fed: Federation) -> None:
    """Else a second sum on the same weights would look like one on others."""
    tensors: dict[str, torch.Tensor] = {}
    if phase == "evaluate":
        featuring(fed)
        tensors = {f"head.{name}": value for name, value in build_head(fed.recipe, 2).state_dict().items()}
    one = fed.attempt(phase, 1, tensors={**tensors, "unused": torch.ones(1)}).until("masked")
    assert one.ask("masked", VICTIM) == "secagg.weights"


# -- what is asked in the clear, out of turn, twice or too late


def test_a_site_that_requires_masks_takes_no_delivery_of_a_plain_run(fed: Federation) -> None:
    told = {"sha256": "0" * 64, "size": 4, "start": 0}
    part = PartRequest(phase="pretrain", stage="deliver", params=told, chunk=np.zeros(4, np.uint8))
    assert fed.ask(VICTIM, part, recipe=replace(fed.recipe, aggregation="fedavg")) == "secagg.plain"
    assert not list(fed.homes[VICTIM].glob("parts/*/*"))
    assert fed.ask(VICTIM, part).values == {"size": 4}


@pytest.mark.parametrize("end", ["refusal", "time", "answer", "next"])
def test_masked_arrays_are_not_collected_after_their_attempt(
    end: str, fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pretraining(fed).until("masked")
    for name in NAMES:
        assert isinstance(one.ask("masked", name, message={"part_bytes": 1000}), Envelope)
    apart = one.answers["masked"][VICTIM].detached  # type: ignore[union-attr]
    collect = staged(one.request, "collect", {"sha256": apart.sha256, "start": 0, "size": 1000})
    assert fed.ask(VICTIM, collect).chunk.size == 1000
    fed.kill()
    assert fed.ask(VICTIM, collect).chunk.size == 1000  # as often as it is asked, while the attempt goes on
    if end == "refusal":
        assert one.ask("consistency", VICTIM, survivors=[VICTIM]) == "secagg.survivors"
    elif end == "time":
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 10**6)
    elif end == "answer":
        assert [*one.stage("consistency"), *one.stage("unmask")] == [*NAMES, *NAMES]
    else:
        fed.attempt(number=7).until("share")
    assert fed.ask(VICTIM, collect) == "protocol"
    assert end == "next" or not fed.secrets(VICTIM).exists()


def test_a_part_is_for_a_phase_that_there_is(fed: Federation) -> None:
    """Else each word that is made up would be an entry in the journal of refusals, and a line in the log."""
    told = {"sha256": "0" * 64, "size": 4, "start": 0}
    for phase in ("", "x", "x" * 100, "pretrain\n03:14:15 chexfound.client all is well"):
        part = PartRequest(phase=phase, stage="deliver", params=told, chunk=np.zeros(4, np.uint8))
        assert fed.ask(VICTIM, part, recipe=replace(fed.recipe, aggregation="fedavg")) == "protocol"
    assert fed.journal(VICTIM) == []


def test_a_stage_under_a_plain_recipe_is_refused(fed: Federation) -> None:
    plain = replace(fed.recipe, aggregation="fedavg")
    assert fed.attempt().ask("advertise", VICTIM, message={"recipe": plain}) == "protocol"


def test_other_rosters_are_refused(fed: Federation) -> None:
    smaller = fed.sites.without_site("gamma")
    stranger = Roster(federation="elsewhere", serial=1, sites=fed.sites.sites)
    for sites in (smaller, stranger):
        assert fed.attempt().ask("advertise", VICTIM, message={"sites": sites}) == "roster"


def test_steps_before_their_turn(fed: Federation, caplog: pytest.LogCaptureFixture) -> None:
    one = fed.attempt().until("masked")
    check_refused(fed, one.ask("consistency", VICTIM, survivors=list(NAMES)), "secagg.order", caplog)
    for stage in STAGES[1:]:
        assert fed.attempt(number=5).ask(stage, "beta") == "secagg.order"


DIFFERENT: dict[str, Callable[[Try], dict[str, Any]]] = {
    "advertise": lambda t: {"findings": ("Bar",)},
    "share": lambda t: {"adverts": [asdict(t.adverts[name]) for name in NAMES[:3]]},
    "masked": lambda t: {
        "sharers": list(NAMES[:3]),
        "packets": [asdict(t.packets[name, VICTIM]) for name in NAMES[:3]],
    },
    "consistency": lambda t: {"survivors": list(NAMES[:3])},
    "unmask": lambda t: {"signatures": only(t, NAMES[1:])},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_different_request_is_refused(stage: str, fed: Federation, caplog: pytest.LogCaptureFixture) -> None:
    one = fed.attempt().until(stage)
    assert isinstance(one.ask(stage, VICTIM), Reply)
    changed = DIFFERENT[stage](one)
    code = "secagg.survivors-twice" if stage == "consistency" else "secagg.repeat"
    check_refused(fed, one.ask(stage, VICTIM, **changed), code, caplog)


def test_an_attempt_that_was_seen_is_past(fed: Federation) -> None:
    fed.attempt(number=5).finish()
    for number in (5, 4, 0):
        one = fed.attempt(number=number)
        answer = one.ask("advertise", VICTIM, findings=("Bar",))
        assert answer == ("secagg.repeat" if number == 5 else "secagg.attempt")
    first, second = fed.attempt(number=6), fed.attempt(number=6, round=1)  # two at a time: the first is over
    assert isinstance(first.ask("advertise", VICTIM), Reply)
    keys = json.loads(fed.secrets(VICTIM).read_text())
    assert isinstance(second.ask("advertise", VICTIM), Reply)
    assert not set(keys.values()) & set(json.loads(fed.secrets(VICTIM).read_text()).values())
    assert first.ask("advertise", VICTIM) == "secagg.attempt"
    assert first.ask("share", VICTIM, adverts=[], sharers=[]) in ("secagg.order", "protocol")
    assert second.until("unmask").ask("unmask", VICTIM) is not None


def test_requests_after_the_attempts_time(
    fed: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for number, moment in ((1, now + 86_500), (2, now - 4000)):  # late, and with a clock that was set back
        one = fed.attempt(number=number).until("unmask")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda moment=moment: moment)
            check_refused(fed, one.ask("unmask", VICTIM), "secagg.late", caplog)
    assert fed.attempt(number=3).finish()["images"] == 96


def test_secrets_go_with_the_attempts_time_at_the_next_message_of_any_kind(
    fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed.attempt().until("unmask")
    assert fed.secrets(VICTIM).exists()
    later = time.time() + 86_500
    monkeypatch.setattr(time, "time", lambda: later)
    assert isinstance(fed.ask(VICTIM, replace(fed.attempt().request, phase="enrol")), Reply)
    assert not fed.secrets(VICTIM).exists()


@pytest.mark.parametrize("number", [True, 1.0, "1", -1, 2**64, 10**400, None, [1], {"a": 1}])
def test_numbers_that_are_none(number: Any, fed: Federation) -> None:
    one = fed.attempt()
    assert one.ask("advertise", VICTIM, attempt=number) == "protocol"
    assert fed.journal(VICTIM) == []


def test_largest_attempt_number(fed: Federation) -> None:
    fed.attempt(number=2**64 - 1).finish()
    assert fed.attempt(number=3).ask("advertise", VICTIM) == "secagg.attempt"
    assert fed.attempt(round=1).finish()["images"] == 96


@pytest.mark.parametrize(
    ("stage", "changed"),
    [
        ("advertise", {"more": 1}),
        ("advertise", {"phase": "enrol"}),
        ("share", {"adverts": "all"}),
        ("share", {"adverts": [{}]}),
        ("share", {"shapes": {"x": [1]}}),
        ("share", {"settings": {"ring": 32}}),
        ("share", {"settings": {"ring": True, "images": 1, "labelled": [], "ranges": {}}}),
        ("share", {"settings": {"ring": 32, "images": 2**31, "labelled": [], "ranges": {}}}),
        ("share", {"weights": ["x"]}),
        ("masked", {"sharers": "alpha"}),
        ("masked", {"sharers": ["beta", "alpha", "delta", "gamma"]}),
        ("masked", {"packets": [None] * 4}),
        ("consistency", {"survivors": {"alpha": 1}}),
        ("consistency", {"survivors": ["alpha", "alpha", "beta", "gamma"]}),
        ("unmask", {"signatures": ["x"]}),
        ("unmask", {"signatures": {"alpha": "00"}}),
        ("unmask", {"signatures": {"alpha": "00" * 64 + "\n"}}),
    ],
)
def test_what_is_no_request_costs_the_attempt_nothing(stage: str, changed: dict[str, Any], fed: Federation) -> None:
    one = fed.attempt().until(stage)
    assert one.ask(stage, VICTIM, **changed) == "protocol"
    if stage == "unmask":
        assert isinstance(one.ask(stage, VICTIM), Reply)


def test_refusals_again_and_again_do_not_fill_the_journal(fed: Federation) -> None:
    fed.attempt(number=2).until("share")
    for _ in range(3):
        assert fed.attempt(number=1).ask("advertise", VICTIM) == "secagg.attempt"
    assert fed.refused(VICTIM) == ["secagg.attempt"]


def test_a_colluders_sealed_rubbish_names_the_colluder(fed: Federation) -> None:
    """The victim cannot open it: it says whose it was, and nothing else leaves."""
    one = fed.attempt().until("masked")
    bad = replace(one.packets[COLLUDER, VICTIM], sealed="00" * 160, signature="")
    one.packets[COLLUDER, VICTIM] = bad.signed(identity(fed, COLLUDER), attempt_of(one), one.context())
    answer = one.ask("masked", VICTIM)
    assert isinstance(answer, Reply)
    assert answer.values == {"refused": "secagg.shares", "dealers": [COLLUDER]}
    assert not answer.masked
    assert fed.refused(VICTIM) == ["secagg.shares"]
    assert not fed.secrets(VICTIM).exists()
