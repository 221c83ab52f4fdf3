"""A site operator's commands beside serving: enrol, approve sites and code, check, status, released sums, a unit."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import chexfound
from chexfound.durable.files import write_text
from chexfound.errors import REFUSALS, ConfigError, PolicyError
from chexfound.host import systemd
from chexfound.identity.roster import public_file
from chexfound.identity.signing import fingerprint
from chexfound.parsing.names import counted
from chexfound.secagg.parameters import MINIMUM
from client.home import approval, membership, secret, template
from client.home.paths import close, named, site_home
from client.home.paths import home as chexfound_home
from client.operator import join

SCHEMA = 1  # of what `check --recipe --json` prints


def enrol(given: argparse.Namespace) -> int:
    """Make a site's keys and secret, and the file with their public halves; say what comes next."""
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


def approve_roster(given: argparse.Namespace) -> int:
    """Show who is in the federation and what changed, ask, and approve it."""
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


def approve_code(given: argparse.Namespace) -> int:
    """Approve, list or withdraw code; with `--weights`, weights."""
    from client.node.flwr_private import release_bundle

    if given.weights is not None:
        return _approve_weights(given)
    name = given.site
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
    name = given.site
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


def show_roster(given: argparse.Namespace) -> int:
    """Show the federation that was approved."""
    name = given.site
    federation = membership.approved(site_home(name))
    if federation is None:
        raise ConfigError(f"site {name!r}: nothing was approved yet; chexfound-client join FILE{named(name)}")
    join.tell(federation, name)
    return 0


def check(given: argparse.Namespace) -> int:
    """Look whether the site can serve, or what a recipe asks of it."""
    from client.operator.preflight import checks
    from client.operator.preflight.order import CHECKS

    name = given.site
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
        print(json.dumps({"schema": SCHEMA, "site": name, "recipe": loaded.name, "sites": n, "lines": rows}, indent=2))
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


def status(given: argparse.Namespace) -> int:
    """Say what the site is doing."""
    from client.operator import status

    name = given.site
    if given.refused:
        print("\n".join(status.refused(site_home(name))))
        return 0
    found = status.read(name, site_home(name))
    print(json.dumps(found, indent=2) if given.json else "\n".join(status.lines(found)))
    return 0


def secagg_show(given: argparse.Namespace) -> int:
    """Say which numbers protect the site, which sums it helped to open, and what it refused."""
    from client.operator import sums

    name = given.site
    found = sums.read(name, site_home(name))
    print(sums.as_json(found) if given.json else "\n".join(sums.lines(found)))
    return 0


def secagg_release(given: argparse.Namespace) -> int:
    """Allow one more sum on weights on which one was opened, or take that back."""
    from client.masked import ledger
    from client.operator import sums

    name = given.site
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


def unit(given: argparse.Namespace) -> int:
    """Print or write the systemd unit that serves the site."""
    name, data = given.site, given.data.absolute()
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
