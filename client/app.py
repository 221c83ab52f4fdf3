"""The ClientApp: one way in, `phases.run`, one way out.  It never raises."""

from __future__ import annotations

import logging
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from chexfound import logs, phases, recipe, wire
from chexfound.errors import ProtocolError
from chexfound.phases import Reply
from client import egress, site

log = logging.getLogger("chexfound.client")
PHASES = {message_type: phase for phase, message_type in wire.MESSAGE_TYPES.items()}

app = ClientApp()


def handle(message: Message, context: Context) -> Message:
    """Answer one message; whatever goes wrong, the answer is a code."""
    phase = PHASES.get(message.metadata.message_type, "unknown")
    outcome: Reply | BaseException
    try:
        if "home" not in context.node_config:  # a simulated site has one, and the simulation its own display
            logs.show()
            site.on_progress = site.on_progress or logs.Steps(log)
        outcome = _answer(message, context, phase)
    except Exception as error:  # noqa: BLE001 (nothing of an exception may leave: Flower would send its text)
        outcome = error
    return egress.release(message, phase, outcome)


def _answer(message: Message, context: Context, phase: str) -> Reply:
    started = time.monotonic()
    request = wire.unpack_request(message.content)
    if request.phase != phase:
        raise ProtocolError(f"a {message.metadata.message_type} message asks for phase {request.phase!r}")
    run_recipe = recipe.from_run_config(context.run_config)
    here = site.site_of(context.node_config, run_recipe.image_px, enrolling=phase == "enrol")
    reply = phases.run(here, run_recipe, request)
    log.info(
        "phase=%s round=%d steps=%d-%d site=%s images=%s seconds=%.1f",
        phase, request.round + 1, request.step, request.step + request.steps, here.name,
        reply.values.get("images", "-"), time.monotonic() - started,
    )  # fmt: skip
    return reply


@app.query("enrol")
def _enrol(message: Message, context: Context) -> Message:
    return handle(message, context)


@app.train("pretrain")
def _pretrain(message: Message, context: Context) -> Message:
    return handle(message, context)


@app.query("features")
def _features(message: Message, context: Context) -> Message:
    return handle(message, context)


@app.train("adapt")
def _adapt(message: Message, context: Context) -> Message:
    return handle(message, context)


@app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return handle(message, context)
