"""What a site's operator does beside serving: enrol, approve sites and code, check, status, released sums, a unit."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import chexfound
from chexfound.durable.files import write_text
from chexfound.errors import REFUSALS, ConfigError, PolicyError
from chexfound.host import systemd
from chexfound.identity.roster import check_name, public_file
from chexfound.identity.signing import fingerprint
from chexfound.parsing.names import counted
from chexfound.secagg.parameters import MINIMUM
from client.home import approval, membership, secret, template
from client.home.paths import close, named, site_home, site_name
from client.home.paths import home as chexfound_home
from client.operator import join


def parser() -> argparse.ArgumentParser:
    """The commands' options."""
    result = argparse.ArgumentParser(prog="chexfound-client")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    enrol = commands.add_parser(
        "enrol",
        help="make this site's keys",
        description="Make this site's two keys, which never leave, and SITE.pub with their public halves, for the "
        "coordinator. Done again, it writes the same file.",
    )
    enrol.add_argument("--name", metavar="SITE", required=True, help="which the other sites and the report see")
    enrol.add_argument("--out", metavar="FILE", type=Path, help="where to (default: SITE.pub here)")
    enrol.set_defaults(run=_enrol)
    join.add(commands)
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
    join.add_name(approve)
    approve.add_argument("--yes", action="store_true", help="do not ask: the fingerprints were compared before")
    approve.set_defaults(run=_approve)
    show = of_roster.add_parser("show", help="show what was approved")
    join.add_name(show)
    show.set_defaults(run=_show)
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
    join.add_name(code)
    code.add_argument(
        "--weights",
        metavar="FILE|SHA256",
        help="a safetensors file, which is hashed here, or a SHA-256; of one that was refused the first digits do",
    )
    code.add_argument("--list", action="store_true", help="show what was approved, and what was refused")
    code.add_argument("--withdraw", metavar="DIGITS", help="approve no longer: code, or weights")
    code.add_argument("--yes", action="store_true", help="do not ask")
    code.set_defaults(run=_approve_code)
    check = commands.add_parser(
        "check",
        help="look whether this site can serve, and what to do if not",
        description="Look at this machine, the way to the coordinator and the coordinator's end, and say for each "
        "fault its cause and its remedy. It changes nothing, here or there, and a site may be serving meanwhile. "
        "Some MB of random bytes are sent to the coordinator, to time the uplink. Exit code 2 if anything failed.",
    )
    join.add_name(check)
    check.add_argument("--data", metavar="DIR", type=Path, help="the images, as for serving")
    check.add_argument("--gpus", metavar="N", help="as for serving (default: $CHEXFOUND_GPUS)")
    check.add_argument("--json", action="store_true", help="one JSON object")
    check.add_argument(
        "--recipe",
        metavar="FILE",
        help="a coordinator's recipe, or a preset: say line by line what it asks and whether site.yaml grants it, and "
        "look at nothing else",
    )
    check.set_defaults(run=_check)
    status = commands.add_parser(
        "status",
        help="what this site is doing",
        description="What this site is doing, by what its own processes wrote last; nobody else is asked.",
    )
    join.add_name(status)
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--refused", action="store_true", help="the files that were left out, each with the reason")
    status.set_defaults(run=_status)
    _secagg_parsers(commands)
    unit = commands.add_parser(
        "unit",
        help="print a systemd unit",
        description="Print the systemd unit that serves this site, from each start of the machine on.",
    )
    unit.add_argument("--data", metavar="DIR", type=Path, required=True, help="as for serving; it is only read")
    join.add_name(unit)
    unit.add_argument("--gpus", metavar="N", help="as for serving")
    unit.add_argument("--drain", metavar="SECONDS", type=float, default=120.0, help="as for serving")
    unit.add_argument("--image-px", metavar="N", type=int, help="as for serving")
    unit.add_argument("--out", metavar="FILE", type=Path, help="write it there")
    unit.set_defaults(run=_unit)
    return result


