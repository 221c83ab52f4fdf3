"""The ClientApp answers whatever comes in, and never raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexfound.contract import request as phases_request
from chexfound.contract.detached import ByteView, Detached
from chexfound.contract.request import PartRequest, Request
from chexfound.errors import ProtocolError
from chexfound.identity import signing
from chexfound.identity.roster import Address, Keys, Roster
from chexfound.phases import dispatch
from chexfound.recipe import load
from chexfound.wire import arrays, envelopes, signatures
from client.answer import egress
from client.answer import hospital as site_module
from client.app import app, handle
from client.home import membership


@pytest.fixture
def make_context(tiny_store_path: Path, tiny_recipe: Any, tmp_path: Path) -> Callable[..., Context]:
    def make(**changes: Any) -> Context:
        node = {"site": "all", "data": str(tiny_store_path), "home": str(tmp_path / "home")} | changes.get("node", {})
        run = {"recipe": load.to_json(tiny_recipe)} | changes.get("run", {})
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)

    return make


def test_it_enrols(make_message: Any, make_context: Any) -> None:
    reply = app(make_message(envelopes.pack_request(Request(phase="enrol"))), make_context())
    values = envelopes.unpack_reply(reply.content).message.values
    assert (values["site"], values["images"]) == ("all", 77)


def test_each_message_type_has_its_phase(make_message: Any, make_context: Any, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setattr(
        dispatch, "run", lambda site, recipe, request: seen.append(request.phase) or phases_request.Reply()
    )
    monkeypatch.setattr(egress.Gate, "admit", lambda gate, phase, reply: reply)
    for phase, message_type in envelopes.MESSAGE_TYPES.items():
        reply = app(make_message(envelopes.pack_request(Request(phase=phase)), message_type), make_context())
        if phase in envelopes.STAGES:  # which are of a phase, and none themselves
            assert reply.error.reason == "protocol"
            continue
        assert reply.has_content()
        wrong = "query.enrol" if phase != "enrol" else "evaluate"
        assert (
            app(make_message(envelopes.pack_request(Request(phase=phase)), wrong), make_context()).error.reason
            == "protocol"
        )
    assert seen == [phase for phase in envelopes.MESSAGE_TYPES if phase not in envelopes.STAGES]


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
    reply = app(make_message(envelopes.pack_request(Request(phase="enrol"))), make_context(**changes))
    assert reply.error.reason == reason
    assert "Jane" not in repr(reply.error) + repr(reply.metadata)


@pytest.mark.parametrize("raised", [RuntimeError, MemoryError, RecursionError, StopIteration, AssertionError])
def test_whatever_a_phase_raises(make_message: Any, make_context: Any, monkeypatch: Any, raised: Any) -> None:
    def fail(*_: Any) -> None:
        raise raised("Jane Doe")

    monkeypatch.setattr(dispatch, "run", fail)
    reply = app(make_message(envelopes.pack_request(Request(phase="enrol"))), make_context())
    assert reply.error.reason == "internal"
    assert "Jane" not in repr(reply.error)


def test_a_message_that_is_an_error_or_of_an_unknown_type(make_message: Any, make_context: Any) -> None:
    asked = make_message(RecordDict())
    assert handle(Message(Error(1, "x"), reply_to=asked), make_context()).error.reason == "internal"
    odd = make_message(envelopes.pack_request(Request(phase="enrol")), "train.something")
    assert handle(odd, make_context()).error.reason == "protocol"


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 0}, {"round": -1}, {"step": -1}, {"roster_index": -1}], ids=str
)
@pytest.mark.parametrize("phase", ["pretrain", "adapt"])
def test_a_request_for_no_work_is_refused(make_message: Any, make_context: Any, phase: str, change: Any) -> None:
    request = Request(phase=phase, **{"steps": 1, "batch_size": 1, "findings": ("Bar",)} | change)
    reply = app(make_message(envelopes.pack_request(request), envelopes.MESSAGE_TYPES[phase]), make_context())
    assert reply.error.reason == "protocol"


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)
fields = st.dictionaries(st.sampled_from([*envelopes._RequestFields.__dataclass_fields__, "x"]), values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(fields, st.sampled_from(list(envelopes.MESSAGE_TYPES)))
def test_it_never_raises(make_message: Any, make_context: Any, given: Any, phase: str) -> None:
    base = {"phase": phase, "round": 0, "step": 0, "steps": 1, "batch_size": 1, "roster_index": 0, "findings": []}
    text = json.dumps(base | given)
    content = envelopes.pack_request(Request(phase=phase))
    content["request"] = ConfigRecord({"json": text})
    reply = app(make_message(content, envelopes.MESSAGE_TYPES[phase]), make_context())
    assert reply.has_content() != reply.has_error()
    if reply.has_error():
        assert reply.error.reason in ("protocol", "checkpoint", "data", "storage")


# ---- before any data is touched


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a site is opened."""
    monkeypatch.setattr(site_module, "site_of", lambda *_, **__: pytest.fail("a site was opened"))
    monkeypatch.setattr(dispatch, "run", lambda *_: pytest.fail("a phase was run"))


