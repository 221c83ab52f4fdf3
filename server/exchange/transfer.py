"""Transfer with one site, message by message, where its arrays come apart (chexfound/contract/detached.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from chexfound.contract.detached import ByteView, Detached, Envelope
from chexfound.contract.request import PartReply, PartRequest, Reply, Request
from chexfound.durable.files import storage
from chexfound.errors import ProtocolError
from chexfound.parsing import values
from chexfound.wire import arrays as wire_arrays

TIMES, BESIDE = 2, 2**28  # of a request's bytes, and beside them, that a reply has at most: rings are twice as wide
Sent = Envelope[Request]
Came = Envelope[Reply]
Talk = Generator[Sent, Came, Reply]  # all messages to a site that one request takes
BACK_MAX = 8  # times that a site may have lost what it had of a delivery


class Outgoing:
    """Tensors on their way to one site or to several."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        arrays, table = wire_arrays.lay(tensors)
        self._laid = ByteView(arrays)
        self.size = self._laid.size
        self._table, self._arrays = table, self._laid.arrays
        self._apart: Detached | None = None
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def apart(self) -> Detached:
        """Give what a request says of them."""
        if self._apart is None:
            self._apart = Detached(sha256=self._laid.sha256(), arrays=self._arrays, table=self._table)
        return self._apart

    def part(self, start: int, size: int) -> np.ndarray:
        """Bytes from there on; sites are at the same part mostly, and it is there once."""
        if self._last is None or self._last[0] != start:
            self._last = start, self._laid.read(start, size)
        return self._last[1]


@dataclass(frozen=True, kw_only=True)
class Download:
    """Put a site's reply together.

    Args:
        path: its file.
        part_bytes: of a message at most.
    """

    path: Path
    part_bytes: int

    def ask(self, request: Request, outgoing: Outgoing) -> Talk:
        """All messages to a site that one request takes; gives the reply, with its arrays where they lie on the disk.

        Args:
            request: as the run has it.
            outgoing: its tensors.

        Raises: ProtocolError if what the site sends is not what it said; StorageError.
        """
        whole = Envelope(message=request, part_bytes=self.part_bytes)
        if outgoing.size > self.part_bytes:
            yield from self._deliver(request, outgoing)
            whole = replace(whole, message=replace(request, tensors={}), detached=outgoing.apart)
        reply = yield whole
        if reply.detached is None:
            return reply.message
        if reply.detached.size > TIMES * outgoing.size + BESIDE:
            raise ProtocolError("replies with more than can come of what it was sent")
        yield from self._collect(request, reply.detached)
        return wire_arrays.with_arrays(reply.message, reply.detached, self.path)

    def _deliver(self, request: Request, outgoing: Outgoing) -> Generator[Sent, Came, None]:
        here, back, params = 0, 0, {"sha256": outgoing.apart.sha256, "size": outgoing.size}
        while here < outgoing.size:
            chunk = outgoing.part(here, self.part_bytes)
            reply = yield _part(request, "deliver", params | {"start": here}, chunk)
            after, here = here + chunk.size, self._held(reply.message, outgoing.size)
            back += here not in (after, outgoing.size)
            if back > BACK_MAX:
                raise ProtocolError("does not keep what is delivered to it")

    @staticmethod
    def _held(reply: Reply, size: int) -> int:
        has = reply.values.get("size")
        if not isinstance(has, int) or not values.count(has) or has > size:
            raise ProtocolError("does not say how much it has of what is delivered to it")
        return has

    def _collect(self, request: Request, apart: Detached) -> Generator[Sent, Came, None]:
        sha256 = hashlib.sha256()
        params = {"sha256": apart.sha256}
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # never written over: what lies there may still be read
            self.path.touch(0o600)
        for start in range(0, apart.size, self.part_bytes):
            size = min(self.part_bytes, apart.size - start)
            reply = (yield _part(request, "collect", params | {"start": start, "size": size})).message
            if not isinstance(reply, PartReply) or reply.chunk.size != size:
                raise ProtocolError("sends another part of its reply than it was asked for")
            sha256.update(reply.chunk.data)
            with storage(self.path), open(self.path, "ab") as file:
                file.write(reply.chunk.data)
        if sha256.hexdigest() != apart.sha256:
            raise ProtocolError("sends other arrays than its reply says")

    def close(self) -> None:
        """Drop the reply's file; what is mapped of it stays until nobody holds it."""
        self.path.unlink(missing_ok=True)


def _part(request: Request, stage: str, params: dict[str, Any], chunk: np.ndarray | None = None) -> Sent:
    """A message about a part of the arrays of a request, or of its reply."""
    return Envelope(message=PartRequest(**request.place(), stage=stage, params=params, chunk=chunk))
