from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chexfound.durable.journal import Journal
from chexfound.errors import SiteError
from chexfound.identity import signing
from chexfound.identity.roster import Address, Keys
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from server.federation import flower_cli, settings
from server.federation.settings import Federation
from server.runs import submission, submit
from server.runs.folders import RunFolder


def keys() -> Keys:
    node = ec.generate_private_key(ec.SECP256R1()).public_key()
    identity = ed25519.Ed25519PrivateKey.generate().public_key()
    return Keys(node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(), signing.public_line(identity))


@pytest.fixture
def thorax(tmp_path: Path) -> Federation:
    """A federation of two sites."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    public = Address("localhost", ports[0])
    made = settings.create(tmp_path / "f", "thorax", public, public, Address("127.0.0.1", ports[1]))
    for name in ("NORTH", "SOUTH"):
        made.write_sites(made.sites().with_site(name, keys()))
    return made


class Flower:
    """A stand-in for Flower's command line: its runs with their status, as `flwr list` has them."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.configs: list[str] = []
        self.log = ""
        self.down = False

    def ask(self, made: Federation, arguments: Sequence[str]) -> dict[str, Any]:
        if self.down:
            raise SiteError("the SuperLink cannot be asked")
        command, *rest = arguments
        if command == "run":
            assert (Path(rest[0]) / "pyproject.toml").is_file()
            self.configs.append(Path(rest[3]).read_text())
            self.statuses[number := str(100 + len(self.statuses))] = "pending"
            return {"run-id": number}
        if command == "stop":
            self.statuses[rest[0]] = "finished:stopped"
            return {"run-id": rest[0]}
        if command == "supernode":
            return {"nodes": []}
        return {"runs": [{"run-id": number, "status": status} for number, status in self.statuses.items()]}

    def show(self, made: Federation, arguments: Sequence[str]) -> str:
        return self.log


@pytest.fixture
def flwr(monkeypatch: pytest.MonkeyPatch) -> Flower:
    made = Flower()
    monkeypatch.setattr(flower_cli, "ask", made.ask)
    monkeypatch.setattr(flower_cli, "show", made.show)
    return made


@pytest.fixture
def recipe() -> Recipe:
    return recipes.load("demo", {"name": "it's tiny", "train.rounds": 3, "adapt.rounds": 1})


@pytest.fixture
def submitted(thorax: Federation, flwr: Flower, recipe: Recipe) -> RunFolder:
    """A run that Flower has, as "running"."""
    run = submit.create(thorax, recipe, "first", None)
    flwr.statuses[submit.submit(run)] = "running"
    return run


@pytest.fixture
def live() -> Iterator[Callable[..., None]]:
    """Write a run's live.json as its ServerApp does, which holds the folder until it has failed or is `killed`."""
    serving: dict[Path, contextlib.ExitStack] = {}

    def write(run: RunFolder, state: str, killed: bool = False, **more: Any) -> None:
        values = {"schema": 1, "state": state, "round": None, "rounds": None, "since": "2026-11-27T13:26:23+00:00"}
        values |= {"waiting_for": [], "replied": [], "lost": [], "flower_run": run.flower_run(), "error": None}
        values |= {"submission": submission.last(run.about()).get("submission", "")}
        if run.path not in serving:
            serving[run.path] = contextlib.ExitStack()
            serving[run.path].enter_context(submission.alone(run.path, "", ""))
        (run.path / "live.json").write_text(json.dumps(values | more))
        if killed or state == "failed":
            serving.pop(run.path).close()

    yield write
    for held in serving.values():
        held.close()


def round_event(number: int, phase: str = "pretrain", loss: float = 9.0, **more: Any) -> dict[str, Any]:
    sites = [
        {"site": site, "images": 42, "labelled": [], "history": [{"step": 0, "loss": 99.0}, {"step": 1, "loss": value}]}
        for site, value in (("NORTH", loss), ("SOUTH", loss + 1))
    ]
    costs = {"seconds": 12.42, "bytes": {"down": 27_000_000, "up": 26_956_752}}
    return (
        {"event": "round", "phase": phase, "round": number, "file": "x", "sha256": "0" * 64, "sites": sites}
        | costs
        | more
    )


START = {
    "event": "start", "findings": ["Nodule"],
    "roster": [{"site": "NORTH", "train": 42}, {"site": "SOUTH", "train": 34}],
}  # fmt: skip
SUMMED_START = {
    "event": "start", "findings": ["Nodule"], "secagg": {"n": 3, "c": 0, "t": 2, "ring": 32},
    "totals": {"images": 99, "patients": 80, "train": 76, "val": 12, "test": 11, "findings": {"Nodule": {}}},
    "roster": [
        {"site": site, "findings": ["Nodule"], "versions": {}, "cells": 0, "withheld": site == "EAST"}
        for site in ("EAST", "NORTH", "SOUTH")
    ],
}  # fmt: skip
SUMMED_ROUND = round_event(0) | {
    "sites": [{**round_event(0)["sites"][0], "site": "all sites"}],
    "cohort": ["EAST", "NORTH"],
    "clipped": 3,
    "missing": [{"site": "SOUTH", "reason": "late"}],
}
DONE = {
    "event": "done",
    "model_sha256": "ab" * 32,
    "unscored": {},
    "results": [{"auroc": 0.7}, {"auroc": None}, {"auroc": 0.9}],
}
KNOWN = {"start": START, "done": DONE, "summed start": SUMMED_START, "summed round": SUMMED_ROUND}


@pytest.fixture
def happened() -> Callable[..., None]:
    """Append events to a run's journal: "start", "done", rounds by number, or events as they are.

    "summed start" and "summed round" are of secure aggregation.
    """

    def append(run: RunFolder, *events: Any) -> None:
        with Journal(run.path / "journal.jsonl") as journal:
            for event in events:
                known = KNOWN.get(event) if isinstance(event, str) else None
                journal.append(known or (round_event(event) if isinstance(event, int) else event))

    return append
