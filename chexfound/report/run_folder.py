"""A run's folder, read for the report: each part, or the reason why it is absent.

Only `metrics.json` must be there and sound.  Anything else may be missing (a deployed run has the
federated arm alone and no artifacts) or damaged; `Run.absent` then says so in a sentence, and the
report goes on without it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from chexfound.contract import cells
from chexfound.errors import ConfigError, DataError, Problems
from chexfound.evaluate.results import (
    CENTRALIZED,
    FEDERATED,
    FLOORS,
    LOCAL,
    RANDOM,
    SCHEMA,
    AcrossSeeds,
    Comparison,
    Difference,
    History,
    Metrics,
    Result,
    SiteRow,
    lenient,
)
from chexfound.parsing.names import ALL_SITES
from chexfound.pretrain.health import symptoms
from chexfound.recipe import check
from chexfound.recipe.schema import ARCHS

_T = TypeVar("_T")


@checked(frozen=True, kw_only=True, config=lenient)
class _Captions:
    findings: list[str]
    sites: list[str] = Field(default_factory=list)
    captions: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class AttentionMaps:
    """GLoRI's attention on `n` real images.

    images (n, px, px) uint8; maps (n, F, h, w) float32, each summing to 1; scores (n, F);
    labels (n, F) int8 with −1 for unknown.
    """

    findings: list[str]
    sites: list[str]
    captions: list[str]
    images: np.ndarray
    maps: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ReportedRun:
    """A run's folder, read."""

    out: Path
    metrics: Metrics
    recipe: dict[str, Any] | None = None
    recipe_text: str | None = None
    history: History | None = None
    sites: list[SiteRow] | None = None
    samples: dict[str, np.ndarray] | None = None
    attention: AttentionMaps | None = None
    absent: dict[str, str] = field(default_factory=dict)  # part -> why it is not here

    @property
    def site_names(self) -> list[str]:
        """Sites in the run's order; ones that only a result names come last."""
        return list(dict.fromkeys([*self.metrics.sites, *(row.tested_on for row in self.metrics.results)]))

    @property
    def n_sites(self) -> int:
        """How many sites there are; all of them together are none."""
        return len([name for name in self.site_names if name != ALL_SITES])

    @property
    def together(self) -> bool:
        """Whether the results are of all sites together, and of none by itself."""
        return bool(self.metrics.results) and all(row.tested_on == ALL_SITES for row in self.metrics.results)

    @property
    def findings(self) -> list[str]:
        """Findings in the run's order; ones that only a result names come last."""
        return list(dict.fromkeys([*self.metrics.findings, *(row.finding for row in self.metrics.results)]))

    def result(self, arm: str, site: str, finding: str) -> Result | None:
        """The row of an arm, tested on a site, for a finding."""
        return self._index.get((arm, site, finding))

    @cached_property
    def _index(self) -> dict[tuple[str, str, str], Result]:
        return {(row.arm, row.tested_on, row.finding): row for row in self.metrics.results}

    def paired(self, against: str, site: str, finding: str) -> Difference | Comparison | None:
        """The row that compares federated with an arm, tested on a site, for a finding."""
        return self._paired.get((against, site, finding))

    def over_seeds(self, against: str, site: str, finding: str) -> AcrossSeeds | None:
        """Give the mean over the run's seeds of what `paired` gives of one; None if the run has but one."""
        rows = self.metrics.across_seeds + self.metrics.comparisons_across_seeds
        key = (FEDERATED, against, site, finding)
        return next((row for row in rows if (row.first, row.second, row.tested_on, row.finding) == key), None)

    @cached_property
    def _paired(self) -> dict[tuple[str, str, str], Difference | Comparison]:
        rows: dict[tuple[str, str, str], Difference | Comparison] = {
            (row.second, row.tested_on, row.finding): row for row in self.metrics.comparisons if row.first == FEDERATED
        }
        return rows | {(CENTRALIZED, row.tested_on, row.finding): row for row in self.metrics.differences}

    @property
    def arms(self) -> list[str]:
        """Arms that have rows: federated, centralized, the sites' own, random, the floors, others."""
        found = {row.arm for row in self.metrics.results}
        order = [FEDERATED, CENTRALIZED, *(LOCAL + site for site in self.site_names), RANDOM, *FLOORS]
        return [arm for arm in order if arm in found] + sorted(found - set(order))

    @property
    def trained(self) -> set[str]:
        """Arms that the run trained or tested, also where there are no results."""
        history = self.history or History()
        return {*self.arms, *self.metrics.model_sha256, *history.pretrain, *history.adapt}

    def setting(self, *keys: str) -> Any:
        """A value of the recipe, or None where the recipe or the key is absent."""
        value: Any = self.recipe
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def confidence(self) -> float:
        """Give the level of the intervals."""
        value = self.setting("evaluate", "confidence")
        return float(value) if isinstance(value, int | float) else 0.95

    @property
    def width(self) -> int:
        """Give the width of the backbone; 0 if nothing tells."""
        arch = self.setting("student", "arch")
        return ARCHS[arch][0] if isinstance(arch, str) and arch in ARCHS else 0

    def judged_from(self, step: int) -> int:
        """The first global step that counts for the health of pretraining at `step`, as the run itself judged."""
        try:
            return symptoms.judged_from(check.validate(self.recipe or {}, "recipe.yaml"), step)
        except ConfigError:
            return symptoms.GRACE

    @property
    def pretrain_steps(self) -> int | None:
        """Global steps of self-supervised pretraining; None if nothing tells."""
        phases = self.setting("phases")
        rounds, local_steps = self.setting("train", "rounds"), self.setting("train", "local_steps")
        if isinstance(phases, list) and "pretrain" not in phases:
            return 0
        if isinstance(rounds, int) and isinstance(local_steps, int):
            stages = self.setting("curriculum")
            later = (
                [stage.get("rounds") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
            )
            return (rounds + sum(number for number in later if isinstance(number, int))) * local_steps
        points = (self.history.pretrain if self.history else {}).get(FEDERATED, [])
        return max((point.step for point in points), default=-1) + 1 or None


def read(out: Path) -> ReportedRun:
    """Read a run's folder.

    Raises: DataError if metrics.json is missing, damaged or of another schema.
    """
    out = Path(out)
    metrics = _metrics(out / "metrics.json")
    absent: dict[str, str] = {}
    history = _optional(absent, "history", out / "history.json", lambda path: _checked(path, TypeAdapter(History)))
    sites = _optional(absent, "sites", out / "sites.json", lambda path: _checked(path, TypeAdapter(list[SiteRow])))
    recipe = _optional(absent, "recipe", out / "recipe.yaml", _recipe)
    samples = _optional(absent, "samples", out / "artifacts" / "samples.npz", _samples)
    attention = _optional(absent, "attention", out / "artifacts" / "attention.npz", _attention)
    text, values = recipe or (None, None)
    metrics = replace(metrics, results=[_explained(row, sites or []) for row in metrics.results])
    return ReportedRun(out, metrics, values, text, history, sites, samples, attention, absent)


def _explained(row: Result, sites: list[SiteRow]) -> Result:
    """A row that is suppressed, with how many patients its site has set as the fewest."""
    if row.reason != cells.SUPPRESSED:
        return row
    least = next((site.cells for site in sites if site.name == row.tested_on), None)
    return replace(row, reason=cells.shown(cells.SUPPRESSED, least))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a figure that JSON has")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)


def _explain(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(str(part) for part in entry['loc']) or 'the file'}: {entry['msg']} (got {entry['input']!r:.80})"
        for entry in error.errors()
    ]


