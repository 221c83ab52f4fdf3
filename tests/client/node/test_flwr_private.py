"""What client/node/flwr_private.py stands on, and what it puts in front of Flower's SuperNode.

The SuperNode's own loop and runtime API run here, with a stand-in for its connection to the coordinator alone.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ISOLATION_MODE_PROCESS
from flwr.supercore.constant import TaskType
from flwr.supercore.exit.signal_handler import SIGNAL_TO_EXIT_CODE
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import fleet_http_connection
from flwr.supernode import start_client_internal as sci
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from hypothesis import given
from hypothesis import strategies as st

from client.home import approval
from client.node import flwr_private, supernode
from tests.client.conftest import serving

FUNCTIONS = "node_id receive send get_run get_fab pull_object push_object confirm_message_received".split()


# ---- what it stands on


def tree(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def test_flower_is_the_version_that_was_read() -> None:
    """Another minor one may have changed any of what this file patches: read it again, then change this line."""
    assert importlib.metadata.version("flwr").split(".")[:2] == ["1", "42"]


def test_the_connection_is_eight_things_in_this_order() -> None:
    unpacked = [
        [name.id for name in node.targets[0].elts]
        for node in ast.walk(tree(sci.start_client_internal))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    ]
    assert unpacked == [FUNCTIONS]
    yielded = [
        [name.attr if isinstance(name, ast.Attribute) else name.id for name in node.value.elts]
        for node in ast.walk(tree(fleet_http_connection.http_request_response))
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)
    ]
    assert yielded == [FUNCTIONS]


def test_the_loop_looks_up_what_is_patched_by_its_name() -> None:
    assert {"_init_connection", "_push_messages"} <= set(sci.start_client_internal.__code__.co_names)
    assert list(inspect.signature(sci._push_messages).parameters) == ["state", "object_store", "send", "push_object"]
    used = [
        node.attr
        for node in ast.walk(tree(sci))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    ]
    assert set(used) == {"sleep"}
    slept = [
        ast.literal_eval(node.args[0])
        for node in ast.walk(tree(sci))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
    assert sorted(set(slept)) == [0.5, 3]  # for the worker; for a message


def test_sigint_is_how_it_leaves() -> None:
    assert signal.SIGINT in SIGNAL_TO_EXIT_CODE
    assert "register_signal_handlers" in sci.start_client_internal.__code__.co_names


def test_a_run_has_the_fields_that_are_replaced() -> None:
    assert {"run_id", "series_id", "override_config", "fab_hash", "primary_task_type"} <= {
        field.name for field in dataclasses.fields(Run)
    }
    assert [field.name for field in dataclasses.fields(Fab)] == ["hash_str", "content", "verifications"]


def test_the_command_line_is_flower_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = supernode.node_config({"site": "A", "data": "/d"})
    made = supernode.commands(tmp_path, "127.0.0.1:9", text, None)
    monkeypatch.setattr(sys, "argv", ["flower-supernode", *made["supernode"][5:]])
    config = importlib.import_module(flwr_private.flower_supernode.__module__)._parse_supernode_lifespan_config()
    assert config.node_config == {"site": "A", "data": "/d"}
    assert (config.server_address, config.insecure) == ("127.0.0.1:9", True)
    assert config.isolation == ISOLATION_MODE_PROCESS
    assert f"{config.host}:{config.port}" == made["worker"][5]
    assert config.superexec_auth_secret == (tmp_path / "worker.secret").read_bytes()
    assert config.max_retries is None
    assert not config.trusted_entities


# ---- the stand-in for a bundle

PLAIN = Run.create_empty(7)


@given(st.text())
def test_whatever_the_reason_the_stand_in_gives_the_configuration(reason: str) -> None:
    config = get_fused_config_from_fab(flwr_private.stand_in(reason), PLAIN)
    assert list(config) == ["recipe", "backbone", "run-dir", "submission", "refused"]
    assert len(config["refused"]) == len(reason)
    if reason.isascii() and reason.isprintable():
        assert config["refused"] == reason


def test_the_stand_in_takes_what_the_run_overrides_and_holds_no_code() -> None:
    content = flwr_private.stand_in("")
    run = dataclasses.replace(PLAIN, override_config={"recipe": "{}"})
    assert get_fused_config_from_fab(content, run) == {
        "recipe": "{}",
        "backbone": "",
        "run-dir": "",
        "submission": "",
        "refused": "",
    }
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["pyproject.toml"]


def test_its_keys_are_those_of_our_app() -> None:
    with open(Path(flwr_private.__file__).parents[2] / "pyproject.toml", "rb") as file:
        assert tuple(tomllib.load(file)["tool"]["flwr"]["app"]["config"]) == flwr_private.RUN_KEYS


# ---- the SuperNode's loop, in front of a coordinator of ours


class Done(Exception):
    """The coordinator has nothing more."""


class Left(Exception):
    """Flower said goodbye."""


class Clock:
    """Time that passes by sleep alone."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 0.0  # long before any message is late

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.pass_by(seconds)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Site:
    """A SuperNode, its coordinator's answers, and a worker that answers at once what it is told to."""

    def __init__(self, make_message: Callable[..., Message], secret: Path) -> None:
        self.make_message = make_message
        self.states: list[str] = []
        self.told: list[dict[str, Any]] = []
        self.contacts = 0
        self.runs: dict[int, Run] = {}
        self.fabs: dict[str, bytes] = {}
        self.asked_for_fabs: list[str] = []
        self.stopped: set[int] = set()  # runs, as their message comes in
        self.ended: set[int] = set()  # runs, while the worker works
        self.when_over: Callable[[], None] = lambda: None
        self.queue: list[Any] = []  # messages; None: there is none now; what can be called is
        self.objects: dict[str, bytes] = {}
        self.replies: list[Message] = []
        self.pushed: list[bytes] = []
        self.configs: list[dict[str, Any]] = []
        self.work: Callable[[], None] = self.worker
        self.factory = NodeStateFactory(ObjectStoreFactory())
        self.secret, self.tasks = secret, None

    # what it is told

    def state(self, name: str, **about: Any) -> None:
        self.states.append(name)
        if about:
            self.told.append(about)
        if name == "working":
            self.work()

    def contact(self) -> None:
        self.contacts += 1

    def over(self) -> None:
        self.states.append("over")
        self.when_over()

    # the coordinator

    def get_run(self, run_id: int) -> Run:
        if run_id in self.ended:
            raise RunNotRunningException
        return self.runs[run_id]

    def run(self, content: bytes, config: dict[str, Any] | None = None, task: str = TaskType.SERVER_APP) -> int:
        fab_hash = hashlib.sha256(content).hexdigest()
        self.fabs[fab_hash] = content
        number = len(self.runs) + 1
        self.runs[number] = dataclasses.replace(
            Run.create_empty(number), override_config=config or {}, fab_hash=fab_hash, primary_task_type=task,
            series_id=number,
        )  # fmt: skip
        return number

    def message(self, run_id: int) -> None:
        from server.exchange.flwr_private import set_identity

        message = self.make_message(RecordDict({"x": ConfigRecord({"n": run_id})}), "query.enrol")
        set_identity(run_id)
        message = Message(message.content, dst_node_id=1, message_type="query.enrol", group_id="3", ttl=60.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        found = get_object_tree(message)
        self.objects |= {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        self.queue.append((remove_content_from_message(message), found))

    @contextlib.contextmanager
    def connection(self, **_: Any) -> Iterator[tuple[Any, ...]]:
        yield (
            *(99, self.receive, self.send, self.get_run, self.fab),
            *(lambda run_id, key: self.objects[key], self.push, lambda run_id, _: self.confirm(run_id)),
        )

    def confirm(self, run_id: int) -> None:
        if run_id in self.stopped:
            raise RunNotRunningException

    def receive(self) -> Any:
        if not self.queue:
            raise Done
        got = self.queue.pop(0)
        return got() if callable(got) else got

    def send(self, message: Message, found: Any, seconds: float) -> tuple[set[str], str]:
        self.replies.append(message)
        return {part.object_id for part in iterate_object_tree(found)}, "session"

    def push(self, run_id: int, session_id: str, object_id: str, content: bytes) -> None:
        self.pushed.append(content)

    def fab(self, fab_hash: str, run_id: int) -> Fab:
        self.asked_for_fabs.append(fab_hash)
        return Fab(fab_hash, self.fabs[fab_hash], {})

    # the worker

    def worker(self) -> None:
        token = self.tasks.take()
        assert token is not None
        self.tasks.answer(token, self.handle)

    def handle(self, message: Message, context: Context) -> Message:
        self.configs.append(dict(context.run_config))
        assert context.node_config == {"site": "A"}
        return Message(RecordDict({"y": ConfigRecord({"answer": message.content["x"]["n"] + 41})}), reply_to=message)


@contextlib.contextmanager
def tasks(address: str, secret: Path) -> Iterator[flwr_private.Tasks]:
    """A worker's, whose connection is closed at the end; a worker has one for its life."""
    made = flwr_private.Tasks(address, secret)
    try:
        yield made
    finally:
        made._client.close()


@pytest.fixture
def site(make_message: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_proxy: None) -> Iterator[Site]:
    """A site whose SIGINT raises Left; its runtime API is Flower's, on a free port."""
    secret = tmp_path / "secret"
    secret.write_text("5" * 64)
    result = Site(make_message, secret)
    monkeypatch.setattr(sci, "_init_connection", result.connection)
    monkeypatch.setattr(sci, "_push_messages", sci._push_messages)
    monkeypatch.setattr(sci, "time", sci.time)  # which run_supernode replaces: both are put back
    monkeypatch.setattr(sci, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(
        flwr_private,
        "flower_supernode",
        lambda: sci.start_client_internal(
            state_factory=result.factory, server_address="127.0.0.1:1", node_config={"site": "A"}, insecure=True,
            isolation=ISOLATION_MODE_PROCESS,
        ),
    )  # fmt: skip

    def left(*_: object) -> None:
        raise Left

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, left)
    app = create_app(state_factory=result.factory, superexec_auth_secret=b"5" * 64)
    config = uvicorn.Config(app, lifespan="on", log_config=None, ws="none")
    try:
        with contextlib.ExitStack() as stack, serving(uvicorn.Server(config)) as port:
            result.tasks = stack.enter_context(tasks(f"127.0.0.1:{port}", secret))
            yield result
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def packed(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("client/app.py", text)
    return buffer.getvalue()


OURS, THEIRS = packed("ours"), packed("import os; os.system('true')")


def refusal(content: bytes) -> str | None:
    return None if content == OURS else "not approved here"


def serve(site: Site, refused: Callable[[bytes], str | None] = refusal, end: type[Exception] = Done) -> None:
    with pytest.raises(end):
        flwr_private.run_supernode(["--insecure"], refused, site)


def held(site: Site) -> bytes:
    """All that the SuperNode keeps of bundles."""
    return b"".join(fab.content for fab in site.factory.state().fab_store.values())


def test_a_message_goes_all_the_way(site: Site) -> None:
    number = site.run(OURS, {"recipe": "{}"})
    site.message(number)
    site.message(number)
    serve(site)
    assert sys.argv == ["flower-supernode", "--insecure"]
    assert site.configs == [{"recipe": "{}", "backbone": "", "run-dir": "", "submission": "", "refused": ""}] * 2
    assert len(site.replies) == 2
    assert site.pushed.count(ConfigRecord({"answer": number + 41}).deflate()) == 2
    once = ["idle", "receiving", "working", "sending"]
    assert site.states == ["connecting", *once[:2], "receiving", *once[2:], *once, "idle"]
    assert site.told[0] == {"run": "1", "phase": "query.enrol", "round": "3"}
    assert site.told[1] == {"refused": None}
    assert site.contacts == 3  # when it connected, and at each message


def test_the_bundle_that_came_never_gets_to_flower(site: Site) -> None:
    site.message(site.run(OURS))
    serve(site)
    assert len(site.asked_for_fabs) == 1
    assert zipfile.ZipFile(io.BytesIO(held(site))).namelist() == ["pyproject.toml"]
    (kept,) = site.factory.state().fab_store
    assert site.factory.state().get_run(1).fab_hash == kept != site.asked_for_fabs[0]


@pytest.mark.parametrize("content", [THEIRS, b"", b"no archive", b"PK\x03\x04" + bytes(99)], ids=len)
def test_a_bundle_that_was_not_approved(site: Site, tmp_path: Path, content: bytes) -> None:
    """Is answered by the worker, with the reason at hand; the next run is served as if nothing had been."""
    site.message(site.run(content))
    site.message(site.run(OURS))
    serve(site, lambda came: None if came == OURS else approval.check(tmp_path, came))
    reason = site.configs[0]["refused"]
    assert re.search("was not approved here|is not a readable archive", reason)
    assert site.configs[1]["refused"] == ""
    assert len(site.replies) == 2
    assert b"os.system" not in held(site)
    assert [about["refused"] for about in site.told if "refused" in about] == [reason, None]


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"extra": "1"}, TaskType.SERVER_APP),
        ({"refused": ""}, TaskType.SERVER_APP),
        ({"recipe": 1}, TaskType.SERVER_APP),
        ({"recipe": True, "backbone": "x"}, TaskType.SERVER_APP),
        ({"run-dir": 0.5}, TaskType.SERVER_APP),
        ({}, TaskType.AGENT_APP),
    ],
)
def test_a_configuration_that_this_release_does_not_know(site: Site, config: dict[str, Any], task: str) -> None:
    site.message(site.run(OURS, config, task))
    serve(site)
    assert site.configs[0]["refused"] == "the run's configuration holds what this release does not know"
    assert set(site.configs[0]) == {"recipe", "backbone", "run-dir", "submission", "refused"}
    assert all(type(value) is str for value in site.configs[0].values())
    assert len(site.replies) == 1


