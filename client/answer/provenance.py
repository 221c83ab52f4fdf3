"""Provenance of weights: a site takes those that its own recipe leads to from what it last accepted, and no others.

    HOME/weights/RUN/accepted.json     what was accepted last, in which round; and how far this site's own steps led
    HOME/weights/RUN/PHASE-ROUND.safetensors      the student and its teacher, or the head

RUN is the recipe's digest, since a run that is resumed has another number.  At a run's beginning the weights are those
that the recipe gives here, or those of a file that the site's operator approved (client/home/approval.py); in later
rounds they are within the box of the recipe's own steps (chexfound/pretrain/bounds.py); the features' backbone is
within one round of them, and pinned by its digest.  All that is written is there before the reply leaves.

The adversary is a coordinator that sends weights of its own making, to read images out of what comes back.  What it can
still do within the box: docs/threat-model.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chexfound.contract.request import MOMENTS, Reply, Request
from chexfound.durable.files import canonical
from chexfound.errors import CheckpointError, ConfigError, RefusedError, StateError
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.phases.site_state import Site
from chexfound.pretrain import beginning, positions, teacher
from chexfound.pretrain.bounds import UpdateBound, check_bounded, largest
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import curriculum
from chexfound.recipe.schema import Recipe
from chexfound.secagg import fixed
from client.answer import lineage
from client.answer.acceptance import Accepted, Shelf
from client.home import approval
from client.home.paths import named
from client.home.policy import Policy

log = logging.getLogger("chexfound.client")
STAND_ON_WEIGHTS = ("pretrain", "features", "adapt", "evaluate")
TOLERANCE = 1e-6  # of weights that both ends derive: other instructions of a processor give others by 5e-8
LIGHTEST = 0.01  # of all images, that a masked sum is over at least


@dataclass(kw_only=True)
class Held:
    """A request whose weights were held against what they may be.

    Args:
        request: as the phase takes it.
        name: digest of the weights that were derived here, in place of those sent; empty where none were.  With other
            last digits the same weights would have another digest, and a second sum on them could be opened.
        backbone: the same of the backbone that they stand on.
    """

    request: Request
    name: str = ""
    backbone: str = ""
    shelf: Shelf | None = None
    accepted: Accepted | None = None  # to be kept with the reply
    tensors: Mapping[str, Tensor] | None = None
    begins: bool = False

    def keep(self, reply: Reply) -> None:
        """Write what was accepted, and how far the site's own steps led from it; before the reply leaves."""
        if self.shelf is None or self.accepted is None:
            return
        if self.request.phase == "pretrain":
            self.accepted = replace(self.accepted, norms=_norms(reply.tensors, self.request.tensors))
        self.shelf.put(self.accepted, self.tensors, begins=self.begins)


def admit(site: Site, recipe: Recipe, request: Request, run: int, n: int = 0) -> Held:
    """Hold a request's weights against their lineage, before any image is touched; in a simulation, take all.

    Args:
        site: whose home has what was accepted.
        recipe: whose steps count, whatever the request says.
        request: with its tensors.
        run: Flower's number of it.  A run that is resumed has another, and may go back to its beginning.
        n: sites of the roster, where updates are summed under masks; else 0.

    Raises: RefusedError of `weights.…`, and of `policy.rate` for a recipe whose optimizer has no box.
    """
    if not site.lineage or request.phase not in STAND_ON_WEIGHTS:
        return Held(request=request)
    try:
        check_bounded(recipe)
    except ConfigError as error:
        raise RefusedError("policy.rate", str(error)) from error
    judge = _Judge(site, recipe, request, run, n)
    kinds = {"pretrain": judge.pretrain, "features": judge.features, "adapt": judge.adapt, "evaluate": judge.evaluate}
    return kinds[request.phase]()


