from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.durable.files import write_json
from chexfound.durable.journal import Journal, read_journal
from chexfound.errors import RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Address, Keys, Roster
from chexfound.secagg.messages import Attempt, names_digest
from client import cli
from client.home import membership
from client.home.policy import Policy, SecAggPolicy
from client.masked import ledger
from client.masked.stages import SiteProtocol
from client.operator import sums
from server.federation import pki

NAMES = ["EAST", "NORTH", "SOUTH", "WEST"]
WEIGHTS = "ab" * 32
OTHER = "ac" * 32
SHARE = {"base": WEIGHTS, "question": "", "place": "", "told": {"settings": {"images": 60}}}
ATTEMPT = Attempt(run=7, phase="pretrain", round=2, attempt=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the site NORTH, which approved a federation of four."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "sites" / "NORTH"
    own, _ = membership.make_keys(folder)
    keys = {"NORTH": own} | {
        name: Keys(own.node, signing.public_line(Ed25519PrivateKey.generate().public_key()))
        for name in NAMES
        if name != "NORTH"
    }
    pki.make_authority(tmp_path / "authority", "thorax")
    authority = (tmp_path / "authority" / "ca.crt").read_text()
    sites = Roster(federation="thorax", serial=4, sites=keys)
    server = Address("coordinator.invalid", 8443)
    federation = membership.ApprovedFederation(name="thorax", server=server, authority=authority, sites=sites)
    monkeypatch.setattr(membership, "approved", lambda home: federation if home == folder else None)
    return folder


@pytest.fixture
def desk(home: Path) -> Iterator[SiteProtocol]:
    """What the site itself reads and writes the journal with; closed before a command is run."""
    federation = membership.present(home)
    made = SiteProtocol(home, "NORTH", federation.sites, membership.identity_key(home), Policy.load(home))
    yield made
    made.close()


def tell(home: Path, *entries: dict[str, object]) -> None:
    with Journal(home / "secagg" / "journal.jsonl") as journal:
        for entry in entries:
            journal.append(dict(entry))


def opened(over: list[str], weights: str = WEIGHTS, phase: str = "pretrain") -> dict[str, object]:
    return {"event": "opened", "phase": phase, "weights": weights, "over": names_digest(over).hex(), "of": "0" * 64}


def refused(code: str = "secagg.differencing", **more: str) -> dict[str, object]:
    return {"event": "refused", "of": "0" * 64, "attempt": 1, "code": code, **more}


def do(*words: str) -> int:
    return cli.main(["secagg", *words])


def test_a_site_that_has_summed_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert do("show") == 0
    out = capsys.readouterr().out
    assert "site NORTH: secure aggregation in federation thorax, roster 4" in out
    assert "4; 1 may collude with the coordinator; 3 must agree to a sum" in out
    assert "is over 3 sites or more; 1 may be lost" in out
    assert "that do not aggregate under masks are refused" in out
    assert "attempt       none yet" in out
    assert not (home / "secagg").exists()  # looking leaves no trace


@pytest.fixture
def demand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`demand(colluders=0)`: what the site's operator wants."""

    def make(**values: Any) -> None:
        monkeypatch.setattr(Policy, "load", staticmethod(lambda home: Policy(secagg=SecAggPolicy(**values))))

    return make


def test_a_site_that_takes_runs_in_the_clear(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "site.yaml").write_text("plain: accepted")
    assert do("show") == 0
    assert "in the clear are accepted too" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "asked", "said"),
    [
        (
            "",
            (False, True),
            "in the clear are accepted; with 3 sites they are refused, unless site.yaml says 'plain: accepted'",
        ),
        ("plain: accepted", (False, False), "in the clear are accepted; with 3 sites too, by site.yaml"),
        ("secagg: {required: false}", (False, False), "in the clear are accepted; with 3 sites too, by site.yaml"),
        (
            "secagg: {required: true}\nplain: accepted",
            (True, True),
            "are all refused: site.yaml says secagg: {required: true}",
        ),
    ],
)
@pytest.mark.parametrize("names", [["NORTH"], ["NORTH", "SOUTH"]])
def test_too_few_sites_for_masks_is_told_and_no_fault(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, names: list[str],
    policy: str, asked: tuple[bool, bool], said: str,
) -> None:  # fmt: skip
    federation = membership.present(home)
    sites = replace(federation.sites, sites={name: federation.sites.sites[name] for name in names})
    monkeypatch.setattr(membership, "approved", lambda home: replace(federation, sites=sites))
    (home / "site.yaml").write_text(policy)
    assert do("show") == 0
    out = capsys.readouterr().out
    assert f"  sites         {len(names)}; masks need 3 or more, so no sum is masked here\n" in out
    assert ("is seen by the coordinator as this site sends it" in out) == (not asked[0])
    assert said in out
    assert do("show", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sites"], found["parameters"]) == (len(names), None)
    assert (found["required"], found["required_from_three"]) == asked


def test_the_numbers_are_those_of_the_policy(
    demand: Callable[..., None], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demand(required=True, colluders=0, minimum=4)
    assert do("show", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["required"] is True
    assert found["parameters"] == {"n": 4, "c": 0, "t": 3, "minimum": 4, "survivors": 4, "dropouts": 0}


def test_numbers_that_do_not_protect_are_told(
    demand: Callable[..., None], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demand(colluders=3)
    assert do("show") == 2
    assert "c is at most 2" in capsys.readouterr().err


def test_sums_are_told_by_who_was_lost(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(home, opened(NAMES), opened(["EAST", "NORTH", "WEST"], OTHER), opened(["NORTH", "ELSEWHERE"], "ad" * 32))
    assert do("show") == 0
    out = capsys.readouterr().out
    assert "opened        3 sums" in out
    assert "pretrain  on weights abababababab… over all sites\n" in out
    assert "pretrain  on weights acacacacacac… over all sites but SOUTH" in out
    assert f"over sites of digest {names_digest(['NORTH', 'ELSEWHERE']).hex()[:12]}…" in out
    assert "without       SOUTH in 1:" in out


def test_the_latest_sums_are_shown_and_json_has_all(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(home, *(opened(NAMES, f"{number:02x}" * 32) for number in range(20)))
    assert do("show") == 0
    out = capsys.readouterr().out
    assert "opened        20 sums, the last 5:" in out
    assert out.count("over all sites") == 5
    assert do("show", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["sums"]) == 20


def test_refusals_are_told_with_what_they_mean(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(home, refused("secagg.repeat"), refused("secagg.repeat"), refused("secagg.of-tomorrow"))
    assert do("show") == 0
    out = capsys.readouterr().out
    assert "refused       3 requests" in out
    assert "2 × secagg.repeat: a second, different request for a step that was answered" in out
    assert "1 × secagg.of-tomorrow: of another release" in out
    assert "WAITING" not in out


@pytest.mark.parametrize(
    ("answered", "more", "said"),
    [
        (["advertise", "share"], {}, "OPEN, share answered; its secrets"),
        ([], {"ended": "secagg.late"}, "refused, secagg.late"),
        (list(sums.STAGES), {}, "done"),
    ],
)
def test_the_attempt_in_hand(
    home: Path, capsys: pytest.CaptureFixture[str], answered: list[str], more: dict[str, str], said: str
) -> None:
    began = 1795773600.0
    values = {"attempt": {"run": 7, "phase": "pretrain", "round": 2, "attempt": 1}, "began": began, "until": began + 60}
    write_json(home / "secagg" / "attempt" / "attempt.json", values | more)
    for stage in answered:
        write_json(home / "secagg" / "attempt" / f"{stage}.json", {})
    assert do("show") == 0
    assert f"pretrain, round 3, attempt 1, begun 2026-11-27T10:00:00+00:00: {said}" in capsys.readouterr().out


def test_a_damaged_attempt_is_no_crash(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(home / "secagg" / "attempt" / "attempt.json", {"attempt": 3})
    assert do("show") == 2
    assert "not what this release writes" in capsys.readouterr().err


def open_sum(
    desk: SiteProtocol,
    names: Sequence[str],
    *,
    weights: str = WEIGHTS,
    summed: Sequence[str] = (),
    **shared: Any,
) -> None:
    """What a site does before it answers the last stage."""
    for stage, kept in (("share", SHARE | shared), ("masked", {"summed": list(summed), "weights": weights})):
        write_json(desk.folder / f"{stage}.json", {"asked": "", "values": {}, "kept": kept})
    desk._check_differencing(ATTEMPT, list(names), list(summed))


def test_a_released_sum_may_be_opened_once_more(
    home: Path, desk: SiteProtocol, capsys: pytest.CaptureFixture[str]
) -> None:
    open_sum(desk, NAMES)
    with pytest.raises(RefusedError, match="second sum"):
        open_sum(desk, NAMES[:3])
    desk.close()
    assert do("release", "pretrain", WEIGHTS[:6], "--yes") == 0
    out = capsys.readouterr().out
    assert "opened  over all sites" in out
    assert "it is that\nsite's own update, in clear" in out
    released = read_journal(home / "secagg" / "journal.jsonl")[-1]
    assert {name: released[name] for name in ("event", "phase", "weights")} == {
        "event": "released", "phase": "pretrain", "weights": WEIGHTS,
    }  # fmt: skip
    federation = membership.present(home)
    again = SiteProtocol(home, "NORTH", federation.sites, membership.identity_key(home), Policy.load(home))
    open_sum(again, NAMES[:3])
    with pytest.raises(RefusedError, match="second sum"):  # one more, and no other
        open_sum(again, NAMES[1:])
    again.close()


def test_a_sum_of_the_same_step_on_other_weights_is_released_by_its_own_word(
    home: Path, desk: SiteProtocol, capsys
) -> None:
    """Of a run that begins anew, say: its weights are near those of before, and it is without a site this time."""
    place = {"place": "cd" * 32}
    open_sum(desk, NAMES, **place)
    near = {**place, "weights": "ef" * 32}
    open_sum(desk, NAMES, **near)
    with pytest.raises(RefusedError, match="second sum") as caught:
        open_sum(desk, NAMES[:3], **near)
    write_json(desk.folder / "consistency.json", {"asked": "", "values": {}, "kept": {"survivors": list(NAMES[:3])}})
    desk._end(ATTEMPT, caught.value)
    desk.close()
    assert do("release", "pretrain", WEIGHTS[:6], "--yes") == 0  # by the digits of any sum of that step
    out = capsys.readouterr().out
    assert "asked   over all sites but WEST" in out
    assert "over all sites, on other weights of the same step of this training" in out
    again = SiteProtocol(home, "NORTH", *_held(home))
    open_sum(again, NAMES[:3], **near)
    for names in (NAMES, NAMES[1:]):
        with pytest.raises(RefusedError, match="second sum"):
            open_sum(again, names, **place)
    again.close()


STEP = {"place": "cd" * 32}
TOLD = {"images": 60, "labelled": [60, 50]}


@pytest.mark.parametrize(
    "changed",
    [
        {"told": {"settings": TOLD | {"images": 59}}},
        {"told": {"settings": TOLD | {"labelled": [60, 49]}}},
        {"summed": ["Nodule"]},
    ],
    ids=["images", "labelled images", "findings left out"],
)
def test_of_one_step_on_near_weights_images_count_alike(desk: SiteProtocol, changed: dict[str, Any]) -> None:
    """Else the difference of two sums over the same sites is what hangs on how they are counted."""
    told = STEP | {"told": {"settings": TOLD}}
    open_sum(desk, NAMES, **told)
    with pytest.raises(RefusedError, match="second sum"):
        open_sum(desk, NAMES, weights=OTHER, **(told | changed))
    open_sum(desk, NAMES, weights=OTHER, question="other ranges", **told)


def test_a_second_sum_of_a_step_has_its_place_in_the_journal_too(desk: SiteProtocol) -> None:
    """On its own weights other work is another sum, whatever that on the first weights was."""
    open_sum(desk, NAMES, **STEP)
    open_sum(desk, NAMES, weights=OTHER, question="other ranges", **STEP)
    with pytest.raises(RefusedError, match="second sum"):
        open_sum(desk, NAMES, weights=OTHER, question="ranges of half the size", **STEP)


def test_sums_of_no_place_are_told_apart_by_their_weights(desk: SiteProtocol) -> None:
    open_sum(desk, NAMES)
    open_sum(desk, NAMES[:3], weights=OTHER)
    with pytest.raises(RefusedError, match="second sum"):
        open_sum(desk, NAMES[1:], weights=OTHER)


def refuse_sum(desk: SiteProtocol, names: Sequence[str], question: str = "") -> None:
    """As a site does that is asked for a second sum."""
    shared = {"asked": "", "values": {}, "kept": {**SHARE, "question": question}}
    write_json(desk.folder / "share.json", shared)
    for stage, kept in (("masked", {"summed": [], "weights": WEIGHTS}), ("consistency", {"survivors": list(names)})):
        write_json(desk.folder / f"{stage}.json", {"asked": "", "values": {}, "kept": kept})
    with pytest.raises(RefusedError, match="second sum") as caught:
        desk._check_differencing(ATTEMPT, list(names), [])
    desk._end(ATTEMPT, caught.value)


def test_a_word_is_for_the_sum_that_was_asked(
    home: Path, desk: SiteProtocol, capsys: pytest.CaptureFixture[str]
) -> None:
    open_sum(desk, NAMES)
    refuse_sum(desk, NAMES[:3])
    desk.close()
    assert do("release", "--last", "--yes") == 0
    out = capsys.readouterr().out
    assert "asked   over all sites but WEST; your word is for this sum alone" in out
    assert "it is that\nsite's own update, in clear" in out
    again = SiteProtocol(home, "NORTH", *_held(home))
    refuse_sum(again, NAMES[1:])
    refuse_sum(again, NAMES[:3], "another recipe")
    again.close()
    assert do("show") == 0
    assert "WAITING" in capsys.readouterr().out
    last = SiteProtocol(home, "NORTH", *_held(home))
    open_sum(last, NAMES[:3])
    last.close()


def test_a_sum_is_held_against_each_that_was_opened_and_not_the_last_alone(desk: SiteProtocol) -> None:
    """Over other weights of the step the same images count, which is no word for other work on the first."""
    place = "cd" * 32
    open_sum(desk, NAMES, place=place)
    open_sum(desk, NAMES, place=place, weights=OTHER)
    for stage, kept in (
        ("share", {**SHARE, "place": place, "question": "other ranges"}),
        ("masked", {"summed": [], "weights": WEIGHTS}),
    ):
        write_json(desk.folder / f"{stage}.json", {"asked": "", "values": {}, "kept": kept})
    with pytest.raises(RefusedError, match="second sum"):
        desk._check_differencing(ATTEMPT, list(NAMES), [])


def test_nothing_waits_for_a_word_once_a_sum_was_opened_after_all(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator who gave it then would give it for a sum that nobody asks for."""
    tell(home, opened(NAMES), refused(phase="pretrain", weights=WEIGHTS), opened(NAMES[:3]))
    assert do("show") == 0
    assert "WAITING" not in capsys.readouterr().out
    assert do("release", "--last", "--yes") == 2
    assert "no sum waits for a release" in capsys.readouterr().err


def _held(home: Path) -> tuple[Roster, Ed25519PrivateKey, Policy]:
    return membership.present(home).sites, membership.identity_key(home), Policy.load(home)


def test_other_work_over_the_same_sites_is_told_as_that(
    home: Path, desk: SiteProtocol, capsys: pytest.CaptureFixture[str]
) -> None:
    open_sum(desk, NAMES)
    refuse_sum(desk, NAMES, "another recipe")
    desk.close()
    assert do("release", "pretrain", WEIGHTS[:6], "--yes") == 0
    out = capsys.readouterr().out
    assert "asked   over all sites; your word" in out
    assert "The same sites, but other work" in out
    assert "site's own update" not in out


def test_the_last_refusal_says_which(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(home, opened(NAMES), opened(NAMES, OTHER), refused(phase="pretrain", weights=WEIGHTS))
    assert do("show") == 0
    assert "  refused       1 request\n" in (said := capsys.readouterr().out)
    assert "chexfound-client secagg release --last" in said
    assert do("release", "--last", "--yes") == 0
    assert read_journal(home / "secagg" / "journal.jsonl")[-1]["weights"] == WEIGHTS
    capsys.readouterr()
    assert do("release", "--last", "--yes") == 2
    assert "no sum waits for a release" in capsys.readouterr().err
    assert do("show") == 0
    out = capsys.readouterr().out
    assert "WAITING" not in out
    assert "RELEASED by this site's operator" in out


def test_a_refusal_that_does_not_say_which(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(home, opened(NAMES), refused())
    assert do("release", "--last", "--yes") == 2
    assert "give PHASE and WEIGHTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["release"], "say which sum"),
        (["release", "pretrain"], "say which sum"),
        (["release", "--last", "pretrain", "ab"], "one of them"),
        (["release", "--last", "--withdraw"], "one of them"),
        (["release", "pretrain", "a"], "of 2 sums"),
        (["release", "pretrain", "ff"], "of 0 sums"),
        (["release", "adapt", "ab"], "of 0 sums"),
        (["release", "features", "ab"], "released already"),
    ],
)
def test_what_cannot_be_released(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    features = opened(NAMES, phase="features")
    tell(home, opened(NAMES), opened(NAMES, OTHER), features, features | {"event": "released"})
    before = read_journal(home / "secagg" / "journal.jsonl")
    assert do(*words) == 2
    assert message in capsys.readouterr().err
    assert read_journal(home / "secagg" / "journal.jsonl") == before


def test_a_word_can_be_taken_back(home: Path, desk: SiteProtocol, capsys: pytest.CaptureFixture[str]) -> None:
    """The last that is left: by one that a sum was opened by, all is said."""
    open_sum(desk, NAMES)
    refuse_sum(desk, NAMES[:3])
    desk.close()
    assert do("release", "--withdraw") == 2
    assert "no release is left to be taken back" in capsys.readouterr().err
    for _ in range(2):
        assert do("release", "--last", "--yes") == 0
        assert do("release", "--withdraw") == 0
    assert f"withdrawn: pretrain on weights {WEIGHTS[:12]}…" in capsys.readouterr().out
    assert do("show") == 0
    out = capsys.readouterr().out
    assert ("WAITING" in out, "RELEASED" in out) == (True, False)
    again = SiteProtocol(home, "NORTH", *_held(home))
    refuse_sum(again, NAMES[:3])
    again.close()
    assert do("release", "--last", "--yes") == 0
    last = SiteProtocol(home, "NORTH", *_held(home))
    open_sum(last, NAMES[:3])
    last.close()
    assert do("release", "--withdraw") == 2
    assert do("show") == 0
    assert "RELEASED" in capsys.readouterr().out


def test_a_word_that_a_sum_on_near_weights_was_opened_by_is_not_taken_back(home: Path) -> None:
    first, near = (opened(names, weights) | STEP for names, weights in ((NAMES, WEIGHTS), (NAMES[:3], OTHER)))
    word = {"event": "released", "phase": "pretrain", "weights": WEIGHTS} | STEP
    tell(home, first, word, near)
    assert do("release", "--withdraw") == 2
    tell(home, word)
    assert do("release", "--withdraw") == 0


def test_nothing_is_released_without_a_yes(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(home, opened(NAMES))
    assert do("release", "pretrain", "ab") == 2
    assert "there is no terminal to ask on" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert do("release", "pretrain", "ab") == 6
    assert len(read_journal(home / "secagg" / "journal.jsonl")) == 1
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    assert do("release", "pretrain", "ab") == 0


def test_a_site_at_work_is_not_disturbed(home: Path, desk: SiteProtocol, capsys: pytest.CaptureFixture[str]) -> None:
    open_sum(desk, NAMES)
    assert do("show") == 0  # looking takes no lock
    assert do("release", "pretrain", WEIGHTS, "--yes") == 2
    assert "the site is answering a stage" in capsys.readouterr().err


def test_of_many_sites_two_lost_are_found() -> None:
    names = [f"{number:03d}" for number in range(128)]
    roster = Roster(federation="f", serial=1, sites=dict.fromkeys(names, Keys("", "")))
    assert ledger.without(names_digest(names[:126]).hex(), roster) == names[126:]
    assert ledger.without(names_digest(names[:125]).hex(), roster) is None
