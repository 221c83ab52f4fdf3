"""Checks between this machine and the coordinator: the way, TLS, clocks, versions, the key, the uplink."""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
import shlex
import socket
import ssl
import time
from importlib import metadata

import httpx
from cryptography import x509
from cryptography.x509.oid import NameOID

from chexfound import __version__
from chexfound.host.durations import span
from chexfound.identity.roster import Address
from client.home import link, membership
from client.home.paths import named
from client.operator.preflight.checks import Diagnosis, Subject, failed, ok, warning
from client.operator.preflight.local import GB, VITL_BYTES

CLOCK_S = (60.0, 2.0)  # behind the coordinator's and ahead of it: more is warned of
DATE_S = datetime.timedelta(seconds=1)  # by which a Date header is late: cut to seconds, and up to one of them old
EXPIRY_DAYS = 30
VERSION = r"\d[\w.+!-]{0,40}"
OTHER_NAME = (62, 64)  # OpenSSL's verification codes: of a host name, of an address
UPLINK_MBIT_S = 4.0  # less is warned of: the slowest that hospitals have had in the field
UPLINK_BYTES = (2**16, 2**22)  # of the first upload and the largest: each is four times the last, until one takes
UPLINK_S = (1.0, 10.0)  # so long; and none may take longer


def dns(subject: Subject) -> Diagnosis:
    """The name of what is connected to has an address."""
    target, proxy = _target(subject)
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return failed(
            f"{target.host} has no address ({error})",
            "correct HTTPS_PROXY, or ask who runs it"
            if proxy
            else f"check with `getent hosts {target.host}`; ask your network's administrator for its name server, or "
            "for HTTPS_PROXY if there is a proxy",
        )
    shown = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))
    if proxy:
        return ok(f"the proxy {target.host} is at {shown}; the coordinator's name is the proxy's to look up")
    return ok(f"{target.host} is at {shown}")


def tcp(subject: Subject) -> Diagnosis:
    """It takes the connection, and a proxy passes it on."""
    target, proxy = _target(subject)
    start = time.perf_counter()
    try:
        socket.create_connection((target.host, target.port), link.TIMEOUT_S).close()
    except OSError as error:
        return failed(
            f"{'the proxy ' if proxy else ''}{target} does not take a connection ({error.strerror or error})",
            "correct HTTPS_PROXY, or ask who runs it"
            if proxy
            else f"have your firewall let this machine out to {target} (TCP); if it does, ask the coordinator whether "
            "it is up",
        )
    took = f"{1000 * (time.perf_counter() - start):.0f} ms"
    if not proxy:
        return ok(f"{target} takes a connection in {took}")
    if reason := subject.contact.refused_by_proxy:
        return failed(
            f"the proxy {target} does not let us through to {subject.server} ({reason})",
            f"have it allow CONNECT to {subject.server}; 407 means that it wants HTTPS_PROXY=http://USER:PASSWORD@…",
        )
    return ok(f"through the proxy {target}, which takes a connection in {took}")


def tls(subject: Subject) -> Diagnosis:
    """There is TLS, with a certificate of the approved authority, for this name; its dates are `certificate`'s."""
    if subject.contact.certificate is not None:
        return ok(f"the certificate is of the authority that was approved, and for {subject.server.host}")
    error = subject.contact.tls_error
    if not isinstance(error, ssl.SSLCertVerificationError):
        if link.ask(subject.server, False, "http").response is not None:
            return failed(
                f"{subject.server} answers in plain HTTP, without TLS",
                "nothing is sent there. Ask the coordinator whether this is the right port, and what listens on it",
            )
        return failed(
            f"no TLS with {subject.server} ({error or subject.contact.error!r})",
            "ask the coordinator what listens there, and your network's administrator what stands between",
        )
    shown = link.ask(subject.server, link.believe_anyone()).certificate
    if shown is None:
        return failed(f"the certificate is not believed ({error.verify_message})", "check again")
    certificate = x509.load_der_x509_certificate(shown)
    if error.verify_code in OTHER_NAME:
        return failed(
            f"the certificate is for {', '.join(_names(certificate))}, not for {subject.server.host}",
            "ask the coordinator for a file with the right address, or for a certificate of that name "
            "(chexfound-server renew)",
        )
    return failed(
        f"the certificate comes from {_common_name(certificate.issuer)}, not from the authority that was approved "
        f"({error.verify_message})",
        f"if something between opens TLS to look inside, have {subject.server} exempted; if the coordinator has a new "
        "authority, it sends a new file: compare it in person, then chexfound-client join FILE"
        f"{named(subject.name)}",
    )


