"""What the SuperLink hands out comes again, if it was lost on the way, until it is confirmed; Flower's own database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import cli as superlink_cli
from flwr.superlink.federation import NoOpFederationManager

from server.exchange import flwr_private

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's migrations


class SuperLink:
    """The part of it that keeps messages, with a run and a node that is connected."""

    def __init__(self, folder: Path) -> None:
        database = str(folder / "superlink.sqlite")
        self.state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
        self.node = self.state.create_node("x", "x", b"key", 30)
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "x", TaskType.SERVER_APP)
        self.activate()

    def activate(self) -> None:
        assert self.state.activate_node(self.node, 30)

    def push(self, message: Message) -> str:
        """A message with all of its objects."""
        flwr_private.set_message_id(message, message.object_id)
        session = self.state.start_session(self.run)
        bare = remove_content_from_message(message)
        stored, missing = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
        assert stored
        for name, content in get_all_nested_objects(message).items():
            if name in missing:
                assert self.state.store_object(self.run, session, name, content.deflate())
        return message.object_id

    def request(self) -> Message:
        flwr_private.set_identity(self.run)
        message = Message(RecordDict(), dst_node_id=self.node, message_type="train", group_id="1", ttl=60)
        self.push(message)
        return message

    def reply(self, request: Message) -> str:
        flwr_private.set_identity(self.run, self.node)
        return self.push(Message(RecordDict(), reply_to=request))

    def for_the_node(self) -> list[str]:
        return [message.metadata.message_id for message in self.state.get_message_ins(self.node, 1)]

    def replies(self, request: Message) -> list[str]:
        found = self.state.get_message_res({request.metadata.message_id}, self.run)
        return [message.metadata.message_id for message in found]

    def confirm(self, message_id: str) -> None:
        self.state.object_store.delete(message_id)


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperLink]:
    """As `chexfound-server superlink` runs it."""
    made: list[SuperLink] = []
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, getattr(TaskIdentity, name))  # put back after the test
    monkeypatch.setattr(flwr_private.sql_mixin, "SQLITE_PRAGMAS", flwr_private.SQLITE_PRAGMAS)
    monkeypatch.setattr(flwr_private.linkstate_factory, "SqlLinkState", flwr_private.SqlLinkState)
    monkeypatch.setattr(superlink_cli, "flower_superlink", lambda: made.append(SuperLink(tmp_path)))
    monkeypatch.setattr("sys.argv", [])
    flwr_private.run_superlink([], tmp_path / "superlink.sqlite")
    yield made[0]
    for database in (made[0].state, made[0].state.object_store):
        database._engine.dispose()


def test_a_message_that_was_lost_on_its_way_to_the_node_comes_again(superlink: SuperLink) -> None:
    """The SuperLink is killed, or the link breaks, between the note that it is delivered and the answer."""
    message = superlink.request().metadata.message_id
    assert superlink.for_the_node() == superlink.for_the_node() == [message]
    superlink.confirm(message)
    assert superlink.for_the_node() == []


def test_messages_come_in_their_order(superlink: SuperLink) -> None:
    first, second = (superlink.request().metadata.message_id for _ in range(2))
    assert superlink.for_the_node() == superlink.for_the_node() == [first]
    superlink.confirm(first)
    assert superlink.for_the_node() == [second]


def test_what_a_node_lost_when_it_ended_does_not_come_again(superlink: SuperLink) -> None:
    """The run asks again, seeing that it was started again (server/exchange/grid.py); the node would work twice."""
    superlink.request()
    superlink.for_the_node()
    superlink.state.deactivate_node(superlink.node)
    superlink.activate()
    assert superlink.for_the_node() == []


def test_a_reply_that_was_lost_on_its_way_to_the_run_comes_again(superlink: SuperLink) -> None:
    request = superlink.request()
    superlink.confirm(*superlink.for_the_node())
    reply = superlink.reply(request)
    assert superlink.replies(request) == superlink.replies(request) == [reply]
    superlink.confirm(reply)
    assert superlink.replies(request) == []


def test_an_object_that_is_sent_again_is_taken(superlink: SuperLink) -> None:
    """Its sender did not hear that it was; it gives the whole message up for one that is refused."""
    message = superlink.request()
    session, content = superlink.state.start_session(superlink.run), message.deflate()
    assert superlink.state.store_object(superlink.run, session, message.object_id, content)
    assert not superlink.state.store_object(superlink.run, session, "0" * 64, content)
