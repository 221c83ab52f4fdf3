"""A hospital as it is deployed, and what a coordinator sends it, message by message."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from torch import Tensor

from chexfound.contract.request import MOMENTS, Reply, Request
from chexfound.model.glori import build_head
from chexfound.pretrain.beginning import taken_backbone
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes, error_replies
from client.answer import hospital as client_site
from client.app import handle
from client.home.paths import site_home
from server.exchange.flwr_private import set_identity, set_message_id

NAME = "NORTH"
FINDINGS = ("Bar", "Blob")
SMALL = """
model: {min_tokens: 1, min_crop_tokens: 1}
min_batch: 2
min_bootstrap: 1
findings: [Bar, Blob]
"""  # for the recipe and the images of the tests; else the defaults

SECRET = b"\1" * 32  # by which both classes of Blob have patients enough to train on; by one of ten drawn they have not


def demand(home: Path, text: str = SMALL) -> None:
    """What the operator of a site writes into site.yaml."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "site.yaml").write_text(text)


def short(recipe: Recipe) -> Recipe:
    """The recipe with one round of each phase."""
    train, adapt = (curriculum.changed(part, rounds=1) for part in (recipe.train, recipe.adapt))
    return curriculum.changed(recipe, train=train, adapt=adapt)


def whole_run(
    ask: Callable[[Request], Reply], recipe: Recipe, findings: tuple[str, ...], batch: int = 4
) -> list[Reply]:
    """What a site answers to an honest coordinator in a run of a `short` recipe, to each phase in order."""
    head = build_head(recipe, len(findings))
    fresh = {name: tensor.clone() for name, tensor in head.state_dict().items()} | zero_moments(head)
    work = {"findings": findings, "batch_size": batch}
    trained = ask(Request(phase="pretrain", steps=recipe.train.local_steps, tensors=initial_weights(recipe), **work))
    backbone = taken_backbone(trained.tensors)
    made = ask(Request(phase="features", findings=findings, tensors=backbone))
    adapted = ask(Request(phase="adapt", steps=recipe.adapt.local_steps, tensors=fresh, **work))
    last = adapted.tensors or fresh
    last = {f"head.{name}": tensor for name, tensor in last.items() if not name.startswith(MOMENTS)}
    return [trained, made, adapted, ask(Request(phase="evaluate", findings=findings, tensors=last))]


class Hospital:
    """One site behind the real ClientApp.

    Args:
        recipe: of the run.
        store: of its images.
    """

    def __init__(self, recipe: Recipe, store: Path) -> None:
        self.recipe, self.store = recipe, store

    @property
    def home(self) -> Path:
        """Its folder."""
        return site_home(NAME)

    def demand(self, text: str) -> None:
        """What its operator writes into site.yaml."""
        demand(self.home, text)
        (self.home / "secret.key").write_bytes(SECRET)

    def ask(self, request: Request, recipe: Recipe | None = None) -> Reply | str:
        """Its reply, or the code that it refuses with."""
        set_identity(1)
        kind = envelopes.MESSAGE_TYPES[request.phase]
        message = Message(envelopes.pack_request(request), dst_node_id=1, message_type=kind, group_id="1", ttl=600.0)
        set_message_id(message, uuid.uuid4().hex)
        node = {"site": NAME, "data": str(self.store)}
        config = {"recipe": recipes.to_json(recipe or self.recipe)}
        reply = handle(message, _context(node, config))
        return error_replies.error_code(reply) if reply.has_error() else envelopes.unpack_reply(reply.content).message

    def pretrain(self, tensors: dict[str, Tensor], number: int = 0, **changed: Any) -> Reply | str:
        """A round of pretraining."""
        steps = self.recipe.train.local_steps
        request = Request(
            phase="pretrain", round=number, step=number * steps, steps=steps, batch_size=2, tensors=tensors
        )
        return self.ask(replace(request, **changed))

    def features(self, backbone: dict[str, Tensor], recipe: Recipe | None = None) -> Reply | str:
        """The features of a backbone."""
        return self.ask(Request(phase="features", findings=FINDINGS, tensors=backbone), recipe)

    def adapt(self, head: dict[str, Tensor], number: int = 0) -> Reply | str:
        """A round of adaptation."""
        steps = self.recipe.adapt.local_steps
        return self.ask(
            Request(
                phase="adapt", round=number, step=number * steps, steps=steps, batch_size=2, findings=FINDINGS,
                tensors=head,
            )
        )  # fmt: skip

    def evaluate(self, head: dict[str, Tensor]) -> Reply | str:
        """The figures of a head."""
        tensors = {f"head.{name}": tensor for name, tensor in head.items() if not name.startswith(MOMENTS)}
        return self.ask(Request(phase="evaluate", findings=FINDINGS, tensors=tensors))

    def restart(self) -> None:
        """End its process: what is not on the disk is gone."""
        client_site.forget()

    # -- what an honest coordinator sends

    def first(self) -> dict[str, Tensor]:
        """What the recipe begins with."""
        return initial_weights(self.recipe)

    def rounds(self, number: int) -> dict[str, Tensor]:
        """The weights after so many honest rounds of this site alone."""
        weights = self.first()
        for done in range(number):
            weights = honest(self.pretrain(weights, done)).tensors
        return weights

    def pretrained(self) -> dict[str, Tensor]:
        """The backbone that honest pretraining ends with."""
        return taken_backbone(self.rounds(self.recipe.pretrain_rounds))

    def head(self) -> dict[str, Tensor]:
        """The head that adaptation begins with."""
        module = build_head(self.recipe, len(FINDINGS))
        return {name: tensor.clone() for name, tensor in module.state_dict().items()} | zero_moments(module)


def honest(answer: Reply | str) -> Reply:
    """The reply to what must not be refused."""
    assert isinstance(answer, Reply), answer
    return answer


def _context(node: dict[str, Any], config: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=config)
