"""The one function through which every reply leaves a site, errors included.

What may leave is declared: the values in client/answer/declared.py, phase by phase; the tensors by the request, of
which the recipe says which come back.  Anything else in a reply is refused, not dropped: a reply that holds more than
was agreed is a fault to be seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message, RecordDict

from chexfound.contract import cells
from chexfound.contract.limits import Tensors
from chexfound.contract.request import MOMENTS, PartReply, Reply, Request
from chexfound.errors import ChexfoundError, DataError, PolicyError, ProtocolError, StorageError
from chexfound.evaluate.histograms import BINS
from chexfound.parsing.names import is_name
from chexfound.phases import parted
from chexfound.pretrain.health.measures import problem
from chexfound.recipe.schema import Recipe
from chexfound.wire import arrays, envelopes, error_replies
from client.answer import declared

log = logging.getLogger("chexfound.client")
CLEAR = ("pretrain", "adapt", "evaluate")  # phases whose replies are one site's own
FIGURES = 64  # sections of a step's figures, and of counts, in a masked array; more than there are


@dataclass(kw_only=True)
class Gate:
    """Hold what was asked of a site, by which its reply is judged.

    Args:
        recipe: of the run.
        request: that is answered; its tensors are known by `sent`.
        sent: dtype and shape of each tensor that it brought.
        site: whose name may leave.
        peers: the sites of its federation.
        tensors: what its policy lets leave; None (a simulation): all.
        words: names of findings that may leave; None (a simulation): all.
    """

    recipe: Recipe
    request: Request
    sent: Mapping[str, tuple[str, tuple[int, ...]]]
    site: str
    peers: frozenset[str] = frozenset()
    tensors: Tensors | None = None
    words: frozenset[str] | None = None

    def admit(self, phase: str, reply: Reply) -> Reply:
        """Check a reply against what may leave in this phase: all of it, to the last key, and that nothing lacks.

        Raises: PolicyError.
        """
        if phase not in declared.KINDS:
            raise PolicyError(f"{phase}: nothing may leave in a phase that is not known")
        self._check_arrays(phase, reply)
        try:
            values = declared.read(phase, reply.values)
        except (ProtocolError, AttributeError, TypeError) as error:
            raise PolicyError(f"{phase}: the reply holds values which may not leave ({error})") from error
        if self.recipe.aggregation == "secagg" and (phase in CLEAR or isinstance(values, declared.Counted)):
            raise PolicyError(f"{phase}: a reply in the clear, of a run whose figures leave under masks only")
        self._check_words(phase, values)
        if phase in ("pretrain", "adapt"):
            self._check_history(phase, reply, values)
        if phase == "adapt" and len(values.labelled) != len(self.request.findings):
            raise PolicyError("adapt: the reply counts other findings than were asked for")
        if phase == "evaluate" and [row.finding for row in values.results] != list(self.request.findings):
            raise PolicyError("evaluate: the results are not of the findings that were asked for")
        return reply

    # -- arrays

    def _check_arrays(self, phase: str, reply: Reply) -> None:
        if reply.masked and phase != "masked":
            raise PolicyError(f"{phase}: the reply holds masked arrays, which leave in their stage only")
        if isinstance(reply, PartReply) and phase != "collect":
            raise PolicyError(f"{phase}: the reply holds a part of another, which leaves only when that is collected")
        expected = self._leaving(phase, reply)
        if odd := declared.strangers(map(str, reply.tensors), expected):
            raise PolicyError(f"{phase}: the reply holds the tensor {odd[0]!r}, which may not leave")
        if missing := declared.strangers(expected, reply.tensors):
            raise PolicyError(f"{phase}: the reply lacks the tensor {missing[0]!r}")
        for name, tensor in reply.tensors.items():
            if _form(tensor) != expected[name]:
                raise PolicyError(f"{phase}: the tensor {name!r} is {_form(tensor)}, and {expected[name]} may leave")
            if not bool(torch.isfinite(tensor).all()):
                raise PolicyError(f"{phase}: the tensor {name!r} is not finite")
        if reply.masked:
            self._check_masked(reply)

    def _leaving(self, phase: str, reply: Reply) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of the tensors that leave."""
        images = reply.values.get("images") if isinstance(reply.values, dict) else None
        if phase == "pretrain":
            kinds = ["student."] + ["teacher."] * (self.recipe.teacher.policy == "average")
            kinds += [MOMENTS] * (self.recipe.train.optimizer_state == "average")
            found = {name: form for name, form in self.sent.items() if name.startswith(tuple(kinds))}
        elif phase == "adapt" and images not in (0, cells.SUPPRESSED):
            averaged = self.recipe.adapt.optimizer_state == "average"
            found = {name: form for name, form in self.sent.items() if averaged or not name.startswith(MOMENTS)}
        else:
            return {}
        if self.tensors is not None and (odd := {_kind(phase, name) for name in found} - set(self.tensors)):
            raise PolicyError(f"{phase}: {', '.join(sorted(odd))} may not leave, by the tensors of site.yaml")
        return found

    def _check_masked(self, reply: Reply) -> None:
        """Arrays of whole numbers, and no more than the sections of what is summed can have."""
        for ring, array in reply.masked.items():
            if ring not in arrays.RINGS or array.dtype.name != f"uint{ring}" or array.ndim != 1:
                raise PolicyError("masked: the reply holds an array that is not of a ring")
        most = sum(math.prod(shape) + 1 for _, shape in self.sent.values())  # and how many of them were clipped
        most += FIGURES * (1 + self.request.steps) + len(self.request.findings) * (2 * BINS + FIGURES)
        if (size := sum(array.size for array in reply.masked.values())) > most:
            raise PolicyError(f"masked: the reply holds {size} numbers under masks, and {most} are the most of its sum")

    # -- words and rows

    def _check_words(self, phase: str, values: Any) -> None:
        """Check that names are this site's, its peers', or of findings that were asked for or may be told."""
        sites: Iterable[str] = ()
        findings: Iterable[str] = ()
        known: Iterable[str] = self.request.findings
        if phase == "enrol":
            sites, findings = [values.site], getattr(values, "findings", ())
            known = findings if self.words is None else self.words
        elif phase == "advertise":
            sites, findings = [values.advert.site], values.advert.findings
            known = parted.parted(self.recipe, self.request)
        elif phase == "evaluate":
            sites = [row.tested_on for row in values.results]
        elif phase == "share":
            sites = [packet.dealer for packet in values.packets]
        if declared.strangers(sites, [self.site]):
            raise PolicyError(f"{phase}: the reply has another site's name, or a word in its place")
        if declared.strangers(findings, known):
            raise PolicyError(f"{phase}: the reply names a finding that may not leave")
        if not all(is_name(name) or name in self.request.findings for name in findings):
            raise PolicyError(f"{phase}: the reply names a finding by what is no name")
        peers = [*getattr(values, "dealers", ()), *getattr(values, "shares", ())]
        peers += [packet.holder for packet in getattr(values, "packets", ())]
        if isinstance(values, declared.Blaming) and not declared.refusal(values.refused):
            raise PolicyError(f"{phase}: the reply refuses with a word that is none of ours")
        if declared.strangers(peers, self.peers):
            raise PolicyError(f"{phase}: the reply names who is not in the federation")

    def _check_history(self, phase: str, reply: Reply, values: Any) -> None:
        """A row for each step, of figures that can be, and a probe's over `health.FEWEST_IMAGES` images or more."""
        steps = range(self.request.step, self.request.step + self.request.steps)
        if [row.step for row in values.history] != list(steps if reply.tensors else ()):
            raise PolicyError(f"{phase}: the history is not a row for each step that was asked for")
        if phase == "pretrain":
            _check_figures(values.history, reply.values["history"], self.recipe)


