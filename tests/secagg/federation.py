"""Hospitals with keys behind the ClientApp, and a coordinator that may say to each of them what it likes.

Every message is packed, handed to the ClientApp, signed and verified as in a run; no stage is called directly.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict

from chexfound.contract.request import Reply, Request
from chexfound.data.store.reader import Store
from chexfound.durable.journal import read_journal
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.model import checkpoint
from chexfound.phases import payload
from chexfound.phases.payload import Settings
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.secagg import messages
from chexfound.secagg.coordinator import Opening
from chexfound.secagg.messages import Advert, Attempt, Opened, Packet
from chexfound.secagg.parameters import Parameters
from chexfound.wire import envelopes, error_replies
from chexfound.wire import signatures as wire_signatures
from client.answer import hospital as client_site
from client.app import app
from client.home import membership
from server.exchange.flwr_private import set_identity, set_message_id
from server.exchange.grid import GridExchange
from sim.engine.in_process import InProcessGrid
from sim.engine.keys import give_keys
from sim.engine.pool import Pool
from strategies.secagg import MaskedSum
from tests.staged import staged

NAMES = ("alpha", "beta", "delta", "gamma")
RARE = "Rare"  # a finding that alpha alone labels
LABELLED = {name: ["Blob", "Bar"] + [RARE] * (name == "alpha") for name in NAMES}
SMALL = {  # on top of the tiny recipe: a run in seconds
    "aggregation": "secagg",
    "train.optimizer_state": "local",
    "train.local_steps": 1,
    "train.pooled_batch_size": 8,
    "adapt.optimizer_state": "local",
    "adapt.local_steps": 2,
    "adapt.pooled_batch_size": 8,
    "evaluate.bootstrap_samples": 20,
}
STAGES = ("advertise", "share", "masked", "consistency", "unmask")
Told = dict[str, Any]
Answer = Reply | str  # what a site gives, or the code that it refuses with


def label_rare(rows: list[dict[str, str]]) -> None:
    """Give every third of alpha's images a finding that no other site knows."""
    for row in rows:
        if row["source"] == "alpha" and int(row["patient_id"][1:]) % 3 == 1:
            row["findings"] = f"{row['findings']}|{RARE}".replace("No Finding|", "")


