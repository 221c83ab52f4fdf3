"""A phase's numbers under masks: from a site's reply to named arrays, and from the sums to a round's figures.

Site and coordinator make the same layout from the recipe, the request and the settings that the coordinator tells;
the context binds it.  Figures that plain aggregation sends by site (counts, losses, results) exist here as sums only.

    counts     images by split, patients, and positives and negatives by finding
    pretrain   how far the steps led from what was sent, weighted by images; losses of each step; of the optimizer's
               moments, where they are averaged, what `moments` says
    adapt      as pretrain; a finding's rows are weighted by its labelled images
    evaluate   held-out images by finding, label and bin of the score
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from chexfound.contract.request import COUNTS, Reply, Request
from chexfound.durable.files import canonical, storage
from chexfound.errors import ProtocolError
from chexfound.evaluate.histograms import BINS
from chexfound.model.glori import build_head
from chexfound.pretrain.health.measures import PROBED, STEP_FIGURES
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.secagg import fixed, moments
from chexfound.secagg.fixed import Layout, Section

PHASES = ("counts", "pretrain", "adapt", "evaluate")
FIGURES = {  # of a history's rows, that are averaged over the sites
    "pretrain": ("loss", "dino", "ibot", "koleo", *STEP_FIGURES, *PROBED),
    "adapt": ("loss",),
}
FIGURE_RANGE = 1024.0  # losses and figures are far below; beyond it they are clipped, and counted as such
WEIGHT_MAX = 2**32  # above the sum of all sites' weights
NAME_MAX = 200
# Of a recipe: what no pretraining hangs on, and what all that is done with a finished backbone hangs on.
BESIDE = ("name", "phases", "aggregation", "federation", "secagg", "adapt", "evaluate")
IMAGES = ("seed", "threads", "image_px", "split", "input", "student", "crops", "compute_precision")
LABELS = ("positives", "negatives")

Range = Annotated[float, Field(ge=fixed.RANGES[0], lt=1e30)]
Images = Annotated[int, Field(gt=0, lt=WEIGHT_MAX)]


def pretraining(recipe: Recipe) -> dict[str, Any]:
    """The sections of a recipe that pretraining hangs on."""
    return {key: value for key, value in json.loads(recipes.to_json(recipe)).items() if key not in BESIDE}


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Settings:
    """Hold what the coordinator tells of the numbers of an attempt; public, and the same for all sites.

    Args:
        ring: bits of the values' ring.
        images: as many as a weight of 1 stands for; more count as these.
        labelled: the same by finding, for its rows.
        ranges: of each tensor's values times their weight; of an optimizer's steps, which are counted, none.
    """

    ring: int
    images: Images
    labelled: list[Images] = Field(default_factory=list)
    ranges: dict[Annotated[str, Field(max_length=NAME_MAX)], Range] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Lay out one attempt: which arrays are summed, of which shape and range.

    Args:
        n: sites of the roster.
        shapes: of the tensors that were sent and are trained, by name.
        rows: names of those whose first axis is the findings.  Use `plan`, which knows them.

    Raises: ProtocolError for settings that are not this phase's.
    """

    recipe: Recipe
    request: Request
    settings: Settings
    n: int
    shapes: Mapping[str, tuple[int, ...]]
    rows: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.request.phase not in PHASES:
            raise ProtocolError(f"{self.request.phase!r} is no phase that is summed")
        if set(self.settings.ranges) != {name for name in self.shapes if not moments.is_step(name)}:
            raise ProtocolError("the ranges are not those of the tensors that are summed")
        if self.settings.ring not in (16, 32):
            raise ProtocolError(f"there is no ring of {self.settings.ring} bits")
        if len(self.settings.labelled) != (len(self.request.findings) if self.request.phase == "adapt" else 0):
            raise ProtocolError("the weights are not those of the findings asked")
        if self.n * max([self.settings.images, *self.settings.labelled]) >= WEIGHT_MAX:
            raise ProtocolError("the sum of the sites' weights could pass 2**32")

    @property
    def layout(self) -> Layout:
        """The masked arrays."""
        return Layout(sections=tuple(self._sections()), n=self.n)

    def _sections(self) -> list[Section]:
        phase, findings, steps = self.request.phase, len(self.request.findings), self.request.steps
        ring, ranges = self.settings.ring, self.settings.ranges
        if phase == "counts":
            counts = [Section(name, (), 32) for name in COUNTS]
            return counts + [Section(name, (findings,), 32) for name in LABELS if findings]
        if phase == "evaluate":
            return [Section("histograms", (findings, 2, BINS), 32)]
        sections = [
            Section(f"tensor/{name}", shape, *((64,) if moments.is_step(name) else (ring, ranges[name])))
            for name, shape in self.shapes.items()
        ]
        sections.append(Section("images", (), 32))
        if phase == "adapt":
            sections.append(Section("labelled", (findings,), 32))
        for name in FIGURES[phase]:
            sections.append(Section(f"figure/{name}", (steps,), 32, FIGURE_RANGE))
            sections.append(Section(f"figure/{name}/images", (steps,), 32))
        return sections

    def asked(self) -> dict[str, Any]:
        """All that sites are told alike of the work and its numbers, as JSON: what the context binds beside the layout.

        Of a weight only the sum is masked: told that one image counts as many, a site would stand alone in it.
        """
        return {**self.request.shared(), "settings": asdict(self.settings)}

    def question(self) -> str:
        """Digest of all that a site's part in this sum hangs on beside the weights; hex.

        Of the counts nothing: they are asked for in every run, whatever its recipe.
        """
        if self.request.phase == "counts":
            return hashlib.sha256(b"").hexdigest()
        return hashlib.sha256(canonical([self.asked(), self.layout.as_list(), self._bearing()])).hexdigest()

    def place(self) -> str:
        """Digest of the step of which training this sum is, whatever its weights and numbers; hex, empty of counts.

        A run that begins anew, or under another name, comes by here with weights that are nearly those of before.
        """
        if self.request.phase == "counts":
            return ""
        return hashlib.sha256(canonical([self.request.shared(), self._bearing()])).hexdigest()

    def _bearing(self) -> dict[str, Any]:
        """The sections of the recipe that a site's part hangs on."""
        if self.request.phase == "pretrain":
            return pretraining(self.recipe)
        recipe = json.loads(recipes.to_json(self.recipe))
        return {key: recipe[key] for key in (*IMAGES, "adapt")}

    # -- at a site

    def values(
        self, reply: Reply, zeroed: Sequence[str], *, spend: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A site's arrays by section, and the weight of each that has one (a number, or one a row).

        Args:
            reply: of the phase, in clear.
            zeroed: findings that are left out.
            spend: the reply's tensors may be overwritten, so that their memory is there once.

        Raises: ProtocolError if a tensor is to be summed that is not trained.
        """
        keep = np.array([finding not in set(zeroed) for finding in self.request.findings], bool)
        phase = self.request.phase
        if phase == "counts":
            values = {name: np.array(reply.values[name]) for name in COUNTS}
            by_name = reply.values["findings"]
            for key in LABELS if self.request.findings else ():
                numbers = [by_name.get(finding, {}).get(key, 0) for finding in self.request.findings]
                values[key] = np.array(numbers, np.int64) * keep
            return values, {}
        if phase == "evaluate":
            return {"histograms": np.asarray(reply.values["histograms"]) * keep[:, None, None]}, {}
        return self._update(reply, keep, spend)

    def _update(self, reply: Reply, keep: np.ndarray, spend: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        sent, adapt = self.request.tensors, self.request.phase == "adapt"
        images = min(int(reply.values["images"]), self.settings.images)
        weight: Any = images / self.settings.images
        by_row, values = np.zeros(0), {}
        if adapt:
            most = np.array(self.settings.labelled, np.int64)
            labelled = np.minimum(np.array(reply.values["labelled"], np.int64), most) * keep
            values["labelled"], by_row = labelled, labelled / most
        weights: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            if name not in sent or (reply.tensors and name not in reply.tensors) or sent[name].shape != shape:
                raise ProtocolError(f"a sum is asked of {name!r} {shape}, which is not trained here")
            section = f"tensor/{name}"
            # Of a site that trains nothing: what was sent, with no weight.
            new = reply.tensors.get(name)
            if moments.is_step(name):
                values[section] = np.array(images * round(float(new - sent[name])) if new is not None else 0)
                continue
            if new is None:
                values[section] = np.zeros(shape, np.float32)
            else:
                new, before = moments.summed(name, new), moments.summed(name, sent[name])
                values[section] = (new.sub_(before) if spend else new - before).float().numpy()
            weights[section] = by_row if name in self.rows else weight
        values["images"] = np.array(images)
        rows = {int(row["step"]) - self.request.step: row for row in reply.values["history"]}
        for name in FIGURES[self.request.phase]:
            figures = [rows.get(step, {}).get(name) for step in range(self.request.steps)]
            values[f"figure/{name}"] = np.array([figure or 0.0 for figure in figures], np.float32)
            there = [figure is not None for figure in figures]
            values[f"figure/{name}/images"] = np.array(there, np.int64) * images
            weights[f"figure/{name}"] = weight
        return values, weights

    # -- at the coordinator

    def update(self, sums: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Give what was sent, moved by the mean of the sites' updates; a row that no site labels stays as it was.

        Args:
            sums: by section, each looked at once, and its array spent.
        """
        result = dict(self.request.tensors)
        images = int(sums["images"])
        weight = images / self.settings.images
        for name in self.shapes:
            total, before = sums[f"tensor/{name}"], self.request.tensors[name]
            if moments.is_step(name):
                result[name] = before + int(total) / (images or np.inf)
                continue
            if name in self.rows:
                by_row = sums["labelled"] / np.array(self.settings.labelled, np.float64)
                by_row = by_row.reshape(-1, *[1] * (total.ndim - 1))
                total = np.divide(total, by_row, out=np.zeros_like(total), where=by_row > 0)
            else:
                np.divide(total, weight or np.inf, out=total)
            mean = _tensor(total).add_(moments.summed(name, before.double()))
            result[name] = (mean.clamp_(min=0).square_() if moments.is_square(name) else mean).to(before.dtype)
            del total, mean  # before the next one comes: in float64 a tensor is twice as large
        return result

    def rounding(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """By how much fixed point moves a tensor's mean at most: n · R / (L · Σw), of its lightest row."""
        least = int(sums["images"]) / self.settings.images
        by_row = [int(n) / most for n, most in zip(sums.get("labelled", []), self.settings.labelled, strict=True) if n]
        step = self.n / fixed.levels(self.settings.ring, self.n)
        weights = {name: min(by_row, default=0.0) if name in self.rows else least for name in self.settings.ranges}
        return {name: step * self.settings.ranges[name] / one if one else 0.0 for name, one in weights.items()}

    def history(self, sums: Mapping[str, np.ndarray], constants: Mapping[str, float]) -> list[dict[str, float]]:
        """A row for each step that a site took: the mean of each figure over the sites that have it, by images.

        Args:
            sums: by section.
            constants: of each row, that need no sum.
        """
        rows = []
        for step in range(self.request.steps):
            row: dict[str, float] = {"step": self.request.step + step, **constants}
            for name in FIGURES[self.request.phase]:
                if images := int(sums[f"figure/{name}/images"][step]):
                    row[name] = float(sums[f"figure/{name}"][step]) * self.settings.images / images
            if "loss" in row:
                rows.append(row)
        return rows

    def nothing(self) -> dict[str, np.ndarray]:
        """The sums over sites of which none has a part in any of it."""
        return fixed.decode(self.layout, self.layout.zeros())


def plan(recipe: Recipe, request: Request, settings: Settings, n: int, shapes: Mapping[str, Sequence[int]]) -> Payload:
    """The plan of a request.

    Which of a head's tensors go by findings is the head's own matter: on it hangs that a rare finding is left out.

    Args:
        recipe: of the run.
        request: with the tensors that were sent, if they were.
        settings: as the coordinator tells them.
        n: sites of the roster.
        shapes: of what is summed, as the coordinator tells them; in `adapt` they must be the recipe's.

    Raises: ProtocolError.
    """
    told, rows = {name: tuple(shapes[name]) for name in sorted(shapes)}, frozenset[str]()
    if request.phase == "adapt":
        head = build_head(recipe, len(request.findings))
        trained = {name: tuple(value.shape) for name, value in head.named_parameters() if value.requires_grad}
        averaged = recipe.adapt.optimizer_state == "average"
        if told != (moments.with_moments(trained) if averaged else trained):
            raise ProtocolError("the shapes are not those of the head's trained tensors")
        rows = moments.row_names(set(head.row_parameters) & set(trained)) & set(told)
    if request.phase in ("counts", "evaluate") and told:
        raise ProtocolError("there is no tensor to sum")
    return Payload(recipe=recipe, request=request, settings=settings, n=n, shapes=told, rows=rows)


def digest(arrays: Mapping[int, np.ndarray]) -> str:
    """SHA-256 of masked arrays, by bits of their ring; hex."""
    whole = hashlib.sha256()
    for ring, array in sorted(arrays.items()):
        whole.update(ring.to_bytes(8, "big") + array.nbytes.to_bytes(8, "big"))
        whole.update(np.ascontiguousarray(array, f"<u{ring // 8}").view(np.uint8).data)
    return whole.hexdigest()


def map_new(path: Path, dtype: str, size: int) -> np.memmap[Any, Any]:
    """A new array of zeros, mapped from a file that has all its room: else a full disk ends the process at some page.

    Raises: StorageError.
    """
    with storage(path):
        array = np.memmap(path, dtype, "w+", shape=(size,))
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, array.nbytes)
    return array


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
