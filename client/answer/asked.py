"""A request, held against the recipe of its own run: no more steps, other tensors or sizes than that describes.

All of it is judged from what a message says, before memory is taken for what it holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from chexfound.contract.detached import Envelope
from chexfound.contract.limits import Limits
from chexfound.contract.request import PartRequest, Request
from chexfound.errors import ProtocolError, RefusedError
from chexfound.model import vit
from chexfound.model.glori import build_head
from chexfound.phases import dispatch
from chexfound.pretrain.beginning import BESIDE, FILE, TIMES
from chexfound.pretrain.meta_arch import build_student
from chexfound.pretrain.optimizer import zero_moments
from chexfound.recipe import curriculum
from chexfound.recipe.schema import Adapt, Recipe, Train
from chexfound.wire.envelopes import LARGEST

Shapes = dict[str, tuple[int, ...]]
BEGIN = ("enrol", "counts")  # asked in every run, whatever its phases
RESTS_ON = {"features": "adapt"}  # the recipe's phase that another is part of


def check(recipe: Recipe, envelope: Envelope[Request], limits: Limits, n_sites: int | None) -> None:
    """Check that a request asks for what its recipe has: phase, round, steps, images, findings and tensors.

    Args:
        recipe: of the run.
        envelope: of the request, whose arrays may still be apart from it.
        limits: of the site.
        n_sites: of the federation, where it is known.

    Raises: RefusedError; ProtocolError for a phase that there is not.
    """
    request = envelope.message
    if request.phase not in dispatch.PHASES:
        raise ProtocolError(f"unknown phase {request.phase!r}")
    _check_work(recipe, request, limits, n_sites)
    named = recipe.adapt.findings
    if named is not None and request.phase not in BEGIN and (odd := sorted(set(request.findings) - set(named))):
        raise _beyond(f"{len(odd)} findings that its recipe does not name")
    if isinstance(request, PartRequest):
        _check_part(recipe, request)
    elif request.kind in (request.phase, "masked"):
        check_tensors(recipe, envelope)
    elif request.tensors or envelope.detached is not None:
        raise RefusedError("request.tensors", f"tensors in the stage {request.kind}, which takes none")


def _is_share(recipe: Recipe, config: Train | Adapt, batch: int, most: int) -> bool:
    """Whether a site of min_sites to `most` may be dealt so many images of the pooled batch."""
    pooled = config.pooled_batch_size or 0
    if config.deal == "by_size":
        return 0 < batch <= pooled
    sites = range(min(recipe.federation.min_sites, most), min(most, pooled) + 1)
    return any(batch in (pooled // n, -(-pooled // n)) for n in sites)


def _beyond(text: str) -> RefusedError:
    return RefusedError("request.beyond", text)


def _check_work(recipe: Recipe, request: Request, limits: Limits, n_sites: int | None) -> None:
    phase = RESTS_ON.get(request.phase, request.phase)
    if phase not in (*BEGIN, *recipe.phases):
        raise _beyond(f"the phase {request.phase}, and its recipe has {', '.join(recipe.phases)}")
    rounds = recipe.rounds.get(request.phase, 0)  # none of features, whose work is one pass
    if not rounds:
        if request.round or request.step or request.steps or request.batch_size:
            raise _beyond(f"rounds, steps or images a step of {request.phase}, which has none")
        return
    config = recipe.train if request.phase == "pretrain" else recipe.adapt
    steps = config.local_steps
    if request.steps != steps or request.round >= rounds or request.step != request.round * steps:
        raise _beyond(
            f"{request.steps} steps from {request.step} on in round {request.round + 1}, and its recipe has {rounds} "
            f"rounds of {steps}"
        )
    if request.phase == "pretrain":
        config = curriculum.at(recipe, request.step)[0].train
    pooled, batch = config.pooled_batch_size, request.batch_size
    if not (batch == config.batch_size if pooled is None else _is_share(recipe, config, batch, n_sites or LARGEST)):
        raise _beyond(f"{batch} images a step, which is no site's share of its recipe's {pooled or config.batch_size}")
    key = "min_batch" if batch < limits.min_batch else "max_batch"
    if not limits.min_batch <= batch <= limits.max_batch:
        raise RefusedError("policy.work", f"{batch} images a step; site.yaml says '{key}: {getattr(limits, key)}'")


# -- tensors


def check_tensors(recipe: Recipe, envelope: Envelope[Request]) -> None:
    """Check that a request has the tensors of its recipe's model, and no others; by names, dtypes and shapes.

    Raises: RefusedError.
    """
    request = envelope.message
    must, may = expected(recipe, request)
    given = dict(forms(envelope))
    _check_file(recipe, request, given.pop(FILE, None))
    if lacking := [name for name in must if name not in given]:
        raise RefusedError("request.tensors", f"{request.phase}: {len(lacking)} lack, {lacking[0]!r} for one")
    groups = [group for group in may if any(name in given for name in group)]
    known = must | {name: shape for group in groups for name, shape in group.items()}
    if len(given) != len(known):
        odd = next((name for name in (*given, *known) if (name in given) != (name in known)), "")
        raise RefusedError("request.tensors", f"{request.phase}: {len(given)}, not {len(known)}; see {odd[:200]!r}")
    for name, shape in known.items():
        if given.get(name) != ("float32", shape):
            raise RefusedError("request.tensors", f"{request.phase}: {name!r} is {given.get(name)}, not {shape}")


def _check_file(recipe: Recipe, request: Request, form: tuple[str, tuple[int, ...]] | None) -> None:
    """Check that a weights file comes with a run's first weights only, and is no larger than their model makes one."""
    if form is None:
        return
    dtype, shape = form
    if not (dtype == "uint8" and len(shape) == 1 and shape[0] <= _file_bytes(recipe, request)):
        raise RefusedError("request.tensors", f"{request.phase}: a weights file of {form}, where none of it can be")


