"""The proof that Flower's node sends, as the guard reads it; what is refused is in test_guard.py."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from chexfound.errors import ConfigError
from server.services import proof
from server.services.proof import Proof, UnknownKey
from tests.server.doors import Node, write_roster


def test_the_names_and_numbers_are_flowers() -> None:
    names = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert tuple(name.encode() for name in names) == proof.HEADERS
    assert (proof.BEHIND_S, proof.AHEAD_S) == (TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE)
    about = API_ERROR_MAP[ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED]
    status, body = proof.NOT_REGISTERED
    expected = FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "").to_json(about.public_message)
    assert (status, json.loads(body)) == (about.http_status_code, expected)


def by_flower(node: Node) -> list[tuple[bytes, bytes]]:
    """What Flower's own node would send."""
    request = httpx.Request("POST", "https://coordinator/v1/fleet/get-run")
    signer = NodeAuthHttpInterceptor(node.key, node.key.public_key())
    signer.intercept(ProtobufRequestContext("", None, request), lambda _: httpx.Response(200))
    return [(name.lower(), value) for name, value in request.headers.raw]


def test_a_node_of_flower_is_known_by_its_site(tmp_path: Path) -> None:
    north, south = Node(), Node()
    known = Proof(write_roster(tmp_path / "roster.json", NORTH=north, SOUTH=south))
    assert [known.site(by_flower(node)) for node in (north, south)] == ["NORTH", "SOUTH"]
    with pytest.raises(UnknownKey):
        known.site(by_flower(Node()))


def test_no_roster_no_guard(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Proof(tmp_path / "roster.json")
