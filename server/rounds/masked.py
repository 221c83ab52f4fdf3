"""Rounds whose figures, updates and results exist as sums over the sites only: `aggregation: secagg`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import ARM, COUNTS, MOMENTS, TRAINED_ON, Request
from chexfound.durable.files import write_json
from chexfound.errors import ConfigError, DataError, ProtocolError, SiteError
from chexfound.evaluate import histograms
from chexfound.model import checkpoint
from chexfound.parsing.names import ALL_SITES
from chexfound.phases import payload
from chexfound.phases.payload import Settings
from chexfound.pretrain.bounds import UpdateBound, betas, check_bounded, largest
from chexfound.recipe.schema import Recipe
from chexfound.secagg import moments
from chexfound.secagg.parameters import MINIMUM, labelling
from server.exchange.grid import GridExchange
from server.exchange.protocol import Member
from server.rounds import validation
from server.rounds.record import Event, Record
from server.rounds.reduction import Reduced, Task
from server.rounds.sums import SecureSums, Summed
from server.rounds.work import bounded
from strategies import ceiling, composition

FINEST = 2.0**-20  # of the range that the recipe bounds, below which a tensor's range does not fall


class MaskedRounds:
    """Rounds over an exchange whose sites have keys.

    What a site would tell in the clear (counts, updates, losses, results) comes as one sum; the journal has one entry
    for all sites in its place, and under `cohort` who is in it.
    """

    def __init__(self, recipe: Recipe, exchange: GridExchange, record: Record) -> None:
        self.recipe, self.exchange, self.record = recipe, exchange, record
        self.own = record.folder / "secagg"

    def check(self) -> None:
        """Check that masked sums can serve the recipe, as `Rounds.check` asks.

        Raises: ConfigError for a recipe that masked sums cannot serve; DataError for sites without keys.
        """
        sites = self.exchange.sites
        composition.check(self.recipe, len(sites.sites) if sites else self.recipe.federation.min_sites)
        check_bounded(self.recipe)  # whose steps the ranges of fixed point are of
        if sites is None:
            raise DataError("secure aggregation needs sites with keys: make a federation with chexfound-server init")

    # -- who takes part, and how much there is

    def count(self, roster: list[Member]) -> list[dict[str, Any]]:
        """Give the training images by finding of all sites together, as `Rounds.count` asks."""
        assert self.exchange.sites is not None
        self.roster = roster
        self.sums = SecureSums(
            recipe=self.recipe,
            exchange=self.exchange,
            members=roster,
            sites=self.exchange.sites,
            run_id=self.exchange.run_id,
            folder=self.own,
            tell=self.record.note,
        )
        self.totals: dict[str, Any] = self.record.begun("totals", None) or self._count()
        asked, known = self.recipe.adapt.findings, self.totals["findings"]
        if "adapt" in self.recipe.phases and not known.keys() & set(known if asked is None else asked):
            what = f"none of {', '.join(asked)}" if asked else "no finding"
            raise DataError(
                f"{what} is labelled at {labelling(MINIMUM, self.sums.parameters.c)} sites, the fewest of which secure "
                "aggregation tells a sum; choose others as adapt.findings, or leave adapt out of phases"
            )
        return [known]

    def _count(self) -> dict[str, Any]:
        named = [member.values["findings"] for member in self.roster]
        findings = bounded({name for names in named for name in names}, named)
        settings = Settings(ring=self.recipe.secagg.ring, images=1)
        sums = self.sums.sum(Request(phase="counts", findings=findings), settings, {}).sums
        numbers = np.stack([sums[name] for name in payload.LABELS], axis=1) if findings else np.zeros((0, 2), int)
        least = self._least()
        counted = {
            finding: {"positives": int(positives), "negatives": int(negatives)}
            for finding, (positives, negatives) in zip(findings, numbers, strict=True)
            if (positives or negatives) and min(positives, negatives) >= least
        }
        totals = {name: cells.told(int(sums[name]), int(sums[name]), least) for name in COUNTS}
        return {**totals, "findings": counted, "cells": least}

    def _least(self) -> int:
        """Patients below which nothing is told of the sum either: as the strictest of the sites has it."""
        return max(int(member.values["cells"]) for member in self.roster)

    def about(self) -> Event:
        """Say what there is at all sites, and by which parameters it is summed."""
        return {"totals": self.totals, "secagg": {**self.sums.parameters.shared(), "ring": self.recipe.secagg.ring}}

    # -- rounds

    def train(self, task: Task) -> Reduced:
        """Ask for a round under masks, and take the mean off its sums (`Rounds.train`)."""
        phase, weights = task.phase, task.weights
        request = self._request(task)
        trained = [name for name in weights if name not in task.frozen]
        bound = UpdateBound.of(self.recipe, phase, task.taken)
        bounds = _ranges_of(bound, trained, weights)
        settings = Settings(
            ring=self.recipe.secagg.ring,
            images=self._most(self.totals["train"]),
            labelled=self._labelled(task.findings) if phase == "adapt" else [],
            ranges=self._ranges(phase, task.number, bounds),
        )
        ask = functools.partial(
            self.sums.sum,
            request,
            settings,
            {name: tuple(weights[name].shape) for name in trained},
            backbone=self._backbone if phase == "adapt" else "",
            whole={**weights, **task.stays} if task.stays else None,
        )
        summed = self._on_backbone(ask) if phase == "adapt" else ask()
        self._check_quorum(summed)
        moved = summed.plan.update(summed.sums)
        moments.lift(moved, *betas(self.recipe, phase))
        mean = {name: moved[name] for name in weights}
        images = int(summed.sums["images"])
        if images:  # else no site had a part in it, and all is as it was
            self._check_mean(mean, task, bound, summed)
        self._keep_ranges(phase, task.number + 1, bounds, weights, mean)
        constants = {"log_k": math.log(self.recipe.dino.head_n_prototypes)} if phase == "pretrain" else {}
        entry = {
            "site": ALL_SITES,
            "images": images,
            "labelled": [int(value) for value in summed.sums["labelled"]] if phase == "adapt" else [],
            "history": summed.plan.history(summed.sums, constants),
        }
        return Reduced(weights=mean, sites=[entry], up=summed.up, down=summed.down, about=_about(summed))

    def _check_mean(self, mean: Mapping[str, Tensor], task: Task, bound: UpdateBound, summed: Summed) -> None:
        """Hold a mean, its moments too, against the box: fixed point leaves it by no more than `rounding` says.

        Moments need none of that: `lift` raised the squares to what the first moments have become.

        Raises: ProtocolError; who is at fault cannot be known.
        """
        rounding = summed.plan.rounding(summed.sums)
        try:
            validation.check_update(mean, task.weights, task.frozen, bound, rounding)
        except ProtocolError as error:
            raise ProtocolError(f"{task.where}: the sum of {len(summed.survivors)} sites: {error}") from error

    def _request(self, task: Task) -> Request:
        if len(set(task.batch_sizes)) > 1:  # all sites are sent one request
            n, section = len(task.batch_sizes), "adapt" if task.phase == "adapt" else "train"
            raise ConfigError(
                f"{task.where}: under masks each site takes the same batch, and {sum(task.batch_sizes)} images a step "
                f"cannot be divided equally among {n}; choose a multiple of {n}: --set {section}.pooled_batch_size="
                f"{n * max(task.batch_sizes)}"
            )
        return Request(
            phase=task.phase,
            round=task.number,
            step=task.taken.start,
            steps=task.steps,
            batch_size=task.batch_sizes[0],
            findings=task.findings,
            tensors={**task.weights, **task.beside},
        )

    def _labelled(self, findings: tuple[str, ...]) -> list[int]:
        counted = self.totals["findings"]
        return [self._most(sum(counted.get(finding, {}).values())) for finding in findings]

    def _most(self, together: int) -> int:
        """How many images of one site count, of so many at all sites: what a weight of 1 stands for."""
        return max(1, math.ceil(together * ceiling.share(len(self.sums.sites.sites))))

    def _check_quorum(self, summed: Summed) -> None:
        """By weight: all that can be known is the sum's own; where no finding has a part in it, it has none.

        Raises: SiteError.
        """
        config = self.recipe.federation
        if summed.plan.request.phase == "adapt" and len(summed.zeroed) == len(summed.plan.request.findings):
            return
        images, total = int(summed.sums["images"]), self.totals["train"]
        if config.quorum_sites is not None and images < config.quorum_weight * total:
            raise SiteError(
                f"{summed.plan.request.phase}, round {summed.plan.request.round + 1}: the sum is over {images} of "
                f"{total} training images, less than federation.quorum_weight {config.quorum_weight:g}"
            )

    # -- ranges

    def _ranges(self, phase: str, number: int, bounds: Mapping[str, float]) -> dict[str, float]:
        """By the last round's update where there was one, within what the recipe bounds."""
        kept = self._kept_ranges().get(f"{phase}/{number}", {})
        return {name: min(bound, max(kept.get(name, bound), bound * FINEST)) for name, bound in bounds.items()}

    def _kept_ranges(self) -> dict[str, dict[str, float]]:
        path = self.own / "ranges.json"
        ranges: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        return ranges

    def _keep_ranges(
        self,
        phase: str,
        number: int,
        bounds: Mapping[str, float],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> None:
        margin = self.recipe.secagg.range_margin
        moved = {
            name: largest(moments.summed(name, after[name]) - moments.summed(name, before[name])) for name in bounds
        }
        ranges = {name: margin * step for name, step in moved.items() if step > 0}
        # With those of the round before: until that is in the journal it may be asked for again, with the same ranges.
        present = f"{phase}/{number - 1}"
        kept = {present: self._kept_ranges().get(present, {}), f"{phase}/{number}": ranges}
        write_json(self.own / "ranges.json", kept)

    # -- features and results

    def hand_out(
        self, backbone: dict[str, Tensor], beside: Mapping[str, Tensor], findings: tuple[str, ...], again: bool
    ) -> list[Event]:
        """Hand the backbone out once; again only to sites that a sum has shown to hold another run's features."""
        self._backbone = checkpoint.digest(backbone)
        request = Request(phase="features", findings=findings, tensors={**backbone, **beside})
        self._again = functools.partial(self.sums.hand_out, request)
        return [] if again else self._again()

    def _on_backbone(self, ask: Callable[[], Summed]) -> Summed:
        """Give what `ask` gives; the backbone is sent once more if the sites hold another run's by now."""
        try:
            return ask()
        except SiteError as error:
            if "(secagg.weights)" not in str(error):
                raise
        self._again()
        return ask()

    def evaluate(self, model: dict[str, Tensor], findings: tuple[str, ...]) -> tuple[list[Event], list[Event]]:
        """Have the sites judge the model (`Rounds.evaluate`); the rows are of all sites together."""
        head = {name: tensor for name, tensor in model.items() if name.startswith("head.")}
        settings = Settings(ring=self.recipe.secagg.ring, images=1)
        request = Request(phase="evaluate", findings=findings, tensors=head)
        ask = functools.partial(self.sums.sum, request, settings, {}, backbone=self._backbone)
        summed = self._on_backbone(ask)
        config = self.recipe.evaluate
        rows = histograms.rows(
            ARM, TRAINED_ON, ALL_SITES, summed.sums["histograms"], findings,
            config.bootstrap_samples, config.confidence, self.recipe.seed, summed.zeroed,
        )  # fmt: skip
        least = self._least()
        told = [
            cells.row(row) if least and min(row["positives"], row["n"] - row["positives"]) < least else row
            for row in rows
        ]
        return told, summed.missing


def _about(summed: Summed) -> Event:
    told: Event = {"cohort": summed.survivors, "clipped": summed.clipped}
    if summed.zeroed:
        told["zeroed"] = summed.zeroed
    if summed.missing:
        told["missing"] = summed.missing
    return told


def _ranges_of(bound: UpdateBound, trained: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each tensor can go in a round; of the optimizer's moments, which gradients' clipping holds, likewise."""

    def most(name: str) -> float:
        if name.startswith(MOMENTS):
            return bound.gradient + largest(moments.summed(name, weights[name]))
        return bound.largest(name, weights)

    return {name: max(most(name), 1e-9) for name in trained if not moments.is_step(name)}
