from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import DataError, SiteError
from server.runs import folders, standing, words
from server.runs.folders import RunFolder
from server.runs.live import Live
from tests.server.conftest import DONE, START, SUMMED_ROUND, SUMMED_START, round_event

MISSING = {"site": "SOUTH", "reason": "late"}
SYMPTOM = {"site": "SOUTH", "symptom": "collapse", "seen": "feature_std 0.001", "since": 1}


def look(run: RunFolder, flwr: Any) -> standing.Standing:
    return standing.look(run, None if flwr.down else flwr.statuses)


@pytest.mark.parametrize(
    ("status", "said", "state"),
    [
        ("pending", None, "submitted"),
        ("starting", None, "submitted"),
        ("running", None, "running"),
        ("running", "waiting", "waiting"),
        ("running", "adapt", "adapt"),
        ("running", "done", "finishing"),
        ("running", "failed", "failed"),
        ("finished:failed", "failed", "failed"),
        ("finished:failed", "pretrain", "died"),
        ("finished:completed", "pretrain", "died"),
        ("finished:stopped", "pretrain", "stopped"),
        ("finished:stopped", "failed", "stopped"),
        (None, "pretrain", "died"),  # Flower's database was lost
        ("down", "pretrain", "pretrain"),
        ("down", None, "unknown"),
    ],
)
def test_states(submitted, flwr, live, status: str | None, said: str | None, state: str) -> None:
    flwr.statuses, flwr.down = {"100": status} if status else {}, status == "down"
    if said:
        live(submitted, said, round=2, rounds=3, waiting_for=["SOUTH"], replied=["NORTH"])
    now = look(submitted, flwr)
    assert now.state == state
    assert now.waiting_for == (["SOUTH"] if said and state not in standing.ENDED else [])


def test_a_serverapp_that_was_killed_is_told_at_once(submitted, flwr, live) -> None:
    """Flower lists its run for a minute more; of the folder it has let go."""
    for state in ("waiting", "pretrain", "done"):
        live(submitted, state)
        assert look(submitted, flwr).state in (state, "finishing")
        live(submitted, state, killed=True)
        assert look(submitted, flwr).state == "died"
        flwr.down = True
        assert look(submitted, flwr).state == "died"
        flwr.down = False
    flwr.statuses["100"] = "finished:stopped"
    assert look(submitted, flwr).state == "stopped"


def test_a_last_word_between_two_looks_is_believed(submitted, flwr, live, monkeypatch) -> None:
    left = folders.left

    def then_fails(run: RunFolder) -> bool:
        live(submitted, "pretrain", killed=True)
        found = left(run)
        live(submitted, "failed", error={"code": "data", "text": "no image"})
        return found

    monkeypatch.setattr(folders, "left", then_fails)
    assert look(submitted, flwr).state == "failed"


EVENTS = [START, round_event(0), SUMMED_START, SUMMED_ROUND, DONE, {"event": "features"}, {"event": "lost"}]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["loss", "site"]), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """A record that lacks something, or has something else in its place, anywhere."""
    if isinstance(value, dict):
        kept = {key: draw(damaged(one)) for key, one in value.items() if draw(st.integers(0, 9))}
        return kept if draw(st.integers(0, 9)) else draw(ANYTHING)
    if isinstance(value, list):
        return [draw(damaged(one)) for one in value if draw(st.integers(0, 9))]
    return value if draw(st.integers(0, 9)) else draw(ANYTHING)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_a_record_lacks_is_not_told_and_nothing_else(data: st.DataObject) -> None:
    event = data.draw(damaged(data.draw(st.sampled_from(EVENTS))))
    event = event if isinstance(event, dict) else {"event": event}
    assert words.line(event, {"pretrain": 3}).isprintable()
    assert all(isinstance(figure, float | int | None) for figure in (words.loss(event), words.auroc(event)))
    assert all(isinstance(one, str) for one in words.cohort(event))
    assert set(words.sent(event)) == {"down", "up"}


