"""`chexfound-server`: the coordinator of a federation."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chexfound.errors import ChexfoundError, ConfigError

SCHEMA = 1  # of what --json prints
EPILOG = """\
example, from nothing:
  chexfound-server init /srv/thorax --name thorax --public coordinator.example.org:8443
  chexfound-server up /srv/thorax
  chexfound-server add-site /srv/thorax NORTHFIELD northfield.pub     (chexfound-client enrol made the file)
Then /srv/thorax/thorax.federation.json goes to every site.

exit codes: 0 done or told to stop, 2 an option is wrong, 3 a file cannot be used, 7 a process or the SuperLink
failed, 8 the disk is full, 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="chexfound-server",
        description="Coordinate federated chest X-ray training: the images stay at the sites.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Callable[..., argparse.Action]:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument("dir", metavar="DIR", type=Path, help="the federation's folder")
        made.set_defaults(run=run)
        return made.add_argument

    add = command("init", _init, "make a federation: its authority, certificate, secret and settings")
    add("--name", metavar="NAME", required=True, help="of the federation, as the sites see it")
    add("--public", metavar="HOST:PORT", required=True, help="what sites connect to; the certificate is for this host")
    add("--listen", metavar="HOST:PORT", help="where the guard listens (default: all addresses, the port of --public)")
    add(
        "--superlink",
        metavar="HOST:PORT",
        default="127.0.0.1:8001",
        help="where flower-superlink listens, on loopback (default: %(default)s)",
    )
    command("renew", _renew, "make a new server certificate by the same authority; the sites need nothing")
    command("commands", _commands, "show how its processes are started by hand")
    command("up", _up, "run SuperLink, SuperExec and guard, and keep them running")
    command("guard", _guard, "run the guard alone: the listener that sites may reach")
    add = command("nginx", _nginx, "print a configuration by which nginx does what the guard does")
    add("--listen", metavar="HOST:PORT", help="where nginx listens (default: all addresses, the port of `public`)")
    add = command("add-site", _add_site, "take a site into the federation")
    add("site", metavar="SITE", help="its name, as it enrolled")
    add("keys", metavar="SITE.pub", type=Path, help="the file that chexfound-client enrol made there")
    add = command("remove-site", _remove_site, "strike a site off: its node may not connect any more")
    add("site", metavar="SITE")
    add = command("sites", _sites, "list the sites: fingerprints, and whether they are connected")
    add("--json", action="store_true", help="as one JSON object")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        code: int = given.run(given)
        return code
    except KeyboardInterrupt:
        return 130
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _init(given: argparse.Namespace) -> int:
    from chexfound.roster import Address
    from server import federation

    public = Address.parse(given.public, "--public")
    listen = Address.parse(given.listen, "--listen") if given.listen else Address("0.0.0.0", public.port)  # noqa: S104
    made = federation.create(given.dir, given.name, public, listen, Address.parse(given.superlink, "--superlink"))
    print(f"federation {made.name}: {made.folder}")
    print(f"  sites connect to {made.public}; open that port, and no other")
    print(f"  keep {made.path('ca.key')} to yourself: who has it can pose as the coordinator")
    print(f"next: chexfound-server up {shlex.quote(str(given.dir))}")
    return 0


def _renew(given: argparse.Namespace) -> int:
    from server import federation, pki

    held = federation.load(given.dir)
    certificate = pki.make_server(held.folder, [held.public.host])
    held.write_sites(held.sites())
    print(f"{held.path('server.crt')}: for {held.public.host}, until {certificate.not_valid_after_utc:%Y-%m-%d}")
    print("next: start chexfound-server up again, which reads it")
    return 0


def _commands(given: argparse.Namespace) -> int:
    from server import federation

    held = federation.load(given.dir)
    for name, value in held.settings().items():
        print(f"export {name}={shlex.quote(value)}")
    for command in held.commands().values():
        print(shlex.join(command))
    return 0


def _up(given: argparse.Namespace) -> int:
    from server import federation
    from server.up import up

    number = up(federation.load(given.dir), lambda text: print(text, flush=True))
    print("stopped")
    return 130 if number == signal.SIGINT else 0


def _guard(given: argparse.Namespace) -> int:
    import ssl

    from chexfound import logs
    from chexfound.errors import DataError
    from server import federation, guard

    held = federation.load(given.dir)
    logs.show()
    try:
        server = guard.server(
            held.listen.host,
            held.listen.port,
            str(held.superlink),
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


def _nginx(given: argparse.Namespace) -> int:
    from chexfound.roster import Address
    from server import federation, nginx

    held = federation.load(given.dir)
    listen = Address.parse(given.listen, "--listen") if given.listen else Address("0.0.0.0", held.public.port)  # noqa: S104
    print(nginx.configuration(held, listen), end="")
    return 0


def _add_site(given: argparse.Namespace) -> int:
    from chexfound import roster
    from chexfound.signing import fingerprint
    from server import federation

    held = federation.load(given.dir)
    try:
        text = given.keys.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{given.keys}: cannot be read: {error}") from error
    keys = roster.read_public_file(text, str(given.keys))
    held.write_sites(held.sites().with_site(given.site, keys))
    print(f"site {given.site}: node {fingerprint(keys.node)}, identity {fingerprint(keys.identity)}")
    print("compare these with what the site saw, by telephone or in person")
    _register(held)
    print(f"next: give {held.site_file} to every site; each approves it with: chexfound-client roster approve FILE")
    return 0


def _remove_site(given: argparse.Namespace) -> int:
    from server import federation

    held = federation.load(given.dir)
    held.write_sites(held.sites().without_site(given.site))
    print(f"site {given.site}: removed")
    _register(held)
    return 0


def _register(held: object) -> None:
    """At the SuperLink too, if it is up; else at its next start."""
    from chexfound.errors import SiteError
    from server import members
    from server.federation import Federation

    assert isinstance(held, Federation)
    try:
        members.register_all(held)
    except SiteError as error:
        print(f"not at the SuperLink yet ({error}); chexfound-server up does it at its next start", file=sys.stderr)


def _sites(given: argparse.Namespace) -> int:
    from chexfound.errors import SiteError
    from chexfound.signing import fingerprint
    from server import federation, members

    held = federation.load(given.dir)
    sites = held.sites()
    try:
        nodes, down = members.nodes(held), ""
    except SiteError as error:
        nodes, down = {}, str(error)
    rows = [
        {
            "site": name,
            "node": fingerprint(keys.node),
            "identity": fingerprint(keys.identity),
            "status": nodes[name].status if name in nodes else "unknown",
            "since": nodes[name].since if name in nodes else None,
        }
        for name, keys in sorted(sites.sites.items())
    ]
    if given.json:
        about = {"schema": SCHEMA, "federation": held.name, "roster_sha256": sites.sha256(), "serial": sites.serial}
        print(json.dumps({**about, "sites": rows, "superlink": "down" if down else "up"}))
        return 0
    for row in rows:
        since = f" since {row['since']}" if row["since"] not in (None, "N/A") else ""
        print(f"{row['site']}: {row['status']}{since}\n  node     {row['node']}\n  identity {row['identity']}")
    if not rows:
        print(f"no site yet; chexfound-server add-site {shlex.quote(str(given.dir))} SITE SITE.pub")
    if down:
        print(f"the SuperLink is not up, so whether they are connected is not known ({down})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
