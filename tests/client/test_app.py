"""The ClientApp answers whatever comes in, and never raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexfound import phases, recipe, wire
from chexfound.phases import Request
from client import site as site_module
from client.app import app, handle


@pytest.fixture
def make_context(tiny_store_path: Path, tiny_recipe: Any, tmp_path: Path) -> Callable[..., Context]:
    def make(**changes: Any) -> Context:
        node = {"site": "all", "data": str(tiny_store_path), "home": str(tmp_path / "home")} | changes.get("node", {})
        run = {"recipe": recipe.to_json(tiny_recipe)} | changes.get("run", {})
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)

    return make


def test_it_enrols(make_message: Any, make_context: Any) -> None:
    reply = app(make_message(wire.pack_request(Request(phase="enrol"))), make_context())
    values = wire.unpack_reply(reply.content).values
    assert (values["site"], values["images"]) == ("all", 77)


def test_each_message_type_has_its_phase(make_message: Any, make_context: Any, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setattr(phases, "run", lambda site, recipe, request: seen.append(request.phase) or phases.Reply())
    for phase, message_type in wire.MESSAGE_TYPES.items():
        assert app(make_message(wire.pack_request(Request(phase=phase)), message_type), make_context()).has_content()
        wrong = "query.enrol" if phase != "enrol" else "evaluate"
        assert (
            app(make_message(wire.pack_request(Request(phase=phase)), wrong), make_context()).error.reason == "protocol"
        )
    assert seen == list(wire.MESSAGE_TYPES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node": {"data": ""}}, "config"),
        ({"node": {"site": ""}}, "config"),
        ({"node": {"site": 3}}, "config"),
        ({"node": {"data": "/no/such/folder/of/Jane-Doe"}}, "data"),
        ({"node": {"patients": "/no/such/file/of/Jane-Doe"}}, "storage"),
        ({"run": {"recipe": "{"}}, "config"),
        ({"run": {"recipe": "[]"}}, "config"),
        ({"run": {"recipe": '{"seed": "Jane-Doe"}'}}, "config"),
        ({"run": {"recipe": '{"image_px": 32, "crops": {"global_crops_size": 32, "local_crops_size": 16}}'}}, "data"),
        ({"run": {"recipe": 7}}, "config"),
    ],
)
def test_a_wrong_configuration_is_a_code(make_message: Any, make_context: Any, changes: Any, reason: str) -> None:
    reply = app(make_message(wire.pack_request(Request(phase="enrol"))), make_context(**changes))
    assert reply.error.reason == reason
    assert "Jane" not in repr(reply.error) + repr(reply.metadata)


@pytest.mark.parametrize("raised", [RuntimeError, MemoryError, RecursionError, StopIteration, AssertionError])
def test_whatever_a_phase_raises(make_message: Any, make_context: Any, monkeypatch: Any, raised: Any) -> None:
    def fail(*_: Any) -> None:
        raise raised("Jane Doe")

    monkeypatch.setattr(phases, "run", fail)
    reply = app(make_message(wire.pack_request(Request(phase="enrol"))), make_context())
    assert reply.error.reason == "internal"
    assert "Jane" not in repr(reply.error)


def test_a_message_that_is_an_error_or_of_an_unknown_type(make_message: Any, make_context: Any) -> None:
    asked = make_message(RecordDict())
    assert handle(Message(Error(1, "x"), reply_to=asked), make_context()).error.reason == "internal"
    odd = make_message(wire.pack_request(Request(phase="enrol")), "train.something")
    assert handle(odd, make_context()).error.reason == "protocol"


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 0}, {"round": -1}, {"step": -1}, {"roster_index": -1}], ids=str
)
@pytest.mark.parametrize("phase", ["pretrain", "adapt"])
def test_a_request_for_no_work_is_refused(make_message: Any, make_context: Any, phase: str, change: Any) -> None:
    request = Request(phase=phase, **{"steps": 1, "batch_size": 1, "findings": ("Bar",)} | change)
    reply = app(make_message(wire.pack_request(request), wire.MESSAGE_TYPES[phase]), make_context())
    assert reply.error.reason == "protocol"


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)
fields = st.dictionaries(st.sampled_from([*wire._RequestFields.__dataclass_fields__, "x"]), values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(fields, st.sampled_from(list(wire.MESSAGE_TYPES)))
def test_it_never_raises(make_message: Any, make_context: Any, given: Any, phase: str) -> None:
    base = {"phase": phase, "round": 0, "step": 0, "steps": 1, "batch_size": 1, "roster_index": 0, "findings": []}
    text = json.dumps(base | given)
    content = RecordDict({"request": ConfigRecord({"json": text}), "arrays": ArrayRecord()})
    reply = app(make_message(content, wire.MESSAGE_TYPES[phase]), make_context())
    assert reply.has_content() != reply.has_error()
    if reply.has_error():
        assert reply.error.reason in ("protocol", "checkpoint", "data", "storage")


def test_images_are_taken_in_at_enrolment_only(
    make_message: Any, make_context: Any, make_images: Any, tmp_path: Path, tiny_recipe: Any
) -> None:
    images = make_images(tmp_path / "images", {"alpha": 8})
    context = make_context(node={"data": str(images), "site": "alpha"})

    def count() -> int:
        reply = app(make_message(wire.pack_request(Request(phase="enrol"))), context)
        return wire.unpack_reply(reply.content).values["images"]

    before = count()
    site = site_module.site_of(context.node_config, tiny_recipe.image_px, enrolling=False)
    more = make_images(tmp_path / "more", {"beta": 8})
    for path in (more / "beta").iterdir():
        path.rename(images / "alpha" / f"new-{path.name}")
    lines = (more / "manifest.csv").read_text().replace("beta/", "alpha/new-").splitlines()[1:]
    with open(images / "manifest.csv", "a") as file:
        file.write("\n".join(lines) + "\n")
    assert site_module.site_of(context.node_config, tiny_recipe.image_px, enrolling=False) is site
    assert len(site.view) == before
    assert count() == before + len(lines)