def test_a_round_without_a_loss_hides_no_run(submitted, flwr, live, happened) -> None:
    """As of a masked sum over sites of which one has no positive image of a finding."""
    happened(submitted, "summed start", SUMMED_ROUND | {"sites": [{"site": "all sites", "history": [{"step": 0}]}]})
    live(submitted, "pretrain")
    now = look(submitted, flwr)
    assert (now.state, now.loss, now.done["pretrain"]) == ("pretrain", None, [1, 3])
    assert "2 sites, loss not known, 12.4 s" in words.line(submitted.journal()[-1], {})


def test_done_is_what_left_metrics(submitted, flwr, live, happened) -> None:
    happened(submitted, "start", "done")
    live(submitted, "done")
    assert look(submitted, flwr).state == "finishing"
    assert look(submitted, flwr).model_sha256 is None
    (submitted.path / "metrics.json").write_text("{}")
    assert (look(submitted, flwr).state, look(submitted, flwr).model_sha256) == ("done", "ab" * 32)
    assert look(submitted, flwr).auroc == pytest.approx(0.8)


def test_what_an_earlier_submission_said_is_not_the_runs_word(submitted, flwr, live) -> None:
    live(submitted, "failed", flower_run="99", submission="old", error={"code": "data", "text": "old"})
    now = look(submitted, flwr)
    assert (now.state, now.error, now.since) == ("running", None, None)


def test_figures(submitted, flwr, live, happened) -> None:
    probed = {"health": {"figures": {"knn_auroc": 0.6}, "symptoms": []}}
    happened(submitted, "start", 0)
    first = submitted.journal()[-1]
    happened(
        submitted, {**first, "round": 1, **probed}, {"event": "lost", "site": "SOUTH", "phase": "pretrain", "round": 2}
    )
    live(submitted, "pretrain", round=3, rounds=3, waiting_for=["SOUTH"], lost=["NORTH", "SOUTH"])
    now = look(submitted, flwr)
    assert now.done == {"pretrain": [2, 3], "adapt": [0, 1]}
    assert (now.loss, now.auroc, now.lost) == (9.5, 0.6, ["SOUTH"])
    assert now.bytes == {"down": 54_000_000, "up": 53_913_504}
    assert standing.sentence(now) == "pretrain, round 3 of 3, waiting for SOUTH; lost: SOUTH"
    live(submitted, "pretrain", round=3, rounds=3, waiting_for=["SOUTH"])
    assert look(submitted, flwr).lost == []  # whatever an earlier submission has in the journal


def test_who_is_lost_is_the_present_serverapps_word(submitted, flwr) -> None:
    """One that trains after `resume` is not, nor is one that was asked anew, came back, replied or refused."""
    told, where = Live(submitted.path, "100"), {"phase": "pretrain", "round": 2}
    asked = {"event": "asked", **where, "sites": ["NORTH", "SOUTH"]}

    def after(event: str) -> Any:
        told({"event": event, **where, "site": "SOUTH"})
        return told.values["lost"]

    for end in ("back", "replied", "refused"):
        told(asked)
        assert after("lost") == ["SOUTH"]
        assert after(end) == []
    after("lost")
    told(asked)
    assert told.values["lost"] == []
    after("lost")
    assert Live(submitted.path, "101").values["lost"] == []


def test_a_run_under_secure_aggregation(submitted, flwr, live, happened) -> None:
    happened(submitted, "summed start", {"event": "lost", "site": "NORTH", "phase": "counts", "round": 0})
    happened(submitted, {"event": "lost", "site": "SOUTH", "phase": "pretrain", "round": 0}, "summed round")
    failed = "only 1 of 3 sites came through, 2 are needed"
    happened(submitted, {"event": "attempt", "phase": "pretrain", "round": 1, "failed": failed})
    events = submitted.journal()
    assert look(submitted, flwr).loss == 9.0
    lines = [words.line(event, {"pretrain": 3}) for event in events]
    held = "EAST withholds findings that are in no vocabulary"
    assert lines[0] == f"start     3 sites: EAST, NORTH, SOUTH; together 76 images; findings: Nodule; {held}"
    assert look(submitted, flwr).withholding == ["EAST"]
    assert lines[3].startswith("pretrain  round 1 of 3, 2 sites, loss 9.0000, 12.4 s")
    assert lines[3].endswith("without SOUTH (late)")
    assert lines[4] == f"attempt   pretrain, round 2 gave no sum: {failed}"