def clock(subject: Subject) -> Diagnosis:
    """This machine's clock is near enough to the coordinator's for signatures to be taken."""
    from client.node import flwr_private

    contact = subject.contact
    told = contact.response.headers.get_list("date")[:1] if contact.response is not None else []
    if not told or contact.when is None:
        return warning("the coordinator does not tell its time", "see yourself that this machine's is set by NTP")
    try:
        theirs = email.utils.parsedate_to_datetime(told[0])
    except ValueError:
        return warning("the coordinator tells no readable time", "see yourself that this machine's is set by NTP")
    subject.clock_offset = theirs.replace(tzinfo=datetime.UTC) + DATE_S - contact.when
    behind = subject.clock_offset.total_seconds()
    late, early = flwr_private.clock_tolerance()
    text = f"{span(abs(behind), 1)} {'behind' if behind > 0 else 'ahead of'} the coordinator's (to about a second)"
    text += f"; {late:.0f} s behind and {early:.0f} s ahead are borne"
    remedy = "set this machine's clock by NTP (timedatectl set-ntp true); if it is right, tell the coordinator"
    if not -early <= behind <= late:
        return failed(text, remedy)
    if not -CLOCK_S[1] <= behind <= CLOCK_S[0]:
        return warning(text, remedy)
    return ok(text)


def certificate(subject: Subject) -> Diagnosis:
    """It is valid now, by the coordinator's clock, and for a while yet; so is the authority."""
    assert subject.contact.certificate is not None  # `tls` has been well
    assert subject.federation is not None
    now = link.now() + subject.clock_offset
    shown = x509.load_der_x509_certificate(subject.contact.certificate)
    authority = x509.load_pem_x509_certificate(subject.federation.authority.encode("ascii"))
    renew = "the coordinator renews it: chexfound-server renew DIR, then up again; nothing is to be done here"
    for one, what, remedy in (
        (shown, "the coordinator's certificate", renew),
        (authority, "the federation's authority", "the coordinator has to make a new federation, and all sites enrol"),
    ):
        if one.not_valid_after_utc < now:
            return failed(f"{what} expired on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", remedy)
        if one.not_valid_before_utc > now:
            return failed(
                f"{what} is valid from {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only: not yet, by the "
                "coordinator's own clock",
                "the coordinator's clock was wrong when it was made: set it, then chexfound-server renew DIR",
            )
        left = (one.not_valid_after_utc - now).days
        if left < EXPIRY_DAYS:
            return warning(f"{what} expires on {one.not_valid_after_utc:%Y-%m-%d}, in {left} days", remedy)
    return ok(f"valid to {shown.not_valid_after_utc:%Y-%m-%d}; the authority to {authority.not_valid_after_utc:%Y}")


def coordinator(subject: Subject) -> Diagnosis:
    """Its SuperLink is up, behind whatever takes our connections."""
    response = subject.contact.response
    if response is None:
        return failed(f"{subject.server} does not answer ({subject.contact.error!r})", "tell the coordinator")
    if response.status_code in (502, 503, 504):
        return failed(
            f"{subject.server} takes connections, but no SuperLink answers behind it ({response.status_code})",
            "ask the coordinator whether chexfound-server up runs; a site that serves tries again for ever",
        )
    if response.status_code != 200:
        return failed(
            f"{subject.server} answers /health with {response.status_code}: no coordinator of a federation does",
            "ask the coordinator whether host and port are right, and your administrator what answers there",
        )
    return ok(f"{subject.server} is up")


def versions(subject: Subject) -> Diagnosis:
    """Both ends have one release, and one minor version of Flower."""
    assert subject.contact.response is not None  # `coordinator` has been well
    headers, ours = subject.contact.response.headers, metadata.version("flwr")
    told = [headers.get(name, "") for name in ("chexfound-version", "flower-version")]
    theirs = [text if re.fullmatch(VERSION, text, re.ASCII) else None for text in told]  # it may be typed after pip
    here = f"chexfound {__version__} and Flower {ours} here"
    if None in theirs:
        return ok(f"{here}; the coordinator does not tell its own. A run of another release would be refused")
    text = f"{here}, {theirs[0]} and {theirs[1]} at the coordinator"
    if theirs[0] != __version__:
        return failed(text, f"install the coordinator's release: pip install federated-chexfound=={theirs[0]}")
    if str(theirs[1]).split(".")[:2] != ours.split(".")[:2]:
        return failed(text, f"install the coordinator's Flower: pip install flwr=={theirs[1]}")
    return ok(text)


