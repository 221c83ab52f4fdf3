"""How fast objects go through the guard, against the guard of another commit, which did not look who asks.

    python benchmarks/guard.py [--against COMMIT | --worktree PATH] [--rounds N] [--json]

Before a stand-in for the SuperLink that reads and drops, and with TLS on both sides as in a federation, each guard runs
in a process of its own from its own sources.  A part of 32 MB goes as Flower's node sends it: cut into objects of
5 MiB, two at a time, each signed by a site of the roster.  The two take turns, part by part, in one run; `ours` and
`rival` are the medians over the parts, in MB/s of the part, and `ratio` ours over the rival's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chexfound.errors import ChexfoundError
from chexfound.host.machine import benchmark_line
from chexfound.identity.roster import Address, Keys
from chexfound.identity.signing import public_line
from server.federation import settings as federations
from server.federation.settings import Federation

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "a9bb7a6"  # the last commit whose guard passed on whatever came
PART, OBJECT, AT_ONCE = 32 * 10**6, 5 * 2**20, 2  # bytes; Flower's, as flwr.supercore.constant has them
PACKAGES = ("federated-chexfound", "flwr", "httpx", "uvicorn")
SINK = """
import sys, uvicorn

async def app(scope, receive, send):
    more = True
    while more:
        event = await receive()
        more = event.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})

port, certificate, key = sys.argv[1:]
uvicorn.run(
    app, port=int(port), http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
    ssl_certfile=certificate, ssl_keyfile=key, timeout_keep_alive=600,
)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    rival = parser.add_mutually_exclusive_group()
    rival.add_argument("--against", metavar="COMMIT", default=BEFORE, help="of the rival (default: %(default)s)")
    rival.add_argument("--worktree", metavar="PATH", type=Path, help="a checkout of the rival, in place of a commit")
    parser.add_argument("--rounds", type=int, default=30, help="parts through each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder, checkout(options, Path(folder) / "before") as before:
            ours, theirs = measure(before, Path(folder), options.rounds)
    except (ChexfoundError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    row = {"ours": ours, "rival": theirs, "unit": "MB/s", "ratio": ours / theirs, "part_bytes": PART}
    line = f"{ours:.0f} MB/s through this guard, {theirs:.0f} through the rival's: {ours / theirs:.2f}"
    print(benchmark_line("guard_throughput", PACKAGES, **row) if options.json else line)
    return 0


@contextlib.contextmanager
def checkout(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    """The rival's sources."""
    if options.worktree:
        if not any((options.worktree / "server" / name).is_file() for name in ("services/guard.py", "guard.py")):
            raise ChexfoundError(f"{options.worktree}: no checkout with a server/services/guard.py")
        yield options.worktree.resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), options.against], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True, capture_output=True)


def measure(before: Path, folder: Path, rounds: int) -> tuple[float, float]:
    """MB/s through our guard and through that of other sources."""
    superlink, key = Address("127.0.0.1", free_port()), ec.generate_private_key(ec.SECP384R1())
    doors = {}
    for name, sources in (("ours", ROOT), ("rival", before)):
        public = Address("localhost", free_port())
        held = federations.create(folder / name, "bench", public, Address("127.0.0.1", public.port), superlink)
        doors[name] = held, sources
    first = doors["ours"][0]
    doors["rival"][0].path("ca.crt").write_bytes(first.path("ca.crt").read_bytes())  # the SuperLink is one
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    identity = public_line(ed25519.Ed25519PrivateKey.generate().public_key())
    for held, _ in doors.values():
        held.write_sites(held.sites().with_site("NORTH", Keys(line, identity)))
    for name in ("server.crt", "server.key"):
        doors["rival"][0].path(name).write_bytes(first.path(name).read_bytes())
    sink = [
        sys.executable,
        "-c",
        SINK,
        str(superlink.port),
        str(first.path("server.crt")),
        str(first.path("server.key")),
    ]
    taken: dict[str, list[float]] = {"ours": [], "rival": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(sink, superlink, os.environ))
        trust = ssl.create_default_context(cafile=str(first.path("ca.crt")))
        client = stack.enter_context(httpx.Client(verify=trust, trust_env=False, timeout=60))
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        for held, sources in doors.values():
            stack.enter_context(process(*guard(held, sources)))
        for number in range(rounds + 1):
            for name in ("ours", "rival") if number % 2 else ("rival", "ours"):
                seconds = send(client, pool, doors[name][0], key)
                if number:  # the first is to warm up
                    taken[name].append(seconds)
    return tuple(1e-6 * PART / statistics.median(taken[name]) for name in ("ours", "rival"))  # type: ignore[return-value]


def guard(held: Federation, sources: Path) -> tuple[list[str], Address, dict[str, str]]:
    """Command, address and environment of a federation's guard."""
    command = [sys.executable, "-P", "-m", "server.cli", "guard", str(held.folder)]
    return command, held.listen, held.environment() | {"PYTHONPATH": str(sources)}


@contextlib.contextmanager
def process(command: list[str], address: Address, env: os._Environ[str] | dict[str, str]) -> Iterator[None]:
    """Running, and listening there."""
    running = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((address.host, address.port), timeout=5).close()
                break
            if running.poll() is not None:
                raise ChexfoundError(f"{' '.join(command[:5])} ended with exit code {running.returncode}")
            time.sleep(0.1)
        yield
    finally:
        running.terminate()
        running.wait()


def send(client: httpx.Client, pool: ThreadPoolExecutor, held: Federation, key: ec.EllipticCurvePrivateKey) -> float:
    """Seconds that a part takes."""
    sizes = [min(OBJECT, PART - start) for start in range(0, PART, OBJECT)]
    start = time.perf_counter()
    for answer in pool.map(lambda size: push(client, held, key, size), sizes):
        answer.raise_for_status()
    return time.perf_counter() - start


def push(client: httpx.Client, held: Federation, key: ec.EllipticCurvePrivateKey, size: int) -> httpx.Response:
    """An object, signed as Flower's node signs."""
    shown = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    when = datetime.datetime.now(datetime.UTC).isoformat()
    headers = {
        "flwr-public-key": b64encode(shown).decode(),
        "flwr-timestamp": when,
        "flwr-signature": b64encode(key.sign(when.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }
    return client.post(f"https://{held.public}/v1/fleet/push-object", content=bytes(size), headers=headers)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
