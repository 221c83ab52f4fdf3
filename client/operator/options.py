"""Options of a site operator's commands beside serving; what does them is imported once it is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from client.home.paths import site_name

COMMANDS = ("enrol", "join", "roster", "approve", "check", "status", "secagg", "unit")


def parser() -> argparse.ArgumentParser:
    """The commands' options."""
    result = argparse.ArgumentParser(prog="chexfound-client")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_membership, _roster, _approve, _check, _secagg, _unit):
        add(commands)
    return result


def run(words: Sequence[str]) -> int:
    """Run a command; returns the exit code.

    Raises: ChexfoundError.
    """
    given = parser().parse_args(words)
    given.site = site_name(given.name)
    module, _, function = given.run.partition(":")
    code: int = getattr(importlib.import_module(module), function)(given)
    return code


def _membership(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    enrol = commands.add_parser(
        "enrol",
        help="make this site's keys",
        description="Make this site's two keys, which never leave, and SITE.pub with their public halves, for the "
        "coordinator. Done again, it writes the same file.",
    )
    enrol.add_argument("--name", metavar="SITE", required=True, help="which the other sites and the report see")
    enrol.add_argument("--out", metavar="FILE", type=Path, help="where to (default: SITE.pub here)")
    enrol.set_defaults(run="client.operator.commands:enrol")
    joining = commands.add_parser(
        "join",
        help="approve the coordinator's file and the code, in one step",
        description="Show who is in the federation, by the file that the coordinator sent, the code that runs may have "
        "(that of the installed release) and the policy in force (site.yaml, or the defaults); ask once, and approve "
        "both. Compare the fingerprints with those people, by telephone or in person, before you say yes. It is the "
        "same as `roster approve FILE` and `approve`, one after the other.",
    )
    joining.add_argument("file", metavar="FILE", type=Path, help="NAME.federation.json")
    _add_name(joining)
    joining.add_argument("--yes", action="store_true", help="do not ask: all of it was compared and read before")
    joining.set_defaults(run="client.operator.join:run")


def _roster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    roster = commands.add_parser("roster", help="who is in the federation")
    of_roster = roster.add_subparsers(dest="what", required=True, metavar="COMMAND")
    approve = of_roster.add_parser(
        "approve",
        help="approve the coordinator's file",
        description="Show who is in the federation, by the file that the coordinator sent, and approve it. Compare the "
        "fingerprints with those people, by telephone or in person, before you say yes. Each change of who is in it "
        "needs a new file and a new approval.",
    )
    approve.add_argument("file", metavar="FILE", type=Path, help="NAME.federation.json")
    _add_name(approve)
    approve.add_argument("--yes", action="store_true", help="do not ask: the fingerprints were compared before")
    approve.set_defaults(run="client.operator.commands:approve_roster")
    show = of_roster.add_parser("show", help="show what was approved")
    _add_name(show)
    show.set_defaults(run="client.operator.commands:show_roster")


def _approve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    code = commands.add_parser(
        "approve",
        help="approve the code that runs may have, and weights that they may begin with",
        description="A run comes with a bundle of code, which this site never executes: it runs its own, installed "
        "release, and only for runs whose bundle was approved. Without a word this approves the bundle of the "
        "installed release; after an update of both ends, approve again. A bundle that came with a run and was refused "
        "is named by its first digits: what sets it apart from the installed release is shown first. With --weights it "
        "approves a file of weights that a run may begin with, or the digest of weights that a refusal named.",
    )
    code.add_argument("bundle", metavar="DIGITS", nargs="?", help="of a bundle that was refused (see --list)")
    _add_name(code)
    code.add_argument(
        "--weights",
        metavar="FILE|SHA256",
        help="a safetensors file, which is hashed here, or a SHA-256; of one that was refused the first digits do",
    )
    code.add_argument("--list", action="store_true", help="show what was approved, and what was refused")
    code.add_argument("--withdraw", metavar="DIGITS", help="approve no longer: code, or weights")
    code.add_argument("--yes", action="store_true", help="do not ask")
    code.set_defaults(run="client.operator.commands:approve_code")


def _check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="look whether this site can serve, and what to do if not",
        description="Look at this machine, the way to the coordinator and the coordinator's end, and say for each "
        "fault its cause and its remedy. It changes nothing, here or there, and a site may be serving meanwhile. "
        "Some MB of random bytes are sent to the coordinator, to time the uplink. Exit code 2 if anything failed.",
    )
    _add_name(check)
    check.add_argument("--data", metavar="DIR", type=Path, help="the images, as for serving")
    check.add_argument("--gpus", metavar="N", help="as for serving (default: $CHEXFOUND_GPUS)")
    check.add_argument("--json", action="store_true", help="one JSON object")
    check.add_argument(
        "--recipe",
        metavar="FILE",
        help="a coordinator's recipe, or a preset: say line by line what it asks and whether site.yaml grants it, and "
        "look at nothing else",
    )
    check.set_defaults(run="client.operator.commands:check")
    status = commands.add_parser(
        "status",
        help="what this site is doing",
        description="What this site is doing, by what its own processes wrote last; nobody else is asked.",
    )
    _add_name(status)
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--refused", action="store_true", help="the files that were left out, each with the reason")
    status.set_defaults(run="client.operator.commands:status")


