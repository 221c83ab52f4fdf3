"""Options of a simulation."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chexfound.durable.files import write_json
from chexfound.errors import CheckpointError, ConfigError

ARMS = ("federated", "centralized", "local", "random", "shuffled", "site-view", "histogram")


_FORMS = "source, site, iid:N or dirichlet:N:ALPHA"
_EXAMPLES = {"source": "source", "site": "site", "iid": "iid:4", "dirichlet": "dirichlet:4:0.5"}


class PartitionRule(NamedTuple):
    """How patients are dealt: by a form of `--by`, and its numbers."""

    form: str
    shards: int = 0
    alpha: float = 0.0

    @staticmethod
    def parse(by: str) -> PartitionRule:
        """Read `source`, `site`, `iid:N` or `dirichlet:N:ALPHA`.

        Raises: ConfigError.
        """
        form, *numbers = by.split(":")
        if form in ("source", "site") and not numbers:
            return PartitionRule(form)
        if form == "iid" and len(numbers) == 1:
            return PartitionRule(form, _shards(by, numbers[0]))
        if form == "dirichlet" and len(numbers) == 2:
            return PartitionRule(form, _shards(by, numbers[0]), _alpha(by, numbers[1]))
        raise ConfigError(_unknown(by, form))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold what a simulation was asked for; kept in OUT/simulation.json, so that --resume needs no more."""

    data: str
    by: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    recipe: dict[str, Any]

    @staticmethod
    def read(out: Path) -> Options:
        """The options that a run was started with.

        Raises: ConfigError if `out` holds no run; CheckpointError if they are not what `start` writes.
        """
        path = out / "simulation.json"
        if not path.is_file():
            raise ConfigError(f"{out}: no simulation to resume here (no simulation.json); start one without --resume")
        with damage_told(path):
            values = load_json(path)
            options = Options(
                data=values["data"],
                by=values["by"],
                seeds=tuple(values["seeds"]),
                arms=tuple(values["arms"]),
                recipe=values["recipe"],
            )
            options.check()
        return options

    def check(self) -> None:
        """Raise what tells that a value is none that the command would have written."""
        if not all(isinstance(value, str) and value for value in (self.data, self.by, *self.arms)):
            raise TypeError("data, by and arms are text")
        if not isinstance(self.recipe, dict):
            raise TypeError("the recipe is a mapping")
        if not all(type(seed) is int and seed >= 0 for seed in self.seeds):
            raise TypeError("seeds are whole numbers")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("one seed at least, each once")
        if not self.arms or unknown_arms(self.arms):
            raise ValueError("one arm at least, all of them known")


def unknown_arms(arms: Sequence[str]) -> list[str]:
    """Those of `arms` that are none; whether there is the SITE of local:SITE is seen when the images are in."""
    return [arm for arm in arms if arm not in ARMS and not arm.startswith("local:")]


def start(options: Options, out: Path) -> None:
    """Claim the output folder for a new run.

    Raises: ConfigError if it is in use or cannot be, StorageError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "continue it with --resume, or choose" if (out / "simulation.json").exists() else "choose"
        raise ConfigError(f"{out}: the output folder is in use; {hint} another with --out")
    write_json(out / "simulation.json", asdict(options))


def abandon(out: Path) -> None:
    """Take away what a run left that could not even start, so that the corrected command may use the folder.

    A folder in which any arm has begun is left as it is.
    """
    if any(out.glob("work/*/*/journal.jsonl")):
        return
    for part in ("simulation.json", "simulation.jsonl"):
        (out / part).unlink(missing_ok=True)
    for part in ("store", "work"):
        shutil.rmtree(out / part, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        out.rmdir()


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Say of a file of this run that cannot be read as what was written that it is damaged.

    Raises: CheckpointError.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged, so the run cannot be resumed; start it anew in another folder"
        ) from error


def load_json(path: Path) -> Any:
    """A file that this simulation wrote."""
    return json.loads(path.read_text())


def _unknown(by: str, form: str) -> str:
    near = [form] if form in _EXAMPLES else difflib.get_close_matches(form, _EXAMPLES, n=1)
    hint = f"did you mean {_EXAMPLES[near[0]]!r}? " if near else ""
    return f"--by {by!r}: {hint}write {_FORMS}"


def _shards(by: str, text: str) -> int:
    try:
        n = int(text)
    except ValueError:
        raise ConfigError(f"--by {by!r}: {text!r} is not a number of sites") from None
    if n < 1:
        raise ConfigError(f"--by {by!r}: there must be at least 1 site (got {n!r})")
    return n


def _alpha(by: str, text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ConfigError(f"--by {by!r}: ALPHA must be a number above 0 (got {text!r})")
    return alpha
