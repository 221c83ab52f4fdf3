"""The one function through which every reply leaves a site, errors included.

What may leave is declared here, phase by phase; anything else in a reply is refused, not dropped:
a reply that holds more than was agreed is a fault to be seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Message, RecordDict

from chexfound import wire
from chexfound.errors import ChexfoundError, PolicyError, StorageError
from chexfound.phases import Reply
from chexfound.pretrain.health import PROBE_FIGURES, STEP_FIGURES, problem

log = logging.getLogger("chexfound.client")

# Values that may leave, by phase.  Tensors: `pretrain` the student (teacher, Adam's moments), `adapt` the head.  Of
# `features` nothing does, no sum over images either.
VALUES: dict[str, frozenset[str]] = {
    "enrol": frozenset(
        {
            "site",
            "images",
            "patients",
            "train",
            "val",
            "test",
            "findings",
            "versions",
            "store_hmac",
            "cells",
            "withheld",
        }
    ),
    "pretrain": frozenset({"images", "state", "history"}),
    "features": frozenset(),
    "adapt": frozenset({"images", "labelled", "history"}),
    "evaluate": frozenset({"results"}),
    # The stages of secure aggregation: keys, sealed shares, signatures, and what is under masks.
    "advertise": frozenset({"advert"}),
    "share": frozenset({"context", "packets"}),
    "masked": frozenset({"context", "payload", "signature", "refused", "dealers"}),
    "consistency": frozenset({"signature"}),
    "unmask": frozenset({"shares", "refused", "dealers"}),
    # Arrays apart from their message: how many bytes of the coordinator's are here; and of a reply that passed here, in
    # its own phase, the bytes themselves.
    "deliver": frozenset({"size"}),
    "collect": frozenset(),
}
TENSORS: dict[str, tuple[str, ...]] = {
    "enrol": (),
    "pretrain": ("student.", "teacher.", "optimizer."),
    "features": (),
    "adapt": ("",),
    "evaluate": (),
    "advertise": (),
    "share": (),
    "masked": (),
    "consistency": (),
    "unmask": (),
    "deliver": (),
    "collect": (),
}

ROWS: dict[str, frozenset[str]] = {  # of the history
    "pretrain": frozenset({"step", "loss", "dino", "ibot", "koleo", "log_k", *STEP_FIGURES, *PROBE_FIGURES}),
    "adapt": frozenset({"step", "loss"}),
}


def admit(phase: str, reply: Reply) -> Reply:
    """Check a reply against what may leave in this phase: names, that every number is finite, and small cells.

    A probe's figures are of a site's own labelled patients; they leave only over `health.FEWEST_IMAGES` images
    or more, and the row says of how many.

    Raises: PolicyError.
    """
    if phase not in VALUES:
        raise PolicyError(f"{phase}: nothing may leave in a phase that is not known")
    odd = sorted(set(reply.values) - VALUES[phase])
    if odd:
        raise PolicyError(f"{phase}: the reply holds {odd[:3]}, which may not leave")
    if reply.masked and phase != "masked":
        raise PolicyError(f"{phase}: the reply holds masked arrays, which leave in their stage only")
    if reply.chunk is not None and phase != "collect":
        raise PolicyError(f"{phase}: the reply holds a part of another, which leaves only when that is collected")
    for name, tensor in reply.tensors.items():
        if not any(name.startswith(prefix) for prefix in TENSORS[phase]):
            raise PolicyError(f"{phase}: the reply holds the tensor {name!r}, which may not leave")
        if not bool(torch.isfinite(tensor).all()):
            raise PolicyError(f"{phase}: the tensor {name!r} is not finite")
    _check_numbers(phase, reply.values)
    if "history" in reply.values:
        _check_rows(phase, reply.values["history"])
    return reply


def _check_rows(phase: str, rows: Any) -> None:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PolicyError(f"{phase}: the history is not a list of rows")
    for row in rows:
        if odd := sorted(set(row) - ROWS[phase]):
            raise PolicyError(f"{phase}: a row of the history holds {odd[:3]}, which may not leave")
        if not all(isinstance(value, int | float) for value in row.values()):
            raise PolicyError(f"{phase}: a row of the history holds what is no number")
        if (name := problem(row)) is not None:
            raise PolicyError(f"{phase}: {name} in a row of the history cannot be, or is of too few images")


def _check_numbers(phase: str, value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(phase, item)
    elif isinstance(value, float) and not wire.finite(value):
        raise PolicyError(f"{phase}: a number in the reply is not finite")
    elif value is not None and not isinstance(value, str | int | float):
        raise PolicyError(f"{phase}: the reply holds a {type(value).__name__}, which is not a plain value")


def release(
    request: Message,
    phase: str,
    reply: Reply | BaseException,
    sign: Callable[[RecordDict], None] | None = None,
    keep: wire.Keep | None = None,
) -> Message:
    """Turn a reply, or what went wrong, into the message that leaves.

    An error leaves as a code only; its text, which may name patients or paths, goes to the site's
    own log.

    Args:
        request: which is answered.
        phase: that it is of.
        reply: or what went wrong.
        sign: puts the site's signature into the message.
        keep: may put the reply's arrays where they are collected from.
    """
    if isinstance(reply, Reply):
        try:
            content = wire.pack_reply(admit(phase, reply), keep)
            if sign is not None:
                sign(content)
            return Message(content, reply_to=request)
        except Exception as error:  # not even a fault in a reply may raise: Flower would send the text
            reply = error
    if isinstance(reply, ChexfoundError):
        log.error("phase=%s error=%s %s", phase, reply.code, reply)
        return wire.pack_error(reply, request)
    if isinstance(reply, OSError):
        log.error("phase=%s error=storage %s", phase, reply)
        return wire.pack_error(StorageError(), request)
    log.error("phase=%s error=internal", phase, exc_info=reply)
    return wire.pack_error(ChexfoundError(), request)
