"""What is delivered to a site in parts and collected from it, on its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.contract.detached import ByteView, Detached
from chexfound.contract.request import PartReply, PartRequest
from chexfound.errors import ProtocolError, StorageError
from client.answer import delivery as parts_module
from client.answer.delivery import Parts

BYTES = np.arange(10, dtype=np.uint8)
LAID = ByteView({"uint8": [BYTES]})
APART = Detached(sha256=LAID.sha256(), arrays=LAID.arrays, table=())


@pytest.fixture
def here(tmp_path: Path) -> Parts:
    return Parts(tmp_path, 7)


def deliver(here: Parts, begin: int, end: int, **told: Any) -> int:
    told = {"sha256": APART.sha256, "size": APART.size, "start": begin} | told
    reply = here.answer(PartRequest(phase="pretrain", stage="deliver", params=told, chunk=BYTES[begin:end]))
    return int(reply.values["size"])


def collect(here: Parts, start: int, size: int, **told: Any) -> list[int]:
    told = {"sha256": APART.sha256, "size": size, "start": start} | told
    reply = here.answer(PartRequest(phase="pretrain", stage="collect", params=told))
    assert isinstance(reply, PartReply)
    return list(reply.chunk)


def names(here: Parts) -> list[str]:
    return sorted(path.name for path in here.folder.iterdir())


def test_what_was_delivered_is_here(here: Parts) -> None:
    assert [deliver(here, 0, 4), deliver(here, 4, 8), deliver(here, 8, 10)] == [4, 8, 10]
    path = here.received(APART)
    assert path.read_bytes() == BYTES.tobytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert here.folder.stat().st_mode & 0o777 == 0o700


def test_a_part_that_comes_again_changes_nothing(here: Parts) -> None:
    assert [deliver(here, 0, 4), deliver(here, 0, 4), deliver(here, 2, 3), deliver(here, 2, 10)] == [4, 4, 4, 10]
    assert here.received(APART).read_bytes() == BYTES.tobytes()


def test_a_site_that_lost_what_it_had_says_so(here: Parts) -> None:
    deliver(here, 0, 4)
    shutil.rmtree(here.folder)
    assert deliver(here, 4, 8) == 0
    assert [deliver(here, 0, 4), deliver(here, 4, 10)] == [4, 10]
    assert here.received(APART)


def test_another_delivery_takes_the_place_of_the_one_before(here: Parts) -> None:
    deliver(here, 0, 10)
    other = "1" * 64
    deliver(here, 0, 4, sha256=other)
    assert names(here) == [f"in-{other}"]
    with pytest.raises(ProtocolError, match="were not delivered"):
        here.received(APART)


@pytest.mark.parametrize("spoilt", [b"", bytes(9), bytes(10), BYTES.tobytes() + b"\0"])
def test_what_is_not_what_the_request_says_is_dropped(here: Parts, spoilt: bytes) -> None:
    """A power cut may leave a file with its length and without its bytes; the next delivery begins anew."""
    deliver(here, 0, 10)
    path = here.received(APART)
    path.write_bytes(spoilt)
    with pytest.raises(ProtocolError, match="damaged on this site's disk"):
        here.received(APART)
    assert deliver(here, 0, 10) == 10
    assert here.received(APART) == path


@pytest.mark.parametrize(
    "told",
    [
        {"start": 10},
        {"start": -1},
        {"start": True},
        {"size": 3},
        {"size": 2**41},
        {"sha256": "../../../../etc/x"},
        {"sha256": "A" * 64},
        {"more": 1},
    ],
)
def test_a_part_that_cannot_be(here: Parts, told: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        deliver(here, 0, 4, **told)
    with pytest.raises(ProtocolError):
        here.answer(
            PartRequest(phase="pretrain", stage="deliver", params={"sha256": APART.sha256, "size": 4, "start": 0})
        )
    assert not here.folder.exists()


def test_a_disk_that_is_too_small_is_left_alone(here: Parts) -> None:
    with pytest.raises(StorageError, match=r"parts/7 has \d+\.\d+ GB free, and needs 1100\.512: 1099511\.6 MB"):
        deliver(here, 0, 4, size=2**40)
    assert names(here) == []


def test_what_is_told_of_a_delivery_does_not_change(here: Parts) -> None:
    deliver(here, 0, 4, size=4)
    with pytest.raises(StorageError):
        deliver(here, 4, 8, size=2**40)
    deliver(here, 4, 8, size=8)
    with pytest.raises(ProtocolError, match="smaller than what is here"):
        deliver(here, 0, 4, size=4)
    assert (here.folder / f"in-{APART.sha256}").stat().st_size == 8


def test_few_runs_have_parts_at_a_time(here: Parts, tmp_path: Path) -> None:
    for run in range(20, 20 + 2 * parts_module.RUNS_MAX):
        deliver(Parts(tmp_path, run), 0, 4)
    (tmp_path / "parts" / "stray").touch()
    os.utime(tmp_path / "parts" / "stray", (0, 0))
    deliver(here, 0, 4)
    left = sorted(path.name for path in (tmp_path / "parts").iterdir() if path.is_dir())
    assert len(left) == parts_module.RUNS_MAX
    assert "7" in left


def test_what_is_kept_is_collected(here: Parts) -> None:
    assert here.keep(LAID) == APART.sha256
    assert here.keep(LAID) == APART.sha256  # the same once more: after a crash, say
    assert collect(here, 0, 4) + collect(here, 4, 6) == list(BYTES)
    assert (here.folder / f"out-{APART.sha256}").stat().st_mode & 0o777 == 0o600
    other = here.keep(ByteView({"uint8": [BYTES[:1]]}))
    assert names(here) == [f"out-{other}"]


@pytest.mark.parametrize(
    ("start", "size", "sha256"), [(8, 3, ""), (10, 1, ""), (2**40, 1, ""), (0, 0, ""), (0, 1, "1" * 64)]
)
def test_what_is_not_there_is_not_collected(here: Parts, start: int, size: int, sha256: str) -> None:
    here.keep(LAID)
    with pytest.raises(ProtocolError, match="asked for a part"):
        collect(here, start, size, sha256=sha256 or APART.sha256)


def test_runs_do_not_disturb_each_other_and_go_when_they_are_old(here: Parts, tmp_path: Path) -> None:
    here.keep(LAID)
    another = Parts(tmp_path, 8)
    deliver(another, 0, 4)
    assert collect(here, 0, 1) == [0]
    os.utime(here.folder, (0, 0))
    deliver(another, 4, 8)
    assert [path.name for path in here.folder.parent.iterdir()] == ["8"]
    assert parts_module.KEPT_S > 86400


def test_a_reply_half_kept_goes_with_the_next(here: Parts) -> None:
    here.folder.mkdir(parents=True)
    (here.folder / ".out-x.1.tmp").touch()
    here.keep(LAID)
    assert names(here) == [f"out-{APART.sha256}"]


def test_what_nobody_has_asked_for_in_a_week_goes_without_another_run(here: Parts, tmp_path: Path) -> None:
    here.keep(LAID)
    parts_module.sweep(tmp_path)
    assert collect(here, 0, 1) == [0]
    os.utime(here.folder, (0, 0))
    parts_module.sweep(tmp_path)
    assert not here.folder.exists()
    parts_module.sweep(tmp_path / "nowhere")