def _file_bytes(recipe: Recipe, request: Request) -> int:
    """How large a weights file may be that comes with a request: none, but with the first of its run."""
    first = request.phase == "features" and "pretrain" not in recipe.phases
    first = first or (request.phase == "pretrain" and not request.step)
    return TIMES * nbytes(expected(recipe, request)[0]) + BESIDE if first else 0


def forms(envelope: Envelope[Request]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a request, which may still be apart from it.

    Raises: RefusedError if they are not of the arrays that are to come.
    """
    apart = envelope.detached
    if apart is None:
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in envelope.message.tensors.items()
        }
    given = {name: (dtype, tuple(shape)) for name, dtype, shape in apart.table}
    arrays: dict[str, int] = {}
    for dtype, shape in given.values():
        arrays[dtype] = arrays.get(dtype, 0) + math.prod(shape) * (1 if dtype == "uint8" else 4)
    if len(given) != len(apart.table) or dict(apart.arrays) != arrays:
        raise RefusedError("request.tensors", "a table that is not of the arrays which come apart from it")
    return given


def expected(recipe: Recipe, request: Request) -> tuple[Shapes, list[Shapes]]:
    """The shapes of what a request must bring, and of groups that it may bring, each as a whole or not at all."""
    if request.phase == "pretrain":
        student, moments = _student(curriculum.at(recipe, request.step)[0])
        must = _under("student.", student)
        averaged = recipe.train.optimizer_state == "average" and recipe.optim.optimizer == "adamw"
        must |= moments if averaged else {}
        teacher = _under("teacher.", student)
        if recipe.teacher.policy == "average":
            return must | teacher, []
        return must, [teacher] if recipe.teacher.policy == "rederive" else []
    if request.phase == "features":
        return _backbone(recipe), []
    if request.phase in ("adapt", "evaluate"):
        head, moments = _head(recipe, len(request.findings))
        if request.phase == "evaluate":
            return _under("head.", head), []
        return head | (moments if recipe.adapt.optimizer_state == "average" else {}), []
    return {}, []


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@functools.lru_cache(maxsize=8)
def _student(stage: Recipe) -> tuple[Shapes, Shapes]:
    """Give the shapes of student and moments; no memory is taken for their values."""
    with torch.device("meta"):
        student = build_student(stage)
        return _shapes(student.state_dict()), _shapes(zero_moments(student))


@functools.lru_cache(maxsize=8)
def _backbone(recipe: Recipe) -> Shapes:
    with torch.device("meta"):
        return _shapes(vit.build(recipe.student, recipe.input, recipe.position_px).state_dict())


@functools.lru_cache(maxsize=8)
def _head(recipe: Recipe, n_findings: int) -> tuple[Shapes, Shapes]:
    with torch.device("meta"):
        head = build_head(recipe, n_findings)
        return _shapes(head.state_dict()), _shapes(zero_moments(head))


def nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the bytes of float32 tensors of these shapes."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def model_bytes(recipe: Recipe) -> int:
    """The largest model of a run, with its heads: one that only adapts derives them too, to see what it begins with."""
    return max(nbytes(_student(stage)[0]) for stage in curriculum.stages(recipe))


def _check_part(recipe: Recipe, request: PartRequest) -> None:
    """Check that no more is delivered than the request that it is for can bring."""
    if request.stage != "deliver":
        return
    must, may = expected(recipe, request)
    most, size = nbytes(must) + sum(map(nbytes, may)) + _file_bytes(recipe, request), request.params.get("size")
    if not isinstance(size, int) or size > most:
        raise RefusedError("request.tensors", f"{size!r} bytes are to be delivered, and its recipe's are {most}")
