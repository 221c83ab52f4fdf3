"""`chexfound-client`: takes a site's images in, then answers a coordinator from them.

`enrol` and `join` come before that, once, and `check` looks whether it will work; without a word it serves,
and `status` says what it is doing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound import __version__
from chexfound.errors import ConfigError
from chexfound.host.exits import ended
from client.operator import options

if TYPE_CHECKING:
    from chexfound.data.store.naming import Naming
    from chexfound.identity.roster import Address
    from client.node.supernode import Credentials

EPILOG = """\
once, before:
  chexfound-client enrol --name CENTRE                  makes CENTRE.pub, for the coordinator
  chexfound-client join FILE                            the file that comes back: who is in the federation, the
                                                        code that runs may have, and what this site demands

then:
  chexfound-client --data /images                       for ever; at each start new images are taken in
  chexfound-client unit --data /images                  the same as a systemd unit, to survive a restart

whenever something does not work:
  chexfound-client check --data /images                 what is wrong, and what to do about it
  chexfound-client status                               what this site is doing
  chexfound-client check --recipe FILE                  what a recipe asks, and whether site.yaml grants it
  chexfound-client approve --list                       code and weights that were approved, and refused

where runs aggregate under masks (docs/secure-aggregation.md):
  chexfound-client secagg show                          the numbers that protect this site, sums opened, refusals
  chexfound-client secagg release --last                one more sum, after a refusal; --withdraw takes that back

What it does: the images of --data are taken into the site's own store, $CHEXFOUND_HOME/sites/NAME
(default ~/.chexfound). Then Flower's SuperNode connects to the coordinator, outbound only, by TLS with the site's own
key, and a worker does what runs ask for, until Ctrl-C. Code that comes with a run is never executed: the worker runs
the installed release, and only for runs whose code was approved. Images, names of patients and of files never leave;
docs/deployed.md lists what does.

without TLS and keys, on this machine or in a network in which every machine is trusted:
  chexfound-client --data /images --name CENTRE --superlink 127.0.0.1:8000 --insecure