# ---- a coordinator that says of a run what is of another


def test_a_run_is_not_admitted_by_another_one_of_its_series(site: Site) -> None:
    """Flower keeps a run's configuration by the run's series, which the coordinator names."""
    bad, good = site.run(THEIRS), site.run(OURS)
    site.runs = {number: dataclasses.replace(run, series_id=5) for number, run in site.runs.items()}
    for number in (bad, good, bad, good):
        site.message(number)
    serve(site)
    assert [config["refused"] for config in site.configs] == ["not approved here", "", "not approved here", ""]


def test_a_run_of_another_number_than_was_asked_for(site: Site) -> None:
    """Else the worker could not be given it, and the SuperNode would wait for its reply for ever."""
    number = site.run(OURS)
    site.runs[number] = dataclasses.replace(site.runs[number], run_id=77)
    site.message(number)
    serve(site)
    assert len(site.replies) == 1
    assert site.factory.state().get_run(77) is None


@pytest.mark.parametrize("change", [{"_message_id": ""}, {"_message_id": "0" * 64}, {"_reply_to_message_id": "x"}])
def test_a_message_that_flower_would_wait_for_in_vain_is_dropped(site: Site, change: dict[str, str]) -> None:
    """Without its own number, or as a reply: the worker would find none, and the SuperNode wait for its answer."""
    number = site.run(OURS)
    site.message(number)
    site.queue[0][0].metadata.__dict__.update(change)
    site.message(number)
    serve(site)
    assert len(site.replies) == len(site.configs) == 1
    assert site.states.count("receiving") == 2  # of the second alone: the message, and its run