class _Judge:
    """Judge the weights of one request."""

    def __init__(self, site: Site, recipe: Recipe, request: Request, run: int, n: int) -> None:
        self.site, self.recipe, self.policy, self.run = site, recipe, Policy.load(site.home), run
        self.shelf = Shelf.of(site, recipe)
        last = self.shelf.accepted
        self.last = last if last is not None and last.run == run else None  # of this very run
        if self.last is not None and self.last.place != request.roster_index:
            raise RefusedError("request.beyond", "another place in the roster than this run gave the site before")
        self.asked = hashlib.sha256(canonical(request.shared())).hexdigest()
        tensors = dict(request.tensors)
        self.file = tensors.pop(beginning.FILE, None)
        self.request = replace(request, tensors=tensors)
        self.tensors = tensors
        self.step = n / (fixed.levels(recipe.secagg.ring, n) * LIGHTEST) if n else 0.0  # fixed point's, over a range
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise RefusedError("request.tensors", "weights are float32, and nothing else")

    # -- phases

    def pretrain(self) -> Held:
        """The first weights, or those of a later round."""
        request = self.request
        _check_place(request, self.recipe.train.local_steps, self.recipe.pretrain_rounds)
        if not request.step:
            expected = self._beginning()
            self._load_file(expected)
            self._check_names(expected)
            self._check_equal(expected)
            name = checkpoint.digest({name: expected[name] for name in self.tensors})
            self._check_beginning("pretrain")
            last = self.shelf.accepted
            again = last is not None and last.sent == _digests(self.tensors)  # not a run more
            return self._held(_weights(self.tensors), begins=not again, name=name)
        self._no_file()
        accepted = self.shelf.accepted
        if accepted is not None and accepted.backbone:
            raise RefusedError("weights.backbone", "the run's features were made: its pretraining is over")
        if accepted is not None and accepted.round == request.round:
            return self._again(accepted)
        try:
            before, step = self._before(accepted, request.round, self._beginning)
            bound, entered = self._bound(before, step, request.step)
            self._check_names(entered | self._moments(entered))
            self._check_steps(bound, entered, self.tensors, accepted, request.round)
        except _Lost:
            return self._lost()
        bound.check_moments(self.tensors)
        warnings = self._second_look(accepted, entered)
        return self._held(self._with_derived_teacher(before, step), warnings=warnings)

    def features(self) -> Held:
        """The backbone that the features are to be of."""
        accepted, digest = self.shelf.accepted, checkpoint.digest(self.tensors)
        if accepted is not None and accepted.backbone == digest:
            return Held(request=self.request)
        if "pretrain" not in self.recipe.phases:
            return self._first_backbone(digest)
        self._no_file()
        if accepted is not None and accepted.backbone:
            raise RefusedError("weights.backbone")
        rounds, steps = self.recipe.pretrain_rounds, self.recipe.pretrain_steps
        whose = "student" if self.recipe.teacher.policy == "local" else "teacher"
        weights = checkpoint.add_prefix(self.tensors, f"{whose}.backbone.")
        try:
            before, step = self._before(accepted, rounds, self._beginning)
            bound, entered = self._bound(before, step, steps)
            self._check_names({n: t for n, t in entered.items() if n.startswith(f"{whose}.backbone.")}, weights)
            self._check_steps(bound, entered, weights, accepted, rounds)
        except _Lost:
            return self._lost(backbone=digest)
        return self._held({}, backbone=digest)

    def _first_backbone(self, digest: str) -> Held:
        """Take the backbone of a run that begins with it."""
        if self.last is not None:
            raise RefusedError("weights.backbone")
        expected = initial_weights(self.recipe)
        expected = positions.with_grid(expected, self.recipe.position_px // self.recipe.student.patch_size)
        self._load_file(expected)
        backbone = beginning.taken_backbone(expected)
        self._check_names(backbone)
        self._check_equal(backbone)
        return self._held({}, backbone=digest, begins=True, derived=checkpoint.digest(backbone))

    def adapt(self) -> Held:
        """The head, on the backbone that was pinned."""
        request, fresh = self.request, self._fresh_head()
        self._no_file()
        _check_place(request, self.recipe.adapt.local_steps, self.recipe.adapt.rounds)
        self._check_names(fresh)
        accepted = self._pinned()
        if accepted is None:
            return self._lost(backbone=self._present_backbone())
        if not request.step:
            self._check_equal(fresh)
            self._check_beginning("adapt")
            name = checkpoint.digest({name: fresh[name] for name in self.tensors})
            return self._on(accepted, name)
        own = accepted if accepted.phase == "adapt" else None
        if own is not None and own.round == request.round:
            return self._again(own)
        try:
            bound = self._check_head(self.tensors, fresh, own, request.round)
        except _Lost:
            return self._lost(backbone=accepted.backbone)
        bound.check_moments(self.tensors)
        return self._on(accepted)

    def evaluate(self) -> Held:
        """The finished head, on the backbone that was pinned; of a second, near one results are a second sum."""
        self._no_file()
        head = checkpoint.with_prefix(self.tensors, "head.")
        backbone = checkpoint.with_prefix(self.tensors, "backbone.")
        fresh = self._fresh_head()
        self._check_names(_weights(fresh), head)
        accepted = self._pinned()
        if accepted is None:
            return self._lost(backbone=self._present_backbone())
        if len(head) + len(backbone) < len(self.tensors):
            raise RefusedError("request.tensors", "other tensors than a head's")
        if backbone and checkpoint.digest(backbone) != accepted.backbone:
            raise RefusedError("weights.backbone")
        own = accepted if accepted.phase == "adapt" else None
        try:
            self._check_head(head, fresh, own, self.recipe.adapt.rounds)
        except _Lost:
            return self._lost(backbone=accepted.backbone)
        judged = checkpoint.digest(head)
        if accepted.judged not in ("", judged):
            raise RefusedError("weights.box", "another head than the one that this run's results are of")
        kept = replace(accepted, judged=judged)
        return Held(request=self.request, backbone=accepted.derived, shelf=self.shelf, accepted=kept)

    # -- what they stand on

    def _check_beginning(self, phase: str) -> None:
        """Check that a phase begins once in a run: who goes back may go on from there to other weights than before.

        Raises: RefusedError.
        """
        last = self.last
        if last is None or (phase == "adapt" and last.phase != "adapt"):
            return
        if last.phase != phase or last.round or last.judged or (phase == "pretrain" and last.backbone):
            raise RefusedError("weights.box", f"this run has begun its {phase} here already, and went on")
        self._check_same(last)

    def _check_same(self, accepted: Accepted) -> None:
        """Check that a round which comes again asks the same, of the same weights.

        Raises: RefusedError.
        """
        if any(accepted.sent.get(whose) != digest for whose, digest in _digests(self.tensors).items()):
            raise RefusedError("weights.box", f"other weights than it accepted for round {accepted.round + 1}")
        if accepted.asked != self.asked:
            raise RefusedError("request.beyond", f"another question than it answered in round {accepted.round + 1}")

    def _beginning(self) -> dict[str, Tensor]:
        """Give what the recipe begins with, with a teacher wherever there is one for all sites."""
        weights = initial_weights(self.recipe)
        return weights if self.recipe.teacher.policy == "local" else _with_teacher(weights)

    def _before(
        self, accepted: Accepted | None, number: int, begin: Callable[[], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], int]:
        """Give what was accepted last, and its global step; where the run began not long ago, what it began with.

        Raises: RefusedError; _Lost.
        """
        missed = number - (0 if accepted is None else accepted.round + 1)
        if missed < 0:
            raise RefusedError("weights.box", f"round {number + 1} is behind what this site accepted")
        if missed > self.policy.max_missed_rounds:
            if self.shelf.accepted is None:
                raise _Lost
            raise RefusedError("weights.missed", f"{missed} rounds passed without this site")
        if accepted is None:
            return begin(), 0
        try:
            before = self.shelf.tensors(accepted)
        except CheckpointError as error:
            raise _Lost from error
        rederived = self.recipe.teacher.policy == "rederive"
        return _with_teacher(before) if rederived and not accepted.step else before, accepted.step

    def _check_steps(
        self,
        bound: UpdateBound,
        entered: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        accepted: Accepted | None,
        number: int,
    ) -> None:
        """Hold a student and its teacher against the box.

        Raises: RefusedError; _Lost where that is of the recipe's own beginning, and the run's may have been a file.
        """
        rounds = number - (0 if accepted is None else accepted.round)
        rounding = {name: self.step * rounds * bound.largest(name, entered) for name in weights if name in entered}
        try:
            bound.check(weights, entered, beginning.frozen_gains(self.recipe, weights), rounding)
        except RefusedError as error:
            if accepted is None:
                raise _Lost from error
            raise

    def _pinned(self) -> Accepted | None:
        """Give what was accepted last, of a run whose backbone is here; none if all that was lost.

        Raises: RefusedError.
        """
        accepted = self.shelf.accepted
        if accepted is not None and not accepted.backbone:
            raise RefusedError("weights.backbone", "the features of this run were not made here")
        if accepted is not None and self._present_backbone() != accepted.backbone:
            raise RefusedError("weights.backbone", "the backbone on this site's disk is another run's by now")
        return accepted

    def _present_backbone(self) -> str:
        try:
            return lineage.backbone_digest(self.site)
        except RefusedError as error:
            raise RefusedError("weights.backbone", "there is no backbone here yet") from error

    def _moments(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shapes of the moments that travel."""
        if self.recipe.train.optimizer_state != "average" or self.recipe.optim.optimizer != "adamw":
            return {}
        students = checkpoint.with_prefix(weights, "student.")
        trained = set(students) - beginning.frozen_gains(self.recipe, students)
        keys = ("exp_avg", "exp_avg_sq")
        found = {f"{MOMENTS}{name}.{key}": students[name] for name in trained for key in keys}
        return found | {f"{MOMENTS}{name}.step": torch.zeros(()) for name in trained}

    def _bound(self, before: dict[str, Tensor], start: int, stop: int) -> tuple[UpdateBound, dict[str, Tensor]]:
        """The box of all steps from what was accepted, and that in the stage where they end."""
        entered = before
        for step in range(start, stop + 1, self.recipe.train.local_steps):
            entered = positions.enter(entered, self.recipe, step)
        resized = curriculum.index_at(self.recipe, stop) - curriculum.index_at(self.recipe, start)
        return UpdateBound.of(self.recipe, "pretrain", range(start, stop), resized=resized), entered

    def _fresh_head(self) -> dict[str, Tensor]:
        head = build_head(self.recipe, len(self.request.findings))
        state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        return state | (zero_moments(head) if self.recipe.adapt.optimizer_state == "average" else {})

    def _with_derived_teacher(self, before: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Give what to keep of this round: the teacher too where there is one for all sites, as it is here."""
        kept = _weights(self.tensors)
        if self.recipe.teacher.policy != "rederive" or any(name.startswith("teacher.") for name in kept):
            return kept
        if self.request.step - step == self.recipe.train.local_steps:
            return kept | teacher.rederived(self.recipe, self.request.step, before, kept)
        return kept  # the phase itself asks for it

    # -- checks

    def _load_file(self, expected: dict[str, Tensor]) -> None:
        """Put the file that came with the weights in place of what is drawn, if the operator approved it."""
        if self.file is None:
            return
        if self.file.dtype != torch.uint8 or self.file.ndim != 1:
            raise RefusedError("request.tensors", "a weights file is bytes")
        beginning.check_size(self.file.nbytes, expected)
        content = self.file.numpy().tobytes()
        self._approved(hashlib.sha256(content).hexdigest(), "weights.file")
        beginning.load_backbone(expected, content)

    def _approved(self, digest: str, code: str) -> None:
        if digest in approval.approved_weights(self.site.home):
            return
        approval.keep_weights(self.site.home, digest, code)
        look = f"chexfound-client approve --weights {digest[:12]}{named(self.site.name)}"
        raise RefusedError(code, f"the weights {digest} were not approved here; to do so: {look}")

    def _no_file(self) -> None:
        if self.file is not None:
            raise RefusedError("request.tensors", "a weights file comes with a run's first weights only")

    def _check_names(self, expected: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> None:
        """Check that all tensors are there, of their shapes, and no others; sites may derive the teacher themselves."""
        given = self.tensors if given is None else given
        derived = self.recipe.teacher.policy == "rederive" and self.request.phase == "pretrain"
        missing = sorted(n for n in set(expected) - set(given) if not (derived and n.startswith("teacher.")))
        if odd := sorted(set(given) - set(expected)):
            raise RefusedError("request.tensors", f"{len(odd)} that the recipe does not have: {odd[:3]}")
        if missing:
            raise RefusedError("request.tensors", f"{len(missing)} are missing: {missing[:3]}")
        if wrong := [name for name, tensor in given.items() if tensor.shape != expected[name].shape]:
            raise RefusedError("request.tensors", f"{wrong[0]!r} is of another shape")

    def _check_equal(self, expected: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            if name in expected:
                own = expected[name]
                if own.dtype != torch.float32:
                    raise ConfigError(f"{name!r} is derived in {own.dtype}; this process's default must be float32")
                if not float((tensor - own).abs().max() if own.numel() else 0.0) <= TOLERANCE * max(1.0, largest(own)):
                    raise RefusedError("weights.initial", f"{name!r} is not what the recipe begins with here")
            elif not bool(tensor.isfinite().all()):
                raise RefusedError("weights.initial", f"{name!r} holds a value that is not finite")

    def _check_head(
        self, head: Mapping[str, Tensor], fresh: Mapping[str, Tensor], own: Accepted | None, number: int
    ) -> UpdateBound:
        before, step = self._before(own, number, lambda: dict(fresh))
        bound = UpdateBound.of(self.recipe, "adapt", range(step, number * self.recipe.adapt.local_steps))
        module = build_head(self.recipe, len(self.request.findings))
        frozen = set(module.state_dict()) - {name for name, p in module.named_parameters() if p.requires_grad}
        weights = _weights(head)
        rounds = number - (0 if own is None else own.round)
        bound.check(weights, before, frozen, {n: self.step * rounds * bound.largest(n, before) for n in weights})
        return bound

    def _second_look(self, accepted: Accepted | None, entered: Mapping[str, Tensor]) -> list[str]:
        """Warnings, where the model moved further than this site's own steps make likely.

        Raises: RefusedError if the policy says so.
        """
        if accepted is None or not accepted.norms or accepted.norms[""] == 0:
            return []
        limits, rounds = self.policy.weights, self.request.round - accepted.round
        fitting = {n: t for n, t in self.tensors.items() if n.startswith("student.") and not n.endswith("pos_embed")}
        moved = _norms(fitting, entered)
        found = []
        if moved[""] > limits.max_change * rounds * accepted.norms[""]:
            found.append(f"round {self.request.round + 1}: all weights, {moved[''] / accepted.norms['']:.2f} times")
        for name, norm in moved.items():
            own = accepted.norms.get(name, 0.0)
            if name and own > 0 and norm > limits.max_tensor_change * rounds * own:
                found.append(f"round {self.request.round + 1}: {name}, {norm / own:.2f} times")
        for text in found[:3]:
            log.warning("event=warning what=%r", f"the global model moved further than this site's own steps: {text}")
        if found and limits.refuse_change:
            raise RefusedError("weights.change", found[0])
        return found[:3]

    # -- outcomes

    def _again(self, accepted: Accepted) -> Held:
        """A round that is asked for again, with the same weights."""
        self._check_same(accepted)
        kept = replace(accepted, run=self.run, place=self.request.roster_index)
        return Held(request=self.request, backbone=accepted.derived, shelf=self.shelf, accepted=kept)

    def _on(self, accepted: Accepted, name: str = "") -> Held:
        """A head, on the backbone that was pinned."""
        return self._held(_weights(self.tensors), backbone=accepted.backbone, derived=accepted.derived, name=name)

    def _lost(self, backbone: str = "") -> Held:
        """Go on by the operator's word alone: what was accepted is gone."""
        if self.recipe.teacher.policy == "rederive" and self.request.phase == "pretrain":
            if not any(name.startswith("teacher.") for name in self.tensors):
                raise StateError(
                    f"site {self.site.name!r}: what round {self.request.round} began with is not on its disk; resume "
                    "the run, which sends the teacher once"
                )
        self._approved(checkpoint.digest(self.tensors), "weights.lost")
        if self.request.phase == "evaluate":
            return Held(request=self.request)
        return self._held(_weights(self.tensors) if self.request.phase != "features" else {}, backbone=backbone)

    def _held(
        self,
        kept: Mapping[str, Tensor],
        *,
        backbone: str = "",
        derived: str = "",
        begins: bool = False,
        name: str = "",
        warnings: list[str] | None = None,
    ) -> Held:
        before = self.shelf.accepted
        earlier = [] if begins or before is None else before.warnings
        accepted = Accepted(
            phase=self.request.phase,
            round=self.request.round,
            step=self.request.step,
            sent=_digests({**kept, **self.tensors}),
            backbone=backbone,
            derived=derived,
            run=self.run,
            place=self.request.roster_index,
            asked=self.asked,
            warnings=[*earlier, *(warnings or [])][-10:],
        )
        return Held(
            request=self.request,
            name=name,
            backbone=derived,
            shelf=self.shelf,
            accepted=accepted,
            tensors=kept,
            begins=begins,
        )


class _Lost(Exception):  # noqa: N818 (no error: the operator's word may stand in its place)
    """Say that what was accepted is not on the disk."""


def _check_place(request: Request, local_steps: int, rounds: int) -> None:
    """Raise RefusedError unless a request's round is one of the recipe's, with its steps."""
    if (request.step, request.steps) != (request.round * local_steps, local_steps) or request.round >= rounds:
        raise RefusedError("request.beyond", f"steps {request.step} + {request.steps} are no round of the recipe")


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTS)}


def _with_teacher(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the teacher that equals the student, where none was kept: at a run's beginning."""
    students = {name: tensor for name, tensor in weights.items() if name.startswith("student.")}
    return {name.replace("student.", "teacher.", 1): tensor for name, tensor in students.items()} | dict(weights)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest of each part of what was sent, which are not always sent together."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        whose = name.split(".")[0]
        parts.setdefault(whose if whose in ("student", "teacher", "optimizer") else "head", {})[name] = tensor
    return {whose: checkpoint.digest(part) for whose, part in parts.items()}


def _norms(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 norms of a student's change, by tensor, and of all of it under the empty name."""
    norms = {
        name: float(torch.linalg.vector_norm(tensor - before[name]))
        for name, tensor in after.items()
        if name.startswith("student.") and not name.endswith("pos_embed")
    }
    return {"": sum(norm * norm for norm in norms.values()) ** 0.5} | norms
