"""Requests and replies <-> Flower messages; the only module of the library that knows Flower.

Everything that arrives is hostile until it has passed here: JSON into checked values, arrays into
tensors of a known dtype.  Codec `none`: full float32 or float64, nothing else.

With a request go the coordinator's terms (its release, who is in the federation), which a site reads before
anything else; with a reply, where sites have keys, the site's signature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import chexfound
from chexfound.contract import detached
from chexfound.contract.detached import ByteView, Detached, Envelope
from chexfound.contract.request import MaskedRequest, PartReply, PartRequest, Reply, Request, StageRequest
from chexfound.errors import (
    ConfigError,
    ProtocolError,
    VersionError,
)
from chexfound.identity import roster as rosters
from chexfound.identity.roster import Roster
from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives
from chexfound.secagg import messages
from chexfound.wire.arrays import (
    DTYPES,
    INLINE_BYTES,
    RINGS,
    chunk_of,
    detached_of,
    lay,
    little_endian,
    masked_of,
    object_of,
    pack_chunk,
    pack_detached,
    pack_tensors,
    tensors_of,
)

MESSAGE_TYPES = {
    "enrol": "query.enrol",
    "pretrain": "train.pretrain",
    "features": "query.features",
    "adapt": "train.adapt",
    "evaluate": "evaluate",
    # The stages of secure aggregation, whatever the phase.
    "advertise": "query.advertise",
    "share": "query.share",
    "masked": "train.masked",
    "consistency": "query.consistency",
    "unmask": "query.unmask",
    # Arrays apart from their message, whatever the phase.
    "deliver": "query.deliver",
    "collect": "query.collect",
}
LARGEST, LARGEST_BATCH = 2**31 - 1, 2**20  # of a request's numbers; step times batch stays below 2**63
FINDINGS_MAX = 4096  # of a request; a site holds labels for each
NUMBERS = ("phase", "round", "step", "steps", "batch_size", "roster_index", "findings")  # fields of any request
STAGES = (*messages.STAGES, *detached.STAGES)
Keep = Callable[[ByteView], str | None]  # keeps arrays apart, for who asks, by SHA-256; or does not


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))
class _RequestFields:
    phase: str
    round: int
    step: int
    steps: int
    batch_size: int
    roster_index: int
    findings: tuple[str, ...]
    stage: str = ""
    part_bytes: Annotated[int, Field(ge=0, le=detached.PART_MAX)] = 0


_request_adapter = TypeAdapter(_RequestFields)


def pack_request(
    request: Request, sites: Roster | None = None, *, detached: Detached | None = None, part_bytes: int = 0
) -> RecordDict:
    """A request as a message's content; `sites` are those of the federation, where they have keys."""
    return pack_requests([Envelope(message=request, detached=detached, part_bytes=part_bytes)], sites)[0]


def pack_requests(requests: Sequence[Envelope[Request]], sites: Roster | None = None) -> list[RecordDict]:
    """Pack requests as messages' contents; tensors that several share are packed, and held in memory, once."""
    terms = json.dumps({"version": chexfound.__version__, "roster": sites and sites.as_dict()})
    packed: dict[int, tuple[dict[str, str | bytes], dict[str, ArrayRecord]]] = {}
    contents = []
    for envelope in requests:
        request = envelope.message
        chunk = request.chunk if isinstance(request, PartRequest) else None
        large = request.tensors if chunk is None else chunk
        if id(large) not in packed:
            packed[id(large)] = pack_tensors(request.tensors) if chunk is None else pack_chunk(chunk)
        fields = {name: getattr(request, name) for name in NUMBERS} | {"part_bytes": envelope.part_bytes}
        own, others = packed[id(large)]
        if envelope.detached is not None:
            own = own | pack_detached(envelope.detached)
        if isinstance(request, StageRequest):
            fields |= {"stage": request.stage}
            own = own | {"told": json.dumps(request.params, allow_nan=False)}
        of_request = ConfigRecord({"terms": terms, "json": json.dumps(fields), **own})
        contents.append(RecordDict({"request": of_request, **others}))
    return contents


