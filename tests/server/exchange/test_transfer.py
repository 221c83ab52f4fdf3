"""What one request takes in messages, to a site that is honest and to one that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.detached import Envelope
from chexfound.contract.request import PartReply, PartRequest, Reply, Request
from chexfound.errors import ProtocolError
from chexfound.wire import arrays, envelopes
from client.answer.delivery import Parts
from server.exchange import transfer as parts_module
from server.exchange.transfer import BACK_MAX, Download, Outgoing

TENSORS = {"a": torch.arange(5.0), "b": torch.arange(6.0, dtype=torch.float64).reshape(2, 3)}
REQUEST = Request(phase="pretrain", round=2, steps=4, tensors=TENSORS)
Change = Callable[[Request, Reply], Reply]


def honest(request: Request, reply: Reply) -> Reply:
    return reply


class Site:
    """Gives back twice what it was sent; `change` what it answers.  Both ways as messages."""

    def __init__(self, home: Path, change: Change = honest) -> None:
        self.parts, self.change, self.asked = Parts(home, 1), change, list[Request]()

    def answer(self, sent: Envelope[Request]) -> Envelope[Reply]:
        came = envelopes.unpack_request(envelopes.pack_requests([sent])[0])
        self.asked.append(came.message)
        return envelopes.unpack_reply(self._reply(came))

    def _reply(self, came: Envelope[Request]) -> Any:
        request = came.message
        if isinstance(request, PartRequest):
            return envelopes.pack_reply(self.change(request, self.parts.answer(request)))
        if came.detached is not None:
            request = arrays.with_arrays(request, came.detached, self.parts.received(came.detached))
        reply = Reply(tensors={name: 2 * tensor for name, tensor in request.tensors.items()}, values={"images": 1})

        def keep(laid: Any) -> str | None:
            return self.parts.keep(laid) if laid.size > came.part_bytes else None

        return envelopes.pack_reply(self.change(request, reply), keep)


def talk(site: Site, folder: Path, part_bytes: int, request: Request = REQUEST) -> Reply:
    spool = Download(path=folder / "spool" / "000", part_bytes=part_bytes)
    messages = spool.ask(request, Outgoing(request.tensors))
    asked = next(messages)
    while True:
        try:
            asked = messages.send(site.answer(asked))
        except StopIteration as ended:
            reply: Reply = ended.value
            return reply


@pytest.mark.parametrize(
    ("part_bytes", "stages"),
    [
        (1000, ["pretrain"]),
        (68, ["pretrain"]),  # all that there is
        (67, ["deliver"] * 2 + ["pretrain"] + ["collect"] * 2),
        (20, ["deliver"] * 4 + ["pretrain"] + ["collect"] * 4),
        (1, ["deliver"] * 68 + ["pretrain"] + ["collect"] * 68),
    ],
)
def test_arrays_go_and_come_in_parts(tmp_path: Path, part_bytes: int, stages: list[str]) -> None:
    site = Site(tmp_path)
    reply = talk(site, tmp_path, part_bytes)
    assert reply.values == {"images": 1}
    assert all(torch.equal(reply.tensors[name], 2 * TENSORS[name]) for name in TENSORS)
    assert [request.kind for request in site.asked] == stages
    assert {(request.phase, request.round, request.steps) for request in site.asked} == {("pretrain", 2, 4)}
    assert all(0 < one.chunk.size <= part_bytes for one in site.asked if getattr(one, "chunk", None) is not None)


def test_a_spool_is_read_until_nobody_holds_it(tmp_path: Path) -> None:
    spool = Download(path=tmp_path / "spool" / "000", part_bytes=20)
    reply = talk(Site(tmp_path), tmp_path, 20)
    assert spool.path.exists()
    spool.close()
    assert not spool.path.exists()
    talk(Site(tmp_path / "other"), tmp_path, 20, replace(REQUEST, tensors={"a": torch.zeros(9)}))
    assert torch.equal(reply.tensors["a"], 2 * TENSORS["a"])


def test_what_a_site_has_already_is_not_sent_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    talk(site, tmp_path, 20)
    site.asked.clear()
    talk(site, tmp_path, 20)
    assert [request.kind for request in site.asked] == ["deliver", "pretrain", *["collect"] * 4]


def test_what_a_site_lost_is_sent_again(tmp_path: Path) -> None:
    def lose(request: Request, reply: Reply) -> Reply:
        if request.kind == "deliver" and len(site.asked) == 3:
            next(site.parts.folder.glob("in-*")).unlink()
            return Reply(values={"size": 0})
        return reply

    site = Site(tmp_path, lose)
    assert torch.equal(talk(site, tmp_path, 20).tensors["a"], 2 * TENSORS["a"])
    assert [getattr(request, "params", {}).get("start") for request in site.asked[:8]] == [
        0,
        20,
        40,
        0,
        20,
        40,
        60,
        None,
    ]


def at(stage: str, reply: Callable[[Reply], Reply]) -> Change:
    return lambda request, given: reply(given) if request.kind == stage else given


def size(value: Any) -> Change:
    return at("deliver", lambda given: Reply(values={"size": value}))


def other_bytes(reply: Reply) -> Reply:
    assert isinstance(reply, PartReply)
    return PartReply(chunk=np.zeros_like(reply.chunk))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("deliver", lambda given: Reply()), "does not say how much it has"),
        (size(69), "does not say how much it has"),
        (size(-1), "does not say how much it has"),
        (size(True), "does not say how much it has"),
        (size("20"), "does not say how much it has"),
        (size(0), "does not keep what is delivered"),
        (at("deliver", lambda given: Reply(values={"size": 1 + given.values["size"] // 20})), "does not keep what is"),
        (at("collect", lambda given: Reply()), "sends another part"),
        (at("collect", lambda given: PartReply(chunk=given.chunk[:-1])), "sends another part"),  # type: ignore[index]
        (at("collect", lambda given: PartReply(chunk=np.zeros(10**6, np.uint8))), "sends another part"),
        (at("collect", other_bytes), "sends other arrays than its reply says"),
    ],
)
def test_what_a_site_cannot_do(tmp_path: Path, change: Change, message: str) -> None:
    site = Site(tmp_path, change)
    with pytest.raises(ProtocolError, match=message):
        talk(site, tmp_path, 20)
    assert len(site.asked) <= 4 + 1 + 4 + BACK_MAX


def test_a_reply_has_no_more_than_can_come_of_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one site fills the coordinator's disk."""
    monkeypatch.setattr(parts_module, "BESIDE", 100)
    most = parts_module.TIMES * 68 + 100

    def large(size: int) -> Change:
        return at("pretrain", lambda given: Reply(tensors={"a": torch.zeros(size // 4)}))

    assert talk(Site(tmp_path / "A", large(most)), tmp_path, 50).tensors["a"].numel() == most // 4
    site = Site(tmp_path / "B", large(most + 4))
    with pytest.raises(ProtocolError, match="more than can come of what it was sent"):
        talk(site, tmp_path, 50)
    assert "collect" not in [request.kind for request in site.asked]


def test_tensors_without_a_value_travel_too(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(0, 3, dtype=torch.float64), "b": torch.arange(9.0)}
    reply = talk(Site(tmp_path), tmp_path, 10, replace(REQUEST, tensors=tensors))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in reply.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }


def test_sites_that_are_sent_the_same_have_it_in_memory_once() -> None:
    outgoing = Outgoing(TENSORS)
    assert outgoing.part(20, 20) is outgoing.part(20, 20)
    assert outgoing.part(40, 20) is not outgoing.part(20, 20)
