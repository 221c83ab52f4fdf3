"""Rounds in the clear: each site's update is checked, and folded into the mean as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import Reply, Request
from chexfound.errors import DataError
from chexfound.pretrain.bounds import UpdateBound
from chexfound.recipe.schema import Recipe
from chexfound.wire.arrays import payload_bytes
from server.exchange.protocol import Exchange, Member
from server.rounds import validation
from server.rounds.cohort import Cohort
from server.rounds.record import Event, Record
from server.rounds.reduction import Reduced, Task
from strategies import robust
from strategies.ceiling import Ceiling
from strategies.fedavg import FedAvg
from strategies.reducer import MakeReducer


class PlainRounds:
    """Rounds whose updates the coordinator sees.

    Args:
        reducer: makes what reduces the updates of one round (`strategies/reducer.py`).
    """

    def __init__(self, recipe: Recipe, exchange: Exchange, record: Record, reducer: MakeReducer = FedAvg) -> None:
        self.recipe, self.exchange, self.record, self.reducer = recipe, exchange, record, reducer
        self.roster: list[Member] = []
        self._in_step: set[str] = set()  # sites that did the round before, in this process's time
        self._behind: set[str] = set()  # sites that missed the phase that the present one stands on

    def check(self) -> None:
        """Serve any recipe."""

    def count(self, roster: list[Member]) -> list[dict[str, Any]]:
        """Give the training images by finding of each site, as `Rounds.count` asks."""
        self.roster = roster
        empty = [member for member in roster if not cells.known(member.values["train"])]
        if empty:
            name, least = empty[0].name, empty[0].values["cells"]
            few = f", or of fewer than {least} patients (its cells.patients)" if least else ""
            raise DataError(f"site {name!r} has no training image{few}; give it images, or leave it out")
        return [member.values["findings"] for member in roster]

    def about(self) -> Event:
        """Say nothing."""
        return {}

    def train(self, task: Task) -> Reduced:
        """Ask for a round in the clear, and reduce the replies as they come (`Rounds.train`)."""
        reducer = self.reducer(
            task.phase,
            task.weights,
            len(task.findings),
            task.rows,
            ceiling=self._ceiling(task),
            bound=robust.bound(self.recipe.robust.clip, self._norms_before(task.phase)),
        )
        requests = self._requests(task.phase, task.findings, {**task.weights, **task.beside}, task)
        if task.stays:
            whole = {**task.weights, **task.stays}
            requests = [
                replace(request, tensors=whole) if member.name not in self._in_step else request
                for member, request in zip(self.roster, requests, strict=True)
            ]
        bound = UpdateBound.of(self.recipe, task.phase, task.taken)
        norms: dict[str, float] = {}

        def check(member: Member, reply: Reply) -> None:
            validation.check_counts(task.phase, reply, member, task.findings)
            fold = reducer.admit(reply)
            validation.check_update(reply.tensors, task.weights, task.frozen, bound)
            validation.check_history(reply, self.recipe, task.phase, task.taken)
            fold()
            if self.recipe.robust.clip is not None and reply.tensors:
                norms[member.name] = robust.norm(reply.tensors, task.weights)

        cohort = self._ask(requests, check, task.where)
        sites, up = [], 0
        for member, reply in cohort:
            up += payload_bytes(reply.tensors)
            labelled = reply.values["labelled"] if task.phase == "adapt" else []
            told = {"images": reply.values["images"], "labelled": labelled, "history": reply.values["history"]}
            sites.append({"site": member.name, **told})
        mean = reducer.result()
        about: Event = {"missing": cohort.missing} if cohort.missing else {}
        if reducer.ceiling.capped:
            about["capped"] = dict(reducer.ceiling.capped)
        if norms:
            about["norms"] = norms
            about["shortened"] = sorted(site for site, own in norms.items() if own > (reducer.bound or math.inf))
        self._in_step = {site["site"] for site in sites}
        down = sum(payload_bytes(request.tensors) for request in requests)
        return Reduced(weights=mean, sites=sites, up=up, down=down, about=about)

    def hand_out(
        self, backbone: dict[str, Tensor], beside: Mapping[str, Tensor], findings: tuple[str, ...], again: bool
    ) -> list[Event]:
        """Hand the backbone out each time, since a site may hold another run's features by now."""
        requests = self._requests("features", findings, {**backbone, **beside})
        cohort = self._ask(requests, lambda _, reply: validation.check_nothing(reply), "features")
        for _ in cohort:
            pass
        # Without this run's features a site has no part in what stands on them.
        self._behind = {one["site"] for one in cohort.missing}
        return cohort.missing

    def evaluate(self, model: dict[str, Tensor], findings: tuple[str, ...]) -> tuple[list[Event], list[Event]]:
        """Have each site judge the model, and give its own rows (`Rounds.evaluate`)."""

        def check(member: Member, reply: Reply) -> None:
            validation.check_results(reply, member, findings)

        head = {name: tensor for name, tensor in model.items() if name.startswith("head.")}
        cohort = self._ask(self._requests("evaluate", findings, head), check, "evaluate")
        rows = [row for _, reply in cohort for row in reply.values["results"]]
        return rows, cohort.missing

    def _requests(
        self, phase: str, findings: tuple[str, ...], tensors: dict[str, Tensor], task: Task | None = None
    ) -> list[Request]:
        request = Request(phase=phase, findings=findings, tensors=tensors)
        batches = (0,) * len(self.roster)
        if task is not None:
            request = replace(request, round=task.number, step=task.taken.start, steps=task.steps)
            batches = task.batch_sizes
        return [replace(request, roster_index=index, batch_size=batch) for index, batch in enumerate(batches)]

    def _ask(self, requests: Sequence[Request], check: Callable[[Member, Reply], None], where: str) -> Cohort:
        """Ask each site that is not behind; the replies come and pass `check`, and who is missing in the end."""
        asked = [
            (member, None if member.name in self._behind else request)
            for member, request in zip(self.roster, requests, strict=True)
        ]
        return Cohort(self.recipe, asked, self.exchange, check, where)

    def _ceiling(self, task: Task) -> Ceiling:
        """The ceiling by what the sites that are asked enrolled with."""
        asked = [member for member in self.roster if member.name not in self._behind]
        images = {member.name: member.values["train"] for member in asked}
        if task.phase == "pretrain":
            return Ceiling.of(images)
        labelled = {member.name: validation.labelled_of(member, task.findings) for member in asked}
        return Ceiling.of({name: min(images[name], sum(counts)) for name, counts in labelled.items()}, labelled)

    def _norms_before(self, phase: str) -> Sequence[float]:
        before = self.record.rounds(phase)[-1:]
        return list(before[0].get("norms", {}).values()) if before else []
