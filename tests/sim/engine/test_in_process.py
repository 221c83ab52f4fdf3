"""The in-process engine: messages go through the ClientApp, at one process or at several."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from chexfound.contract.request import Request
from chexfound.errors import DataError, SiteError
from chexfound.recipe import load as recipes
from chexfound.wire import envelopes
from sim.engine.in_process import InProcessGrid
from sim.engine.pool import Pool, _Worker


def nodes(store: Path, homes: Path, names: list[str]) -> list[dict[str, Any]]:
    return [{"site": name, "data": str(store), "home": str(homes / name)} for name in names]


def test_messages_reach_their_nodes(tiny_store_path: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    grid = InProcessGrid(
        Pool(1), nodes(tiny_store_path, tmp_path, ["A", "B"]), {"recipe": recipes.to_json(tiny_recipe)}
    )
    assert list(grid.get_node_ids()) == [1, 2]
    messages = [
        grid.create_message(envelopes.pack_request(Request(phase="enrol")), "query.enrol", node, "0") for node in (2, 1)
    ]
    replies = list(grid.send_and_receive(messages))
    assert [envelopes.unpack_reply(reply.content).message.values["site"] for reply in replies] == ["B", "A"]


def test_an_error_comes_as_a_code(tiny_recipe: Any, tmp_path: Path) -> None:
    grid = InProcessGrid(Pool(1), nodes(tmp_path / "absent", tmp_path, ["A"]), {"recipe": recipes.to_json(tiny_recipe)})
    message = grid.create_message(envelopes.pack_request(Request(phase="enrol")), "query.enrol", 1, "0")
    (reply,) = grid.send_and_receive([message])
    assert reply.error.reason == "data"


def test_workers_work_raise_and_die() -> None:
    told: list[Any] = []
    with Pool(2, lambda *what: told.append(what)) as pool:
        assert dict(pool.run([(str(n), ("operator:mul", (n, n))) for n in range(5)])) == {
            str(n): n * n for n in range(5)
        }
        tickets = [pool.submit(n, "t", ("operator:neg", (n,))) for n in range(4)]
        assert [pool.result(ticket) for ticket in reversed(tickets)] == [-3, -2, -1, 0]
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            pool.result(pool.submit(0, "t", ("operator:truediv", (1, 0))))
        with pytest.raises(DataError, match="no such folder"):
            pool.result(pool.submit(1, "t", ("chexfound.data.intake.ingest:ingest", ("/no/such", "/no/store", 64))))
        mine = pool.result(pool.submit(0, "t", ("os:getpid", ())))
        assert mine != os.getpid()
        with pytest.raises(
            SiteError, match=r"that works on site 'A' died \(killed by signal 9 \(SIGKILL\); the machine may"
        ):
            pool.result(pool.submit(0, "site 'A'", ("os:kill", (mine, signal.SIGKILL))))


def test_what_ails_an_arm_comes_from_whatever_process_runs_it() -> None:
    told: list[Any] = []
    found = [{"site": "all", "symptom": "cls-plateau"}]
    for workers in (1, 2):
        with Pool(workers, on_warnings=lambda *what: told.append(what)) as pool:
            pool.result(pool.submit(0, "t", ("sim.engine.listeners:on_warnings", (7, "centralized", found))))
    assert told == [(7, "centralized", found)] * 2


class Dead:
    """A process that ended long ago."""

    exitcode = -signal.SIGTERM

    def join(self, timeout: float) -> None:
        pass


def test_a_worker_that_dies_idle_is_named_by_its_last_work() -> None:
    worker = _Worker(Dead(), None, label="site 'B'")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"that last worked on site 'B' died \(killed by signal 15 \(SIGTERM\)\)"):
        Pool(2)._died(worker)
