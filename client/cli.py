"""`chexfound-client`: takes a site's images in, then answers a coordinator from them."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chexfound.errors import ChexfoundError, ConfigError, SiteError

EPILOG = """\
examples:
  chexfound-client --data /images --name CENTRE --superlink 127.0.0.1:8000 --insecure
  chexfound-client --data /images --name CENTRE --superlink 127.0.0.1:8000 --insecure --gpus all
  CHEXFOUND_HOME=/srv/chexfound chexfound-client --data /images --name CENTRE --superlink 127.0.0.1:8000 --insecure

What it does: the images of --data are taken into the site's own store, $CHEXFOUND_HOME/sites/NAME
(default ~/.chexfound); new ones are added at the next start. Then Flower's SuperNode connects to the
coordinator and does what runs ask for, until Ctrl-C. Images, names of patients and of files
never leave; docs/deployed.md lists what does.

The same by hand, without taking in the images first:
  flower-supernode --insecure --superlink 127.0.0.1:8000 --node-config 'site="CENTRE" data="/images"'

exit codes: 0 told to stop, 2 an option is wrong, 3 the images cannot be used, 7 the SuperNode failed,
8 the disk is full, 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="chexfound-client",
        description="Take part in federated chest X-ray training as one site: the images stay here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--data", metavar="DIR", required=True, help="images: DICOM folder, folder with manifest.csv, or store"
    )
    result.add_argument(
        "--name", metavar="SITE", required=True, help="this site's name, which the other sites and the report see"
    )
    result.add_argument(
        "--superlink", metavar="HOST:PORT", required=True, help="where the coordinator's flower-superlink listens"
    )
    result.add_argument(
        "--insecure",
        action="store_true",
        help="connect without TLS: nobody is authenticated and all can be read on the way. The only way in this "
        "release; for this machine itself, or a network in which every machine is trusted",
    )
    result.add_argument(
        "--gpus",
        metavar="N",
        help="pretrain on N GPUs of this machine, or on all; the batch that a run gives the site must divide by it "
        "(default: $CHEXFOUND_GPUS, else 1)",
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
    given = parser().parse_args(arguments)
    try:
        return _serve(given)
    except KeyboardInterrupt:
        print("\nStopped; nothing was left half-written.", file=sys.stderr)
        return 130
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _serve(given: argparse.Namespace) -> int:
    from client import supernode
    from client.home import checked_name, site_home

    name = checked_name(given.name)
    host, port = supernode.parse_address(given.superlink)
    _check_insecure(given.insecure, given.superlink, supernode.is_loopback(host))
    data = Path(given.data).resolve()
    gpus = _gpus(given.gpus)
    config = supernode.node_config({"site": name, "data": str(data), **({"gpus": gpus} if gpus else {})})
    home = site_home(name)
    with _alone(home, name):
        _take_in(name, data, home, given.image_px)
        if supernode.answers(host, port):
            _say(name, f"connecting to {given.superlink}, without TLS; Ctrl-C ends it")
        else:
            _say(name, f"nothing answers at {given.superlink} yet; trying again until it does; Ctrl-C ends it")
        child = supernode.SuperNode(supernode.command(given.superlink, config), supernode.environment(home / "flower"))
        code = child.wait()
    if child.asked is not None:
        _say(name, "stopped")
        return 130 if child.asked == signal.SIGINT else 0
    raise SiteError(f"flower-supernode ended by itself with exit code {code}; its last lines above say why")


def _gpus(asked: str | None) -> str:
    """The number of GPUs for the node's configuration, empty where nothing asks for one.

    Raises: ConfigError if this machine has fewer.
    """
    if not asked and not os.environ.get("CHEXFOUND_GPUS"):
        return ""
    from chexfound import machine

    return str(machine.gpus(asked))


def _check_insecure(insecure: bool, address: str, loopback: bool) -> None:
    if insecure and not loopback:
        print(
            f"warning: {address} is another machine, and nothing on the way there is encrypted or authenticated; "
            "go on only in a network that you trust",
            file=sys.stderr,
        )
    if not insecure:
        where = "this machine" if loopback else "another machine: do so only in a network that you trust"
        raise ConfigError(
            "--insecure is missing: this release connects without TLS only, nothing encrypted and nobody "
            f"authenticated. Give --insecure to agree to that; {address} is {where}"
        )


def _say(name: str, text: str) -> None:
    print(f"site {name}: {text}", flush=True)


@contextlib.contextmanager
def _alone(home: Path, name: str) -> Iterator[None]:
    """Keep a second client of the same name out: they would share one disk.

    Raises: ConfigError.
    """
    from chexfound.journal import storage

    with storage(home):
        home.mkdir(parents=True, exist_ok=True)
        handle = open(home / ".lock", "w")  # noqa: SIM115 (held, with its lock, as long as the site serves)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"site {name!r} is already being served from {home}; stop that, or use another --name"
            ) from error
        yield


def _take_in(name: str, data: Path, home: Path, image_px: int) -> None:
    """Bring the site's store up to date, and say what was refused and what is in it now."""
    from chexfound.data.sources import ingest
    from chexfound.data.store import INDEX, Store
    from client.home import store_path

    if (data / INDEX).exists():
        path = data
    else:
        path = store_path(home, image_px)
        _say(name, f"taking in the images of {data}")
        with _bar() as progress:
            summary = ingest(data, path, image_px, progress=progress)
        _say(
            name,
            f"{summary.images} new images of {summary.patients} patients, "
            f"{summary.skipped_existing} files were there already, {len(summary.refused)} refused",
        )
        for reason, count in Counter(_kind(reason) for _, reason in summary.refused).most_common():
            print(f"  {count} refused: {reason}", flush=True)
    store = Store.open(path)
    _say(name, f"{len(store)} images of {len(set(store.keys))} patients, {store.px} px, in {path}")
    strangers = sum(image.root != str(data) for image in store.images) if path != data else 0
    if strangers:
        print(
            f"warning: images of another folder that site {name!r} was served from before take part too: "
            f"{strangers} of {len(store)}; if they should not, remove {path} and start again",
            file=sys.stderr,
        )


def _kind(reason: str) -> str:
    """A reason without the file that it names, so that equal ones can be counted."""
    return "duplicate of another image" if reason.startswith("duplicate of ") else reason


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
