"""A run, step by step: enrol, pretrain, adapt, evaluate.

The same for a federation over Flower's Grid and for a lone site (the centralized and single-site
arms).  After each round the weights are on the disk and the round is in the journal; a run that was
stopped anywhere goes on from the last such round and ends with the same hash.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import Reply, Request
from chexfound.durable.files import write_text
from chexfound.durable.journal import Journal
from chexfound.errors import CheckpointError, ConfigError, DataError
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.pretrain import positions, teacher
from chexfound.pretrain.beginning import file_tensor, frozen_gains, load_backbone, taken_backbone
from chexfound.pretrain.bounds import UpdateBound
from chexfound.pretrain.optimizer import PREFIX, zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import BatchSizes
from chexfound.recipe.schema import Recipe
from chexfound.wire import arrays
from server.exchange.protocol import ENROLMENT, Exchange, Member
from server.rounds import validation
from server.rounds.cohort import Cohort
from server.rounds.health import Watch
from server.rounds.work import choose_findings
from strategies import robust
from strategies.ceiling import Ceiling
from strategies.fedavg import FedAvg

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gives: its folder holds model.safetensors and journal.jsonl."""

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
        folder: where weights and journal go.
        batches: images a step; the recipe's share for each site if not given.
        backbone: start from these weights (safetensors, names without prefix) instead of fresh ones.
        on_event: told each journal record as it is written.
    """

    def __init__(
        self,
        recipe: Recipe,
        exchange: Exchange,
        folder: Path,
        *,
        batches: BatchSizes | None = None,
        backbone: Path | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.recipe, self.exchange, self.folder = recipe, exchange, Path(folder)
        self.backbone, self.on_event = backbone, on_event
        self.batches = batches
        self.roster: list[Member] = []
        self._in_step: set[str] = set()  # sites that did the round before, in this process's time
        self._behind: set[str] = set()  # sites that missed the phase that the present one stands on
        self.findings: tuple[str, ...] = ()

    def run(self) -> Outcome:
        """Do all phases of the recipe, going on from where the folder's journal ends.

        Raises: ChexfoundError; what was done is in the journal, and `run` can be called again.
        """
        with Journal(self.folder / "journal.jsonl") as self.journal:
            self._check_same(self._inputs())
            before = [
                Member(name=values["site"], values={key: value for key, value in values.items() if key in ENROLMENT})
                for values in self._begun("roster", [])
            ]
            self.roster = self.exchange.enrol(self.recipe, before)
            if self.batches is None:
                self.batches = BatchSizes.of(self.recipe, len(self.roster))
            self._start()
            weights = self._pretrain() if "pretrain" in self.recipe.phases else None
            model = checkpoint.add_prefix(self._take_backbone(weights), "backbone.")
            if "adapt" in self.recipe.phases:
                model |= checkpoint.add_prefix(self._adapt(checkpoint.with_prefix(model, "backbone.")), "head.")
            checkpoint.save(self.folder / "model.safetensors", model)
            sha256 = checkpoint.digest(model)
            unscored = self._unscored()
            results: list[dict[str, Any]] = []
            missing: list[dict[str, str]] = []
            if "evaluate" in self.recipe.phases and "adapt" in self.recipe.phases:
                rows, missing = self._evaluate(model)
                results = [_without_figures(row, unscored) for row in rows]
            done: Event = {"event": "done", "model_sha256": sha256, "unscored": unscored, "results": results}
            self._record(done | ({"missing": missing} if missing else {}))
        return Outcome(roster=self.roster, findings=self.findings, tensors=model, model_sha256=sha256, results=results)

    # -- the journal

    def _begun(self, key: str, default: Any) -> Any:
        """What the journal's first record, the run's start, has under a key."""
        return self.journal.entries[0][key] if self.journal.entries else default

    def heard(self, event: Event) -> None:
        """Told by the exchange; who was lost, came back or refused is kept."""
        if event["event"] in ("lost", "back", "refused") and self.journal.entries:
            self.journal.append(event)
        if self.on_event is not None:
            self.on_event(event)

    def _record(self, event: Event) -> None:
        if event not in self.journal.entries[-1:]:
            self.journal.append(event)
        if self.on_event is not None:
            self.on_event(event)

    def _counted(self) -> list[dict[str, Any]]:
        """Training images by finding, of each site.

        Raises: DataError for a site without any, or with fewer patients' than it tells of.
        """
        empty = [member for member in self.roster if not cells.known(member.values["train"])]
        if empty:
            name, least = empty[0].name, empty[0].values["cells"]
            few = f", or of fewer than {least} patients (its cells.patients)" if least else ""
            raise DataError(f"site {name!r} has no training image{few}; give it images, or leave it out")
        return [member.values["findings"] for member in self.roster]

    def _start(self) -> None:
        """Write who takes part and in what, or check that it is still so."""
        counted = self._counted()
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
            **self._told(),
        }
        if not self.journal.entries:
            write_text(self.folder / "recipe.yaml", recipes.to_yaml(self.recipe))
            granted = {member.name: member.limits.as_dict() for member in self.roster if member.limits is not None}
            self._record(event | ({"policies": granted} if granted else {}))
            return
        self._check_same(event)  # but for the policies, which a site may change between two of a run's starts
        if self.on_event is not None:
            self.on_event({"event": "resume", **{phase: len(self._rounds(phase)) for phase in ("pretrain", "adapt")}})

    def _told(self) -> Event:
        """What the run's start says beside who takes part."""
        return {}

    def _inputs(self) -> Event:
        return {
            "recipe_sha256": hashlib.sha256(recipes.to_json(self.recipe).encode()).hexdigest(),
            "backbone_sha256": hashlib.sha256(self.backbone.read_bytes()).hexdigest() if self.backbone else None,
        }

    def _check_same(self, start: Event) -> None:
        """Raise ConfigError if the folder's run started with something else."""
        changed = sorted(key for key, value in start.items() if self._begun(key, value) != value)
        if changed:
            raise ConfigError(
                f"{self.folder}: this folder holds a run with another {' and '.join(changed)}; "
                "resume it with the same recipe, sites and images, or choose another folder"
            )

    def _rounds(self, phase: str) -> list[Event]:
        return [entry for entry in self.journal.entries if entry["event"] == "round" and entry["phase"] == phase]

    def _commit(
        self,
        phase: str,
        number: int,
        weights: dict[str, Tensor],
        started: float,
        replies: list[Event],
        sent: int,
        told: Event,
    ) -> None:
        """Put a round's weights on the disk, then the round into the journal, then drop the round before."""
        path = self.folder / "rounds" / f"{phase}-{number:06d}.safetensors"
        checkpoint.save(path, weights)
        received = sum(reply.pop("bytes") for reply in replies)
        self._record(
            {
                "event": "round",
                "phase": phase,
                "round": number,
                "file": path.name,
                "sha256": checkpoint.digest(weights),
                "seconds": round(time.monotonic() - started, 3),
                "bytes": {"down": sent, "up": received},
                "sites": replies,
                **told,
            }
        )
        for old in self.folder.glob(f"rounds/{phase}-*.safetensors"):
            if old != path:
                old.unlink()

    def _last(self, phase: str) -> tuple[int, dict[str, Tensor] | None]:
        """How many rounds of a phase are done, and the weights after the last."""
        done = self._rounds(phase)
        if not done:
            return 0, None
        path = self.folder / "rounds" / done[-1]["file"]
        weights = checkpoint.load(path)
        if checkpoint.digest(weights) != done[-1]["sha256"]:
            raise CheckpointError(f"{path}: is not what the journal says it should be; the file was changed or damaged")
        return len(done), weights

    # -- the phases

    def _ask(self, requests: list[Request], check: Callable[[Member, Reply], None], where: str) -> Cohort:
        """The replies that come and pass `check`, and who is missing in the end; who is behind is not asked."""
        asked = [
            (member, None if member.name in self._behind else request)
            for member, request in zip(self.roster, requests, strict=True)
        ]
        return Cohort(self.recipe, asked, self.exchange, check, where)

    def _requests(
        self, phase: str, tensors: dict[str, Tensor], number: int = 0, steps: int = 0, batch: int = 0
    ) -> list[Request]:
        return [
            Request(
                phase=phase,
                round=number,
                step=number * steps,
                steps=steps,
                batch_size=batch,
                roster_index=index,
                findings=self.findings,
                tensors=tensors,
            )
            for index in range(len(self.roster))
        ]

    def _pretrain(self) -> dict[str, Tensor]:
        config = self.recipe.train
        done, weights = self._last("pretrain")
        if weights is None:
            weights = initial_weights(self.recipe)
            if self.backbone is not None:
                load_backbone(weights, self.backbone)
        assert self.batches is not None
        gains = frozen_gains(self.recipe, weights)
        self.watch = Watch(self.recipe, self._rounds("pretrain"))
        for number in range(done, self.recipe.pretrain_rounds):
            step = number * config.local_steps
            weights = positions.enter(weights, self.recipe, step)
            batch = self.batches.pretrain[curriculum.index_at(self.recipe, step)]
            travels, stays = _parted(self.recipe, weights)
            weights = self._train_round(
                "pretrain",
                FedAvg("pretrain", travels),
                travels,
                gains,
                number,
                config.local_steps,
                batch,
                stays=stays if step else None,
                beside={} if step else self._file(weights),
                finish=functools.partial(_with_teacher, self.recipe, step + config.local_steps, weights),
            )
        return weights

    def _train_round(
        self,
        phase: str,
        strategy: FedAvg,
        weights: dict[str, Tensor],
        frozen: set[str],
        number: int,
        steps: int,
        batch: int,
        *,
        stays: dict[str, Tensor] | None = None,
        beside: dict[str, Tensor] | None = None,
        finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> dict[str, Tensor]:
        """Ask for a round and commit what `finish` makes of its mean.

        `stays` is what a site derives by itself from round to round, for those that may not have what it takes;
        `beside`, what is sent to be looked at, and is not trained.
        """
        started, replies, norms = time.monotonic(), [], dict[str, float]()
        strategy.hold(self._ceiling(phase), self._bound(phase))
        requests = self._requests(phase, weights | (beside or {}), number, steps, batch)
        if stays:
            whole = weights | stays
            requests = [
                replace(request, tensors=whole) if member.name not in self._in_step else request
                for member, request in zip(self.roster, requests, strict=True)
            ]
        taken = range(number * steps, (number + 1) * steps)
        bound = UpdateBound.of(self.recipe, phase, taken)

        def check(member: Member, reply: Reply) -> None:
            validation.check_counts(phase, reply, member, self.findings)
            fold = strategy.admit(reply)
            validation.check_update(reply.tensors, weights, frozen, bound)
            validation.check_history(reply, self.recipe, phase, taken)
            fold()
            if self.recipe.robust.clip is not None and reply.tensors:
                norms[member.name] = robust.norm(reply.tensors, weights)

        cohort = self._ask(requests, check, f"{phase}, round {number + 1}")
        for member, reply in cohort:
            replies.append(
                {
                    "site": member.name,
                    "bytes": arrays.payload_bytes(reply.tensors),
                    "images": reply.values["images"],
                    "labelled": reply.values["labelled"] if phase == "adapt" else [],
                    "history": reply.values["history"],
                }
            )
        weights = finish(strategy.result())
        told: Event = {"health": self.watch.look(number, taken.start, replies)} if phase == "pretrain" else {}
        if cohort.missing:
            told["missing"] = cohort.missing
        if strategy.ceiling.capped:
            told["capped"] = dict(strategy.ceiling.capped)
        if norms:
            told["norms"] = norms
            told["shortened"] = sorted(site for site, own in norms.items() if own > (strategy.bound or math.inf))
        self._in_step = {reply["site"] for reply in replies}
        sent = sum(arrays.payload_bytes(request.tensors) for request in requests)
        self._commit(phase, number, weights, started, replies, sent, told)
        return weights

    def _ceiling(self, phase: str) -> Ceiling:
        """By what the sites that are asked enrolled with."""
        asked = [member for member in self.roster if member.name not in self._behind]
        images = {member.name: member.values["train"] for member in asked}
        if phase == "pretrain":
            return Ceiling.of(images)
        labelled = {member.name: validation.labelled_of(member, self.findings) for member in asked}
        return Ceiling.of({name: min(images[name], sum(counts)) for name, counts in labelled.items()}, labelled)

    def _bound(self, phase: str) -> float | None:
        """Of an update's norm, by the round before."""
        before = self._rounds(phase)[-1:]
        return robust.bound(self.recipe.robust.clip, before[0].get("norms", {}).values() if before else ())

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

    def _adapt(self, backbone: dict[str, Tensor]) -> dict[str, Tensor]:
        config = self.recipe.adapt
        head_module = build_head(self.recipe, len(self.findings))
        done, head = self._last("adapt")
        self._features(backbone, first=head is None)
        if head is None:
            head = {name: tensor.clone() for name, tensor in head_module.state_dict().items()}
            if config.optimizer_state == "average":
                head |= zero_moments(head_module)
        moments = [f"{PREFIX}{name}.{key}" for name in head_module.row_parameters for key in ("exp_avg", "exp_avg_sq")]
        trained = {name for name, parameter in head_module.named_parameters() if parameter.requires_grad}
        frozen = set(head_module.state_dict()) - trained
        assert self.batches is not None
        for number in range(done, config.rounds):
            head = self._train_round(
                "adapt",
                FedAvg("adapt", head, len(self.findings), [*head_module.row_parameters, *moments]),
                head,
                frozen,
                number,
                config.local_steps,
                self.batches.adapt,
                finish=functools.partial(_at_step, (number + 1) * config.local_steps),
            )
        return {name: tensor for name, tensor in head.items() if not name.startswith(PREFIX)}

    def _features(self, backbone: dict[str, Tensor], *, first: bool) -> None:
        """Have the sites take the backbone and make their features of it, which stay there.

        Args:
            backbone: that the features are of.
            first: the run's features are not in its journal yet.
        """
        started = time.monotonic()
        requests = self._requests("features", backbone | self._first_file(backbone))
        cohort = self._ask(requests, lambda _, reply: validation.check_nothing(reply), "features")
        for _ in cohort:
            pass
        # Without this run's features a site may hold another run's: it has no part in what stands on them.
        self._behind = {one["site"] for one in cohort.missing}
        if first:
            self._record_features(started, len(requests) * arrays.payload_bytes(backbone), cohort.missing)

    def _record_features(self, started: float, down: int, missing: list[dict[str, str]]) -> None:
        event: Event = {"event": "features", "seconds": round(time.monotonic() - started, 3)}
        event["bytes"] = {"down": down, "up": 0}
        self._record(event | ({"missing": missing} if missing else {}))

    def _unscored(self) -> dict[str, str]:
        """Findings of which no site could train a row, with the reason."""
        rounds = self._rounds("adapt")
        if not rounds:
            return {}
        labelled = (map(cells.known, site["labelled"]) for site in rounds[-1]["sites"])
        totals = [sum(counts) for counts in zip(*labelled, strict=True)]
        reason = "not trained: no site has both classes among its training images"
        if len(self.roster) == 1:
            reason = f"not trained: {self.roster[0].name} has not both classes among its training images"
        return {finding: reason for finding, total in zip(self.findings, totals, strict=True) if not total}

    def _evaluate(self, model: dict[str, Tensor]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """The rows of results, and who gave none."""
        head = {name: tensor for name, tensor in model.items() if name.startswith("head.")}

        def check(member: Member, reply: Reply) -> None:
            validation.check_results(reply, member, self.findings)

        cohort = self._ask(self._requests("evaluate", head), check, "evaluate")
        rows = [row for _, reply in cohort for row in reply.values["results"]]
        return rows, cohort.missing


def _parted(recipe: Recipe, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What travels each round, and what stays: the teacher that every site derives by itself."""
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
        name: torch.full_like(tensor, step) if name.startswith(PREFIX) and name.endswith(".step") else tensor
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
