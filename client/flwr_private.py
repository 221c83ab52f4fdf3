"""Everything of the site that touches Flower's private API, so that a new minor version breaks one file loudly."""

from __future__ import annotations

import os

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from chexfound import bundle
from chexfound.bundle import Bundle


def release_bundle() -> Bundle:
    """The bundle that the installed release ships, built as `flwr run` builds it."""
    return bundle.read(build_fab_from_files(bundle.release_files())[0])


def clock_tolerance() -> tuple[float, float]:
    """By how many seconds a node's clock may be behind the SuperLink's, and ahead of it, for its signature to be taken.

    As flwr.superlink.routers.fleet.node_auth compares them.
    """
    return TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE


def registered(address: str, authority: bytes, private: ec.EllipticCurvePrivateKey) -> bool:
    """Whether the SuperLink knows a node's key; asked so that nothing changes there, for a running node either.

    It is asked to take the node in with an interval of heartbeats that is out of bounds.  It looks the key up first,
    and refuses either way: with another code.

    Raises: httpx.HTTPError if it does not answer, or so as it does to no node.
    """
    signer = NodeAuthHttpInterceptor(private, private.public_key())
    request = ActivateNodeRequest(public_key=public_key_to_bytes(private.public_key()), heartbeat_interval=0)
    with FleetHttpClient.from_server_address(address, False, authority, [signer]) as client:
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            answer = FlowerError.from_json(error.response.text)
            if answer is None or answer.code not in _KNOWN:
                raise
            return _KNOWN[answer.code]
    raise httpx.DecodingError("the SuperLink takes a node in that asks for no heartbeats")


_KNOWN = {
    int(ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL): True,
    int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED): False,
}


def unsigned_object(size: int) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of an upload of random bytes, which the SuperLink reads and then refuses with 401."""
    body = PushObjectRequest(object_content=os.urandom(size)).SerializeToString()
    return "/v1/fleet/push-object", body, {"content-type": PROTOBUF_MEDIA_TYPE}
