"""The ClientApp: one way in, `phases.run`, one way out.  It never raises."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from chexfound.contract import limits
from chexfound.contract.detached import ByteView, Envelope
from chexfound.contract.request import MaskedRequest, PartRequest, Reply, Request, StageRequest
from chexfound.errors import CodeError, ConfigError, ProtocolError
from chexfound.host import logs
from chexfound.phases import dispatch
from chexfound.pretrain.beginning import FILE
from chexfound.recipe import load
from chexfound.recipe.schema import Recipe
from chexfound.wire import arrays, envelopes, signatures
from client.answer import egress, hospital, lineage, provenance, refusals
from client.answer.asked import forms
from client.answer.delivery import Parts
from client.answer.egress import Gate
from client.answer.grants import Grant
from client.home import membership
from client.masked import stages

log = logging.getLogger("chexfound.client")
PHASES: dict[str, str] = {}  # or stage, by the type of its messages

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
    sign = keep = gate = None
    try:
        if "home" not in context.node_config:  # a simulated site has one, and the simulation its own display
            logs.show(hospital.folder_of(context.node_config) / logs.REASONS)
            hospital.on_progress = hospital.on_progress or logs.Steps(log)
        envelope = _admitted(message, context, phase)
        request = envelope.message
        run_recipe, grant = load.from_run_config(context.run_config), Grant.of(context.node_config)
        gate = _gate(run_recipe, envelope, context, grant)
        sign = _signer(message, context, request)
        run_id = message.metadata.run_id
        refusing = grant.check(run_recipe, envelope, run_id) if grant is not None else None
        if refusing is not None and grant is not None:
            outcome = refusing
            against = limits.refused(grant.judge(run_recipe))
            refusals.note(grant.home, run_id, phase, against[0].code)
        else:
            request = _begun(context, run_recipe, envelope, run_id, grant)
            if spend:
                message.content.clear()
            outcome = _answer(context, request, run_id, grant, gate)
            if grant is not None:
                refusals.answered(grant.home, run_id)
        if envelope.part_bytes:
            keep = functools.partial(_kept, _parts(context, run_id), envelope.part_bytes)
    except Exception as error:  # noqa: BLE001 (nothing of an exception may leave: Flower would send its text)
        outcome = error
        _note(context, message.metadata.run_id, phase, error)
    return egress.release(message, phase, outcome, gate, sign, keep)


def _note(context: Context, run_id: int, phase: str, error: BaseException) -> None:
    """Keep a refusal for the site's operator; of a simulation nobody asks."""
    code = refusals.code_of(error)
    if code is not None and "home" not in context.node_config:
        with contextlib.suppress(ConfigError):  # a name that no site can have
            refusals.note(hospital.folder_of(context.node_config), run_id, phase, code)


def _admitted(message: Message, context: Context, phase: str) -> Envelope[Request]:
    """The request, once its code, release and sites are what this site approved; before any data is touched."""
    if refusal := context.run_config.get("refused"):
        raise CodeError(str(refusal))
    sites = envelopes.unpack_terms(message.content)
    home = hospital.member_home(context.node_config)
    if home is not None:
        membership.check_terms(sites, membership.present(home))
    envelope = envelopes.unpack_request(message.content)
    request = envelope.message
    if isinstance(request, MaskedRequest):
        membership.check_equal(sites, None if home is None else membership.present(home))
    if request.kind != phase:
        raise ProtocolError(f"a {message.metadata.message_type!r} message asks for phase {request.phase!r}")
    if request.phase not in dispatch.PHASES:
        raise ProtocolError(f"a stage of {request.phase!r}, which is no phase")
    return envelope


