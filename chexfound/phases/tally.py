"""How many images the steps of a simulated site were taken on, counted by its trainers and kept on its disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chexfound.contract.request import Request
from chexfound.durable.files import write_json
from chexfound.phases.site_state import Site
from chexfound.pretrain.health.measures import DRAWN

FILE = "tally.json"  # phase -> first global step of a round -> images


def add(site: Site, request: Request, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a round's images, by the rows of its steps; a round that is asked for again is counted once.

    Raises: StorageError.
    """
    if not site.tally:
        return
    path = site.home / FILE
    rounds = _read(path) if path.exists() else {}
    before = {step: images for step, images in rounds.get(request.phase, {}).items() if int(step) < request.step}
    now = {str(request.step): sum(row[DRAWN] for row in rows)}
    write_json(path, rounds | {request.phase: before | now})


def total(home: Path) -> dict[str, int]:
    """Sum up the images of each phase that the site at `home` took steps on; none of a phase that it had no part in."""
    path = home / FILE
    return {phase: sum(rounds.values()) for phase, rounds in _read(path).items()} if path.exists() else {}


def _read(path: Path) -> dict[str, dict[str, int]]:
    rounds: dict[str, dict[str, int]] = json.loads(path.read_text())
    return rounds
