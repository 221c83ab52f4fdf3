"""All that passes between sites and coordinator, kept as it passes; and a search that knows how names are disguised."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import Iterable, Iterator

import numpy as np

HASHES = ("md5", "sha1", "sha256")
PREFIX = 16  # hex digits, or bytes, of a hash by which a number is recognised: the pseudonym of before had as many
LEAST = 8  # letters of a canary: fewer turn up by chance


class Recorder:
    """Passes the bytes of a TCP port on to another, both ways, and keeps them by connection and direction."""

    def __init__(self, port: int) -> None:
        self._to, self._server = port, socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._streams: list[bytearray] = []
        self._pumps: list[threading.Thread] = []
        self._door = threading.Thread(target=self._accept, daemon=True)
        self._door.start()

    @property
    def streams(self) -> list[bytes]:
        return [bytes(stream) for stream in self._streams]

    def stop(self) -> None:
        """Once both ends have closed what they had open."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in (self._door, *self._pumps):
            thread.join(30)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._pass_on(self._server.accept()[0])

    def _pass_on(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            kept = bytearray()
            self._streams.append(kept)
            self._pumps.append(threading.Thread(target=self._pump, args=(one, other, kept), daemon=True))
            self._pumps[-1].start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket, kept: bytearray) -> None:
        with one, contextlib.suppress(OSError):  # each closes the one that it reads
            while read := one.recv(1 << 16):
                kept += read
                other.sendall(read)
            other.shutdown(socket.SHUT_WR)


def disguises(canary: str) -> Iterator[tuple[str, bytes]]:
    """Each way of writing a canary, with the bytes that it then is."""
    for text in dict.fromkeys((canary, canary.upper(), canary.lower())):
        plain = text.encode()
        yield "plain", plain
        yield "hex", plain.hex().encode()
        yield "HEX", plain.hex().upper().encode()
        for at in range(3):  # where it stands in what was encoded: the letters that hold bits of its neighbours are cut
            encoded = base64.b64encode(b"\0" * at + plain).rstrip(b"=")
            bits = 8 * (at + len(plain))
            yield f"base64, {at}", encoded[-(-8 * at // 6) : bits // 6]
        for name in HASHES:
            digest = hashlib.new(name, plain).digest()
            yield name, digest.hex()[:PREFIX].encode()
            yield f"{name} in base64", base64.b64encode(digest)[:PREFIX]
            yield f"{name} as bytes", digest


class Search:
    """Finds canaries, in whatever disguise."""

    def __init__(self, canaries: Iterable[str]) -> None:
        self.letters: list[tuple[str, str, bytes]] = []
        self.digests: dict[bytes, tuple[str, str]] = {}
        for canary in canaries:
            assert len(canary) >= LEAST
            for how, form in disguises(canary):
                if how.endswith("as bytes"):
                    self.digests[form[:PREFIX]] = canary, how
                else:
                    self.letters.append((canary, how, form))
        self.begin = np.zeros((256, 256), bool)
        for digest in self.digests:
            self.begin[digest[0], digest[1]] = True

    def __call__(self, data: bytes) -> set[tuple[str, str]]:
        """The canaries that are there, each with how it was written.

        Letters are looked for among letters only: weights are megabytes, and eight letters in a row are rare there.
        """
        lines = b"\n".join(re.findall(rb"[\x20-\x7e]{%d,}" % LEAST, data))
        found = {(canary, how) for canary, how, form in self.letters if form in lines}
        whole = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(self.begin[whole[:-1], whole[1:]]).tolist()
        return found | {self.digests[part] for at in places if (part := data[at : at + PREFIX]) in self.digests}
