"""The records of metrics.json, counts.json and history.json."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked

from chexfound.contract import cells
from chexfound.contract.cells import Told
from chexfound.evaluate.floors import VARIANTS

SCHEMA = 1
FEDERATED, CENTRALIZED, RANDOM = "federated", "centralized", "random"
HISTOGRAM = "histogram"  # the best of its variants, which are arms of their own
HISTOGRAMS = tuple(f"{HISTOGRAM}:{name}" for name in VARIANTS)
FLOORS = ("shuffled", "site-view", HISTOGRAM, *HISTOGRAMS)
LOCAL = "local:"  # an arm's name is this and the site's

lenient = ConfigDict(extra="ignore", allow_inf_nan=False, coerce_numbers_to_str=True)


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


Drawn = dict[str, dict[str, dict[str, int]]]  # arm -> phase -> site -> images that its steps were taken on
Interval = Annotated[tuple[float, float] | None, BeforeValidator(_interval)]


@checked(frozen=True, kw_only=True, config=lenient)
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
    variant: str | None = None  # of the grey-level floor: which one this is, or which was chosen
    validation_auroc: float | None = None  # of that variant, on the site's validation patients

    @model_validator(mode="before")
    @classmethod
    def _suppressed(cls, values: Any) -> Any:
        """A row of too few patients: it has no figure, for that reason."""
        if not isinstance(values, dict) or values.get("n") != cells.SUPPRESSED:
            return values
        return values | dict.fromkeys(cells.FIGURES) | {"reason": cells.SUPPRESSED}


@checked(frozen=True, kw_only=True, config=lenient)
class Difference:
    """The paired difference federated − centralized on one site's held-out patients."""

    finding: str
    tested_on: str
    value: float | None = Field(default=None, validation_alias="federated_minus_centralized")
    ci: Interval = None
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=lenient)
class Comparison:
    """The paired difference between two arms on one site's held-out patients: the first less the second."""

    first: str
    second: str
    finding: str
    tested_on: str
    value: float | None = Field(default=None, validation_alias="difference")
    ci: Interval = None
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=lenient)
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


@checked(frozen=True, kw_only=True, config=lenient)
class Floor:
    """The bar at one site, as `benchmarks/hog_floor.py --run` leaves it: mean AUROC over the seeds."""

    finding: str
    tested_on: str
    seeds: list[int] = Field(default_factory=list)
    ours: float  # the centralized arm
    rival: float  # HOG and a logistic regression


@checked(frozen=True, kw_only=True, config=lenient)
class NotTrained:
    """An arm that could not be trained, and why."""

    arm: str
    reason: str | None = None


@checked(frozen=True, kw_only=True, config=lenient)
class Replicate:
    """Another seed's run of the same comparison."""

    seed: int
    model_sha256: dict[str, str] = Field(default_factory=dict)
    drawn: Drawn = Field(default_factory=dict)


@checked(frozen=True, kw_only=True, config=lenient)
class SummedOver:
    """How the federated arm was aggregated under masks: t of n sites open a sum, c of them may collude."""

    n: int
    c: int
    t: int
    ring: int = 32
    clipped: int = 0  # values beyond their range
    failed: int = 0  # attempts


@checked(frozen=True, kw_only=True, config=lenient)
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
    secagg: SummedOver | None = None
    deployed: bool = False
    notes: list[str] = Field(default_factory=list)
    model_sha256: dict[str, str] = Field(default_factory=dict)
    drawn: Drawn = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = Field(default_factory=dict)
    rounds: Any = None
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    date: str | None = None


@checked(frozen=True, kw_only=True, config=lenient)
class Counts:
    """Labels of one finding at one site, in images."""

    positives: Told = 0
    negatives: Told = 0
    unknown: int = 0


@checked(frozen=True, kw_only=True, config=lenient)
class SiteRow:
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


@checked(frozen=True, kw_only=True, config=lenient)
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
        """Give what was measured, as `chexfound.pretrain.health.symptoms` takes it."""
        return {name: value for name, value in vars(self).items() if name != "site" and value is not None}


@checked(frozen=True, kw_only=True, config=lenient)
class History:
    """history.json: arm -> its points, per phase."""

    pretrain: dict[str, list[Point]] = Field(default_factory=dict)
    adapt: dict[str, list[Point]] = Field(default_factory=dict)