def test_lines(submitted, happened) -> None:
    happened(submitted, "start", 1)
    start, first = submitted.journal()
    health = {"health": {"figures": {"knn_auroc": 0.61234}, "symptoms": [SYMPTOM, {**SYMPTOM, "since": 0}]}}
    of = {"pretrain": 3}
    lines = [
        (start, "start     2 sites: NORTH (42 images), SOUTH (34 images); findings: Nodule"),
        (first, "pretrain  round 2 of 3, 2 sites, loss 9.5000, 12.4 s, up 27.0 MB, down 27.0 MB"),
        ({**first, "missing": [MISSING]}, "down 27.0 MB; without SOUTH (late)"),
        ({**first, **health}, "kNN AUROC 0.612, 12.4 s, up 27.0 MB, down 27.0 MB; collapse at SOUTH: feature_std 0.001"
         " (docs/health.md)"),
        ({**first, "phase": "adapt", "sites": []}, "adapt     round 2 of ?, 0 sites, no step"),
        ({"event": "features", "seconds": 3.61, "bytes": {"up": 12_320, "down": 999}},
         "features  3.6 s, up 12.3 kB, down 999 B"),
        ({"event": "lost", "site": "a\x1b", "phase": "adapt", "round": 0, "reason": "gone"},
         r"lost      a\x1b in adapt, round 1: gone"),
        ({"event": "back", "site": "a", "phase": "enrol", "round": 0}, "back      a in enrol"),
        ({"event": "refused", "site": "a", "phase": "counts", "round": 0, "reason": "secagg.parameters"},
         "refused   a in counts: secagg.parameters"),
        ({"event": "done", "model_sha256": "ab", "results": []}, "done      model ab"),
        ({"event": "new", "what": "\x1b"}, r"new       what=\x1b"),
    ]  # fmt: skip
    for event, text in lines:
        assert text in words.line(event, of)
        assert words.line(event, of).isprintable()


def test_a_failure_is_the_serverapps_own(submitted, flwr, live) -> None:
    error = {"code": "data", "text": "no image at SOUTH"}
    live(submitted, "failed", error=error)
    told = standing.failure(submitted, look(submitted, flwr))
    assert type(told) is DataError
    assert str(told).startswith(
        "run first failed: no image at SOUTH\nwhat is done is kept; go on with: chexfound-server resume"
    )


def test_a_recipe_that_cannot_be_is_not_gone_on_with(submitted, flwr, live, happened) -> None:
    """`resume` submits it again as it was; once something was done, it is the sites or the folder that changed."""
    live(submitted, "failed", error={"code": "config", "text": "32 cannot be divided"})
    told = standing.failure(submitted, look(submitted, flwr))
    folder = submitted.federation.folder
    assert str(told) == (
        "run first failed: 32 cannot be divided\n"
        f"start a new run with other values: chexfound-server run {folder} RECIPE --set KEY=VALUE"
    )
    assert not standing.resumable(look(submitted, flwr))
    happened(submitted, "start", 0)
    assert standing.resumable(look(submitted, flwr))
    assert f"what is done is kept; go on with: chexfound-server resume {folder} first" in str(
        standing.failure(submitted, look(submitted, flwr))
    )


def test_a_failure_before_it_could_say_so_is_in_flowers_log(submitted, flwr) -> None:
    flwr.statuses["100"] = "finished:failed"
    assert "ended without a word: killed" in str(standing.failure(submitted, look(submitted, flwr)))
    flwr.log = "12:00:00 chexfound.server event=failed error=site exit_code=7 site 'A' in enrol: gone\nTraceback"
    told = standing.failure(submitted, look(submitted, flwr))
    assert type(told) is SiteError
    assert "run first failed: site 'A' in enrol: gone\n" in str(told)
    flwr.statuses["100"] = "finished:stopped"
    assert "was stopped" in str(standing.failure(submitted, look(submitted, flwr)))