def unpack_terms(content: RecordDict) -> Roster | None:
    """The sites that the coordinator says are in the federation; None if it names none.

    Raises: VersionError if the coordinator is of another release; ProtocolError.
    """
    terms = object_of(content, "request", "terms")
    version = terms.get("version")
    if version != chexfound.__version__:
        shown = repr(version) if isinstance(version, str) and is_name(version) else "another one"
        raise VersionError(
            f"the coordinator runs federated CheXFound {shown}, this site {chexfound.__version__}; "
            "install the same release at both ends"
        )
    if terms.get("roster") is None:
        return None
    try:
        return rosters.parse(terms["roster"], "the coordinator's roster")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def unpack_request(content: RecordDict) -> Envelope[Request]:
    """The inverse of `pack_request`, for content from outside.

    Raises: ProtocolError.
    """
    try:
        fields = _request_adapter.validate_python(object_of(content, "request"))
    except ValidationError as error:
        raise ProtocolError(f"the request is malformed: {error.error_count()} fields") from error
    numbers = (fields.round, fields.step, fields.steps, fields.batch_size, fields.roster_index)
    if min(numbers) < 0 or max(numbers) > LARGEST or fields.batch_size > LARGEST_BATCH:
        raise ProtocolError("the request holds a number that is negative or too large")
    findings = fields.findings
    if (
        len(findings) > FINDINGS_MAX
        or len(set(findings)) < len(findings)
        or not all(0 < len(name) <= 200 and name.isprintable() for name in findings)
    ):
        raise ProtocolError("the request's findings are too many, named twice, or no names")
    if not is_name(fields.phase) or (fields.stage and fields.stage not in STAGES):
        raise ProtocolError("the request is of a phase or stage that there is not")
    apart = detached_of(content, "request", DTYPES)
    values: dict[str, Any] = {name: getattr(fields, name) for name in NUMBERS}
    values |= {} if apart is not None else {"tensors": tensors_of(content, "request")}
    request = Request(**values)
    if fields.stage:
        stage: dict[str, Any] = {"stage": fields.stage, "params": object_of(content, "request", "told")}
        if fields.stage in messages.STAGES:
            request = MaskedRequest(**values, **stage)
        else:
            request = PartRequest(**values, **stage, chunk=chunk_of(content, "request"))
    return Envelope(message=request, detached=apart, part_bytes=fields.part_bytes)


def pack_reply(reply: Reply, keep: Keep | None = None) -> RecordDict:
    """A reply as a message's content (what leaves must have passed `client.answer.egress`).

    Args:
        reply: to be packed.
        keep: its arrays apart from it, if it will, and if there are any.
    """
    if any(tensor.dtype == torch.uint8 for tensor in reply.tensors.values()):
        raise ProtocolError("a reply's tensor: dtype uint8 does not travel this way")
    text = json.dumps(reply.values, allow_nan=False)
    if keep is not None and (reply.tensors or reply.masked):
        flat, table = lay(reply.tensors)
        laid = ByteView(flat | {f"uint{ring}": [array] for ring, array in reply.masked.items()})
        if (sha256 := keep(laid)) is not None:
            apart = pack_detached(Detached(sha256=sha256, arrays=laid.arrays, table=table))
            return RecordDict({"reply": ConfigRecord({"json": text, **apart})})
    own, others = pack_chunk(reply.chunk) if isinstance(reply, PartReply) else pack_tensors(reply.tensors)
    masked = {f"uint{ring}": array for ring, array in sorted(reply.masked.items())}
    if masked and sum(array.nbytes for array in masked.values()) <= INLINE_BYTES:
        own = own | {name: array.astype(little_endian(name)).tobytes() for name, array in masked.items()}
    elif masked:
        others = others | {"masked": ArrayRecord({name: Array(array) for name, array in masked.items()})}
    return RecordDict({"reply": ConfigRecord({"json": text, **own}), **others})


def unpack_reply(content: RecordDict) -> Envelope[Reply]:
    """The inverse of `pack_reply`, for content from outside.

    Raises: ProtocolError.
    """
    values = object_of(content, "reply")
    if (apart := detached_of(content, "reply", (*DTYPES, *(f"uint{ring}" for ring in RINGS)))) is not None:
        return Envelope(message=Reply(values=values), detached=apart)
    tensors, masked = tensors_of(content, "reply"), masked_of(content)
    if (chunk := chunk_of(content, "reply")) is not None:
        return Envelope(message=PartReply(tensors=tensors, values=values, masked=masked, chunk=chunk))
    return Envelope(message=Reply(tensors=tensors, values=values, masked=masked))
