"""Sums over real sites, honest but unlucky: lost at any stage, broken, lying, and a coordinator that is killed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chexfound.contract.request import Reply, Request
from chexfound.durable.journal import Journal, read_journal
from chexfound.errors import RefusedError, SiteError
from chexfound.model import checkpoint
from chexfound.phases import dispatch, parted
from chexfound.phases.payload import Settings
from chexfound.pretrain.train import initial_weights
from chexfound.secagg.keys import Secrets
from chexfound.secagg.site import Side, WrongSharesError
from client.answer import hospital as client_site
from client.masked import stages as client_secure
from server.app import log_event
from server.exchange.protocol import Missing
from server.rounds.loop import Outcome
from server.rounds.masked import MaskedRounds
from server.rounds.record import Record
from server.rounds.start import run_of
from server.rounds.sums import SecureSums
from server.runs import words
from tests.secagg.federation import NAMES, STAGES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
EACH = 24  # images of a site


@dataclass
class Unlucky:
    """The exchange, with replies that are lost or changed on their way: the first time that a stage is asked.

    Args:
        lost: by stage: sites that are not heard.
        asked: whether these were asked, and it is their reply that is lost.
        change: of replies, by stage and site.
    """

    exchange: Any
    lost: dict[str, Sequence[str]] = field(default_factory=dict)
    asked: bool = True
    change: dict[tuple[str, str], Callable[[Reply], Reply]] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)

    def ask(self, requests: Sequence[Request | None], timeout_s: float | None = None) -> Iterator[Any]:
        stage = next(request.kind for request in requests if request is not None)
        self.stages.append(stage)
        lost = self.lost.pop(stage, ())
        sent = [None if name in lost and not self.asked else one for name, one in zip(NAMES, requests, strict=True)]
        outcomes = list(self.exchange.ask(sent, timeout_s))
        for name, request, outcome in zip(NAMES, requests, outcomes, strict=True):
            if request is not None and name in lost:
                yield Missing(reason="gone", error=SiteError("gone"))
            elif isinstance(outcome, Reply) and (stage, name) in self.change:
                yield self.change[stage, name](outcome)
            else:
                yield outcome


@pytest.fixture
def sums(fed: Federation, tmp_path: Path) -> Callable[..., SecureSums]:
    """`sums(lost={…})`: the sums of a run over these hospitals, with that misfortune."""
    exchange = fed.exchange()
    members = exchange.enrol(fed.recipe)

    def make(**misfortune: Any) -> SecureSums:
        return SecureSums(
            recipe=fed.recipe,
            exchange=Unlucky(exchange, **misfortune),
            members=members,
            sites=fed.sites,
            run_id=1,
            folder=tmp_path / "run",
            tell=lambda event: None,
        )

    return make


def counted(sums: SecureSums) -> Any:
    return sums.sum(Request(phase="counts", findings=("Bar", "Blob")), Settings(ring=32, images=1), {})


def opened(fed: Federation) -> list[str]:
    return [name for name in NAMES if any(entry["event"] == "opened" for entry in fed.journal(name))]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_one_site_lost_at_any_stage(stage: str, asked: bool, sums: Callable[..., SecureSums]) -> None:
    summed = counted(sums(lost={stage: ["beta"]}, asked=asked))
    masked = STAGES.index(stage) > STAGES.index("masked")
    assert summed.sums["images"] == (4 if masked else 3) * EACH
    assert summed.survivors == [name for name in NAMES if masked or name != "beta"]


def backbone(fed: Federation) -> Request:
    tensors = checkpoint.with_prefix(initial_weights(fed.recipe), "student.backbone.")
    return Request(phase="features", findings=("Bar", "Blob"), tensors=tensors)


@pytest.mark.parametrize("fault", ["lost", "tells"])
def test_a_backbone_is_handed_out_to_as_many_as_a_sum_needs(
    fault: str, sums: Callable[..., SecureSums], fed: Federation
) -> None:
    """A site that is not heard, or whose reply holds something, is named; with two of four there is no sum after it."""

    def unlucky(*names: str) -> SecureSums:
        if fault == "lost":
            return sums(lost={"features": names})
        return sums(change={("features", name): lambda reply: Reply(values={"images": 3}) for name in names})

    assert unlucky().hand_out(backbone(fed)) == []
    reason = "gone" if fault == "lost" else "protocol"
    assert unlucky("beta").hand_out(backbone(fed)) == [{"site": "beta", "reason": reason}]
    with pytest.raises(SiteError, match=f"features: only 2 of 4 .* 3 are needed; missing: beta .{reason}., delta"):
        unlucky("beta", "delta").hand_out(backbone(fed))


def test_a_backbone_goes_to_no_site_that_is_left_out(sums: Callable[..., SecureSums], fed: Federation) -> None:
    run = sums()
    run.left_out = {"gamma": "secagg.blame"}
    assert run.hand_out(backbone(fed)) == [{"site": "gamma", "reason": "secagg.blame"}]
    assert not (fed.homes["gamma"] / "backbone.safetensors").exists()


def test_a_run_begins_with_the_same_numbers_at_all_sites(
    sums: Callable[..., SecureSums], fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site's typing error is told as that, and nothing is opened without it."""
    (fed.homes["beta"] / "site.yaml").write_text("secagg: {colluders: 0}")
    run = sums()
    with pytest.raises(SiteError, match=r"beta has other numbers of sites or colluders .*site\.yaml"):
        counted(run)
    assert run.exchange.stages == ["advertise", "share"]
    assert opened(fed) == []


