"""The ClientApp: one way in, `phases.run`, one way out.  It never raises."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from chexfound import logs, parts, phases, recipe, wire
from chexfound.errors import CodeError, ProtocolError
from chexfound.parts import Laid
from chexfound.phases import Reply, Request
from chexfound.secagg.messages import STAGES
from client import egress, membership, secure, site, weights
from client.parts import Parts

log = logging.getLogger("chexfound.client")
PHASES = {message_type: phase for phase, message_type in wire.MESSAGE_TYPES.items()}

app = ClientApp()


def handle(message: Message, context: Context, *, spend: bool = False) -> Message:
    """Answer one message; whatever goes wrong, the answer is a code.

    Args:
        message: from outside.
        context: of the node, as Flower has it.
        spend: let go of the message's arrays once they are read, so that they are there once while the site works.
    """
    phase = PHASES.get(message.metadata.message_type, "unknown")
    outcome: Reply | BaseException
    sign = keep = None
    try:
        if "home" not in context.node_config:  # a simulated site has one, and the simulation its own display
            logs.show()
            site.on_progress = site.on_progress or logs.Steps(log)
        request = _admitted(message, context, phase)
        if spend:
            message.content.clear()
        sign = _signer(message, context, request)
        outcome = _answer(context, request, message.metadata.run_id)
        if request.part_bytes:
            keep = functools.partial(_kept, _parts(context, message.metadata.run_id), request.part_bytes)
    except Exception as error:  # noqa: BLE001 (nothing of an exception may leave: Flower would send its text)
        outcome = error
    return egress.release(message, phase, outcome, sign, keep)


def _admitted(message: Message, context: Context, phase: str) -> Request:
    """The request, once its code, release and sites are what this site approved; before any data is touched."""
    if refusal := context.run_config.get("refused"):
        raise CodeError(str(refusal))
    sites = wire.unpack_terms(message.content)
    home = site.member_home(context.node_config)
    if home is not None:
        membership.check_terms(sites, membership.present(home))
    request = wire.unpack_request(message.content)
    if request.stage in STAGES:
        membership.check_equal(sites, None if home is None else membership.present(home))
    if (request.stage or request.phase) != phase:
        raise ProtocolError(f"a {message.metadata.message_type!r} message asks for phase {request.phase!r}")
    if request.apart is not None:
        request = wire.with_arrays(request, _parts(context, message.metadata.run_id).received(request.apart))
    return request


def _parts(context: Context, run_id: int) -> Parts:
    return Parts(site.folder_of(context.node_config), run_id)


def _kept(parts: Parts, part_bytes: int, laid: Laid) -> str | None:
    """Where the coordinator takes arrays in parts: keep those of a reply that are more than one."""
    return parts.keep(laid) if laid.size > part_bytes else None


def _signer(message: Message, context: Context, request: Request) -> Callable[[RecordDict], None] | None:
    if (home := site.member_home(context.node_config)) is None:
        return None
    asked = message.metadata
    return functools.partial(
        wire.sign_reply,
        key=membership.identity_key(home),
        run_id=asked.run_id,
        round_number=request.round,
        message_id=asked.message_id,
    )


def _answer(context: Context, request: Request, run_id: int) -> Reply:
    started = time.monotonic()
    run_recipe = recipe.from_run_config(context.run_config)
    home = site.member_home(context.node_config)
    of_parts = request.stage in parts.STAGES
    if of_parts and request.phase not in phases.PHASES:
        raise ProtocolError("a part for a phase that there is not")
    if not request.stage or (of_parts and run_recipe.aggregation != "secagg"):
        secure.check_plain(run_recipe, request, run_id, home)
    if of_parts:
        if home is not None:
            secure.sweep(home)
        return _parts(context, run_id).answer(request)
    here = site.site_of(context.node_config, run_recipe.image_px, enrolling=request.phase == "enrol")
    if request.stage:
        assert home is not None  # or the request was refused
        return secure.answer(here, run_recipe, request, run_id, home)
    held = weights.admit(here, run_recipe, request)
    request = held.request
    reply = phases.run(here, run_recipe, request)
    held.keep(reply)
    log.info(
        "phase=%s round=%d steps=%d-%d site=%s images=%s seconds=%.1f",
        request.phase, request.round + 1, request.step, request.step + request.steps, here.name,
        reply.values.get("images", "-"), time.monotonic() - started,
    )  # fmt: skip
    return reply


for _kind in wire.MESSAGE_TYPES.values():
    _category, _, _action = _kind.partition(".")
    getattr(app, _category)(*([_action] if _action else []))(handle)