def _metrics(path: Path) -> Metrics:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; a report is made from a finished run's folder, "
            "so check the folder or let the run end"
        )
    try:
        values = _json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; run the evaluation again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: must hold a JSON object, not {type(values).__name__}; run the evaluation again")
    if values.get("schema") != SCHEMA:
        raise DataError(
            f"{path}: schema {values.get('schema')!r} is unknown (this version reads {SCHEMA}); "
            "make the report with the version that made the run"
        )
    problems = Problems(DataError, str(path))
    try:
        return TypeAdapter(Metrics).validate_python(values)
    except ValidationError as error:
        for text in _explain(error)[:20]:
            problems.add(text)
        problems.check()
        raise


def _optional(absent: dict[str, str], part: str, path: Path, reader: Callable[[Path], _T]) -> _T | None:
    """Give what `reader` makes of a file, or None with the reason noted."""
    where = path.relative_to(path.parents[1]) if path.parent.name == "artifacts" else path.name
    if not path.is_file():
        absent[part] = f"The run left no {where}."
        return None
    try:
        return reader(path)
    except ValidationError as error:
        absent[part] = f"{where} is damaged: {_explain(error)[0]}."
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RecursionError,
        zipfile.BadZipFile,
        yaml.YAMLError,
    ) as error:
        absent[part] = f"{where} cannot be read: {error}."
    return None


def _checked(path: Path, adapter: TypeAdapter[_T]) -> _T:
    return adapter.validate_python(_json(path))


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a mapping of keys")
    return text, values


def _samples(path: Path) -> dict[str, np.ndarray]:
    with (
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):  # numpy leaves a file that it cannot read open
        found = {name: arrays[name] for name in arrays.files}
    names = path.with_suffix(".json")  # array -> site; without it, an array's name is the site's
    if names.is_file():
        sites = _checked(names, TypeAdapter(dict[str, str]))
        found = {sites.get(name, name): images for name, images in found.items()}
    for name, images in found.items():
        if images.ndim != 3 or images.dtype != np.uint8:
            raise ValueError(f"the images of {name!r} must be (k, px, px) uint8, not {images.shape} {images.dtype}")
    found = {name: images for name, images in found.items() if images.size}
    if not found:
        raise ValueError("it holds no image")
    return found


def _attention(path: Path) -> AttentionMaps:
    texts = _checked(path.with_suffix(".json"), TypeAdapter(_Captions))
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, maps, scores, labels = (arrays[name] for name in ("images", "maps", "scores", "labels"))
    n, wanted = len(images), (len(images), len(texts.findings))
    if images.ndim != 3 or images.dtype != np.uint8 or not images.size or not maps.size:
        raise ValueError(f"images must be (n, px, px) uint8 with at least one, not {images.shape} {images.dtype}")
    if maps.ndim != 4 or maps.shape[:2] != wanted or scores.shape != wanted or labels.shape != wanted:
        raise ValueError(
            f"maps {maps.shape}, scores {scores.shape} and labels {labels.shape} "
            f"do not fit {n} images and {wanted[1]} findings"
        )
    if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
        raise ValueError("maps or scores are not finite")
    sites = [*texts.sites, *[""] * n][:n]
    captions = [*texts.captions, *[""] * n][:n]
    return AttentionMaps(texts.findings, sites, captions, images, maps, scores, labels)
