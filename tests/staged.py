"""A stage of a request, as the coordinator sends it."""

from __future__ import annotations

from typing import Any

from chexfound.contract.request import MaskedRequest, PartRequest, Request, StageRequest


def staged(request: Request, stage: str, params: dict[str, Any] | None = None, **more: Any) -> StageRequest:
    """A stage of secure aggregation, or of arrays in parts; `more`: the tensors, or what is delivered."""
    kind = PartRequest if stage in ("deliver", "collect") else MaskedRequest
    return kind(**request.place() | {"stage": stage, "params": params or {}, **more})
