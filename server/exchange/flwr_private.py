"""Everything that touches Flower's private API, so that a new minor version breaks one file loudly."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Queue

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.app import Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_files
from flwr.common.config import get_fused_config_from_dir
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import linkstate_factory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.serverapp import Grid
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS, NodeStatus
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.logger import mirror_output_to_queue, restore_output
from flwr.supercore.run import Run
from flwr.supercore.state.schema.corestate_models import Task as TaskModel
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.state.schema.linkstate_models import Node as NodeModel
from flwr.supercore.state.schema.linkstate_models import Run as RunModel
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink import cli as superlink_cli
from flwr.superlink.grid import HttpGrid
from sqlalchemy import ColumnElement, create_engine, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from chexfound._launch import application_root
from chexfound.errors import CheckpointError, PolicyError
from chexfound.identity import bundle
from chexfound.identity.bundle import Bundle
from chexfound.identity.roster import Roster

RETRY_S = (0.05, 0.5)  # between two tries to pull an object: doubled each time, up to this
BUSY_TIMEOUT_S = 300  # that the SuperLink waits for its database


def set_identity(run_id: int, node_id: int = 1) -> None:
    """Say who this process is: outside a Flower run, `Message(content, …)` cannot be made without."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = node_id


def run_superlink(arguments: Sequence[str], database: Path) -> None:
    """Run flower-superlink in this process, with a database that is waited for, and runs that outlive its absence.

    Flower gives up after 5 s ("database is locked", and the run has failed); a large model is written for longer.
    And it ends each run whose ServerApp it has not heard for a minute, when it was itself that could not be reached.
    And it delivers a message once, whether or not it arrives; see `LinkState`.

    Args:
        arguments: its command line.
        database: that this names.
    """
    if database.exists():
        _hear_from_them_again(database)
    patient = tuple(
        (name, str(BUSY_TIMEOUT_S * 1000) if name == "busy_timeout" else value) for name, value in SQLITE_PRAGMAS
    )
    sql_mixin.SQLITE_PRAGMAS = patient  # type: ignore[attr-defined, assignment]
    linkstate_factory.SqlLinkState = LinkState  # type: ignore[attr-defined]
    sys.argv = ["flower-superlink", *arguments]
    superlink_cli.flower_superlink()


def _hear_from_them_again(database: Path) -> None:
    """Give the tasks that were running when the SuperLink ended, and the nodes, a minute to be heard from again."""
    engine, now = create_engine(f"sqlite:///{database}"), datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(seconds=HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)
    with Session(engine) as session, session.begin():
        session.execute(
            update(TaskModel)
            .where(TaskModel.active_until.is_not(None), TaskModel.finished_at.is_(None))
            .values(active_until=until)
        )
        session.execute(
            update(NodeModel).where(NodeModel.status == NodeStatus.ONLINE).values(online_until=until.timestamp())
        )
    engine.dispose()


def submitted(database: Path) -> dict[str, str]:
    """Flower's number of each run that was submitted with a token, by that; whether or not the SuperLink is up.

    Raises: CheckpointError.
    """
    if not database.is_file():
        return {}
    engine = create_engine(f"sqlite:///{database}")
    try:
        with Session(engine) as session:
            rows = session.execute(select(RunModel.run_id, RunModel.override_config)).all()
        configs = {int64_to_uint64(number): json.loads(text or "{}") for number, text in rows if number is not None}
    except (SQLAlchemyError, ValueError) as error:
        raise CheckpointError(f"{database}: cannot be read: {error}") from error
    finally:
        engine.dispose()
    return {config["submission"]: str(number) for number, config in configs.items() if config.get("submission")}


