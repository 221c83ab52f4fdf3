"""The in-process engine: Flower's messages, the same ServerApp and ClientApp, no Ray and no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict

from server.flwr_private import LocalGrid, set_identity
from sim.pool import Pool

RUN_ID = 1


class InProcessGrid(LocalGrid):
    """A Grid whose nodes are served by the processes of a pool; node k always by the same one.

    Args:
        node_configs: one configuration a site; node ids are 1, 2, …
        run_config: what the ClientApp is given.
    """

    def __init__(self, pool: Pool, node_configs: list[dict[str, Any]], run_config: dict[str, Any]) -> None:
        self.pool, self.node_configs, self.run_config = pool, node_configs, run_config
        set_identity(RUN_ID)

    def get_node_ids(self) -> Iterable[int]:
        """1 … number of sites."""
        return range(1, len(self.node_configs) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue each message at its node's process; the ids are tickets."""
        tickets = []
        for message in messages:
            node = message.metadata.dst_node_id
            config = self.node_configs[node - 1]
            label = f"site {config['site']!r} ({message.metadata.message_type})"
            task = ("sim.engine:answer", (message, node, config, self.run_config))
            tickets.append(str(self.pool.submit(node - 1, label, task)))
        return tickets

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait for the replies.

        Raises: SiteError if a site's process died.
        """
        return [self.pool.result(int(message_id)) for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull all."""
        return self.pull_messages(self.push_messages(messages))


def answer(message: Message, node: int, node_config: dict[str, Any], run_config: dict[str, Any]) -> Message:
    """Hand a message to the ClientApp, as Flower would at a node."""
    from client.app import app

    context = Context(run_id=RUN_ID, node_id=node, node_config=node_config, state=RecordDict(), run_config=run_config)
    return app(message, context)