def _check_figures(rows: Sequence[declared.Step], given: Sequence[Mapping[str, Any]], recipe: Recipe) -> None:
    log_k = math.log(recipe.dino.head_n_prototypes)
    for row, keys in zip(rows, given, strict=True):
        figures = {name: value for name, value in keys.items() if not isinstance(value, str)}
        if (name := problem(figures)) is not None:
            raise PolicyError(f"pretrain: {name} in a row of the history cannot be, or is of too few images")
        if abs(row.log_k - log_k) > 1e-6:
            raise PolicyError("pretrain: log_k in a row of the history is not the recipe's")


def _form(tensor: Any) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape; None for what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _kind(phase: str, name: str) -> str:
    """Which of site.yaml's `tensors` a tensor is."""
    if name.startswith(MOMENTS):
        return "optimizer"
    return name.split(".")[0] if phase == "pretrain" else "head"


def release(
    request: Message,
    phase: str,
    reply: Reply | BaseException,
    gate: Gate | None = None,
    sign: Callable[[RecordDict], None] | None = None,
    keep: envelopes.Keep | None = None,
) -> Message:
    """Turn a reply, or what went wrong, into the message that leaves.

    An error leaves as a code only; its text goes to the site's own log, and to a file of the site where it may name
    patients or paths (`logs.REASONS`).

    Args:
        request: which is answered.
        phase: that it is of.
        reply: or what went wrong.
        gate: that a reply has to pass; without one none does.
        sign: puts the site's signature into the message.
        keep: may put the reply's arrays where they are collected from.
    """
    if isinstance(reply, Reply):
        try:
            if gate is None:
                raise PolicyError(f"{phase}: a reply to what was never understood")
            content = envelopes.pack_reply(gate.admit(phase, reply), keep)
            if sign is not None:
                sign(content)
            return Message(content, reply_to=request)
        except Exception as error:  # not even a fault in a reply may raise: Flower would send the text
            reply = error
    if isinstance(reply, ChexfoundError):
        of_images = isinstance(reply, DataError) or isinstance(reply.__cause__, DataError)
        told = {"told": f"phase={phase} error={reply.code}"} if of_images else None
        log.error("phase=%s error=%s %s", phase, reply.code, reply, extra=told)
        return error_replies.pack_error(reply, request)
    if isinstance(reply, OSError):
        log.error("phase=%s error=storage %s", phase, reply, extra={"told": f"phase={phase} error=storage"})
        return error_replies.pack_error(StorageError(), request)
    told = {"told": f"phase={phase} error=internal {type(reply).__name__}"}
    log.error("phase=%s error=internal", phase, exc_info=reply, extra=told)
    return error_replies.pack_error(ChexfoundError(), request)
