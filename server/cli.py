"""`chexfound-server`: the coordinator of a federation."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chexfound import __version__
from chexfound.host.exits import ended

EPILOG = """\
from nothing to a model:
  chexfound-server init /srv/thorax --name thorax --public coordinator.example.org:8443
  chexfound-server up /srv/thorax                                     runs until Ctrl-C; the rest in another terminal
  chexfound-server add-site /srv/thorax NORTHFIELD NORTHFIELD.pub     chexfound-client enrol made the file
  (/srv/thorax/thorax.federation.json goes to every site: chexfound-client join FILE, then it connects)
  chexfound-server run /srv/thorax vits16-224 --set train.rounds=50
  chexfound-server report /srv/thorax
  chexfound-server fetch-model /srv/thorax --out model

before a run with secure aggregation:
  chexfound-server plan-secagg --sites 5                              colluders and losses borne, seconds, bytes

Ctrl-C in run and watch leaves the run going; stop ends it, resume goes on after its last finished round.
Where RUN may be left out, it is the latest. Each command has its own --help; docs/coordinator.md shows all of it.

exit codes: 0 done or told to stop; 130 Ctrl-C; of a run that failed, its own:
1 what no check foresaw, 2 an option or a recipe is wrong, 3 a file or images cannot be used, 4 weights do not fit,
5 a message is not as agreed, 6 forbidden by a site, 7 a site, a process or the SuperLink failed, 8 the disk is full.
"""
RUN = """\
Resolves the recipe, ships the installed release as the code of the run, submits both to the SuperLink, and shows how
it goes, a line an event, until it ends. The run is the SuperLink's: Ctrl-C only ends the showing. All that it leaves is
in DIR/runs/NAME.

examples:
  chexfound-server run /srv/thorax demo --set train.rounds=2 --set adapt.rounds=2
  chexfound-server run /srv/thorax mine.yaml --name first --detach
  chexfound-server run /srv/thorax vitb16-224 --backbone model/backbone.safetensors

`chexfound recipe` lists the presets, `chexfound recipe NAME` shows one.
"""
RESUME = """\
For a run that failed, was stopped or was killed: the same recipe and folder are submitted again, and it goes on after
its last finished round, to the same result. A run that is still going is left alone.
"""
PLAN = """\
With `aggregation: secagg` the coordinator sees sums over sites, and no site's own update. For n sites of which c may
collude with it, t must agree to a sum: 2t > n + c, so that no two sums can be opened, and t - c >= 2, so that none is
of one honest site. This prints t, how many sites may be lost, and what it costs; numbers that do not protect are
refused. Seconds come from a measurement of this machine, which takes one.

examples:
  chexfound-server plan-secagg
  chexfound-server plan-secagg --sites 5 6 7 --colluders 2
  chexfound-server plan-secagg --sites 8 --recipe vits16-224 --ring 16
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="chexfound-server",
        description="Coordinate federated chest X-ray training: the images stay at the sites.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    groups = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(module: str, name: str, text: str, more: str = "") -> Callable[..., argparse.Action]:
        made = groups.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("dir", metavar="DIR", type=Path, help="the federation's folder")
        made.set_defaults(module=module)
        return made.add_argument

    _federation_commands(command)
    _run_commands(command)
    _plan_command(groups.add_parser)
    return result