class LinkState(SqlLinkState):
    """Flower's, but what was handed out and lost on the way is handed out again.

    Flower notes a message as delivered before its answer leaves.  If that is lost (the SuperLink killed, a link broken)
    the message never comes again, and nobody knows: the round would wait for it until its deadline.  But who received
    a message confirms it, which deletes its objects, before asking for another; so what is asked for while its objects
    are here has not arrived.  The same goes for an object that was stored when the answer was lost: Flower refuses it
    when it is sent again, and the sender drops the message.
    """

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Give what waits for a node; of what it lost, that of its last activation: grid.py asks anew after another."""
        node = uint64_to_int64(node_id)
        since = select(NodeModel.last_activated_at).where(NodeModel.node_id == node).scalar_subquery()
        with self.session():
            self._take_back(MessageIns, MessageIns.dst_node_id == node, MessageIns.delivered_at >= since)
            return super().get_message_ins(node_id, limit, run_id=run_id)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The replies to messages."""
        with self.session():
            self._take_back(MessageRes, MessageRes.reply_to_message_id.in_(message_ids))
            return super().get_message_res(message_ids, run_id)

    def _take_back(self, model: type[MessageIns | MessageRes], *where: ColumnElement[bool]) -> None:
        unconfirmed = select(StoredObject.object_id).where(StoredObject.object_id == model.message_id).exists()
        lost = update(model).where(model.delivered_at != "", unconfirmed, *where).values(delivered_at="")
        with self.session() as session:
            session.execute(lost, execution_options={"synchronize_session": False})

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Whether an object is here now."""
        stored = super().store_object(run_id, session_id, object_id, object_content)
        return stored or bool(self.object_store.get(object_id))


# -- the SuperExec


def release_bundle() -> Bundle:
    """The bundle that the installed release ships, built as `flwr run` builds it."""
    return bundle.read(build_fab_from_files(bundle.release_files())[0])


def run_superexec(arguments: Sequence[str], command: Sequence[str]) -> None:
    """Run flower-superexec in this process; what it starts for a task, of whatever type, is a command of ours.

    Args:
        arguments: its command line.
        command: that a task is done by; it is given the SuperLink's address, the file of its authority and our process
            number, and reads the task's token, by which it may act for the run, where no other account sees it: from
            its standard input.
    """
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor

    def launch(_: SubprocessExecutor, spec: ExecutionSpec) -> LaunchResult:
        words = [*command, spec.runtime_api_address, str(spec.root_certificates_path), str(spec.parent_pid)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE)  # noqa: S603 (our own arguments, no shell)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(spec.token.encode())
        return LaunchResult.accepted()

    setattr(SubprocessExecutor, "launch", launch)  # noqa: B010 (mypy takes no other method for it)
    sys.argv = ["flower-superexec", *arguments]
    flower_superexec()


def run_task(
    address: str, authority: Path, parent: int, token: str, refusal: Callable[[bytes, UserConfig], str]
) -> None:
    """Run the ServerApp of a task: the installed release's, if that is what the run ships; nothing else is installed.

    Args:
        address: HOST:PORT of the SuperLink.
        authority: file of the certificate that signs the SuperLink's.
        parent: process number of the SuperExec.
        token: of the task.
        refusal: of a bundle's bytes and a run's configuration; why it may not run, empty if it may.
    """
    runtime = importlib.import_module("flwr.superlink.runtime.run_serverapp")  # the package has a function so named
    shipped: list[bytes] = []

    def configured(folder: Path, override: UserConfig) -> UserConfig:
        if why := refusal(shipped[0], override):
            raise PolicyError(why)
        config: UserConfig = get_fused_config_from_dir(folder, override)
        return config

    ours = {
        "install_from_fab": lambda content, **_: shipped.append(content),
        "get_fab_metadata": lambda _: ("", ""),
        "get_project_dir": lambda *_: application_root(),
        "get_fused_config_from_dir": configured,
    }
    for name, function in ours.items():
        assert hasattr(runtime, name)
        setattr(runtime, name, function)
    lines: Queue[str | None] = Queue()
    mirror_output_to_queue(lines)
    runtime.run_serverapp(
        runtime_api_address=address,
        log_queue=lines,
        token=token,
        insecure=False,
        certificates=authority.read_bytes(),
        parent_pid=parent,
        runtime_dependency_install=False,
    )
    restore_output()


# -- the Grid


def retry_soon() -> None:
    """Ask again soon for an object that is not there yet: Flower waits 1 s, 2 s, 4 s … for what takes milliseconds.

    Without Flower's limit of tries, which would come too soon; that of two hours stays.
    """
    sooner = {"initial_backoff": RETRY_S[0], "backoff_cap": RETRY_S[1], "max_tries_per_object": None}
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__
        assert defaults is not None
        assert defaults.keys() >= sooner.keys()
        defaults.update(sooner)


def keep_asking(grid: Grid) -> None:
    """Try a connection that broke in the TLS handshake again, as one that broke elsewhere.

    Flower gives up on any error with "ssl" in its text, and the run has failed; a SuperLink that is killed then makes
    one.
    """
    if isinstance(grid, HttpGrid):
        invoker = grid._retry_invoker
        gives_up = invoker.should_giveup
        assert gives_up is not None
        invoker.should_giveup = lambda error: not isinstance(error, httpx.TransportError) and gives_up(error)


def pull_until(deadline: float) -> None:
    """From then on (time.monotonic) wait no more for objects of a reply that are not there: it is not complete."""
    defaults = inflatable_utils.pull_objects.__kwdefaults__
    assert defaults is not None
    assert "max_time" in defaults
    defaults["max_time"] = max(deadline - time.monotonic(), 0.0)


def node_key(node: NodeInfo) -> str:
    """The public key that a node authenticated itself with, as a line in OpenSSH's format; empty if it has none."""
    if not node.public_key:
        return ""
    key = load_pem_public_key(node.public_key)
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def node_info(node: int, line: str) -> NodeInfo:
    """The record of a node that authenticated itself with the key of a line in OpenSSH's format; "": with none."""
    if not line:
        return NodeInfo(node_id=node)
    pem = load_ssh_public_key(line.encode("ascii")).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return NodeInfo(node_id=node, public_key=pem)


def of_superlink(message: Message) -> bool:
    """Tell whether a message is the SuperLink's own; a node cannot send one, its replies are taken as its own alone."""
    return message.metadata.src_node_id == SUPERLINK_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id


class LocalGrid(Grid):
    """The part of a Grid that needs no server: subclasses say how messages reach the nodes, and who they are."""

    sites: Roster | None = None  # of the federation, where the sites have keys
    works_when_pulled = False  # a site's work is done in this process when its reply is pulled: one at a time, then

    def set_run(self, run: Run) -> None:
        """Not needed: a local grid has one run."""

    @property
    def run(self) -> Run:
        """Not available: there is no SuperLink that knows it."""
        raise RuntimeError("a local grid has no run record")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, as records."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]
