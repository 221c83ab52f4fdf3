"""Arrays that come to a site or leave it in parts, on its disk, by run.

    HOME/parts/RUN/in-SHA256    what the coordinator delivered last, or is delivering
    HOME/parts/RUN/out-SHA256   the arrays of the site's last reply, which the coordinator collects

Each stays until the next of its kind comes, so that what was lost on the way can be asked for again, whoever died.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from chexfound.contract import detached
from chexfound.contract.detached import ByteView, Detached
from chexfound.contract.request import PartReply, PartRequest, Reply
from chexfound.durable.files import replace_file, storage
from chexfound.errors import ProtocolError, StorageError
from chexfound.secagg import messages

KEPT_S = 7 * 86400.0  # seconds that a run's arrays stay which nobody asks for
RUNS_MAX = 4  # that have some
SPARE = 10**9  # bytes of the disk that no delivery takes
_Place = Annotated[int, Field(ge=0, le=detached.WHOLE_MAX)]


@dataclass(frozen=True, kw_only=True, config=messages.STRICT)
class _Piece:
    """Which bytes, of which arrays; `size`: of all that is delivered, or of the part that is collected."""

    sha256: messages.Digest
    start: _Place
    size: _Place


class Parts:
    """Those of one site in one run."""

    def __init__(self, home: Path, run_id: int | str) -> None:
        self.folder = home / "parts" / str(run_id)

    def answer(self, request: PartRequest) -> Reply:
        """Take a part that is delivered, and say how many bytes are here; or give one that is collected.

        Raises: ProtocolError; StorageError if the disk is full.
        """
        part = messages.parse(_Piece, request.params, "a part")
        if request.stage == "collect":
            return PartReply(chunk=self._give(part))
        if request.chunk is None or not 0 < request.chunk.size <= part.size - part.start:
            raise ProtocolError("a part without bytes, or beyond the arrays that it is of")
        return Reply(values={"size": self._take(part, request.chunk)})

    def _take(self, part: _Piece, chunk: np.ndarray) -> int:
        path = self._only("in", part.sha256)
        with storage(path):
            here = path.stat().st_size if path.exists() else 0
            if here > part.size:
                raise ProtocolError("a part of arrays that are smaller than what is here of them")
            if (free := shutil.disk_usage(path.parent).free) < (needed := part.size - here + SPARE):
                raise StorageError(
                    f"the disk of {path.parent} has {free / 1e9:.3f} GB free, and needs {needed / 1e9:.3f}: "
                    f"{(part.size - here) / 1e6:.1f} MB that the coordinator delivers, and {SPARE / 1e9:g} GB that "
                    "stays free beside them; free some space there, and have the coordinator resume the run"
                )
            path.touch(0o600)
            if part.start <= here < part.start + chunk.size:
                with open(path, "rb+") as file:
                    file.seek(part.start)
                    file.write(chunk.data)
                here = part.start + chunk.size
        return here

    def received(self, apart: Detached) -> Path:
        """Give the file of what was delivered for a request, all of it.

        Raises: ProtocolError if it is not here, or not what the request says.
        """
        path = self.folder / f"in-{apart.sha256}"
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == apart.sha256 and file.tell() == apart.size:
                return path
            path.unlink()
        raise ProtocolError("the arrays of the request were not delivered, or are damaged on this site's disk")

    def keep(self, laid: ByteView) -> str:
        """Put the arrays of a reply where they are collected from, durably.

        Returns: their SHA-256.
        """
        sha256 = laid.sha256()
        path = self._only("out", sha256)
        with replace_file(path, 0o600) as temporary, open(temporary, "wb") as file:
            for piece in laid:
                file.write(piece)
        return sha256

    def forget(self) -> None:
        """Give no more of what was kept."""
        with storage(self.folder):
            for path in self.folder.glob("*out-*"):  # one half-written too
                path.unlink(missing_ok=True)

    def _give(self, part: _Piece) -> np.ndarray:
        path = self.folder / f"out-{part.sha256}"
        try:
            chunk = np.fromfile(path, np.uint8, min(part.size, detached.PART_MAX), offset=part.start)
        except OSError as error:
            raise ProtocolError("asked for a part of a reply whose arrays are not here") from error
        if chunk.size != part.size or not chunk.size:
            raise ProtocolError("asked for a part beyond the arrays of a reply")
        return chunk

    def _only(self, kind: str, sha256: str) -> Path:
        """The one file of its kind, once the others are gone, and those of runs that are over."""
        path = self.folder / f"{kind}-{sha256}"
        with storage(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for other in self.folder.glob(f"*{kind}-*"):  # one half-written too
                if other != path:
                    other.unlink()
        sweep(self.folder.parent.parent, beside=self.folder)
        return path


def sweep(home: Path, beside: Path | None = None) -> None:
    """Drop the parts of runs that nobody has asked for in a week, and of more runs than may have some.

    Raises: StorageError.
    """
    old = time.time() - KEPT_S
    with storage(home / "parts"):
        runs = [run for run in home.glob("parts/*") if run.is_dir() and run != beside]
        runs.sort(key=lambda run: run.stat().st_mtime, reverse=True)
        for place, run in enumerate(runs, start=1 if beside else 0):
            if place >= RUNS_MAX or run.stat().st_mtime < old:
                shutil.rmtree(run, ignore_errors=True)
