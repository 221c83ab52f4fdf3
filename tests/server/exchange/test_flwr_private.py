"""What we use of Flower's private API is as we know it; a new minor version fails here first."""

from __future__ import annotations

import datetime
import inspect
import socket
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import flwr
import httpx
import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS, NodeStatus
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.superexec import run_superexec
from flwr.superlink import cli as superlink_cli
from flwr.superlink.grid import HttpGrid
from sqlalchemy import create_engine, insert, select
from sqlalchemy.orm import Session

from chexfound.errors import CheckpointError
from chexfound.identity import bundle
from client.node import flwr_private as of_client
from client.node.flwr_private import release_bundle
from server.exchange import flwr_private

KNOWN = "1.42"  # raise it, and the pin in pyproject.toml, after reading what changed in what is used here


def test_flower_is_the_minor_version_that_we_know() -> None:
    assert flwr.__version__.rpartition(".")[0] == KNOWN
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert "flwr>=1.42,<1.43" in project["dependencies"]


def test_the_superlink_waits_for_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own pragmas but for the one, at a real connection made by Flower's own code."""
    seen: dict[str, int] = {}

    class Database(sql_mixin.SqlMixin):
        pass

    def superlink() -> None:
        assert sys.argv == ["flower-superlink", "--host", "127.0.0.1"]
        database = Database(str(tmp_path / "a.sqlite"))
        monkeypatch.setattr(sql_mixin, "run_migrations", lambda engine: None)
        database.initialize()
        for name in ("busy_timeout", "foreign_keys"):
            seen[name] = next(iter(database.query(f"PRAGMA {name}")[0].values()))
        database._engine.dispose()

    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", SQLITE_PRAGMAS)  # put back after the test
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(superlink_cli, "flower_superlink", superlink)
    flwr_private.run_superlink(["--host", "127.0.0.1"], tmp_path / "none yet")
    assert seen == {"busy_timeout": 300_000, "foreign_keys": 1}
    assert dict(SQLITE_PRAGMAS)["busy_timeout"] == "5000"


def test_the_superlinks_entry_reads_its_arguments_itself() -> None:
    assert not inspect.signature(superlink_cli.flower_superlink).parameters


def test_the_superexec_takes_our_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.federation.settings import POLL_S

    assert run_superexec._TASK_POLL_INTERVAL_ENV == "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
    low, high = run_superexec._MIN_TASK_POLL_INTERVAL_SECONDS, run_superexec._MAX_TASK_POLL_INTERVAL_SECONDS
    assert low <= float(POLL_S) <= high


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_what_is_staged_builds_the_releases_bundle(tmp_path: Path) -> None:
    """A site that approved the installed release takes the runs of a coordinator of the same release."""
    from flwr.cli.build import build_fab_from_disk

    from server.runs.submit import stage

    stage(tmp_path / "app")
    assert bundle.read(build_fab_from_disk(tmp_path / "app")).digest() == release_bundle().digest()


def test_runs_outlive_the_superlinks_absence(tmp_path: Path) -> None:
    """What was running, or connected, has a minute to be heard from; what had ended, or left, has not."""
    database = tmp_path / "superlink.sqlite"
    engine = create_engine(f"sqlite:///{database}")
    now = datetime.datetime.now(datetime.UTC)
    then = now - datetime.timedelta(hours=1)
    task, node = flwr_private.TaskModel, flwr_private.NodeModel
    for model in (task, node):
        model.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        common = {"type": "x", "run_id": 1, "pending_at": then, "sub_status": "", "details": ""}
        session.execute(insert(task), [
            {"task_id": 1, "active_until": then, "finished_at": None, **common},
            {"task_id": 2, "active_until": None, "finished_at": None, **common},
            {"task_id": 3, "active_until": then, "finished_at": then, **common},
        ])  # fmt: skip
        session.execute(insert(node), [
            {"node_id": number, "status": status, "online_until": then.timestamp(), "public_key": bytes([number])}
            for number, status in enumerate((NodeStatus.ONLINE, NodeStatus.OFFLINE, NodeStatus.UNREGISTERED))
        ])  # fmt: skip
    flwr_private._hear_from_them_again(database)
    with Session(engine) as session:
        tasks = dict(session.execute(select(task.task_id, task.active_until)).all())
        nodes = dict(session.execute(select(node.status, node.online_until)).all())
    engine.dispose()
    assert (tasks[2], tasks[3]) == (None, then)
    assert tasks[1] > now + datetime.timedelta(seconds=50)
    assert nodes[NodeStatus.ONLINE] > now.timestamp() + 50
    assert nodes[NodeStatus.OFFLINE] == nodes[NodeStatus.UNREGISTERED] == then.timestamp()


@pytest.mark.parametrize("end", [flwr_private, of_client])
def test_an_object_that_is_not_there_yet_is_asked_for_again_soon(
    end: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own pull, with what its waits are told instead of waited."""
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        monkeypatch.setattr(pull, "__kwdefaults__", dict(pull.__kwdefaults__))
    waits: list[float] = []
    missing = iter(range(600))  # more than Flower's 500 tries

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    def pull_object(object_id: str) -> bytes:
        if next(missing, None) is not None:
            raise inflatable_utils.ObjectUnavailableError(object_id)
        return b"here"

    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    end.retry_soon()
    assert inflatable_utils.pull_objects(["a"], pull_object) == {"a": b"here"}
    assert waits[0] == pytest.approx(0.05, rel=0.21)
    assert max(waits) == pytest.approx(0.5, rel=0.21)


def test_a_run_outlives_a_superlink_that_is_killed_in_a_handshake() -> None:
    """Flower's own grid, with what it would wait told instead; here it may try thrice."""
    waits: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            for _ in range(3):
                taken, _ = listener.accept()
                with taken:
                    taken.recv(2**16)

        server = threading.Thread(target=die)
        server.start()
        grid = HttpGrid(f"127.0.0.1:{listener.getsockname()[1]}", token="x")
        flwr_private.keep_asking(grid)
        grid._retry_invoker.wait_function, grid._retry_invoker.max_tries = waits.append, 3
        with pytest.raises(httpx.ConnectError, match="(?i)ssl"):
            grid.get_nodes()
        server.join()
        grid.close()
    assert len(waits) == 2


def test_a_run_does_not_ask_again_after_a_refusal() -> None:
    grid = HttpGrid("127.0.0.1:1", token="x")
    flwr_private.keep_asking(grid)
    refused = httpx.HTTPStatusError("", request=httpx.Request("POST", "/"), response=httpx.Response(400))
    assert grid._retry_invoker.should_giveup(refused)


def test_what_was_submitted_is_found_in_the_superlinks_database_by_its_token(tmp_path: Path) -> None:
    path = tmp_path / "superlink.sqlite"
    assert flwr_private.submitted(path) == {}
    engine = create_engine(f"sqlite:///{path}")
    flwr_private.RunModel.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        for number, config in ((7, "{}"), (-2, '{"recipe": "{}", "submission": "t"}'), (8, None)):
            session.execute(
                insert(flwr_private.RunModel).values(run_id=number, primary_task_id=number, override_config=config)
            )
    engine.dispose()
    assert flwr_private.submitted(path) == {"t": str(2**64 - 2)}  # as `flwr list` has it, unsigned
    path.write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match=r"superlink\.sqlite: cannot be read"):
        flwr_private.submitted(path)
