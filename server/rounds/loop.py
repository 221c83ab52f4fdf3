"""A run, step by step: enrol, pretrain, adapt, evaluate.

The same for a federation over Flower's Grid and for a lone site (the centralized and single-site
arms), in the clear and under masks.  After each round the weights are on the disk and the round is in the journal; a
run that was stopped anywhere goes on from the last such round and ends with the same hash.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import MOMENTS
from chexfound.durable.files import write_text
from chexfound.errors import DataError
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.pretrain import positions, teacher
from chexfound.pretrain.beginning import file_tensor, frozen_gains, load_backbone, taken_backbone
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import BatchSizes
from chexfound.recipe.schema import Recipe
from chexfound.wire.arrays import payload_bytes
from server.exchange.protocol import ENROLMENT, Exchange, Member
from server.rounds.health import Watch
from server.rounds.record import Event, Record
from server.rounds.reduction import Rounds, Task
from server.rounds.work import choose_findings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Hold what a run gives: its folder holds model.safetensors and journal.jsonl."""

    roster: list[Member]
    findings: tuple[str, ...]
    tensors: dict[str, Tensor]  # backbone.… and, after adapt, head.…
    model_sha256: str
    results: list[dict[str, Any]]


class Run:
    """One run in one folder.

    Args:
        recipe: what to do.
        exchange: how to reach the sites.
        record: where weights and journal go.
        rounds: how the sites' replies become one.
        batches: images a step of each site; the recipe's, dealt, if not given.
        backbone: start from these weights (safetensors, names without prefix) instead of fresh ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        exchange: Exchange,
        record: Record,
        rounds: Rounds,
        *,
        batches: BatchSizes | None = None,
        backbone: Path | None = None,
    ) -> None:
        self.recipe, self.exchange, self.record, self.rounds = recipe, exchange, record, rounds
        self.backbone, self.batches = backbone, batches
        self.roster: list[Member] = []
        self.findings: tuple[str, ...] = ()

    def run(self) -> Outcome:
        """Do all phases of the recipe, going on from where the folder's journal ends.

        Raises: ChexfoundError; what was done is in the journal, and `run` can be called again.
        """
        self.rounds.check()
        with self.record.open():
            self.record.check_same(self._inputs())
            before = [
                Member(name=values["site"], values={key: value for key, value in values.items() if key in ENROLMENT})
                for values in self.record.begun("roster", [])
            ]
            self.roster = self.exchange.enrol(self.recipe, before)
            self._start()
            train = [member.values.get("train", 1) for member in self.roster]  # which nobody tells under masks
            self.batches = self.batches or BatchSizes.of(self.recipe, train)
            weights = self._pretrain(self.batches.pretrain) if "pretrain" in self.recipe.phases else None
            model = checkpoint.add_prefix(self._take_backbone(weights), "backbone.")
            if "adapt" in self.recipe.phases:
                head = self._adapt(checkpoint.with_prefix(model, "backbone."), self.batches.adapt)
                model |= checkpoint.add_prefix(head, "head.")
            checkpoint.save(self.record.folder / "model.safetensors", model)
            sha256 = checkpoint.digest(model)
            unscored = self._unscored()
            results: list[dict[str, Any]] = []
            missing: list[Event] = []
            if "evaluate" in self.recipe.phases and "adapt" in self.recipe.phases:
                rows, missing = self.rounds.evaluate(model, self.findings)
                results = [_without_figures(row, unscored) for row in rows]
            done: Event = {"event": "done", "model_sha256": sha256, "unscored": unscored, "results": results}
            self.record.add(done | ({"missing": missing} if missing else {}))
        return Outcome(roster=self.roster, findings=self.findings, tensors=model, model_sha256=sha256, results=results)

    def heard(self, event: Event) -> None:
        """Take what the exchange tells; who was lost, came back or refused is kept."""
        (self.record.note if event["event"] in ("lost", "back", "refused") else self.record.tell)(event)

    # -- the beginning

    def _start(self) -> None:
        """Write who takes part and in what, or check that it is still so."""
        counted = self.rounds.count(self.roster)
        if "adapt" in self.recipe.phases:
            self.findings = choose_findings(self.recipe, counted)
            labelled = {
                name for findings in counted for name, both in findings.items() if cells.SUPPRESSED not in both.values()
            }
            if not labelled & set(self.findings):
                raise DataError(
                    f"no site has a training image labelled with any of {', '.join(self.findings)}; "
                    f"there are {', '.join(sorted(labelled)) or 'no labels'}: "
                    "choose others as adapt.findings, or leave adapt out of phases"
                )
        event = {
            "event": "start",
            **self._inputs(),
            "roster": [{"site": member.name, **member.values} for member in self.roster],
            "findings": list(self.findings),
            **self.rounds.about(),
        }
        if not self.record.entries:
            write_text(self.record.folder / "recipe.yaml", recipes.to_yaml(self.recipe))
            granted = {member.name: member.limits.as_dict() for member in self.roster if member.limits is not None}
            self.record.add(event | ({"policies": granted} if granted else {}))
            return
        self.record.check_same(event)  # but for the policies, which a site may change between two of a run's starts
        done = {phase: len(self.record.rounds(phase)) for phase in ("pretrain", "adapt")}
        self.record.tell({"event": "resume", **done})

    def _inputs(self) -> Event:
        return {
            "recipe_sha256": recipes.digest(self.recipe),
            "backbone_sha256": hashlib.sha256(self.backbone.read_bytes()).hexdigest() if self.backbone else None,
        }

    # -- the phases

    def _pretrain(self, batches: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
        steps = self.recipe.train.local_steps
        done, weights = self.record.last("pretrain")
        if weights is None:
            weights = initial_weights(self.recipe)
            if self.backbone is not None:
                load_backbone(weights, self.backbone)
        gains = frozen_gains(self.recipe, weights)
        watch = Watch(self.recipe, self.record.rounds("pretrain"))
        for number in range(done, self.recipe.pretrain_rounds):
            step = number * steps
            weights = positions.enter(weights, self.recipe, step)
            travels, stays = _parted(self.recipe, weights)
            task = Task(
                phase="pretrain",
                number=number,
                steps=steps,
                batch_sizes=batches[curriculum.index_at(self.recipe, step)],
                weights=travels,
                frozen=gains,
                findings=self.findings,
                stays=stays if step else {},
                beside={} if step else self._file(weights),
            )
            finish = functools.partial(_with_teacher, self.recipe, task.taken.stop, weights)
            weights = self._round(task, finish, functools.partial(watch.look, number, step))
        return weights

    def _round(
        self,
        task: Task,
        finish: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        look: Callable[[list[Event]], Event] | None = None,
    ) -> dict[str, Tensor]:
        """Ask for a round and commit what `finish` makes of its mean, with what `look` sees in the sites' figures."""
        started = time.monotonic()
        reduced = self.rounds.train(task)
        weights = finish(reduced.weights)
        event: Event = {"health": look(reduced.sites)} if look is not None else {}
        event |= {
            "seconds": round(time.monotonic() - started, 3),
            "bytes": {"down": reduced.down, "up": reduced.up},
            "sites": reduced.sites,
            **reduced.about,
        }
        self.record.commit(task.phase, task.number, weights, event)
        return weights

    def _take_backbone(self, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The backbone that goes on, of the weights after pretraining, or of those that the run begins with."""
        if weights is None:
            weights = positions.with_grid(
                initial_weights(self.recipe), self.recipe.position_px // self.recipe.student.patch_size
            )
            if self.backbone is not None:
                load_backbone(weights, self.backbone)
        return taken_backbone(weights)

    def _file(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file that the run's first weights are from, which goes with them."""
        return file_tensor(self.backbone, weights) if self.backbone is not None else {}

    def _first_file(self, backbone: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same where the run begins with its features."""
        return {} if "pretrain" in self.recipe.phases else self._file(backbone)

    def _adapt(self, backbone: dict[str, Tensor], batch_sizes: tuple[int, ...]) -> dict[str, Tensor]:
        config = self.recipe.adapt
        head_module = build_head(self.recipe, len(self.findings))
        done, head = self.record.last("adapt")
        self._features(backbone)
        if head is None:
            head = {name: tensor.clone() for name, tensor in head_module.state_dict().items()}
            if config.optimizer_state == "average":
                head |= zero_moments(head_module)
        moments = [f"{MOMENTS}{name}.{key}" for name in head_module.row_parameters for key in ("exp_avg", "exp_avg_sq")]
        trained = {name for name, parameter in head_module.named_parameters() if parameter.requires_grad}
        for number in range(done, config.rounds):
            task = Task(
                phase="adapt",
                number=number,
                steps=config.local_steps,
                batch_sizes=batch_sizes,
                weights=head,
                frozen=set(head_module.state_dict()) - trained,
                findings=self.findings,
                rows=[*head_module.row_parameters, *moments],
            )
            head = self._round(task, functools.partial(_at_step, task.taken.stop))
        return {name: tensor for name, tensor in head.items() if not name.startswith(MOMENTS)}

    def _features(self, backbone: dict[str, Tensor]) -> None:
        """Have the sites make their features of the backbone; the first time is in the journal."""
        again = any(entry["event"] == "features" for entry in self.record.entries)
        started = time.monotonic()
        missing = self.rounds.hand_out(backbone, self._first_file(backbone), self.findings, again)
        if again:
            return
        event: Event = {"event": "features", "seconds": round(time.monotonic() - started, 3)}
        event["bytes"] = {"down": len(self.roster) * payload_bytes(backbone), "up": 0}
        self.record.add(event | ({"missing": missing} if missing else {}))

    def _unscored(self) -> dict[str, str]:
        """Findings of which no row was trained, with the reason."""
        rounds = self.record.rounds("adapt")
        if not rounds:
            return {}
        labelled = (map(cells.known, site["labelled"]) for site in rounds[-1]["sites"])
        totals = [sum(counts) for counts in zip(*labelled, strict=True)]
        reason = "not trained: no site has both classes among its training images"
        if len(self.roster) == 1:
            reason = f"not trained: {self.roster[0].name} has not both classes among its training images"
        rare = "not trained: fewer sites label it than secure aggregation tells a sum of"
        zeroed = rounds[-1].get("zeroed", ())
        return {
            finding: rare if finding in zeroed else reason
            for finding, total in zip(self.findings, totals, strict=True)
            if not total
        }


def _parted(recipe: Recipe, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give what travels each round, and what stays: the teacher that every site derives by itself."""
    if recipe.teacher.policy != "rederive":
        return weights, {}
    stays = {name: tensor for name, tensor in weights.items() if name.startswith("teacher.")}
    return {name: tensor for name, tensor in weights.items() if name not in stays}, stays


def _with_teacher(recipe: Recipe, step: int, before: dict[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
    """A round's mean, with the teacher at its end (global step `step`) where it stays: as every site derives it."""
    if recipe.teacher.policy != "rederive":
        return mean
    return mean | teacher.rederived(recipe, step, before, positions.enter(mean, recipe, step))


def _at_step(step: int, mean: dict[str, Tensor]) -> dict[str, Tensor]:
    """A head's mean, whose moments have the run's steps behind them: also those of a round that no site trained in."""
    return {
        name: torch.full_like(tensor, step) if name.startswith(MOMENTS) and name.endswith(".step") else tensor
        for name, tensor in mean.items()
    }


def _without_figures(row: dict[str, Any], unscored: dict[str, str]) -> dict[str, Any]:
    if row["finding"] not in unscored or row["n"] == cells.SUPPRESSED:
        return row
    return (
        row
        | dict.fromkeys(("auroc", "auroc_ci", "auprc", "auprc_ci"))
        | {"reason": row["reason"] or unscored[row["finding"]]}
    )