def test_sites_lost_one_after_the_other_down_to_the_threshold(sums: Callable[..., SecureSums]) -> None:
    summed = counted(sums(lost={"masked": ["beta"]}))
    assert summed.sums["images"] == 3 * EACH
    summed = counted(sums(lost={"consistency": ["beta"], "unmask": []}))
    assert summed.sums["images"] == 3 * EACH  # as before, or who has opened it over three would refuse


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_nothing_is_opened_and_the_next_attempt_has_fresh_keys(
    stage: str, asked: bool, sums: Callable[..., SecureSums], fed: Federation
) -> None:
    run = sums(lost={stage: ["beta", "gamma"]}, asked=asked)
    keys = []

    def keep(reply: Reply) -> Reply:
        keys.append(reply.values["advert"]["mask"])
        return reply

    run.exchange.change["advertise", "alpha"] = keep
    assert counted(run).sums["images"] == 4 * EACH
    first = run.exchange.stages.index("advertise", 1)
    assert ("unmask" in run.exchange.stages[:first]) == (stage == "unmask")
    assert len(set(keys)) == len(keys) == 2


def test_whom_a_sum_may_have_been_opened_over_it_is_opened_over_again(sums: Callable[..., SecureSums]) -> None:
    """Beta is lost before, two more while they open: with beta back, it must be the sum without beta after all."""
    run = sums(lost={"masked": ["beta"], "unmask": ["alpha", "gamma"]})
    assert counted(run).survivors == ["alpha", "delta", "gamma"]
    assert run.exchange.stages.count("unmask") == 2
    # Another coordinator process, later.
    assert counted(sums()).survivors == ["alpha", "delta", "gamma"]


def test_what_all_refuse_is_not_asked_again(sums: Callable[..., SecureSums], fed: Federation, tmp_path: Path) -> None:
    """Another run's sum of counts, over other sites; another attempt would be for nothing."""
    assert counted(sums(lost={"masked": ["beta"]})).survivors == ["alpha", "delta", "gamma"]
    (tmp_path / "run" / "opened.json").unlink()  # which that run remembers, and another does not know
    run = sums()
    with pytest.raises(SiteError, match=r"no sum after one attempt: .*secagg\.differencing.*wait for all to be there"):
        counted(run)
    assert run.exchange.stages.count("unmask") == 1


def test_attempts_below_the_threshold_for_ever(sums: Callable[..., SecureSums], fed: Federation) -> None:
    run = sums()
    run.left_out = dict.fromkeys(["beta", "gamma"], "secagg.blame")
    with pytest.raises(SiteError, match="only 2 sites advertised"):
        counted(run)
    assert not opened(fed)


# -- sites that are broken, or lie


def patched(monkeypatch: pytest.MonkeyPatch, method: str, site: str, change: Callable[..., Any]) -> None:
    """One site's side, changed: `change(side, true, *given)`."""
    true = getattr(Side, method)

    def instead(self: Side, *given: Any) -> Any:
        return change(self, true, *given) if self.site == site else true(self, *given)

    monkeypatch.setattr(Side, method, instead)