def _federation_commands(command: Callable[..., Callable[..., argparse.Action]]) -> None:
    here = "server.commands.federation"
    add = command(here, "init", "make a federation: its authority, certificate, secret and settings")
    add("--name", metavar="NAME", required=True, help="of the federation, as the sites see it")
    add("--public", metavar="HOST:PORT", required=True, help="what sites connect to; the certificate is for this host")
    add("--listen", metavar="HOST:PORT", help="where the guard listens (default: all addresses, the port of --public)")
    add(
        "--superlink",
        metavar="HOST:PORT",
        default="127.0.0.1:8001",
        help="where flower-superlink listens, on loopback (default: %(default)s)",
    )
    command(here, "renew", "make a new server certificate by the same authority; the sites need nothing")
    command(here, "up", "run SuperLink, SuperExec and guard, and keep them running")
    command(here, "commands", "show how these processes are started by hand")
    command(here, "superlink", "run the SuperLink alone, with a database that is waited for")
    command(here, "superexec", "run the SuperExec alone: it runs the installed release, and no other code")
    command(here, "guard", "run the guard alone: the listener that sites may reach")
    add = command(here, "nginx", "print a configuration by which nginx does what the guard does")
    add("--listen", metavar="HOST:PORT", help="where nginx listens (default: all addresses, the port of `public`)")
    add = command(here, "add-site", "take a site into the federation")
    add("site", metavar="SITE", help="its name, as it enrolled")
    add("keys", metavar="SITE.pub", type=Path, help="the file that chexfound-client enrol made there")
    add = command(here, "remove-site", "strike a site off: its node may not connect any more")
    add("site", metavar="SITE")
    add = command(here, "sites", "list the sites: fingerprints, and whether they are connected")
    add("--json", action="store_true", help="as one JSON object")


def _run_commands(command: Callable[..., Callable[..., argparse.Action]]) -> None:
    here, which = "server.commands.runs", "a run's name (default: the latest)"
    add = command(here, "run", "start a run over the sites, and show how it goes", RUN)
    add("recipe", metavar="RECIPE", help="a preset or a YAML file")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the recipe, e.g. train.rounds=3; may be repeated",
    )
    add("--name", metavar="NAME", help="of the run (default: the recipe's, with date and time)")
    add("--backbone", metavar="FILE", type=Path, help="start from these weights (safetensors) instead of fresh ones")
    add("--detach", action="store_true", help="submit it and return")
    add = command(here, "resume", "go on with a run that ended before its end", RESUME)
    add("run", metavar="RUN", nargs="?", help="its name (default: the one unfinished run)")
    add("--detach", action="store_true", help="submit it and return")
    add = command(here, "status", "say how processes, certificate, sites and runs stand")
    add("run", metavar="RUN", nargs="?", help="of this run only (default: of all)")
    add("--json", action="store_true", help="as one JSON object")
    add = command(here, "watch", "show a run live until it ends: rounds, sites, bytes, curves")
    add("run", metavar="RUN", nargs="?", help=which)
    add = command(here, "stop", "end a run; resume goes on with it")
    add("run", metavar="RUN", nargs="?", help="its name (default: the one that is going)")
    add = command(here, "fetch-model", "copy the model of a finished run, its hash checked")
    add("run", metavar="RUN", nargs="?", help=which)
    add("--out", metavar="FOLDER", type=Path, required=True, help="a new folder")
    add = command(here, "report", "draw the report.html of a finished run")
    add("run", metavar="RUN", nargs="?", help=which)


def _plan_command(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """The one that needs no federation's folder."""
    made = add_parser(
        "plan-secagg",
        help="how many colluders and lost sites secure aggregation bears, and what it costs",
        description=PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(module="server.planning.masks")
    add = made.add_argument
    add("--sites", metavar="N", type=int, nargs="+", help="numbers of sites (default: 3 4 5 8 16 32 64 128)")
    add(
        "--colluders",
        metavar="C",
        type=int,
        help="sites that may collude with the coordinator, as each site has it in site.yaml (default: a quarter)",
    )
    add(
        "--minimum",
        metavar="M",
        type=int,
        default=3,
        help="sites that a sum must be over, as the sites have it in site.yaml (default: %(default)s)",
    )
    add("--ring", type=int, choices=(16, 32), help="bits of a value under masks (default: the recipe's, 32)")
    of = made.add_mutually_exclusive_group()
    of.add_argument("--recipe", metavar="RECIPE", help="count what pretraining sums by this preset or YAML file")
    of.add_argument("--values", metavar="N", type=int, help="so many values are summed")
    add("--json", action="store_true", help="as one JSON object")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    from server.federation import settings

    def run() -> int:
        if given.command not in ("init", "plan-secagg"):
            settings.load(given.dir)  # refused before all that a command needs is imported
        command = getattr(importlib.import_module(given.module), given.command.replace("-", "_"))
        code: int = command(given)
        return code

    return ended(run, stopped="")


if __name__ == "__main__":
    sys.exit(main())
