"""HOME/site.yaml: what a site's operator demands, whatever the coordinator asks."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from chexfound.contract.limits import STRICT, Amount, Count, Limits, Model, Phases, Positive, Tensors
from chexfound.durable.files import canonical
from chexfound.errors import ConfigError
from chexfound.parsing import strict_yaml
from chexfound.secagg.parameters import MINIMUM, Parameters

SIZE_MAX = 2**20
PLAIN = "plain: accepted"  # the line by which a site takes runs in the clear, where three sites or more could mask
REQUIRED = "secagg: {required: true}"  # by which it refuses them whatever `plain` says, and however few sites there are
_strict = dataclass(frozen=True, kw_only=True, config=STRICT)


@_strict
class SecAggPolicy:
    """Hold what the policy says of secure aggregation."""

    # Refuse runs in the clear; none: where the roster has three sites or more.  False says what `plain: accepted` does.
    required: bool | None = None
    colluders: Annotated[int, Field(ge=0)] | None = None  # sites that may collude with the coordinator; none: a quarter
    minimum: Annotated[int, Field(ge=MINIMUM)] = MINIMUM  # sites that a sum must be over
    attempt_s: Annotated[float, Field(gt=0)] = 86_400.0  # after which an attempt's secrets are dropped


@_strict
class Cells:
    """Bound what is told of few patients: nothing."""

    patients: Count = 10  # below which a count, a figure or a row is `suppressed`


@_strict
class WeightsPolicy:
    """Bound how far the coordinator's weights move beyond this site's own steps before it warns, or refuses."""

    max_change: Amount = 1.1  # of a round, over this site's own
    max_tensor_change: Amount = 3.0  # likewise, in one tensor
    refuse_change: bool = False  # refuse what is beyond, instead of warning in `status`


@_strict
class Machine:
    """Hold what a run may take of the machine; none: no more than it has."""

    hours: Amount | None = None  # of work on one run
    disk_gb: Amount | None = None
    memory_gb: Amount | None = None


@_strict
class Fractions:
    """Split the site's patients: these shares, and the rest for the test.  A recipe has no say in it."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.6
    val: Annotated[float, Field(ge=0, lt=1)] = 0.15

    def __post_init__(self) -> None:
        if self.train + self.val >= 1:
            raise ValueError("train + val must leave patients for the test (their sum must be below 1)")


@_strict
class Policy:
    """All of site.yaml.  A coordinator may ask for less than it grants, never for more."""

    phases: Phases = ("pretrain", "adapt", "evaluate")
    tensors: Tensors = ("student", "teacher", "head", "optimizer")  # that leave; under masks too
    model: Model = Model()
    min_patients: Count = 20  # with a training image, in each phase
    min_images: Count = 20  # for training
    min_batch: Positive = 4  # images a step: of one image, the gradient is that image's
    max_batch: Positive = 4096  # images a step
    min_steps: Positive = 2  # of a round
    max_steps: Positive = 10_000  # of a round
    max_rounds: Positive = 10_000  # of a phase
    max_runs: Positive = 5  # begun in 30 days
    min_bootstrap: Positive = (
        200  # draws of an interval: of few, each is the figure of a few patients of a known choice
    )
    max_missed_rounds: Count = 3  # that may pass without this site
    machine: Machine = Machine()
    cells: Cells = Cells()
    split: Fractions = Fractions()
    findings: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()  # beside the released vocabulary
    weights: WeightsPolicy = WeightsPolicy()
    secagg: SecAggPolicy = SecAggPolicy()
    plain: Literal["accepted"] | None = None  # runs in the clear, where the roster has three sites or more

    @staticmethod
    def load(home: Path) -> Policy:
        """The policy of a site's home; the defaults where it has no file.

        Raises: ConfigError.
        """
        path = home / "site.yaml"
        try:
            with open(path, "rb") as file:
                text = file.read(SIZE_MAX + 1)
        except FileNotFoundError:
            return Policy()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        try:
            if len(text) > SIZE_MAX:
                raise ValueError(f"larger than {SIZE_MAX} bytes")
            values: Any = strict_yaml.load(text.decode())
            # As JSON: strict, and yet a mapping is a section.
            return TypeAdapter(Policy).validate_json(canonical({} if values is None else values))
        except ValidationError as error:
            raise ConfigError(f"{path}: {'; '.join(map(_explain, error.errors()[:3]))}") from error
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{path}: not a site's policy: {error}; a line that begins with blanks stands under a section: where "
                "the '#' is taken from one, it has to be taken from its section too"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a site's policy: {error}") from error

    def limits(self, n: int) -> Limits:
        """Give what a coordinator is told of it, in a federation of n sites."""
        shared = {field.name: getattr(self, field.name) for field in fields(Limits) if field.name != "masked"}
        return Limits(**shared, masked=self.masked(n))

    def masked(self, n: int) -> bool:
        """Whether a run in the clear is refused, in a federation of n sites."""
        if self.secagg.required is not None:
            return self.secagg.required
        return n >= MINIMUM and self.plain != "accepted"

    def parameters(self, n: int) -> Parameters:
        """Give the parameters of secure aggregation in a federation of n sites.

        Raises: ConfigError if they do not protect.
        """
        try:
            return Parameters.of(n, self.secagg.colluders, self.secagg.minimum)
        except ConfigError as error:
            raise ConfigError(f"site.yaml: {error}" if self.secagg != SecAggPolicy() else str(error)) from error


def clear(refused: bool, *, by_word: bool) -> str:
    """Say what happens to runs in the clear, and give the line that says so, or that changes it.

    Args:
        refused: whether they are.
        by_word: site.yaml has `secagg.required`, which wins over `plain`.
    """
    if refused:
        line = f"site.yaml says {REQUIRED}" if by_word else f"{PLAIN} in site.yaml takes them"
        return f"runs in the clear are refused ({line})"
    return "runs in the clear are accepted"


def _explain(entry: Any) -> str:
    """Say what is wrong at one place of the file, with the field that was meant."""
    path = [str(part) for part in entry["loc"]]
    if entry["type"] != "unexpected_keyword_argument":
        return f"{'.'.join(path) or 'all of it'}: {entry['msg']}"
    section: Any = Policy
    for part in path[:-1]:
        section = type(next(field.default for field in fields(section) if field.name == part))
    near = difflib.get_close_matches(path[-1], [field.name for field in fields(section)], n=1)
    hint = f"; did you mean {'.'.join([*path[:-1], *near])!r}?" if near else "; docs/site.md lists the fields"
    return f"unknown field {'.'.join(path)[:80]!r}{hint}"