def test_a_dealer_whose_shares_do_not_open_is_left_out(
    sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deal(side: Side, true: Any) -> Any:
        packets = {packet.holder: packet for packet in true(side)}
        for holder in ("alpha", "gamma"):
            bad = replace(packets[holder], sealed=packets["delta"].sealed, signature="")
            packets[holder] = bad.signed(side.key, side.attempt, side.context)
        return [packets[name] for name in sorted(packets)]

    patched(monkeypatch, "deal", "beta", deal)
    run = sums()
    assert counted(run).survivors == ["alpha", "delta", "gamma"]
    assert run.left_out == {"beta": "secagg.blame"}


def test_a_site_that_complains_of_several_is_left_out(
    sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(side: Side, true: Any, *given: Any) -> Any:
        raise WrongSharesError(["alpha", "gamma"])

    patched(monkeypatch, "check_sharers", "beta", lie)
    run = sums()
    assert counted(run).survivors == ["alpha", "delta", "gamma"]
    assert run.left_out == {"beta": "secagg.blame"}


def test_of_a_pair_that_disputes_nobody_can_tell(
    sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(side: Side, true: Any, *given: Any) -> Any:
        raise WrongSharesError(["alpha"])

    patched(monkeypatch, "check_sharers", "beta", lie)
    run = sums()
    with pytest.raises(SiteError, match="only 2 sites advertised"):  # of four sites two are too few
        counted(run)
    assert run.left_out == {"alpha": "secagg.doubt", "beta": "secagg.doubt"}


def test_a_holder_that_opens_a_wrong_share_is_named_and_the_sum_is_right(
    fed: Federation, tmp_path: Path, sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sums()

    def wrong(reply: Reply) -> Reply:
        share = reply.values["shares"]["alpha"]
        share["share"] = f"{int(share['share'], 16) ^ 1:0{len(share['share'])}x}"
        return reply

    run.exchange.change["unmask", "beta"] = wrong
    assert counted(run).sums["images"] == 4 * EACH
    assert run.left_out == {"beta": "secagg.blame"}


def test_a_dealer_of_another_secret_is_named_and_needs_the_operators(
    fed: Federation, sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows when all have opened, and a sum without that dealer is then a second one on the same weights."""

    def deal(side: Side, true: Any) -> Any:
        return true(replace(side, secrets=replace(side.secrets, seed=Secrets.fresh().seed)))

    patched(monkeypatch, "deal", "beta", deal)
    run = sums()
    with pytest.raises(SiteError, match="chexfound-client secagg release"):
        counted(run)
    assert run.left_out == {"beta": "secagg.blame"}
    (entry,) = [entry for entry in fed.journal("alpha") if entry["event"] == "opened"]
    for name in NAMES:
        with Journal(fed.homes[name] / "secagg" / "journal.jsonl") as journal:
            journal.append({"event": "released", "phase": entry["phase"], "weights": entry["weights"]})
    assert counted(run).survivors == ["alpha", "delta", "gamma"]


@pytest.mark.parametrize("changed", [{"cipher": "00" * 32}, {"mask": "01" + "00" * 31}, {"minimum": 128}, "same"])
def test_an_advert_that_the_others_would_refuse_goes_no_further(
    changed: Any, fed: Federation, sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = client_secure.advertise

    def advertise(key: Any, attempt: Any, site: str, *given: Any, **named: Any) -> Any:
        advert = true(key, attempt, site, *given, **named)
        if site != "beta":
            return advert
        new = {"cipher": advert.mask} if changed == "same" else changed
        return replace(advert, signature="", **new).signed(key, attempt)

    monkeypatch.setattr(client_secure, "advertise", advertise)
    run = sums()
    assert counted(run).survivors == ["alpha", "delta", "gamma"]
    assert run.exchange.stages == list(STAGES)  # at the first attempt


GARBAGE: list[dict[str, Any]] = [
    {},
    {"advert": None, "context": 1, "packets": 2, "payload": 3, "signature": 4, "shares": 5},
    {"advert": {}, "context": "", "packets": [{}], "payload": "", "signature": "", "shares": {"alpha": {}}},
    {"refused": "secagg.shares", "dealers": ["omega"]},
    {"shares": {name: {"kind": "seed", "share": "00" * 33, "salt": "00" * 32} for name in NAMES}},
]


@pytest.mark.parametrize("stage", STAGES)
def test_replies_that_are_garbage_cost_their_site_the_attempt(stage: str, sums: Callable[..., SecureSums]) -> None:
    late = STAGES.index(stage) > STAGES.index("masked")
    for number, values in enumerate(GARBAGE):
        run = sums(change={(stage, "beta"): lambda reply, values=values: Reply(values=values)})
        request = Request(phase="counts", round=number, findings=("Bar",))
        summed = run.sum(request, Settings(ring=32, images=1), {})
        assert summed.sums["images"] == (4 if late else 3) * EACH


# -- whole runs


@pytest.fixture
def whole(fed: Federation) -> Federation:
    """With a recipe of one round a phase, its findings named, and small parts."""
    recipe = fed.recipe
    fed.recipe = replace(
        recipe,
        train=replace(recipe.train, rounds=1),
        adapt=replace(recipe.adapt, rounds=1, findings=("Bar", "Blob")),
        federation=replace(recipe.federation, part_mb=0.05),
    )
    return fed


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-4) for name in one)


class Killed(BaseException):
    """The coordinator's process ends here."""


def test_a_coordinator_killed_at_every_stage_ends_with_the_model_of_plain_averaging(
    whole: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secagg = whole.recipe
    undisturbed = run_of(secagg, whole.exchange(), tmp_path / "run").run()

    homes = {name: tmp_path / "others" / name for name in NAMES}
    for name, home in homes.items():
        copy_keys(whole.homes[name], home)
        whole.nodes[name]["home"] = str(home)
    client_site.forget()
    killed: set[tuple[Any, ...]] = set()
    outcome = None
    while outcome is None:
        exchange = whole.exchange(tmp_path / "killed" / "parts")
        true = exchange.ask

        def ask(requests: Sequence[Request | None], timeout_s: float | None = None, true: Any = true) -> Iterator[Any]:
            first = next(request for request in requests if request is not None)
            yield from true(requests, timeout_s)
            if first.phase != "enrol" and (key := (first.phase, first.kind)) not in killed:
                killed.add(key)
                raise Killed

        exchange.ask = ask  # type: ignore[method-assign]
        try:
            outcome = run_of(secagg, exchange, tmp_path / "killed").run()
        except Killed:
            client_site.forget()
    assert len(killed) == 4 * len(STAGES) + 1  # the backbone is handed out in one message
    assert close(outcome.tensors, undisturbed.tensors)
    assert json.loads((tmp_path / "killed" / "secagg" / "attempts.json").read_text())["1/pretrain/0"] == 6
    for home in homes.values():
        entries = read_journal(home / "secagg" / "journal.jsonl")
        begun = [(entry["of"], entry["attempt"]) for entry in entries if entry["event"] == "begun"]
        assert len(begun) == len(set(begun)) == 4 * 6
        assert not [entry for entry in entries if entry["event"] == "refused"]
        assert not (home / "secagg" / "attempt" / "secrets.json").exists()
        kept = {path.name.partition("-")[0]: path.stat().st_size for path in (home / "parts" / "1").iterdir()}
        assert kept["in"] > 50_000  # all of this went in parts; the undisturbed run whole
        assert "out" not in kept  # gone with its attempt

    plain = in_the_clear(whole, tmp_path)
    assert close(plain.tensors, undisturbed.tensors)
    assert checkpoint.digest(plain.tensors) != checkpoint.digest(undisturbed.tensors)


def in_the_clear(whole: Federation, tmp_path: Path) -> Outcome:
    """The same run as plain averaging, at sites that accept it."""
    for name in NAMES:
        home = tmp_path / "plain" / name
        whole.nodes[name]["home"] = str(home)
        copy_keys(whole.homes[name], home)
        (home / "site.yaml").write_text("plain: accepted")
    client_site.forget()
    whole.recipe = replace(whole.recipe, aggregation="fedavg")
    return run_of(whole.recipe, whole.exchange(), tmp_path / "fedavg").run()


def copy_keys(home: Path, to: Path) -> None:
    to.mkdir(parents=True)
    for part in ("keys", "federation.json", "ca.crt"):
        (shutil.copytree if (home / part).is_dir() else shutil.copy)(home / part, to / part)


def test_averaged_moments_are_those_of_plain_averaging_but_for_the_mean_of_roots(
    whole: Federation, tmp_path: Path
) -> None:
    """A round each, from the same weights."""
    train = replace(whole.recipe.train, optimizer_state="average", local_steps=2)
    whole.recipe = replace(whole.recipe, train=train, phases=("pretrain",))
    run_of(whole.recipe, whole.exchange(), tmp_path / "run").run()
    masked = checkpoint.load(next((tmp_path / "run" / "rounds").glob("*.safetensors")))
    in_the_clear(whole, tmp_path)
    plain = checkpoint.load(next((tmp_path / "fedavg" / "rounds").glob("*.safetensors")))
    assert masked.keys() == plain.keys()
    for name, tensor in plain.items():
        if name.endswith(".exp_avg_sq"):
            assert bool((masked[name].sqrt() <= tensor.sqrt() + 1e-5).all()), name  # of means, that of roots is lower
            assert bool((masked[name].sqrt() >= tensor.sqrt() / len(NAMES) ** 0.5 - 1e-5).all()), name
        elif name.endswith(".step"):
            assert torch.equal(masked[name], tensor), name
        else:
            assert torch.allclose(masked[name], tensor, rtol=0, atol=1e-5), name
    squares = [name for name in plain if name.endswith(".exp_avg_sq")]
    assert squares
    for name in squares:
        m = masked[name.replace("exp_avg_sq", "exp_avg")].double()
        assert bool((m**2 <= 53 * masked[name].double() * 1.001 + 1e-30).all()), name


# -- a finding that too few sites can train


@pytest.mark.parametrize("known", [(), ("alpha", "beta")])
def test_a_finding_that_too_few_sites_can_train_ends_with_the_reason(
    known: Sequence[str], whole: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All label it, and of the others none has a positive among its training images."""
    true = client_site.Site.training_labels

    def labels(site: Any, recipe: Any, findings: tuple[str, ...]) -> Any:
        found = true(site, recipe, findings)
        if site.name not in known and "Bar" in findings:
            column = findings.index("Bar")
            found[:, column] = 0
        return found

    monkeypatch.setattr(client_site.Site, "training_labels", labels)
    recipe = whole.recipe
    whole.recipe = replace(
        recipe, phases=("adapt", "evaluate"), adapt=replace(recipe.adapt, rounds=2, findings=("Bar",))
    )
    told: list[Any] = []
    outcome = run_of(whole.recipe, whole.exchange(), tmp_path / "run", on_event=told.append).run()
    rounds = [event for event in told if event["event"] == "round"]
    assert [one["zeroed"] for one in rounds] == [["Bar"]] * 2
    assert [one["sites"][0]["history"] for one in rounds] == [[], []]
    for event in told:
        log_event(event)
        assert words.line(event, {})
    assert [words.loss(event) for event in rounds] == [None, None]
    assert {row["auroc"] for row in outcome.results} == {None}
    assert all("fewer sites label it" in row["reason"] for row in outcome.results)


@pytest.mark.parametrize("masked", [True, False])
def test_sites_take_the_moments_of_a_round_that_nobody_trained_in(
    masked: bool, whole: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold the number of steps against the run's."""
    true = client_site.Site.training_labels
    monkeypatch.setattr(client_site.Site, "training_labels", lambda *given: true(*given).clip(-1, 0))
    adapt = replace(whole.recipe.adapt, rounds=2, optimizer_state="average")
    whole.recipe = replace(whole.recipe, phases=("adapt",), adapt=adapt)
    if masked:
        run_of(whole.recipe, whole.exchange(), tmp_path / "run").run()
    else:
        in_the_clear(whole, tmp_path)
    (path,) = (tmp_path / ("run" if masked else "fedavg") / "rounds").glob("adapt-*.safetensors")
    steps = {int(tensor) for name, tensor in checkpoint.load(path).items() if name.endswith(".step")}
    assert steps == {2 * adapt.local_steps}


def test_a_site_without_a_trainable_finding_has_no_part_and_no_say(
    whole: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = client_site.Site.training_labels

    def labels(site: Any, recipe: Any, findings: tuple[str, ...]) -> Any:
        found = true(site, recipe, findings)
        return found.clip(-1, 0) if site.name == "delta" else found

    monkeypatch.setattr(client_site.Site, "training_labels", labels)
    whole.recipe = replace(whole.recipe, phases=("adapt", "evaluate"))
    told: list[Any] = []
    run_of(whole.recipe, whole.exchange(), tmp_path / "run", on_event=told.append).run()
    (one,) = [event for event in told if event["event"] == "round"]
    assert set(one.get("zeroed", ())) < {"Bar", "Blob"}
    assert "delta" in one["cohort"]
    assert words.loss(one) > 0


# -- adverts of what was not asked


@pytest.mark.parametrize(
    "findings", [["Bar", "invented"], ["Bar", "Bar"], [f"f{n}" for n in range(4096)], ["x"] * 5000]
)
def test_a_site_that_advertises_what_was_not_asked_is_left_out(
    findings: list[str], sums: Callable[..., SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = client_secure.advertise

    def advertise(key: Any, attempt: Any, site: str, *given: Any, **named: Any) -> Any:
        advert = true(key, attempt, site, *given, **named)
        return replace_unchecked(advert, findings).signed(key, attempt) if site == "beta" else advert

    def replace_unchecked(advert: Any, value: list[str]) -> Any:
        made = copy.copy(advert)
        object.__setattr__(made, "findings", value)
        object.__setattr__(made, "signature", "")
        return made

    monkeypatch.setattr(client_secure, "advertise", advertise)
    run = sums()
    summed = counted(run)
    assert summed.survivors == ["alpha", "delta", "gamma"]
    assert [one["site"] for one in summed.missing] == ["beta"]
    assert run.exchange.stages == list(STAGES)


# -- a site that refuses by its own policy


def refusing(monkeypatch: pytest.MonkeyPatch, stage: str, names: Sequence[str]) -> None:
    """These sites take no part in sums of so few patients: they say so as they advertise, or once they see the work."""
    module, what = {"advertise": (parted, "declared"), "masked": (dispatch, "run")}[stage]
    true = getattr(module, what)

    def instead(site: Any, *given: Any) -> Any:
        if site.name in names:
            raise RefusedError("policy.patients")
        return true(site, *given)

    monkeypatch.setattr(module, what, instead)


@pytest.mark.parametrize("stage", ["advertise", "masked"])
def test_a_site_that_refuses_is_missing_and_the_sum_goes_on(
    stage: str, sums: Callable[..., SecureSums], fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sums()
    refusing(monkeypatch, stage, ["beta"])
    summed = counted(run)
    assert summed.survivors == ["alpha", "delta", "gamma"]
    assert summed.missing == [{"site": "beta", "reason": "policy.patients"}]
    assert fed.refused("beta") == ["policy.patients"]


@pytest.mark.parametrize("stage", ["advertise", "masked"])
def test_where_too_few_are_left_nothing_is_opened(
    stage: str, sums: Callable[..., SecureSums], fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sums()
    refusing(monkeypatch, stage, ["alpha", "beta"])
    with pytest.raises(SiteError, match=r"only 2 .*missing: alpha \(policy\.patients\), beta \(policy\.patients\)"):
        counted(run)
    assert not opened(fed)


def test_a_site_s_own_minimum_holds_for_all(sums: Callable[..., SecureSums], fed: Federation) -> None:
    (fed.homes["gamma"] / "site.yaml").write_text("secagg: {minimum: 4}")
    with pytest.raises(SiteError, match="only 3 of 4 sites came through, 4 are needed"):
        counted(without_beta(sums()))
    assert not opened(fed)


def without_beta(run: SecureSums) -> SecureSums:
    """Beta's masked values never come."""
    run.exchange.change["masked", "beta"] = lambda reply: Missing(reason="gone", error=SiteError("gone"))
    return run


@pytest.mark.parametrize(("n", "together", "most"), [(3, 99, 66), (4, 101, 51), (128, 10, 5), (4, 0, 1)])
def test_a_site_counts_at_most_its_share_of_what_all_counted(
    n: int, together: int, most: int, fed: Federation, tmp_path: Path
) -> None:
    rounds = MaskedRounds(fed.recipe, fed.exchange(), Record(tmp_path / "run"))
    sites = {str(number): None for number in range(n)}
    rounds.sums = SimpleNamespace(sites=SimpleNamespace(sites=sites))  # type: ignore[assignment]
    assert rounds._most(together) == most