class Federation:
    """Four hospitals on this disk.

    Args:
        recipe: of the run.
        store: of all their images.
        folder: for their homes.
        authority: for the certificate that their roster comes with; made once.
    """

    def __init__(self, recipe: Recipe, store: Path, folder: Path, authority: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.kept: Any = None  # an attempt that a test comes back to
        self.homes = {name: folder / "homes" / name for name in NAMES}
        self.sites: Roster = give_keys(self.homes, authority)
        self.parameters = Parameters.of(len(NAMES))
        keys = sorted(set(Store.open(store).keys))
        self.nodes: dict[str, dict[str, Any]] = {}
        for name in NAMES:
            shard = folder / f"{name}.json"
            shard.write_text(json.dumps([key for key in keys if key.startswith(name + "/")]))
            node = {"site": name, "data": str(store), "home": str(self.homes[name]), "patients": str(shard)}
            self.nodes[name] = {**node, "secured": True}

    def exchange(self, spool: Path | None = None) -> GridExchange:
        """As a run has it; with a `spool`, arrays travel in parts."""
        config = {"recipe": recipes.to_json(self.recipe)}
        grid = InProcessGrid(Pool(1), [self.nodes[name] for name in NAMES], config, self.sites)
        return GridExchange(grid, sites=self.sites, run_id=1, spool=spool)

    def ask(
        self,
        name: str,
        request: Request,
        *,
        recipe: Recipe | None = None,
        run: int = 1,
        sites: Roster | None = None,
        edit: Callable[[RecordDict], None] | None = None,
        part_bytes: int = 0,
    ) -> Answer:
        """One message to one site; its reply, the signature verified, or the code of its error.

        Args:
            name: of the site.
            request: as it is packed.
            recipe: in the run's configuration, if it is another.
            run: its id.
            sites: in the terms, if they are others than the roster.
            edit: changes the message's content.
            part_bytes: of the reply, from which on it comes in parts.
        """
        set_identity(run)
        content = envelopes.pack_request(request, sites or self.sites, part_bytes=part_bytes)
        if edit is not None:
            edit(content)
        kind = envelopes.MESSAGE_TYPES[request.kind]
        message = Message(content, dst_node_id=1, message_type=kind, group_id="1", ttl=600.0)
        set_message_id(message, uuid.uuid4().hex)
        context = Context(
            run_id=run,
            node_id=1,
            node_config=dict(self.nodes[name]),
            state=RecordDict(),
            run_config={"recipe": recipes.to_json(recipe or self.recipe)},
        )
        reply = app(message, context)
        if reply.has_error():
            return error_replies.error_code(reply)
        key = signing.read_public_line(self.sites.sites[name].identity)
        wire_signatures.verify_reply(reply.content, key, run, request.round, message.metadata.message_id)
        came = envelopes.unpack_reply(reply.content)
        return came.message if came.detached is None else came

    def attempt(self, phase: str = "counts", number: int = 1, **changed: Any) -> Try:
        """An attempt that is not begun yet; `changed`: fields of the request, and of the `Try`."""
        own = {key: changed.pop(key) for key in ("run", "recipe", "settings", "shapes") if key in changed}
        request = Request(phase=phase, **{"findings": ("Bar", "Blob"), **changed})
        return Try(self, request, number, **own)

    # -- what is on a site's disk

    def journal(self, name: str) -> list[dict[str, Any]]:
        """The entries of a site's journal."""
        path = self.homes[name] / "secagg" / "journal.jsonl"
        return read_journal(path) if path.exists() else []

    def refused(self, name: str) -> list[str]:
        """The codes in a site's journal."""
        return [entry["code"] for entry in self.journal(name) if entry["event"] == "refused"]

    def attempt_folder(self, name: str) -> Path:
        """Where a site keeps its one attempt."""
        return self.homes[name] / "secagg" / "attempt"

    def secrets(self, name: str) -> Path:
        """The one file with an attempt's secrets."""
        return self.attempt_folder(name) / "secrets.json"

    def kill(self) -> None:
        """End the process of every site: what is not on the disk is gone."""
        client_site.forget()


@dataclass
class Try:
    """One attempt, as an honest coordinator makes it; a test changes what one site is told."""

    fed: Federation
    request: Request
    number: int
    run: int = 1
    recipe: Recipe | None = None  # in the run's configuration, if it is another than the federation's
    settings: Settings = field(default_factory=lambda: Settings(ring=32, images=1))
    shapes: dict[str, list[int]] = field(default_factory=dict)
    adverts: dict[str, Advert] = field(default_factory=dict)
    packets: dict[tuple[str, str], Packet] = field(default_factory=dict)
    arrays: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    opened: dict[str, dict[str, Opened]] = field(default_factory=dict)
    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)  # by stage and site
    sharers: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)

    def told(self, stage: str, name: str) -> Told:
        """What an honest coordinator tells one site in a stage."""
        own: Told = {"attempt": self.number}
        if stage == "share":
            own |= {
                "adverts": [asdict(self.adverts[site]) for site in sorted(self.adverts)],
                "parameters": self.fed.parameters.shared(),
                "weights": checkpoint.digest(self.request.tensors),
                "settings": asdict(self.settings),
                "shapes": self.shapes,
            }
        elif stage == "masked":
            packets = [asdict(self.packets[dealer, name]) for dealer in self.sharers]
            own |= {"sharers": self.sharers, "packets": packets}
        elif stage == "consistency":
            own |= {"survivors": self.survivors}
        elif stage == "unmask":
            own |= {"signatures": self.signatures}
        return own

    def asked(self, stage: str, name: str, **changed: Any) -> Request:
        """The request of a stage to one site; `changed`: fields of it, and of `told`."""
        told = {key: changed.pop(key) for key in list(changed) if key not in Request.__dataclass_fields__}
        tensors = self.request.tensors if stage == "masked" else {}
        return staged(self.request, stage, self.told(stage, name) | told, **{"tensors": tensors} | changed)

    def ask(self, stage: str, name: str, *, message: Mapping[str, Any] | None = None, **changed: Any) -> Answer:
        """One site; a good answer is taken in.  `message`: as `Federation.ask`; `changed`: as `asked`."""
        answer = self.fed.ask(
            name, self.asked(stage, name, **changed), **{"run": self.run, "recipe": self.recipe, **(message or {})}
        )
        self.answers.setdefault(stage, {})[name] = answer
        if isinstance(answer, Reply) and "refused" not in answer.values:
            self._take(stage, name, answer)
        return answer

    def _take(self, stage: str, name: str, answer: Reply) -> None:
        values = answer.values
        if stage == "advertise":
            self.adverts[name] = messages.parse(Advert, values["advert"], "an advert")
        elif stage == "share":
            for packet in messages.parse_all(Packet, values["packets"], "the packets"):
                self.packets[packet.dealer, packet.holder] = packet
            self.sharers = sorted({dealer for dealer, _ in self.packets})
        elif stage == "masked":
            self.arrays[name] = answer.masked
            self.survivors = sorted(self.arrays)
        elif stage == "consistency":
            self.signatures[name] = values["signature"]
        else:
            opened = values["shares"].items()
            self.opened[name] = {dealer: messages.parse(Opened, one, "a share") for dealer, one in opened}

    def stage(self, stage: str, names: Sequence[str] = NAMES) -> dict[str, Answer]:
        """Ask these sites honestly."""
        return {name: self.ask(stage, name) for name in names}

    def until(self, stage: str, names: Sequence[str] = NAMES) -> Try:
        """All stages before this one, honestly and without loss."""
        for before in STAGES[: STAGES.index(stage)]:
            for name, answer in self.stage(before, names).items():
                assert isinstance(answer, Reply), (before, name, answer)
                assert "refused" not in answer.values, (before, name, answer)
        return self

    def context(self) -> bytes:
        """As the sites have it."""
        (context,) = {a.values["context"] for a in self.answers["share"].values() if isinstance(a, Reply)}
        return bytes.fromhex(context)

    def sum(self) -> dict[str, np.ndarray]:
        """What the coordinator can open from what it has."""
        opening = Opening(
            attempt=Attempt(run=self.run, phase=self.request.phase, round=self.request.round, attempt=self.number),
            sites=self.fed.sites,
            parameters=self.fed.parameters,
            context=self.context(),
            adverts=self.adverts,
            packets=self.packets,
            sharers=self.sharers,
            survivors=self.survivors,
        )
        for name, opened in self.opened.items():
            opening.add(name, opened)
        assert opening.enough
        plan = payload.plan(self.fed.recipe, self.request, self.settings, len(NAMES), self.shapes)
        total = MaskedSum(plan.layout, self.fed.folder / "masked")
        for name in self.survivors:
            total.add(name, self.arrays[name])
        return total.result(self.survivors, opening.masks())

    def finish(self, names: Sequence[str] = NAMES) -> dict[str, np.ndarray]:
        """The whole attempt, honestly."""
        self.until("unmask", names)
        for name, answer in self.stage("unmask", names).items():
            assert isinstance(answer, Reply), (name, answer)
        return self.sum()


def identity(fed: Federation, name: str) -> Ed25519PrivateKey:
    """The key of a site that colludes with the coordinator."""
    return membership.identity_key(fed.homes[name])
