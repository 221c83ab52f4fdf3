"""`chexfound-server run | resume | status | watch | stop | fetch-model | report`: what they do and print."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from typing import Any

from chexfound.durable.files import new_folder
from chexfound.errors import CheckpointError, ConfigError, DataError, SiteError
from chexfound.parsing.names import shown
from chexfound.recipe.schema import Recipe
from chexfound.secagg.parameters import MINIMUM
from server.federation import members, pki, policies, settings
from server.federation.settings import Federation
from server.runs import folders, follow, standing, submit, words
from server.runs.folders import RunFolder
from server.services import supervise

SCHEMA = 1  # of what --json prints
ERROR_MAX = 2000  # characters of a run's error that are shown of a line


def run(given: argparse.Namespace) -> int:
    """Submit a recipe, and show how it goes."""
    from chexfound.recipe import load as recipes

    held = settings.load(given.dir)
    recipe = _recipe(held, given.recipe, recipes.parse_overrides(given.set))
    policies.check(held, recipe)
    _check_up(held)
    if problem := submit.check_beginning(held, recipe, given.backbone):
        print(f"warning: {problem}", file=sys.stderr)
    made = submit.create(held, recipe, given.name, given.backbone)
    if given.backbone is not None:
        digest = hashlib.sha256(given.backbone.read_bytes()).hexdigest()
        print(f"weights {digest}: each site's operator approves them, with the same file:")
        print(f"  chexfound-client approve --weights {given.backbone.name}")
    return _submitted(made, submit.submit(made), given.detach)


def _recipe(held: Federation, name: str, overrides: dict[str, Any]) -> Recipe:
    """Load the recipe: under masks where it says nothing of that and there are sites enough; batches that divide."""
    from chexfound.recipe import load as recipes
    from chexfound.recipe.batch_sizes import fitted

    as_written = recipes.load(name, overrides)
    n = len(held.sites().sites)
    recipe = as_written if n < MINIMUM else recipes.load(name, overrides, {"aggregation": "secagg"})
    if recipe != as_written:
        print(
            f"{n} sites: the run aggregates under masks (aggregation: secagg); in the clear, which sites refuse unless "
            "their site.yaml says `plain: accepted`, by --set aggregation=fedavg"
        )
    recipe, told = fitted(recipe, max(n, 1))
    print("".join(f"{text}\n" for text in told), end="")
    return recipe


def resume(given: argparse.Namespace) -> int:
    """Submit a run again."""
    held = settings.load(given.dir)
    _check_up(held)
    chosen = folders.find(held, given.run) if given.run else _unfinished(held)
    return _submitted(chosen, submit.resubmit(chosen), given.detach)


def _unfinished(held: Federation) -> RunFolder:
    """The one run that may be gone on with.

    Raises: ConfigError if there is none, or several; SiteError.
    """
    flower = folders.statuses(held)
    found = []
    for one in folders.all_runs(held):
        try:
            now = standing.look(one, flower)
        except CheckpointError:  # one damaged folder does not hide the others
            continue
        if standing.resumable(now) or (now.state not in standing.ENDED and folders.interrupted(one)):
            found.append(one)
    if not found:
        raise ConfigError(
            f"{held.folder}: there is no run to go on with; one that is going is left alone, and of one that failed "
            f"by its recipe a new one is started (chexfound-server status {_dir(held)})"
        )
    if len(found) > 1:
        raise ConfigError(f"which run? Unfinished are {', '.join(one.name for one in found)}; name one")
    return found[0]


def _check_up(held: Federation) -> None:
    """Raise SiteError unless the SuperLink listens; warn if nobody would take the run up."""
    if not supervise.listens(held.superlink):
        raise SiteError(
            f"nothing listens at {held.superlink}, where the SuperLink belongs: chexfound-server up {_dir(held)}"
        )
    if not supervise.superexec_seen(held):
        print(
            "warning: no SuperExec of this federation is seen on this machine; without one the run does not "
            f"begin (chexfound-server up {_dir(held)} starts it)",
            file=sys.stderr,
        )


def _submitted(made: RunFolder, number: str, detach: bool) -> int:
    begun = len(made.journal())
    print(f"run {made.name}: submitted as Flower's {number}; its folder is {made.path}", flush=True)
    if begun:
        print(f"it goes on after {_rounds(standing.look(made, None))}", flush=True)
    if detach:
        print(f"next: {_command('watch', made)}")
        return 0
    try:
        follow.tell(made, lambda text: print(text, flush=True), after=begun)
    except KeyboardInterrupt:
        print(f"\nrun {made.name} goes on; see it: {_command('watch', made)}; end it: {_command('stop', made)}")
        return 130
    print(f"next: {_command('report', made)}")
    return 0


def _rounds(now: standing.Standing) -> str:
    told = [f"{done} of {of or '?'} rounds of {phase}" for phase, (done, of) in now.done.items()]
    return ", ".join(told) or "no round"


def _command(name: str, one: RunFolder) -> str:
    return f"chexfound-server {name} {_dir(one.federation)} {shlex.quote(one.name)}"


def _dir(held: Federation) -> str:
    return shlex.quote(str(held.folder))


def stop(given: argparse.Namespace) -> int:
    """End a run."""
    held = settings.load(given.dir)
    chosen = folders.choose_going(held, given.run)
    if not submit.stop(chosen):
        print(f"run {chosen.name} was not running ({standing.look(chosen, folders.statuses(held)).state})")
        return 0
    print(f"run {chosen.name}: stopped after {_rounds(standing.look(chosen, None))}")
    print(f"next: {_command('resume', chosen)} goes on from there")
    return 0


def watch(given: argparse.Namespace) -> int:
    """Show a run live until it ends."""
    chosen = folders.choose(settings.load(given.dir), given.run)
    try:
        if sys.stdout.isatty():
            from server.runs import display

            display.show(chosen)
        else:
            follow.tell(chosen, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print(f"\nrun {chosen.name} goes on")
        return 130
    print(f"next: {_command('report', chosen)}")
    return 0


def fetch_model(given: argparse.Namespace) -> int:
    """Copy a run's model."""
    from chexfound.model.weights.release import folder as folders_of_weights

    chosen = folders.choose(settings.load(given.dir), given.run, done=True)
    source, stated = chosen.path / "model", _model_sha256(chosen)
    said = folders_of_weights.stated(source)
    if said is None:
        raise DataError(f"{source}: is not whole, or of an earlier release: its config.json says nothing of weights")
    with new_folder(given.out) as made:
        for file in ("config.json", *said.files):
            try:
                shutil.copyfile(source / file, made / file)
            except FileNotFoundError as error:
                raise DataError(f"{source}: is not whole, {file} is missing") from error
        try:
            for file in said.files:
                folders_of_weights.verify(made, file, said.files)
            sound = getattr(said.source, "weights_sha256", None) == stated
        except CheckpointError:  # it names the copy
            sound = False
        if not sound:
            raise CheckpointError(f"{source}: is not the model whose hash metrics.json states: changed or damaged")
    print(f"{given.out}: the model of run {chosen.name}, SHA-256 {stated}, as the run's metrics state it")
    print(f"next: python -c 'import chexfound; print(chexfound.load_backbone(\"{given.out}\"))', or its README.md")
    return 0


