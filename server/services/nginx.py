"""nginx in the guard's place: a configuration made from a federation and from the guard's own list of paths.

What may pass is decided by the request line as it was sent (`$request`), never by `$uri`, which nginx decodes and
tidies up first, and by nothing of the peer.  nginx reaches the SuperLink on loopback, by TLS, and believes the
federation's authority only.

It cannot check a signature, so it knows no site: a stranger's body is taken like a site's, but it is kept here until
all of it has come, and only then given to the SuperLink.
"""

from __future__ import annotations

from pathlib import Path

from chexfound.errors import ConfigError
from chexfound.identity.roster import Address
from server.federation.settings import Federation
from server.services import guard

HEADERS_KIB = 8  # of one header; Flower's largest hold a key and a signature
PIECE_KIB = 64  # of an answer on its way, all that is held of it; of a body, the rest goes to a file
ADDRESS_MAX = 64  # requests at once of one address, and in a second:
RATE_MAX, BURST_MAX = (
    100,
    400,
)  # these; so many more at once are taken, the rest gets 503, and Flower's node tries again
NOT_FOUND = '{"detail":"Not Found"}'


def configuration(federation: Federation, listen: Address) -> str:
    """Write what belongs inside nginx's `http` block, such as a file of /etc/nginx/conf.d.

    Args:
        federation: whose certificate nginx shows, and whose SuperLink it asks.
        listen: where nginx listens.

    Raises: ConfigError if that is where the guard listens, or if nginx cannot be told the folder's name.
    """
    if listen.port == federation.listen.port and not _apart(listen, federation.listen):
        raise ConfigError(
            f"listen {listen}: the guard listens there; give it a port of its own on loopback in "
            f"{federation.path('federation.yaml')}, for example listen: 127.0.0.1:{_other(listen.port)}, and start "
            "chexfound-server up again (in a new federation: init --listen)"
        )
    return _TEMPLATE.format(
        name=federation.name,
        this=f"chexfound_{listen.port}",
        listen=listen,
        superlink=federation.superlink,
        fleet="|".join(sorted(path.decode().removeprefix(_FLEET) for path in guard.FLEET_PATHS)),
        fleet_at=_FLEET,
        health=guard.HEALTH_PATH.decode(),
        certificate=_quoted(federation.path("server.crt")),
        key=_quoted(federation.path("server.key")),
        authority=_quoted(federation.path("ca.crt")),
        object_at=guard.OBJECT_PATH.decode(),
        object_max=guard.OBJECT_MAX,
        control_max=guard.CONTROL_MAX,
        headers_s=f"{guard.HEADERS_S:.0f}s",
        grace=f"{guard.GRACE_S:.0f}s",
        connections=ADDRESS_MAX,
        rate=RATE_MAX,
        burst=BURST_MAX,
        silence=f"{guard.SILENCE_S:.0f}s",
        headers=HEADERS_KIB,
        piece=PIECE_KIB,
        not_found=NOT_FOUND,
    )


_FLEET = "/v1/fleet/"


def _apart(one: Address, other: Address) -> bool:
    """Whether two hosts are different addresses, none of them "all"."""
    return one.host != other.host and not {one.host, other.host} & {"0.0.0.0", "::"}  # noqa: S104


def _other(port: int) -> int:
    return port + 1 if port < 65535 else port - 1


def _quoted(path: Path) -> str:
    """A path as nginx reads one; it has no way to write a dollar that is not a variable.

    Raises: ConfigError.
    """
    text = str(path)
    if "$" in text or not text.isprintable():
        raise ConfigError(f"{text!r}: nginx cannot be told this name; move the federation to a folder without $")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_TEMPLATE = """\
# The public door of the federation {name}, by: chexfound-server nginx DIR
# Belongs inside the http block. Not to be edited: make it anew after a change of federation.yaml.
#
# What the guard does and nginx cannot:
#   - check a node's key and signature. Whoever reaches the port may send bodies of the sizes below; they are kept in
#     nginx's own files until they are all there, and the SuperLink then refuses them. So nobody can fill its memory
#     with bodies that do not end, but strangers have the same places as sites.
#   - end a body that comes slowly but steadily: the time below is between two pieces of it. And connections that send
#     no whole headers are not counted by limit_conn; their time is up after client_header_timeout.
#   - keep places for sites: the limits are by address, and sites that share one share them.
# Where strangers can reach the port, leave the guard there, or a firewall before nginx that knows the sites' addresses.

# The request line as it was sent. Strings would be compared without their case, so these are expressions.
map $request ${this}_passes {{
    default 0;
    "~^POST {fleet_at}(?:{fleet}) HTTP/1\\.[01]\\z" 1;
    "~^(?:GET|HEAD) {health} HTTP/1\\.[01]\\z" 1;
}}

limit_conn_zone $binary_remote_addr zone={this}:10m;
limit_req_zone $binary_remote_addr zone={this}_rate:10m rate={rate}r/s;

upstream {this} {{
    server {superlink};
    keepalive 16;
    keepalive_timeout 3s;  # before the SuperLink closes an idle one, after 5 s
}}

server {{
    listen {listen} ssl default_server;
    server_tokens off;

    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets off;

    client_header_buffer_size 1k;
    large_client_header_buffers 4 {headers}k;
    client_header_timeout {headers_s};
    client_body_timeout {grace};
    send_timeout {silence};
    client_body_buffer_size {piece}k;
    client_max_body_size {control_max};
    limit_conn {this} {connections};
    limit_req zone={this}_rate burst={burst} nodelay;

    # Also what nginx itself would refuse in another way.
    error_page 400 404 405 414 494 501 505 =404 /nothing;
    location = /nothing {{
        internal;
        default_type application/json;
        return 404 '{not_found}';
    }}

    # To the SuperLink, once all of a body is here.
    proxy_http_version 1.1;
    proxy_request_buffering on;
    proxy_buffering off;
    proxy_buffer_size {piece}k;
    proxy_buffers 4 {piece}k;  # none is used; nginx wants them no smaller
    proxy_redirect off;
    gzip off;

    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_set_header Forwarded "";
    proxy_set_header X-Forwarded-For "";
    proxy_set_header X-Forwarded-Proto "";

    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {authority};
    proxy_ssl_name localhost;
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;

    proxy_connect_timeout 10s;
    proxy_send_timeout {silence};
    proxy_read_timeout {silence};

    # The one path with large bodies.
    location = {object_at} {{
        if (${this}_passes = 0) {{
            return 404;
        }}
        client_max_body_size {object_max};
        proxy_pass https://{this};
    }}

    location / {{
        if (${this}_passes = 0) {{
            return 404;
        }}
        proxy_pass https://{this};
    }}
}}
"""
