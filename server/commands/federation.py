"""`chexfound-server init | renew | commands | up | superlink | superexec | guard | nginx`, and the sites' three."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys

from chexfound.durable.files import lock, storage
from chexfound.errors import ConfigError, SiteError
from chexfound.identity import roster
from chexfound.identity.roster import Address
from chexfound.identity.signing import fingerprint
from server.federation import members, pki, settings
from server.federation.settings import Federation

SCHEMA = 1  # of what --json prints


def init(given: argparse.Namespace) -> int:
    """Make a federation."""
    public = Address.parse(given.public, "--public")
    listen = Address.parse(given.listen, "--listen") if given.listen else Address("0.0.0.0", public.port)  # noqa: S104
    made = settings.create(given.dir, given.name, public, listen, Address.parse(given.superlink, "--superlink"))
    print(f"federation {made.name}: {made.folder}")
    print(f"  sites connect to {made.public}; open that port, and no other")
    print(f"  keep {made.path('ca.key')} to yourself: who has it can pose as the coordinator")
    print(f"next: chexfound-server up {shlex.quote(str(given.dir))}")
    return 0


def renew(given: argparse.Namespace) -> int:
    """Make a new server certificate."""
    held = settings.load(given.dir)
    certificate = pki.make_server(held.folder, [held.public.host])
    held.write_sites(held.sites())
    print(f"{held.path('server.crt')}: for {held.public.host}, until {certificate.not_valid_after_utc:%Y-%m-%d}")
    print("next: start chexfound-server up again, which reads it")
    return 0


def commands(given: argparse.Namespace) -> int:
    """Show how the processes are started by hand."""
    held = settings.load(given.dir)
    for name, value in held.settings().items():
        print(f"export {name}={shlex.quote(value)}")
    print(
        "# Flower's own waits 5 s for its database, so that a run with a large model fails, and ends the runs that went"
    )
    print("# on without it for a minute. Better in its place:")
    print(f"# chexfound-server superlink {shlex.quote(str(held.folder))}")
    for command in held.commands().values():
        print(shlex.join(command))
    return 0


def up(given: argparse.Namespace) -> int:
    """Run the processes."""
    from server.services.supervise import up

    number = up(settings.load(given.dir), lambda text: print(text, flush=True))
    print("stopped")
    return 130 if number == signal.SIGINT else 0


def superlink(given: argparse.Namespace) -> int:
    """Run the SuperLink alone."""
    import os

    held = settings.load(given.dir)
    os.environ.update(held.environment())
    from server.exchange import flwr_private

    flwr_private.run_superlink(held.commands()["superlink"][1:], held.path("superlink.sqlite"))
    return 0


def superexec(given: argparse.Namespace) -> int:
    """Run the SuperExec alone; it holds a lock, by which it is seen."""
    import os

    held = settings.load(given.dir)
    held.close()
    os.environ.update(held.environment())
    from server.exchange import flwr_private

    with storage(held.path(settings.SUPEREXEC)), open(held.path(settings.SUPEREXEC), "wb") as held_open:
        lock(held_open, ConfigError(f"{held.folder}: its SuperExec runs already"))
        flwr_private.run_superexec(held.superexec_options(), [*settings.OURS, "server.services.task"])
    return 0


def guard(given: argparse.Namespace) -> int:
    """Run the guard alone."""
    import ssl

    from chexfound.errors import DataError
    from chexfound.host import logs
    from server.services import guard

    held = settings.load(given.dir)
    logs.show()
    try:
        server = guard.server(
            held.listen.host,
            held.listen.port,
            str(held.superlink),
            held.path("roster.json"),
            ca=str(held.path("ca.crt")),
            certificate=str(held.path("server.crt")),
            key=str(held.path("server.key")),
        )
        server.run()
    except ssl.SSLError as error:
        raise DataError(
            f"{held.folder}: certificate or key cannot be used ({error}); chexfound-server renew"
        ) from error
    except SystemExit as error:  # how uvicorn says that it cannot listen
        raise ConfigError(f"listen {held.listen}: cannot listen there; its line above says why") from error
    return 0


def nginx(given: argparse.Namespace) -> int:
    """Print nginx's configuration."""
    from server.services import nginx

    held = settings.load(given.dir)
    listen = Address.parse(given.listen, "--listen") if given.listen else Address("0.0.0.0", held.public.port)  # noqa: S104
    print(nginx.configuration(held, listen), end="")
    return 0


def add_site(given: argparse.Namespace) -> int:
    """Take a site in."""
    held = settings.load(given.dir)
    try:
        text = given.keys.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{given.keys}: cannot be read: {error}") from error
    keys = roster.read_public_file(text, str(given.keys), given.site)
    if held.sites().sites.get(given.site) != keys:  # else it is only registered, which it may not have been yet
        members.admit(held, given.site, keys)
    print(f"site {given.site}: node {fingerprint(keys.node)}, identity {fingerprint(keys.identity)}")
    print("compare these with what the site saw, by telephone or in person")
    if code := _register(held, given.site, "registers it"):
        return code
    print(f"next: give {held.site_file} to every site; each takes it with: chexfound-client join FILE")
    return 0


def remove_site(given: argparse.Namespace) -> int:
    """Strike a site off."""
    held = settings.load(given.dir)
    members.strike(held, given.site)
    print(f"site {given.site}: removed; the other sites need approve nothing for that")
    return _register(held, given.site, "strikes it off")


def _register(held: Federation, name: str, what: str) -> int:
    """At the SuperLink too, if it is up; else at its next start.

    Returns: the exit code, which is 0 whatever came of the other sites.
    """
    from server.services.supervise import listens

    try:
        _, _, refused = members.register_all(held)
    except SiteError as error:
        if not listens(held.superlink):
            up = f"chexfound-server up {shlex.quote(str(held.folder))}"
            print(f"no SuperLink answers at {held.superlink}; {up} {what} there at its next start")
            return 0
        print(f"error: {error}\nonce that is mended, chexfound-server up {what} there", file=sys.stderr)
        return error.exit_code
    for other, why in refused.items():
        print(f"{'error' if other == name else 'warning'}: site {other}: not registered: {why}", file=sys.stderr)
    return SiteError.exit_code if name in refused else 0


def sites(given: argparse.Namespace) -> int:
    """List the sites."""
    held = settings.load(given.dir)
    try:
        nodes, down = members.nodes(held), ""
    except SiteError as error:
        nodes, down = None, str(error)
    rows = members.rows(held, nodes)
    if given.json:
        known = held.sites()
        about = {"schema": SCHEMA, "federation": held.name, "roster_sha256": known.sha256(), "serial": known.serial}
        print(json.dumps({**about, "sites": rows, "superlink": "down" if down else "up"}))
        return 0
    for row in rows:
        since = f" since {row['since']}" if row["since"] else ""
        print(f"{row['site']}: {members.called(row['status'])}{since}")
        print(f"  node     {row['node']}\n  identity {row['identity']}")
    if not rows:
        print(f"no site yet; chexfound-server add-site {shlex.quote(str(given.dir))} SITE SITE.pub")
    if down:
        print(f"whether they are connected is not known: {down}", file=sys.stderr)
    return 0