def test_a_run_whose_code_was_refused(
    make_message: Any, make_context: Any, untouched: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it asks for; the reason stays here."""
    context = make_context(run={"refused": "the code 1234 was not approved here"})
    for content in (envelopes.pack_request(Request(phase="enrol")), RecordDict()):
        reply = app(make_message(content), context)
        assert (reply.error.code, reply.error.reason) == (6, "code")
        assert "1234" not in repr(reply.error)
    assert "the code 1234 was not approved here" in caplog.text


def test_a_run_that_was_not_refused(make_message: Any, make_context: Any) -> None:
    assert app(
        make_message(envelopes.pack_request(Request(phase="enrol"))), make_context(run={"refused": ""})
    ).has_content()


@pytest.mark.parametrize("version", ["0.0.0", "", None, 1, "Jane\nDoe", "x" * 5000])
def test_another_release(make_message: Any, make_context: Any, untouched: None, version: Any) -> None:
    content = envelopes.pack_request(Request(phase="enrol"))
    content["request"]["terms"] = json.dumps({"version": version, "roster": None})
    reply = app(make_message(content), make_context())
    assert (reply.error.code, reply.error.reason) == (5, "version")


def test_no_terms_at_all(make_message: Any, make_context: Any, untouched: None) -> None:
    content = envelopes.pack_request(Request(phase="enrol"))
    del content["request"]["terms"]
    assert app(make_message(content), make_context()).error.reason == "protocol"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Keys]:
    """Of three sites and of one that is in no federation."""
    return [membership.make_keys(tmp_path_factory.mktemp("site"))[0] for _ in range(4)]


@pytest.fixture
def secured(enrolled: Callable[..., Path], authority: Path, make_context: Any, keys: list[Keys]) -> Any:
    """The context of the site NORTH, and the roster that it approved: with EAST and WEST."""
    home = enrolled(authority, Address("127.0.0.1", 1))
    federation = membership.present(home)
    sites = federation.sites.with_site("EAST", keys[0]).with_site("WEST", keys[1])
    membership.approve(home, replace(federation, sites=sites))
    (home / "site.yaml").write_text("plain: accepted")  # of three sites, masks would be asked for
    return make_context(node={"site": "NORTH", "secured": True, "home": str(home)}), sites


def changed(sites: Roster, keys: list[Keys], change: str) -> Roster | None:
    own = sites.sites
    return {
        "no roster": None,
        "one more": sites.with_site("SOUTH", keys[2]),
        "other keys": sites.without_site("EAST").with_site("EAST", keys[2]),
        "another name for one's keys": sites.without_site("EAST").with_site("SOUTH", keys[0]),
        "keys exchanged": Roster(
            federation="thorax", serial=9, sites={**own, "EAST": own["WEST"], "WEST": own["EAST"]}
        ),
        "half of other keys": Roster(
            federation="thorax", serial=9, sites={**own, "EAST": Keys(own["EAST"].node, keys[2].identity)}
        ),
        "another federation": Roster(federation="abdomen", serial=sites.serial, sites=own),
    }[change]


@pytest.mark.parametrize(
    "change",
    [
        "no roster", "one more", "other keys", "another name for one's keys", "keys exchanged", "half of other keys",
        "another federation",
    ],
)  # fmt: skip
def test_sites_that_were_not_approved(
    make_message: Any, secured: Any, keys: list[Keys], untouched: None, change: str
) -> None:
    context, sites = secured
    content = envelopes.pack_request(Request(phase="enrol"), changed(sites, keys, change))
    reply = app(make_message(content), context)
    assert (reply.error.code, reply.error.reason) == (6, "roster")


@pytest.mark.parametrize("gone", [(), ("EAST",), ("EAST", "WEST")])
def test_the_sites_that_were_approved_or_some_of_them(make_message: Any, secured: Any, gone: tuple[str, ...]) -> None:
    """The reply bears the site's signature, to this message of this run and round."""
    context, sites = secured
    for name in gone:
        sites = sites.without_site(name)
    asked = make_message(envelopes.pack_request(Request(phase="enrol", round=2), sites))
    asked.metadata.__dict__["_message_id"] = "the request's"
    reply = app(asked, context).content
    key = signing.read_public_line(sites.sites["NORTH"].identity)
    signatures.verify_reply(reply, key, asked.metadata.run_id, 2, "the request's")
    with pytest.raises(ProtocolError, match="signature"):
        signatures.verify_reply(reply, key, asked.metadata.run_id, 3, "the request's")


def test_a_site_whose_federation_was_never_approved(
    make_message: Any, make_context: Any, untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    context = make_context(node={"site": "NORTH", "secured": True})
    assert app(make_message(envelopes.pack_request(Request(phase="enrol"))), context).error.reason == "config"


def test_a_site_without_keys_signs_nothing(make_message: Any, make_context: Any) -> None:
    reply = app(make_message(envelopes.pack_request(Request(phase="enrol"))), make_context())
    assert "ed25519" not in reply.content["reply"]


def test_images_are_taken_in_at_enrolment_only(
    make_message: Any, make_context: Any, make_images: Any, tmp_path: Path, tiny_recipe: Any
) -> None:
    images = make_images(tmp_path / "images", {"alpha": 8})
    context = make_context(node={"data": str(images), "site": "alpha"})

    def count() -> int:
        reply = app(make_message(envelopes.pack_request(Request(phase="enrol"))), context)
        return envelopes.unpack_reply(reply.content).message.values["images"]

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


# ---- arrays in parts


@pytest.fixture
def ask(make_message: Any, make_context: Any) -> Callable[..., Any]:
    """`ask(request)`: the reply, or the code of an error."""

    def ask(request: Request, **sent: Any) -> Any:
        kind = envelopes.MESSAGE_TYPES[request.kind]
        reply = app(make_message(envelopes.pack_request(request, **sent), kind), make_context())
        if reply.has_error():
            return reply.error.reason
        came = envelopes.unpack_reply(reply.content)
        return came.message if came.detached is None else came

    return ask


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site gives back twice what it was sent."""

    def run(site: Any, recipe: Any, request: Request, *decision: Any) -> phases_request.Reply:
        values = {"images": 1, "state": "travels", "history": []}
        return phases_request.Reply(
            tensors={name: 2 * tensor for name, tensor in request.tensors.items()}, values=values
        )

    monkeypatch.setattr(dispatch, "run", run)


TENSORS = {"student.x": torch.arange(9.0)}
LAID = ByteView({"float32": [TENSORS["student.x"].numpy()]})
APART = Detached(sha256=LAID.sha256(), arrays=LAID.arrays, table=[("student.x", "float32", [9])])


def delivery(start: int, size: int) -> Request:
    told = {"sha256": APART.sha256, "size": APART.size, "start": start}
    return PartRequest(phase="pretrain", stage="deliver", params=told, chunk=LAID.read(start, size))


def test_arrays_are_delivered_and_collected_in_parts(ask: Any, doubled: None, tmp_path: Path) -> None:
    request, sent = Request(phase="pretrain"), {"detached": APART, "part_bytes": 20}
    assert ask(request, **sent) == "protocol"  # nothing was delivered
    assert [ask(delivery(start, 20)).values["size"] for start in (0, 20)] == [20, 36]
    reply = ask(request, **sent)
    assert reply.detached.size == 36
    told = {"sha256": reply.detached.sha256, "start": 0, "size": 36}
    chunk = ask(PartRequest(phase="pretrain", stage="collect", params=told)).chunk
    (tmp_path / "reply").write_bytes(chunk.tobytes())
    whole = arrays.with_arrays(reply.message, reply.detached, tmp_path / "reply")
    assert torch.equal(whole.tensors["student.x"], 2 * TENSORS["student.x"])
    assert ask(PartRequest(phase="pretrain", stage="collect", params=told | {"sha256": APART.sha256})) == "protocol"


@pytest.mark.parametrize("part_bytes", [0, 36])
def test_arrays_that_make_one_part_are_in_the_reply(ask: Any, doubled: None, part_bytes: int) -> None:
    reply = ask(Request(phase="pretrain", tensors=TENSORS), part_bytes=part_bytes)
    assert torch.equal(reply.tensors["student.x"], 2 * TENSORS["student.x"])


def test_nothing_is_kept_of_a_reply_that_may_not_leave(ask: Any, doubled: None, tmp_path: Path) -> None:
    tensors = {"odd.x": torch.arange(9.0)}
    assert ask(Request(phase="pretrain", tensors=tensors), part_bytes=20) == "policy"
    assert not list(tmp_path.rglob("out-*"))


def test_a_disk_that_is_full_is_a_code(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    ask(delivery(0, 20))
    monkeypatch.setattr("builtins.open", full)
    assert ask(delivery(20, 20)) == "storage"


def test_parts_of_a_run_whose_code_was_refused(make_message: Any, make_context: Any, tmp_path: Path) -> None:
    message = make_message(envelopes.pack_request(delivery(0, 20)), "query.deliver")
    assert app(message, make_context(run={"refused": "not approved"})).error.reason == "code"
    assert not list(tmp_path.rglob("in-*"))
