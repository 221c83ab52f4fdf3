from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from chexfound.errors import SiteError
from chexfound.model.glori import build_head
from chexfound.recipe import batch_sizes
from server.exchange.flwr_private import LocalGrid, set_identity

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import round_latency

    return round_latency


class Echoes(LocalGrid):
    """Nodes that answer with the rival's ClientApp, in this process; the first look at them finds two only."""

    def __init__(self, client: Any, context: Context, fails: bool = False) -> None:
        self.client, self.context, self.fails, self.asked = client, context, fails, []
        self.looks = iter([[7, 8]])

    def get_node_ids(self) -> list[int]:
        return next(self.looks, [7, 8, 9])

    def push_messages(self, messages: Any) -> Any:
        raise NotImplementedError

    def pull_messages(self, message_ids: Any) -> Any:
        raise NotImplementedError

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        self.asked.append([message.metadata.dst_node_id for message in messages])
        replies = [self.client(message, self.context) for message in messages]
        return replies[: 2 if self.fails else 3]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    set_identity(1)
    config = {"rounds": 2, "sites": 3, "out": str(tmp_path / "seconds.json")}
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)


def test_the_rivals_app_times_each_round(bench, context, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    app: dict[str, Any] = {}
    exec(bench.ECHO, app)
    grid = Echoes(app["client"], context)
    app["server"](grid, context)
    assert grid.asked == [[7, 8, 9]] * 2
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_a_reply_that_is_missing_ends_the_rivals_run(bench, context, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    app: dict[str, Any] = {}
    exec(bench.ECHO, app)
    with pytest.raises(RuntimeError, match="round 1: not all replied"):
        app["server"](Echoes(app["client"], context, fails=True), context)
    assert not (tmp_path / "seconds.json").exists()


def test_blocks_take_turns_and_their_first_round_does_not_count(bench, capsys):
    calls = []

    def side(name: str, *seconds: float) -> Any:
        def block(number: int, rounds: int) -> list[float]:
            calls.append((name, number))
            assert rounds == 3
            return [99.0, *(one + number for one in seconds)]

        return block

    row = bench.in_turns({"ours": side("ours", 1.0, 1.5), "rival": side("rival", 6.0, 8.0)}, blocks=2, rounds=2)
    assert calls == [("ours", 0), ("rival", 0), ("ours", 1), ("rival", 1)]
    assert row == {
        "ours": 1.75, "rival": 7.5, "unit": "s", "ratio": 4.29, "rounds": 4,
        "spread": {"ours": [1.0, 2.5], "rival": [6.0, 9.0]},
    }  # fmt: skip
    assert capsys.readouterr().err.splitlines()[0] == "block 1 ours: 1.00 1.50 s (and 99.00 s the first)"
    assert bench.told({**row, "at_sites": 0.04}).splitlines() == [
        "ours    1.75 s, from 1.00 to 2.50",
        "rival   7.50 s, from 6.00 to 9.00",
        "ratio 4.3; of ours 0.0 s is the sites' own work",
    ]


def entry(seconds: float, sites: int = 3) -> dict[str, Any]:
    return {"event": "round", "phase": "adapt", "seconds": seconds, "sites": [{}] * sites}


def test_our_rounds_are_those_of_the_journal(bench):
    journal = [{"event": "start"}, {"event": "features", "seconds": 5.0}, entry(1.5), entry(1.25), {"event": "done"}]
    assert bench.journal_seconds(journal, 2) == [1.5, 1.25]
    with pytest.raises(SiteError, match="2 of 3 rounds"):
        bench.journal_seconds(journal, 3)
    with pytest.raises(SiteError, match="without all 3 sites"):
        bench.journal_seconds([entry(1.5), entry(1.25, sites=2)], 2)


def test_the_sites_own_work_is_that_of_the_slowest_in_the_median_round(bench):
    line = "14:03:44 chexfound.client phase=adapt round={} steps=0-1 site=X images=20 seconds={}"

    def log(*seconds: float) -> str:
        return "\n".join(line.format(number % 4 + 1, one) for number, one in enumerate(seconds))

    slow, fast = log(9.0, 0.1, 0.3, 0.2, 9.0, 0.6, 0.1, 0.1), log(9.0, 0.2, 0.1, 0.1, 9.0, 0.1, 0.1, 0.5)
    # Rounds 2 to 4 of two runs: 0.2 0.3 0.2 and 0.6 0.1 0.5.
    assert bench.at_sites([slow, fast], rounds=3) == pytest.approx(0.25)


def test_a_round_of_ours_is_small(bench):
    recipe = bench.recipe(3)
    assert batch_sizes.dealt(recipe.adapt.pooled_batch_size, [1] * len(bench.SITES)) == (2,) * len(bench.SITES)
    assert recipe.phases == ("adapt",)
    weights = sum(tensor.numel() for tensor in build_head(recipe, 1).state_dict().values())
    assert weights * 4 < 16_384  # bytes


def test_the_rival_keeps_its_own_polls(bench):
    ours = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "FLWR_HOME": "/here"}
    assert bench.as_it_comes(ours) == {"FLWR_HOME": "/here"}


def test_a_process_that_does_not_come_up_is_told_of(bench, tmp_path):
    with contextlib.ExitStack() as running:
        command = [sys.executable, "-c", "print('no such luck')"]
        process = bench.Process(running, command, {}, tmp_path / "log")
        with pytest.raises(SiteError, match=r"did not come up:\nno such luck"):
            process.wait_for("up")
