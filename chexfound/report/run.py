"""What a run left in its folder, read for the report: each part, or the reason why it is absent.

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
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import yaml
from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked

from chexfound import cells
from chexfound import recipe as recipes
from chexfound.cells import Told
from chexfound.errors import ConfigError, DataError, Problems
from chexfound.names import ALL_SITES
from chexfound.pretrain import symptoms
from chexfound.schema import ARCHS

SCHEMA = 1
FEDERATED, CENTRALIZED, RANDOM = "federated", "centralized", "random"
FLOORS = ("shuffled", "site-view", "histogram")
LOCAL = "local:"  # an arm's name is this and the site's

_lenient = ConfigDict(extra="ignore", allow_inf_nan=False, coerce_numbers_to_str=True)
_T = TypeVar("_T")


def _interval(value: Any) -> Any:
    """An interval as a pair in ascending order; one without ends is none."""
    if value is None or (isinstance(value, list) and all(end is None for end in value)):
        return None
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(end, int | float) for end in value)
        and value[0] > value[1]
    ):
        raise ValueError("the interval's lower end is above its upper end")
    return value


Interval = Annotated[tuple[float, float] | None, BeforeValidator(_interval)]


@checked(frozen=True, kw_only=True, config=_lenient)
class Result:
    """How one arm did on one site's held-out patients for one finding."""

    arm: str
    tested_on: str
    finding: str
    n: int | None = None
    positives: int | None = None
    auroc: float | None = None
    auroc_ci: Interval = None
    auprc: float | None = None
    auprc_ci: Interval = None
    reason: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _suppressed(cls, values: Any) -> Any:
        """A row of too few patients: it has no figure, for that reason."""
        if not isinstance(values, dict) or values.get("n") != cells.SUPPRESSED:
            return values
        return values | dict.fromkeys(cells.FIGURES) | {"reason": cells.SUPPRESSED}


@checked(frozen=True, kw_only=True, config=_lenient)
class Difference:
    """The paired difference federated − centralized on one site's held-out patients."""

    finding: str
    tested_on: str
    value: float | None = Field(default=None, validation_alias="federated_minus_centralized")
    ci: Interval = None
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=_lenient)
class Comparison:
    """The paired difference between two arms on one site's held-out patients: the first less the second."""

    first: str
    second: str
    finding: str
    tested_on: str
    value: float | None = Field(default=None, validation_alias="difference")
    ci: Interval = None
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=_lenient)
class AcrossSeeds:
    """The paired difference between two arms, mean over seeds: federated − centralized, if they are not named."""

    finding: str
    tested_on: str
    first: str = FEDERATED
    second: str = CENTRALIZED
    seeds: list[int] = Field(default_factory=list)
    value: float | None = Field(
        default=None, validation_alias=AliasChoices("mean_federated_minus_centralized", "mean_difference")
    )
    ci: Interval = None
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=_lenient)
class Floor:
    """The bar at one site, as `benchmarks/hog_floor.py --run` leaves it: mean AUROC over the seeds."""

    finding: str
    tested_on: str
    seeds: list[int] = Field(default_factory=list)
    ours: float  # the centralized arm
    rival: float  # HOG and a logistic regression


@checked(frozen=True, kw_only=True, config=_lenient)
class NotTrained:
    """An arm that could not be trained, and why."""

    arm: str
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=_lenient)
class Replicate:
    """Another seed's run of the same comparison."""

    seed: int
    model_sha256: dict[str, str] = Field(default_factory=dict)


@checked(frozen=True, kw_only=True, config=_lenient)
class Summed:
    """How the federated arm was aggregated under masks: t of n sites open a sum, c of them may collude."""

    n: int
    c: int
    t: int
    ring: int = 32
    clipped: int = 0  # values beyond their range
    failed: int = 0  # attempts


@checked(frozen=True, kw_only=True, config=_lenient)
class Metrics:
    """metrics.json, schema 1."""

    results: list[Result]
    seed: int | None = None
    sites: list[str] = Field(default_factory=list)
    findings: list[str] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    across_seeds: list[AcrossSeeds] = Field(default_factory=list)
    comparisons_across_seeds: list[AcrossSeeds] = Field(default_factory=list)
    replicates: list[Replicate] = Field(default_factory=list)
    not_trained: list[NotTrained] = Field(default_factory=list)
    void: str | None = None
    floor: list[Floor] | None = None  # None: not checked
    secagg: Summed | None = None
    deployed: bool = False
    notes: list[str] = Field(default_factory=list)
    model_sha256: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = Field(default_factory=dict)
    rounds: Any = None
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    date: str | None = None