def _model_sha256(chosen: RunFolder) -> str:
    path = chosen.path / "metrics.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_sha256"]["federated"])
    except FileNotFoundError as error:
        raise ConfigError(f"run {chosen.name!r} is not done; see it with: {_command('status', chosen)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def report(given: argparse.Namespace) -> int:
    """Draw a run's report."""
    from chexfound.report.build import build

    chosen = folders.choose(settings.load(given.dir), given.run, done=True)
    _model_sha256(chosen)
    print(f"report: {build(chosen.path)}")
    return 0


# -- status


def status(given: argparse.Namespace) -> int:
    """Say how all stands: processes, certificate, sites, runs."""
    held = settings.load(given.dir)
    chosen = [folders.find(held, given.run)] if given.run else folders.all_runs(held)
    told, away = _status(held, chosen)
    if given.json:
        print(json.dumps(told))
        return 0
    certificate = told["certificate"]
    print(f"federation {held.name}: sites connect to {held.public}")
    for name, state in told["processes"].items():
        print(f"  {name:<10} {state}")
    expired = f"; chexfound-server renew {_dir(held)}" if certificate["days_left"] < pki.RENEW_DAYS else ""
    print(f"  certificate for {certificate['days_left']} days, until {certificate['until']}{expired}")
    print("sites" if told["sites"] else f"no site yet; chexfound-server add-site {_dir(held)} SITE SITE.pub")
    for row in told["sites"]:
        print(f"  {row['site']}: {members.called(row['status'])}{' since ' + row['since'] if row['since'] else ''}")
    print("runs" if told["runs"] else f"no run yet; chexfound-server run {_dir(held)} RECIPE")
    for one in told["runs"]:
        for text in _run_lines(held, one):
            print(f"  {text}")
    if away:
        print(f"the SuperLink is down: {away}", file=sys.stderr)
    return 0


def _run_lines(held: Federation, one: dict[str, Any]) -> list[str]:
    if "damaged" in one:
        return [f"{one['run']}: {one['damaged']}"]
    now = standing.Standing(**one)
    said = [f"{now.run}: {standing.sentence(now)}{f' since {words.moment(now.since)}' if now.since else ''}"]
    figures = [f"{phase} {done}/{of or '?'}" for phase, (done, of) in now.done.items()]
    figures += [f"loss {now.loss:.4f}"] if now.loss is not None else []
    figures += [f"AUROC {now.auroc:.3f}"] if now.auroc is not None else []
    figures += [f"{way} {words.size(number)}" for way, number in now.bytes.items() if number]
    if figures:
        said.append("  " + ", ".join(figures))
    said += [f"  {shown(words.withheld(site))}" for site in now.withholding]
    said += [f"  warning: {shown(text)}" for text in now.warnings]
    if now.error:
        first, *more = now.error["text"].split("\n")
        lines = [f"  error {now.error['code']}: {first}", *(f"    {line}" for line in more)]
        said += [shown(line, ERROR_MAX) for line in lines]
    if now.state in standing.ENDED and now.state != "done":
        said.append(f"  {standing.next_step(RunFolder(held, now.run), now)}")
    return said


def _status(held: Federation, chosen: list[RunFolder]) -> tuple[dict[str, Any], str]:
    """All that is told; and why the SuperLink could not be asked, if so."""
    certificate = pki.read_certificate(held.path("server.crt"))
    processes, away = supervise.processes(held), ""
    try:
        nodes, statuses = members.nodes(held), folders.statuses(held)
    except SiteError as error:
        nodes, statuses, away = None, None, str(error)
        processes["superlink"] = "down"  # also where something else listens at its port
    return {
        "schema": SCHEMA,
        "federation": held.name,
        "public": str(held.public),
        "processes": processes,
        "certificate": {
            "days_left": pki.days_left(certificate),
            "until": f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        },
        "sites": members.rows(held, nodes),
        "runs": [_one(run, statuses) for run in chosen],
    }, away


def _one(run: RunFolder, statuses: dict[str, str] | None) -> dict[str, Any]:
    try:
        return standing.look(run, statuses).as_dict()
    except CheckpointError as error:  # one damaged folder does not hide the others
        return {"run": run.name, "damaged": str(error)}