def _begun(
    context: Context, run_recipe: Recipe, envelope: Envelope[Request], run_id: int, grant: Grant | None
) -> Request:
    """The request with its arrays, once the site takes part in the run."""
    request = envelope.message
    part = isinstance(request, PartRequest)
    if not isinstance(request, StageRequest) or (part and run_recipe.aggregation != "secagg"):
        stages.check_plain(run_recipe, request, run_id, hospital.member_home(context.node_config))
    if grant is not None:
        grant.begin(run_recipe, request, run_id)
    if envelope.detached is None:
        return request
    return arrays.with_arrays(request, envelope.detached, _parts(context, run_id).received(envelope.detached))


def _parts(context: Context, run_id: int) -> Parts:
    return Parts(hospital.folder_of(context.node_config), run_id)


def _kept(parts: Parts, part_bytes: int, laid: ByteView) -> str | None:
    """Keep those of a reply's arrays that are more than one part, where the coordinator takes arrays in parts."""
    return parts.keep(laid) if laid.size > part_bytes else None


def _signer(message: Message, context: Context, request: Request) -> Callable[[RecordDict], None] | None:
    if (home := hospital.member_home(context.node_config)) is None:
        return None
    asked = message.metadata
    return functools.partial(
        signatures.sign_reply,
        key=membership.identity_key(home),
        run_id=asked.run_id,
        round_number=request.round,
        message_id=asked.message_id,
    )


def _gate(run_recipe: Recipe, envelope: Envelope[Request], context: Context, grant: Grant | None) -> Gate:
    """Make the gate that the reply has to pass."""
    home = hospital.member_home(context.node_config)
    return Gate(
        recipe=run_recipe,
        request=Request(**envelope.message.place()),
        sent={name: form for name, form in forms(envelope).items() if name != FILE},
        site=str(context.node_config.get("site", "")),
        peers=frozenset() if home is None else frozenset(membership.present(home).sites.sites),
        tensors=None if grant is None else grant.policy.tensors,
    )


def _answer(context: Context, request: Request, run_id: int, grant: Grant | None, gate: Gate) -> Reply:
    started, run_recipe = time.monotonic(), gate.recipe
    home = hospital.member_home(context.node_config)
    if isinstance(request, PartRequest):
        if home is not None:
            stages.sweep(home)
        return _parts(context, run_id).answer(request)
    here = hospital.site_of(context.node_config, run_recipe.image_px, enrolling=request.phase == "enrol")
    gate.words = here.words
    if grant is not None:
        here.limits, here.least = grant.limits.as_dict(), (grant.policy.min_patients, grant.policy.min_images)
    try:
        if isinstance(request, MaskedRequest):
            assert home is not None  # or the request was refused
            return stages.answer(here, run_recipe, request, run_id, home)
        if run_recipe.aggregation == "secagg" and request.phase == "features":
            assert home is not None  # likewise
            return stages.features(here, run_recipe, request, run_id, home)
        held = provenance.admit(here, run_recipe, request, run_id)
        request = held.request
        if here.lineage and request.phase == "adapt":
            lineage.check_features(here, run_recipe, request)
        reply = dispatch.run(here, run_recipe, request)
        held.keep(reply)
        if here.lineage and request.phase == "features":
            lineage.record_features(here, run_recipe, request)
    finally:
        if grant is not None:
            grant.worked(run_recipe, run_id, time.monotonic() - started)
    log.info(
        "phase=%s round=%d steps=%d-%d site=%s images=%s seconds=%.1f",
        request.phase, request.round + 1, request.step, request.step + request.steps, here.name,
        reply.values.get("images", "-"), time.monotonic() - started,
    )  # fmt: skip
    return reply


def listen(phase: str) -> None:
    """Answer the messages of a phase, or of a stage, which have the type that `envelopes.MESSAGE_TYPES` gives it."""
    message_type = envelopes.MESSAGE_TYPES[phase]
    category, _, action = message_type.partition(".")
    getattr(app, category)(*([action] if action else []))(handle)
    PHASES[message_type] = phase


for _phase in envelopes.MESSAGE_TYPES:
    listen(_phase)