@checked(frozen=True, kw_only=True, config=_lenient)
class Counts:
    """Labels of one finding at one site, in images."""

    positives: Told = 0
    negatives: Told = 0
    unknown: int = 0


@checked(frozen=True, kw_only=True, config=_lenient)
class Site:
    """A site's row of sites.json; counts are of images unless they say patients, and of `cells` patients or more."""

    name: str
    images: Told | None = None
    patients: Told | None = None
    train: Told | None = None
    val: Told | None = None
    test: Told | None = None
    cells: int = 0
    withheld: bool = False
    refused: int | None = None
    epochs: dict[str, float | None] = Field(default_factory=dict)
    views: dict[str, int] = Field(default_factory=dict)
    findings: dict[str, Counts] = Field(default_factory=dict)


@checked(frozen=True, kw_only=True, config=_lenient)
class Point:
    """Losses and health at one global step; `log_k` is the DINO loss of a model that tells nothing apart."""

    step: int
    site: str | None = None
    loss: float | None = None
    dino: float | None = None
    ibot: float | None = None
    koleo: float | None = None
    log_k: float | None = None
    teacher_entropy: float | None = None
    prototype_perplexity: float | None = None
    prototype_usage: float | None = None
    feature_std: float | None = None
    probe_images: float | None = None
    rankme: float | None = None
    knn_auroc: float | None = None

    def row(self) -> dict[str, float]:
        """What was measured, as `chexfound.pretrain.symptoms` takes it."""
        return {name: value for name, value in vars(self).items() if name != "site" and value is not None}


@checked(frozen=True, kw_only=True, config=_lenient)
class History:
    """history.json: arm -> its points, per phase."""

    pretrain: dict[str, list[Point]] = Field(default_factory=dict)
    adapt: dict[str, list[Point]] = Field(default_factory=dict)


@checked(frozen=True, kw_only=True, config=_lenient)
class _Captions:
    findings: list[str]
    sites: list[str] = Field(default_factory=list)
    captions: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Attention:
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
class Run:
    """A run's folder, read."""

    out: Path
    metrics: Metrics
    recipe: dict[str, Any] | None = None
    recipe_text: str | None = None
    history: History | None = None
    sites: list[Site] | None = None
    samples: dict[str, np.ndarray] | None = None
    attention: Attention | None = None
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
        """As `paired`, the mean over the run's seeds; None if it has but one."""
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
        """Of the intervals."""
        value = self.setting("evaluate", "confidence")
        return float(value) if isinstance(value, int | float) else 0.95

    @property
    def width(self) -> int:
        """Of the backbone; 0 if nothing tells."""
        arch = self.setting("student", "arch")
        return ARCHS[arch][0] if isinstance(arch, str) and arch in ARCHS else 0

    def judged_from(self, step: int) -> int:
        """The first global step that counts for the health of pretraining at `step`, as the run itself judged."""
        try:
            return symptoms.judged_from(recipes.validate(self.recipe or {}, "recipe.yaml"), step)
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


def read(out: Path) -> Run:
    """Read a run's folder.

    Raises: DataError if metrics.json is missing, damaged or of another schema.
    """
    out = Path(out)
    metrics = _metrics(out / "metrics.json")
    absent: dict[str, str] = {}
    history = _optional(absent, "history", out / "history.json", lambda path: _checked(path, TypeAdapter(History)))
    sites = _optional(absent, "sites", out / "sites.json", lambda path: _checked(path, TypeAdapter(list[Site])))
    recipe = _optional(absent, "recipe", out / "recipe.yaml", _recipe)
    samples = _optional(absent, "samples", out / "artifacts" / "samples.npz", _samples)
    attention = _optional(absent, "attention", out / "artifacts" / "attention.npz", _attention)
    text, values = recipe or (None, None)
    metrics = replace(metrics, results=[_explained(row, sites or []) for row in metrics.results])
    return Run(out, metrics, values, text, history, sites, samples, attention, absent)


def _explained(row: Result, sites: list[Site]) -> Result:
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
    """What `reader` makes of a file, or None with the reason noted."""
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


def _attention(path: Path) -> Attention:
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
    return Attention(texts.findings, sites, captions, images, maps, scores, labels)
