"""Weights that a site accepted last of a run, on its disk; see client/answer/provenance.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from chexfound.durable.files import remove_unfinished, replace_file, storage
from chexfound.errors import ConfigError
from chexfound.identity.roster import read_json

if TYPE_CHECKING:  # the command line stands on this module, and imports nothing heavy
    from torch import Tensor

    from chexfound.phases.site_state import Site
    from chexfound.recipe.schema import Recipe

FORMAT = 1


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Accepted:
    """The last weights that a site took of a run.

    Args:
        phase: that they came with.
        round: likewise.
        step: the global step that they are of.
        sent: digests of the student, its teacher, the optimizer's moments or the head.
        backbone: digest of what the run's features are of, once they are.
        derived: the same of that backbone as it is derived here, where it was.
        judged: digest of the head that the run's results are of, once there are some.
        run: Flower's number of the run that they came in, the latest.
        place: the site's number in the roster, as that run has it.
        asked: digest of what was asked of them.
        norms: how far the site's own steps led from them, by tensor; of all together under the empty name.
        warnings: where the model moved further than the site's own steps make likely, the latest.
    """

    phase: str
    round: int
    step: int
    sent: dict[str, str]
    backbone: str = ""
    derived: str = ""
    judged: str = ""
    run: int = 0
    place: int = 0
    asked: str = ""
    norms: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)


class Shelf:
    """Keep the weights that one site accepted last of one run."""

    def __init__(self, home: Path, run: str) -> None:
        self.home, self.folder = home, home / "weights" / run
        self.accepted = read(self.folder)

    @staticmethod
    def of(site: Site, recipe: Recipe) -> Shelf:
        """Give the shelf of a recipe's run."""
        from chexfound.phases import carried

        return Shelf(site.home, carried.state_folder(site, recipe, "").name)

    def tensors(self, accepted: Accepted) -> dict[str, Tensor]:
        """The weights themselves.

        Raises: CheckpointError if they are not there.
        """
        from chexfound.model import checkpoint

        return checkpoint.load(self._path(accepted))

    def put(self, accepted: Accepted, tensors: Mapping[str, Tensor] | None, *, begins: bool) -> None:
        """Keep this, and nothing older; of other runs nothing, where one begins."""
        from chexfound.model import checkpoint

        _private(self.folder)
        path = self._path(accepted)
        if tensors:
            checkpoint.save(path, tensors)
            os.chmod(path, 0o600)
        _write(self.folder / "accepted.json", asdict(accepted))
        with storage(self.folder):
            for old in self.folder.glob("*.safetensors"):
                if old != path:
                    old.unlink()
            if begins:
                for other in self.home.glob("weights/*/"):
                    if other != self.folder:
                        shutil.rmtree(other)
        remove_unfinished(self.folder)

    def _path(self, accepted: Accepted) -> Path:
        return self.folder / f"{accepted.phase}-{accepted.round:06d}.safetensors"


def read(folder: Path) -> Accepted | None:
    """Give what is in a run's folder; nothing where it is not there, or damaged: then it is lost."""
    with contextlib.suppress(ConfigError, ValidationError, OSError, TypeError):
        values = read_json(folder / "accepted.json")
        if isinstance(values, dict) and values.pop("format", None) == FORMAT:
            return Accepted(**values)
    return None


def warnings(home: Path) -> list[str]:
    """Give the present run's warnings."""
    found = [accepted for path in sorted(home.glob("weights/*/")) if (accepted := read(path)) is not None]
    return [text for accepted in found for text in accepted.warnings]


def _write(path: Path, values: dict[str, Any]) -> None:
    with replace_file(path, 0o600) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **values}, allow_nan=False))


def _private(folder: Path) -> None:
    with storage(folder):
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
