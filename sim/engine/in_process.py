"""The in-process engine: Flower's messages, the same ServerApp and ClientApp, no Ray and no sockets."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from chexfound.identity.roster import Roster
from server.exchange.flwr_private import LocalGrid, node_info, set_identity, set_message_id
from sim.engine.pool import Pool

RUN_ID = 1


class InProcessGrid(LocalGrid):
    """A Grid whose nodes are served by the processes of a pool; node k always by the same one.

    Args:
        node_configs: one configuration a site; node ids are 1, 2, …
        run_config: what the ClientApp is given.
        sites: their keys, by name, where they have some.
    """

    works_when_pulled = True

    def __init__(
        self,
        pool: Pool,
        node_configs: list[dict[str, Any]],
        run_config: dict[str, Any],
        sites: Roster | None = None,
    ) -> None:
        self.pool, self.node_configs, self.run_config, self.sites = pool, node_configs, run_config, sites
        self._tickets: dict[str, int] = {}
        set_identity(RUN_ID)

    def get_node_ids(self) -> Iterable[int]:
        """1 … number of sites."""
        return range(1, len(self.node_configs) + 1)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, by the keys of their sites."""
        lines = {name: keys.node for name, keys in self.sites.sites.items()} if self.sites else {}
        return [node_info(node, lines.get(self.node_configs[node - 1]["site"], "")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue each message at its node's process."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            set_message_id(message, message_id)
            node = message.metadata.dst_node_id
            config = self.node_configs[node - 1]
            label = f"site {config['site']!r} ({message.metadata.message_type})"
            task = ("sim.engine.in_process:answer", (message, node, config, self.run_config))
            self._tickets[message_id] = self.pool.submit(node - 1, label, task)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait for the replies.

        Raises: SiteError if a site's process died.
        """
        return [self.pool.result(self._tickets.pop(message_id)) for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull all."""
        return self.pull_messages(self.push_messages(messages))


def answer(message: Message, node: int, node_config: dict[str, Any], run_config: dict[str, Any]) -> Message:
    """Hand a message to the ClientApp, as Flower would at a node."""
    from client.app import app

    context = Context(run_id=RUN_ID, node_id=node, node_config=node_config, state=RecordDict(), run_config=run_config)
    return app(message, context)