def _secagg_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    secagg = commands.add_parser("secagg", help="secure aggregation: which sums this site helped to open")
    of_secagg = secagg.add_subparsers(dest="what", required=True, metavar="COMMAND")
    show = of_secagg.add_parser(
        "show",
        help="the numbers in force, sums that were opened, what was refused",
        description="Show what protects this site under secure aggregation: the numbers in force (of the approved "
        "roster and site.yaml), the attempt in hand, the sums that it helped to open, and what it refused and why. "
        "docs/secure-aggregation.md explains all of it.",
    )
    join.add_name(show)
    show.add_argument("--json", action="store_true", help="one JSON object, with all sums")
    show.set_defaults(run=_secagg_show)
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
    join.add_name(release)
    release.add_argument("--yes", action="store_true", help="do not ask")
    release.add_argument(
        "--withdraw", action="store_true", help="take back the latest release that no sum was opened with; asks nothing"
    )
    release.set_defaults(run=_secagg_release)


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code.

    Raises: ChexfoundError.
    """
    given = parser().parse_args(arguments)
    code: int = given.run(given)
    return code


def _enrol(given: argparse.Namespace) -> int:
    check_name(given.name, "site name")
    home, out = site_home(given.name), given.out or Path(f"{given.name}.pub")
    close(home)
    keys, made = membership.make_keys(home)
    secret.of_site(home)
    write_text(out, public_file(given.name, keys))
    print(
        f"site {given.name}: {'made its keys' if made else 'has its keys already'} in {home / 'keys'}; they never leave"
    )
    print(f"  its secret, by which its patients are named and split: {secret.path_of(home)}; back up both, together")
    if (written := template.write(home)) is not None:
        print(f"what it demands of any run is in {written}: read it, each line is a default that protects")
    print(f"  node     {fingerprint(keys.node)}\n    {keys.node}")
    print(f"  identity {fingerprint(keys.identity)}\n    {keys.identity}")
    print(f"next: give {out} to the coordinator, and tell the fingerprints by telephone or in person;")
    print(f"      then, with the file that comes back: chexfound-client join FILE{named(given.name)}")
    return 0


def _approve(given: argparse.Namespace) -> int:
    name, home, federation, before = join.admissible(given)
    join.tell(federation, name)
    join.tell_changes(before, federation)
    join.consent(given, "Are these the fingerprints that they told you?")
    membership.approve(home, federation)
    steps = [] if approval.approved(home) else [f"chexfound-client approve{named(name)}"]
    if before is None:
        steps.append(f"chexfound-client --data DIR{named(name)}")
    print("approved" + (f"; next: {', then: '.join(steps)}" if steps else "; a site that serves knows it at once"))
    return 0


def _approve_code(given: argparse.Namespace) -> int:
    from client.node.flwr_private import release_bundle

    if given.weights is not None:
        return _approve_weights(given)
    name = site_name(given.name)
    home = site_home(name)
    if given.withdraw is not None:
        weights = approval.approved_weights(home)
        digest = _one_of([*approval.approved(home), *weights], given.withdraw, "approved")
        if digest in weights:
            approval.withdraw_weights(home, digest)
            print(f"weights {digest}: not approved any more; a run that began with them goes on")
            return 0
        approval.withdraw(home, digest)
        print(f"code {digest}: not approved any more; a run that was begun with it goes on until the site is restarted")
        return 0
    release, refused = release_bundle(), approval.refused(home)
    if given.list:
        for digest, when in approval.approved(home).items():
            which = ", the installed release" if digest == release.digest() else ""
            print(f"code {digest}: approved on {when[:10]}{which}")
        for digest, bundle in refused.items():
            differing = len(bundle.differences(release))
            print(f"code {digest}: REFUSED: {counted(differing, 'file')} other than the installed release's")
        for digest, when in approval.approved_weights(home).items():
            print(f"weights {digest}: approved on {when[:10]}")
        for digest, code in approval.refused_weights(home).items():
            print(f"weights {digest}: REFUSED: {REFUSALS[code]} ({code})")
        return 0
    if given.bundle is None:
        digest, differences = release.digest(), []
    else:
        digest = _one_of(refused, given.bundle, "refused")
        differences = refused[digest].differences(release)
    print(f"code {digest}")
    print(f"differs from the installed release {chexfound.__version__}: {'' if differences else 'nothing'}")
    for line in differences:
        print(f"  {line}")
    if differences:
        join.consent(given, "The coordinator runs this; your site does not. Approve it?")
    approval.approve(home, digest)
    print("approved: runs with this code are accepted")
    if not (home / "keys").is_dir():
        print(f"site {name!r} was not enrolled here: this is for serving it with --insecure only", file=sys.stderr)
    return 0


def _approve_weights(given: argparse.Namespace) -> int:
    """Approve a file, hashed here, or a digest in full; of weights that were refused the first digits do."""
    name = site_name(given.name)
    home, path = site_home(name), Path(given.weights)
    refused = approval.refused_weights(home)
    if path.is_file():
        from chexfound.model import checkpoint

        tensors = checkpoint.load(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        said = f"{path}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
    else:
        full = re.fullmatch("[0-9a-f]{64}", given.weights) is not None
        if not full and not re.fullmatch("[0-9a-f]+", given.weights):
            raise ConfigError(f"--weights {given.weights!r}: no such file, and no SHA-256 in hexadecimal digits")
        digest = given.weights if full else _one_of(refused, given.weights, "refused", "file")
        code = refused.get(digest)
        said = f"refused when it came: {REFUSALS[code]} ({code})" if code else "has not come here yet"
    print(f"weights {digest}")
    print(f"  {said}")
    print(
        "  A run may read images out of what it gets back for weights that were made for it: approve them only if you"
    )
    print("  know who trained them, and were told this digest by them.")
    join.consent(given, "Approve them?")
    approval.approve_weights(home, digest)
    print("approved: a run may begin with these weights, or go on with them where this site's own are lost")
    return 0


def _one_of(digests: Iterable[str], start: str, what: str, of: str = "bundle") -> str:
    found = [digest for digest in digests if start and digest.startswith(start)]
    if not found:
        raise ConfigError(f"no {what} {of} begins with {start!r}; see --list")
    if len(found) > 1:
        raise ConfigError(f"{start!r}: the first digits of {len(found)} {of}s that were {what}; see --list")
    return found[0]


def _show(given: argparse.Namespace) -> int:
    name = site_name(given.name)
    federation = membership.approved(site_home(name))
    if federation is None:
        raise ConfigError(f"site {name!r}: nothing was approved yet; chexfound-client join FILE{named(name)}")
    join.tell(federation, name)
    return 0


def _check(given: argparse.Namespace) -> int:
    from client.operator.preflight import checks
    from client.operator.preflight.order import CHECKS

    name = site_name(given.name)
    if given.recipe is not None:
        return _check_recipe(given, name)
    data = given.data.resolve() if given.data else None
    subject = checks.Subject(name=name, home=site_home(name), data=data, gpus=given.gpus)
    if given.json:
        results = checks.run(subject, CHECKS)
        print(json.dumps(checks.as_dict(subject, results), indent=2))
    else:
        results = checks.run(subject, CHECKS, lambda result: print(checks.lines(result), flush=True))
        print(checks.summary(results))
    return 0 if checks.passed(results) else ConfigError.exit_code


def _check_recipe(given: argparse.Namespace, name: str) -> int:
    """Asked and granted; exit code 6 if something is not."""
    from chexfound.contract import limits
    from chexfound.recipe import load
    from client.answer.grants import Grant

    loaded = load.load(given.recipe)
    secured = membership.approved(site_home(name)) is not None
    grant = Grant.of({"site": name, "secured": secured})
    assert grant is not None  # no simulation has a command line
    verdicts, n = grant.judge(loaded), grant.sharing(loaded)
    if given.json:
        rows = [{"line": one.line, "asked": one.asked, "ok": one.ok, "code": one.code} for one in verdicts]
        print(json.dumps({"schema": 1, "site": name, "recipe": loaded.name, "sites": n, "lines": rows}, indent=2))
    else:
        of = (
            "of the approved roster"
            if grant.n_sites
            else "the recipe's federation.min_sites, since no roster is approved"
        )
        print(f"min_batch is reckoned with {counted(n, 'site')}, {of}")
        print("\n".join(limits.table(verdicts)))
    against = limits.refused(verdicts)
    few = loaded.aggregation == "secagg" and grant.n_sites is not None and grant.n_sites < MINIMUM
    if not given.json:
        print("\n".join(_said_of_recipe(site_home(name) / "site.yaml", len(verdicts), len(against))))
        if few:
            print(f"REFUSED: masks need {MINIMUM} sites, and the roster has {grant.n_sites}")
    return PolicyError.exit_code if against or few else 0


def _said_of_recipe(path: Path, lines: int, against: int) -> list[str]:
    """The sum of a table of asked and granted."""
    if against:
        return [
            f"{against} of {lines} lines of {path} refuse it; change them only if",
            "the security officer agrees, or ask the coordinator for another recipe",
        ]
    return [
        f"all {lines} lines of {path} that bear on a recipe grant it; a run is held",
        "against the others too: max_runs, min_patients, min_images, cells, findings, machine and max_missed_rounds",
    ]


def _status(given: argparse.Namespace) -> int:
    from client.operator import status

    name = site_name(given.name)
    if given.refused:
        print("\n".join(status.refused(site_home(name))))
        return 0
    found = status.read(name, site_home(name))
    print(json.dumps(found, indent=2) if given.json else "\n".join(status.lines(found)))
    return 0


def _secagg_show(given: argparse.Namespace) -> int:
    from client.operator import sums

    name = site_name(given.name)
    found = sums.read(name, site_home(name))
    print(sums.as_json(found) if given.json else "\n".join(sums.lines(found)))
    return 0


def _secagg_release(given: argparse.Namespace) -> int:
    from client.masked import ledger
    from client.operator import sums

    name = site_name(given.name)
    if given.last + given.withdraw + (given.phase is not None) > 1:
        raise ConfigError("give --last, PHASE and WEIGHTS, or --withdraw; one of them")
    home = site_home(name)
    if given.withdraw:
        found = ledger.withdraw(home)
        print(f"withdrawn: {found['phase']} on weights {found['weights'][:12]}…; a second sum on them is refused again")
        return 0
    chosen = ledger.choose(home, last=given.last, phase=given.phase, weights=given.weights)
    print("\n".join(sums.question(sums.read(name, home), chosen)))
    join.consent(given, "Release it?", "released")
    ledger.release(home, chosen)
    print("released: one more sum on these weights may be opened; the coordinator can resume the run")
    print(f"until then it can be taken back: chexfound-client secagg release --withdraw{named(name)}")
    return 0


def _unit(given: argparse.Namespace) -> int:
    name, data = site_name(given.name), given.data.absolute()
    words = ["--data", str(data), "--name", name, "--drain", f"{given.drain:g}"]
    for option, value in (("--gpus", given.gpus), ("--image-px", given.image_px)):
        if value is not None:
            words += [option, str(value)]
    text = systemd.client(chexfound_home().absolute(), data, words, given.drain)
    if given.out is None:
        print(text, end="")
        return 0
    write_text(given.out, text)
    file = shlex.quote(str(given.out.absolute()))
    print(f"wrote {given.out}; next, as root: install -m 644 {file} /etc/systemd/system/chexfound-client.service")
    print("      && systemctl daemon-reload && systemctl enable --now chexfound-client")
    return 0
