"""A site's own eye on its pretraining: the end of its curve is kept on its disk from round to round."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chexfound.durable.files import write_json
from chexfound.errors import ChexfoundError
from chexfound.pretrain.health.symptoms import Row, Symptom, judged_from, symptoms, tail
from chexfound.recipe.schema import ARCHS, Recipe

log = logging.getLogger("chexfound.site")
LARGEST = 2**40  # of a row's numbers


def new_symptoms(path: Path, recipe: Recipe, step: int, rows: Sequence[Row]) -> list[Symptom]:
    """Add a round's rows, from global step `step` on, to the curve in `path`; what ails it that did not before.

    A curve that is damaged begins anew; one that cannot be kept is not judged, for what was told of it before would
    be told in every round.  Either is said in the log once, and costs the site's own warnings and not the round: the
    coordinator judges from what it is sent.
    """
    curve, before = _read(path, rows[-1].get("log_k")) if step else ([], [])
    curve = tail([*(row for row in curve if row["step"] < step), *rows])
    found = symptoms(curve, dim=ARCHS[recipe.student.arch][0], judged_from=judged_from(recipe, step), before=before)
    try:
        write_json(path, {"rows": curve, "symptoms": [one.name for one in found]})
    except (ChexfoundError, ValueError) as error:
        _warn_once(f"{path}: the site's own watch over its pretraining is off: {error}")
        return []
    return [one for one in found if one.name not in before]


@functools.cache  # once in a process
def _warn_once(text: str) -> None:
    log.warning("event=warning what=%r", text)


def _read(path: Path, log_k: float | None) -> tuple[list[Row], list[str]]:
    """The rows and the symptoms that were kept; nothing where there are none that are sound."""
    try:
        kept = json.loads(path.read_text())
        if not _sound(kept, log_k):
            raise ValueError("it holds something else than rows of this run")
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(f"{path}: cannot be read, so the watch over this site's pretraining begins anew: {error}")
        return [], []
    return kept["rows"], kept["symptoms"]


def _sound(kept: Any, log_k: float | None) -> bool:
    return (
        isinstance(kept, dict)
        and isinstance(kept.get("rows"), list)
        and isinstance(kept.get("symptoms"), list)
        and all(isinstance(name, str) for name in kept["symptoms"])
        and all(
            isinstance(row, dict)
            and "step" in row
            and row.get("log_k") == log_k
            and all(isinstance(value, int | float) and abs(value) < LARGEST for value in row.values())  # no NaN either
            for row in kept["rows"]
        )
    )