def test_a_run_that_is_stopped_while_a_message_comes_in_delays_no_other(site: Site) -> None:
    """Flower leaves the message with the worker, and would take its reply for that to the next one."""
    stopped, going = site.run(OURS), site.run(OURS)
    site.stopped.add(stopped)
    site.message(stopped)
    site.message(going)
    serve(site)
    assert [reply.metadata.run_id for reply in site.replies] == [going]
    assert site.tasks.take() is None


def test_a_reply_to_a_message_that_was_dropped_is_not_taken_for_that_to_the_next(site: Site) -> None:
    site.message(site.run(OURS))
    with site.connection() as functions:
        node = flwr_private._Node(functions, refusal, site)
    message, tree = node.receive()
    stale = Message(RecordDict(), reply_to=message)
    stale.metadata.__dict__["_reply_to_message_id"] = "dropped"
    ready = [stale, Message(RecordDict(), reply_to=message)]
    pushed = []

    def push(**about: Any) -> None:  # as Flower's: what is ready, and it is one at a time
        pushed.append(about)
        node.send(ready.pop(0), tree, 0.0)

    about = {"state": "s", "object_store": SimpleNamespace(get=lambda number: b"content")}
    node.pushing(push)(**about)
    assert not ready
    assert pushed == [about] * 2


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"),
        httpx.HTTPStatusError("", request=httpx.Request("POST", "/"), response=httpx.Response(500)),
    ],
)
@pytest.mark.parametrize("part", ["send", "push"])
def test_a_reply_that_could_not_be_sent_is_sent_later(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    """Where Flower's own connection gives up; it would drop the reply, and the coordinator wait for it."""
    monkeypatch.setattr(flwr_private, "SEND_AGAIN_S", 0.01)
    errors, through = [error] * 2, getattr(site, part)

    def broken(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return through(*args)

    monkeypatch.setattr(site, part, broken)
    site.message(site.run(OURS))
    serve(site)
    [reply] = site.replies
    assert {get_object_id(content) for content in site.pushed} >= {reply.metadata.message_id}
    assert len(site.pushed) == len(set(site.pushed))


def test_a_reply_that_the_coordinator_forgot_half_is_sent_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for longer than it waits for the next object: it refuses that, and wants all of them anew."""
    monkeypatch.setattr(flwr_private, "SEND_AGAIN_S", 0.01)
    through = site.push

    def push(run_id: int, session_id: str, object_id: str, content: bytes) -> None:
        if len(site.replies) == 1 and site.pushed:
            raise ObjectPushError(object_id, run_id, session_id)
        through(run_id, session_id, object_id, content)

    monkeypatch.setattr(site, "push", push)
    site.message(site.run(OURS))
    serve(site)
    first, again = site.replies
    assert first.metadata.message_id == again.metadata.message_id
    assert len(site.pushed) == 1 + len(set(site.pushed))  # the one that it had had, and all


@pytest.mark.parametrize("status", [413, 500])
def test_a_reply_that_is_refused_or_that_nobody_waits_for_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The site is there for the next message."""
    error = httpx.HTTPStatusError("", request=httpx.Request("POST", "/"), response=httpx.Response(status))

    def send(message: Message, *_: Any) -> Any:
        if message.metadata.run_id == 1:
            raise error
        site.replies.append(message)
        return set(), "session"

    monkeypatch.setattr(site, "send", send)
    if status == 500:
        late = SimpleNamespace(time=lambda: 2e10, monotonic=time.monotonic, sleep=time.sleep)
        monkeypatch.setattr(flwr_private, "time", late)
    for _ in range(2):
        site.message(site.run(OURS))
    serve(site)
    assert [reply.metadata.run_id for reply in site.replies] == [2]


def test_the_log_shows_a_coordinators_names_on_their_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    number = site.run(OURS)
    site.message(number)
    site.queue[0][0].metadata.__dict__["_group_id"] = "3]\n12:00:00 all is well\x1b[2J"
    serve(site)
    assert "ROUND 3]\\n12:00:00 all is well\\x1b[2J]" in caplog.text
    assert "\x1b" not in caplog.text


# ---- work that nobody waits for any more


@pytest.fixture
def ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flwr_private, "ASK_S", 0.0)


def test_a_worker_whose_run_has_ended_is_told_so(site: Site, ask_often: None) -> None:
    """And the next run is served as if nothing had been."""
    first, second = site.run(OURS), site.run(OURS)
    site.message(first)
    site.message(second)
    works = [lambda: site.ended.add(first), site.worker]
    site.work = lambda: works.pop(0)()
    site.when_over = site.worker  # it stops, and says so
    serve(site)
    once = ["receiving", "working"]
    assert [state for state in site.states if state in (*once, "over")] == [
        "receiving", *once, "over", "receiving", *once
    ]  # fmt: skip
    assert [reply.metadata.run_id for reply in site.replies] == [first, second]


def test_a_worker_whose_reply_would_come_too_late_is_told_so(site: Site) -> None:
    site.message(site.run(OURS))
    site.queue[0][0].metadata.__dict__["_ttl"] = -1.0
    site.work = lambda: None
    site.when_over = site.worker
    serve(site)
    assert "over" in site.states


def test_told_to_leave_it_waits_for_no_worker_whose_run_has_ended(site: Site, ask_often: None) -> None:
    site.message(site.run(OURS))
    site.work = lambda: (site.ended.add(1), sigterm())
    serve(site, end=Left)
    assert (site.states[-1], site.replies) == ("over", [])


def test_a_superlink_that_does_not_say_whether_a_run_goes_on_ends_nothing(site: Site, ask_often: None) -> None:
    number = site.run(OURS)
    site.message(number)
    asked: list[int] = []

    def away(run_id: int) -> Run:
        if site.states[-1] == "working":
            asked.append(run_id)
            if len(asked) == 3:
                site.worker()
            raise httpx.ConnectError("away")
        return site.runs[run_id]

    site.get_run = away
    site.work = lambda: None
    serve(site)
    assert len(asked) >= 3
    assert "over" not in site.states
    assert len(site.replies) == 1


# ---- told to leave


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_idle_it_leaves_at_once(site: Site) -> None:
    def waiting() -> None:
        sigterm()
        pytest.fail("it did not leave")

    site.queue += [None, waiting]
    serve(site, end=Left)
    assert site.replies == []


def test_with_a_message_in_hand_it_leaves_after_the_reply(site: Site) -> None:
    number = site.run(OURS)
    site.message(number)
    site.message(number)
    site.work = lambda: (sigterm(), site.worker())
    serve(site, end=Left)
    assert len(site.replies) == 1
    assert len(site.queue) == 1


def test_with_a_message_in_hand_that_will_not_come_it_leaves(site: Site) -> None:
    """A message that was lost on the way, or whose run has ended."""
    number = site.run(OURS)
    site.message(number)
    site.objects.clear()
    site.queue.append(lambda: pytest.fail("it asked for another one"))
    site.fab = lambda *_: sigterm() or Fab("", OURS, {})
    serve(site, end=Left)
    assert site.replies == []


def test_without_a_parent_it_leaves_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def orphan() -> None:
        before = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: before + 1)
        sigterm()
        pytest.fail("it stayed")

    site.message(site.run(OURS))
    site.work = orphan
    serve(site, end=Left)
    assert site.replies == []