def _secagg(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    secagg = commands.add_parser("secagg", help="secure aggregation: which sums this site helped to open")
    of_secagg = secagg.add_subparsers(dest="what", required=True, metavar="COMMAND")
    show = of_secagg.add_parser(
        "show",
        help="the numbers in force, sums that were opened, what was refused",
        description="Show what protects this site under secure aggregation: the numbers in force (of the approved "
        "roster and site.yaml), the attempt in hand, the sums that it helped to open, and what it refused and why. "
        "docs/secure-aggregation.md explains all of it.",
    )
    _add_name(show)
    show.add_argument("--json", action="store_true", help="one JSON object, with all sums")
    show.set_defaults(run="client.operator.commands:secagg_show")
    release = of_secagg.add_parser(
        "release",
        help="allow one more sum on weights on which one was opened, or take that back",
        description="Of the same weights a site helps to open one sum, or that over the same sites again: two over "
        "different sites would tell the coordinator their difference. Where a sum was opened and then lost (a "
        "coordinator that died, a site that left), and the run is refused with secagg.differencing, this allows one "
        "more: with --last the one that was refused, and no other; given before any was refused, whichever comes next "
        "on these weights. Each site that refuses has to do so; then the coordinator resumes the run.",
    )
    release.add_argument("phase", metavar="PHASE", nargs="?", help="of the sum: counts, pretrain, adapt, evaluate")
    release.add_argument("weights", metavar="WEIGHTS", nargs="?", help="first digits of their digest, by secagg show")
    release.add_argument("--last", action="store_true", help="the one that was refused last")
    _add_name(release)
    release.add_argument("--yes", action="store_true", help="do not ask")
    release.add_argument(
        "--withdraw", action="store_true", help="take back the latest release that no sum was opened with; asks nothing"
    )
    release.set_defaults(run="client.operator.commands:secagg_release")


def _unit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    unit = commands.add_parser(
        "unit",
        help="print a systemd unit",
        description="Print the systemd unit that serves this site, from each start of the machine on.",
    )
    unit.add_argument("--data", metavar="DIR", type=Path, required=True, help="as for serving; it is only read")
    _add_name(unit)
    unit.add_argument("--gpus", metavar="N", help="as for serving")
    unit.add_argument("--drain", metavar="SECONDS", type=float, default=120.0, help="as for serving")
    unit.add_argument("--image-px", metavar="N", type=int, help="as for serving")
    unit.add_argument("--out", metavar="FILE", type=Path, help="write it there")
    unit.set_defaults(run="client.operator.commands:unit")


def _add_name(command: argparse.ArgumentParser) -> None:
    """The option by which a command is told which site is meant."""
    command.add_argument("--name", metavar="SITE", help="this site (default: the one enrolled on this machine)")