exit codes: 0 told to stop, 2 an option is wrong or something is missing, 3 the images or keys cannot be used,
6 something was not approved, 8 the disk is full, 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="chexfound-client",
        description="Take part in federated chest X-ray training as one site: the images stay here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    result.add_argument(
        "--data", metavar="DIR", required=True, help="images: DICOM folder, folder with manifest.csv, or store"
    )
    result.add_argument(
        "--name", metavar="SITE", help="this site's name (default: that of the one site enrolled on this machine)"
    )
    result.add_argument(
        "--superlink",
        metavar="HOST:PORT",
        help="with --insecure: where flower-superlink listens; else the approved file says where to connect",
    )
    result.add_argument(
        "--insecure",
        action="store_true",
        help="connect without TLS: nobody is authenticated and all can be read on the way; for this machine itself, "
        "or a network in which every machine is trusted",
    )
    result.add_argument(
        "--gpus",
        metavar="N",
        help="pretrain on N GPUs of this machine, or on all; the batch that a run gives the site must divide by it "
        "(default: $CHEXFOUND_GPUS, else 1)",
    )
    result.add_argument(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=120.0,
        help="at SIGTERM, how long the message in hand may still take before it is left (default: %(default)g); "
        "Ctrl-C leaves it at once. What was left is asked for again",
    )
    result.add_argument(
        "--keep-warm",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="after the last message, how long what was opened stays so, and the GPU's memory reserved (default: "
        "%(default)g); what is given back is read from the disk when it is needed",
    )
    result.add_argument(
        "--image-px",
        metavar="N",
        type=int,
        default=128,
        help="side of the stored images; as image_px of the recipe, else they are taken in anew when a run starts "
        "(default: %(default)s)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from client.home.paths import UMASK

    words = list(sys.argv[1:] if arguments is None else arguments)
    os.umask(UMASK)  # the node's and the worker's too
    if words and words[0] in options.COMMANDS:
        return ended(lambda: options.run(words))
    return ended(lambda: _serve(parser().parse_args(words)))


def _serve(given: argparse.Namespace) -> int:
    from client.home.paths import close, named, site_home, site_name

    name = site_name(given.name)
    from client.home import approval, link, secret
    from client.home.policy import Policy
    from client.node import flower_node, supernode

    home = site_home(name)
    address, credentials = _connection(given, name, home)
    Policy.load(home)  # else every run would be refused
    data = Path(given.data).resolve()
    gpus = _gpus(given.gpus)
    values: dict[str, str | bool] = {"site": name, "data": str(data)}
    values |= {"gpus": gpus} if gpus else {}
    values |= {"secured": True} if credentials else {}
    config = supernode.node_config(values)
    with _alone(home, name):
        close(home)
        _take_in(name, data, home, given.image_px, secret.of_site(home).naming)
        how = "with TLS" if credentials else "without TLS"
        if link.answers(address, "https" if credentials else "http"):
            _say(name, f"connecting to {address}, {how}; Ctrl-C ends it")
        else:
            _say(name, f"nothing answers at {address} yet; trying again until it does; Ctrl-C ends it")
        if not approval.approved(home):
            _say(name, f"no code was approved here yet, so every run is refused: chexfound-client approve{named(name)}")
        commands = supernode.commands(home, str(address), config, credentials, given.keep_warm)
        environment = supernode.environment(home / "flower")
        asked = supernode.keep_running(commands, environment, lambda text: _say(name, text), given.drain)
        flower_node.Status.stopped(home)
    _say(name, "stopped")
    return 130 if asked == signal.SIGINT else 0


def _connection(given: argparse.Namespace, name: str, home: Path) -> tuple[Address, Credentials | None]:
    """Tell where to connect, and with what.

    Raises: ConfigError if the site was not enrolled and approved, and --insecure was not given.
    """
    from chexfound.identity.roster import Address
    from client.home import membership
    from client.home.paths import named
    from client.node.supernode import Credentials

    if given.insecure:
        if not given.superlink:
            raise ConfigError("--insecure: say where to connect, with --superlink HOST:PORT")
        if (joined := membership.approved(home)) is not None:
            raise ConfigError(
                f"--insecure: site {name!r} has joined {joined.name}, and would serve whoever answers at "
                f"{given.superlink}, without TLS and its keys; for a trial take another --name or $CHEXFOUND_HOME"
            )
        address = Address.parse(given.superlink, "--superlink")
        if not address.loopback:
            print(
                f"warning: {address} is another machine, and nothing on the way there is encrypted or authenticated; "
                "go on only in a network that you trust",
                file=sys.stderr,
            )
        return address, None
    if given.superlink:
        raise ConfigError(
            "--superlink: with TLS the approved file says where to connect (chexfound-client join FILE); "
            "--superlink is for --insecure, which encrypts nothing and authenticates nobody"
        )
    federation = membership.approved(home)
    if federation is None:
        raise ConfigError(
            f"site {name!r} is in no federation yet: chexfound-client enrol --name {shlex.quote(name)}, give the file "
            f"to the coordinator, then chexfound-client join FILE{named(name)}, with the one that comes back"
        )
    membership.check_own(name, membership.public_keys(home), federation, str(home / "federation.json"))
    return federation.server, Credentials(membership.authority_file(home, federation), home / "keys" / "node.key")


def _gpus(asked: str | None) -> str:
    """The number of GPUs for the node's configuration, empty where nothing asks for one.

    Raises: ConfigError if this machine has fewer.
    """
    if not asked and not os.environ.get("CHEXFOUND_GPUS"):
        return ""
    from chexfound.host import machine

    return str(machine.gpus(asked))


def _say(name: str, text: str) -> None:
    print(f"site {name}: {text}", flush=True)


@contextlib.contextmanager
def _alone(home: Path, name: str) -> Iterator[None]:
    """Keep a second client of the same name out: they would share one disk.

    Raises: ConfigError.
    """
    from chexfound.durable.files import lock, storage

    with storage(home):
        home.mkdir(parents=True, exist_ok=True)
        handle = open(home / ".lock", "w")  # noqa: SIM115 (held, with its lock, as long as the site serves)
    with handle:
        lock(handle, ConfigError(f"site {name!r} is served already, from {home}; stop that, or use another --name"))
        yield


def _take_in(name: str, data: Path, home: Path, image_px: int, naming: Naming) -> None:
    """Bring the site's store up to date, and say what was refused and what is in it now."""
    from chexfound.data.intake.ingest import ingest
    from chexfound.data.store.reader import Store, is_store
    from client.home.paths import named, store_path

    if is_store(data):
        path = data
    else:
        path = store_path(home, image_px)
        _say(name, f"taking in the images of {data}")
        with _bar() as progress:
            summary = ingest(data, path, image_px, progress=progress, naming=naming, site=name)
        _say(
            name,
            f"{summary.images} new images of {summary.patients} patients, "
            f"{summary.skipped_existing} files were there already, {len(summary.refused)} refused",
        )
        for reason, count in Counter(_kind(reason) for _, reason in summary.refused).most_common():
            print(f"  {count} refused: {reason}", flush=True)
        if summary.refused:
            print(f"  which they are: chexfound-client status --refused{named(name)}", flush=True)
    store = Store.open(path)
    _say(name, f"{len(store)} images of {len(set(store.keys))} patients, {store.px} px, in {path}")
    strangers = sum(image.root != naming.hide(str(data)) for image in store.images) if path != data else 0
    if strangers:
        print(
            f"warning: images of another folder that site {name!r} was served from before take part too: "
            f"{strangers} of {len(store)}; if they should not, remove {path} and start again",
            file=sys.stderr,
        )


def _kind(reason: str) -> str:
    """A reason without the file or the text that it names, so that equal ones can be counted, and nobody is named."""
    if reason.startswith("duplicate of "):
        return "duplicate of another image"
    return re.sub(r"""(['"]).*\1""", "…", reason)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("  taking in"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