def test_while_it_waits_for_the_worker_it_says_that_it_drains(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(flwr_private, "time", clock)
    site.message(site.run(OURS))
    site.work = sigterm
    clock.sleep = lambda seconds: site.worker()
    serve(site, end=Left)
    assert site.states[-3:] == ["working", "draining", "sending"]
    assert len(site.replies) == 1


# ---- how often it asks


def test_it_asks_often_while_a_run_goes_and_seldom_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 0.2 s at first, then a twentieth of the time that nothing came, and at most every 3 s."""
    clock = Clock()
    monkeypatch.setattr(flwr_private, "time", clock)
    site.queue += [None] * 120
    site.message(site.run(OURS))
    site.work = lambda: (clock.pass_by(600), site.worker())
    site.queue.append(None)
    serve(site)
    *idle, last = clock.slept
    assert idle[:20] == [0.2] * 20
    assert idle == sorted(idle)
    assert idle[-1] == 3
    assert any(0.2 < seconds < 3 for seconds in idle)
    assert last == 0.2  # after the reply, however long that took


def test_the_workers_reply_is_looked_for_often(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(flwr_private, "time", clock)
    site.message(site.run(OURS))
    site.work = lambda: None
    waits = iter([lambda: None] * 3 + [site.worker])
    clock.sleep = lambda seconds: (clock.slept.append(seconds), next(waits)())
    serve(site)
    assert clock.slept == [0.05] * 4


# ---- its worker


def test_no_task_and_no_supernode(site: Site, closed_port: int) -> None:
    assert site.tasks.take() is None
    with tasks(f"127.0.0.1:{closed_port}", site.secret) as alone:
        assert alone.take() is None


def test_who_does_not_know_the_secret_gets_no_task(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("6" * 64)
    with tasks(site.tasks.address, tmp_path / "other") as stranger, pytest.raises(httpx.HTTPStatusError):
        stranger.take()
