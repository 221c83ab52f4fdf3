"""A site's own eye on its pretraining: the end of its curve is kept on its disk from round to round."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chexfound.errors import StorageError
from chexfound.journal import write_json
from chexfound.pretrain.symptoms import Row, Symptom, judged_from, symptoms, tail
from chexfound.schema import ARCHS, Recipe


def new_symptoms(path: Path, recipe: Recipe, step: int, rows: Sequence[Row]) -> list[Symptom]:
    """Add a round's rows, from global step `step` on, to the curve in `path`; what ails it that did not before.

    A curve that cannot be read, or written, costs the warning and not the round.
    """
    kept = _read(path)
    curve = tail([*(row for row in kept["rows"] if row["step"] < step), *rows])
    found = symptoms(
        curve, dim=ARCHS[recipe.student.arch][0], judged_from=judged_from(recipe, step), before=kept["symptoms"]
    )
    with contextlib.suppress(StorageError):
        write_json(path, {"rows": curve, "symptoms": [one.name for one in found]})
    return [one for one in found if one.name not in kept["symptoms"]]


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        kept = json.loads(path.read_text())
        if _sound(kept):
            return dict(kept)
    return {"rows": [], "symptoms": []}


def _sound(kept: Any) -> bool:
    return (
        isinstance(kept, dict)
        and isinstance(kept.get("rows"), list)
        and isinstance(kept.get("symptoms"), list)
        and all(isinstance(name, str) for name in kept["symptoms"])
        and all(
            isinstance(row, dict) and "step" in row and all(isinstance(value, int | float) for value in row.values())
            for row in kept["rows"]
        )
    )