def key(subject: Subject) -> Diagnosis:
    """The SuperLink knows the node's key, and takes its signature."""
    from client.node import flwr_private

    assert subject.federation is not None
    authority = subject.federation.authority.encode("ascii")
    try:
        known = flwr_private.registered(str(subject.server), authority, membership.node_key(subject.home))
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 401:
            return failed(
                "the coordinator does not take the node's signature", "tell the coordinator; check the clocks"
            )
        return failed(f"the coordinator answers {error.response.status_code}", "tell the coordinator")
    except httpx.HTTPError as error:
        return failed(f"the coordinator does not answer as it should ({error!r})", "check again")
    if not known:
        return _unknown(subject)
    return ok("the coordinator knows this site's node")


def _unknown(subject: Subject) -> Diagnosis:
    """Say what to do about a key that the coordinator does not know: never enrolled and removed are one answer."""
    name, file = shlex.quote(subject.name), shlex.quote(f"{subject.name}.pub")
    keys, enrol = subject.home / "keys", f"chexfound-client enrol --name {name}"
    aside = shlex.quote(str(subject.home / "keys-of-old"))
    anew = (
        f"make new keys: mv {shlex.quote(str(keys))} {aside}, then {enrol}; give the new {file} to the coordinator, "
        f"and take the file that comes back: chexfound-client join FILE{named(subject.name)} (docs/site.md, section 1)"
    )
    if connected := _connected(subject):
        return failed(
            f"the coordinator does not know this site's node any more (it did on {connected}): it has removed this "
            "site, and a key that was removed is never taken again",
            anew,
        )
    return failed(
        "the coordinator does not know this site's node: it has not taken it in yet, or has removed it",
        f"if it was never taken in: give the coordinator {file} ({enrol} writes it again), for chexfound-server "
        f"add-site DIR {name} {file}. If it was removed, that is refused: {anew}",
    )


def _connected(subject: Subject) -> str | None:
    """When the coordinator answered a node of this site with its present keys last; None if that is not known."""
    try:
        contact = json.loads((subject.home / "node.json").read_text())["contact"]
        when = datetime.datetime.fromisoformat(contact)
        made = (subject.home / "keys" / "node.key").stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{when:%Y-%m-%d %H:%M} UTC" if when.timestamp() > made else None


def uplink(subject: Subject) -> Diagnosis:
    """How fast uploads are, by some of random bytes and no node, which the coordinator reads and refuses."""
    from client.node import flwr_private

    private = membership.node_key(subject.home)
    size, most = UPLINK_BYTES
    enough, patience = UPLINK_S
    rate, at_least = 0.0, False
    try:
        with link.client(subject.trust, patience) as client:
            client.get(f"https://{subject.server}/health")  # so that the connection stands
            while True:
                path, body, headers = flwr_private.stray_object(size, private)
                start = time.perf_counter()
                answer = client.post(f"https://{subject.server}{path}", content=body, headers=headers)
                seconds = time.perf_counter() - start
                if answer.status_code == 413 and rate:
                    break
                if answer.status_code != 401:
                    return failed(f"an upload is answered with {answer.status_code}", "tell the coordinator")
                rate, at_least = 8e-6 * size / seconds, seconds < enough
                if seconds >= enough or size >= most:
                    break
                size = min(4 * size, most)
    except httpx.TimeoutException:
        rate = rate or 8e-6 * size / patience
        at_least = False
    except httpx.HTTPError as error:
        return failed(
            f"an upload of {size / 2**20:.1f} MiB broke off ({error!r})",
            "ask your administrator whether something between limits the size of uploads",
        )
    minutes = math.ceil(8e-6 * VITL_BYTES / rate / 60)
    text = f"{'at least ' if at_least else ''}{rate:.1f} Mbit/s; ViT-L's {VITL_BYTES / GB:.2f} GB take "
    text += "under a minute" if minutes == 1 else f"{minutes} minutes"
    if rate < UPLINK_MBIT_S:
        return warning(text, "tell the coordinator before a run of a large model: its rounds wait for the slowest site")
    return ok(text)


def _target(subject: Subject) -> tuple[Address, Address | None]:
    """Give the address that is connected to, and the proxy if it is one.

    Raises: ConfigError if the environment names one that cannot be used.
    """
    proxy = subject.contact.proxy
    return proxy or subject.server, proxy


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [_common_name(certificate.subject)]
    return [repr(name) for name in names.get_values_for_type(x509.DNSName)] + [
        str(address) for address in names.get_values_for_type(x509.IPAddress)
    ]


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return repr(str(found[0].value) if found else name.rfc4514_string())
