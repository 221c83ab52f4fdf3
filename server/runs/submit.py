"""Submits, resubmits and stops a run of a federation."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chexfound.durable.files import lock, storage, write_json, write_text
from chexfound.errors import CheckpointError, ChexfoundError, ConfigError, SiteError
from chexfound.identity import bundle
from chexfound.identity.roster import check_name
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from server.federation import flower_cli
from server.federation.settings import CONNECTION, Federation
from server.runs import submission
from server.runs.folders import SETTLE_S, RunFolder, all_runs, deserted, ended, interrupted, see, statuses, submitted
from strategies import composition

END_S = 60.0  # in which the ServerApp of a run that was stopped has to end


# -- submitting


def check_beginning(federation: Federation, recipe: Recipe, backbone: Path | None) -> str | None:
    """Whether sites will refuse a run's first sum, because they opened one on the same weights for another recipe.

    Returns: None if no run of this federation is known to have begun so, else which, and what to do.
    """
    from chexfound.phases.payload import pretraining

    if recipe.aggregation != "secagg" or "pretrain" not in recipe.phases:
        return None
    asked, begins = pretraining(recipe), ("seed", "student", "dino", "ibot")
    given = str(backbone.absolute()) if backbone else None
    for run in all_runs(federation):
        try:
            about, events = run.about(), run.journal()
            if about is None or about["backbone"] != given:
                continue
            other = recipes.load(str(run.path / "recipe.yaml"))
        except (CheckpointError, ConfigError):  # a damaged folder, or one of another release, hinders no new run
            continue
        opened = any(event["event"] == "round" and event["phase"] == "pretrain" for event in events)
        held = pretraining(other)
        if (
            opened
            and other.aggregation == "secagg"
            and held != asked
            and all(held[key] == asked[key] for key in begins)
        ):
            return (
                f"run {run.name} began with the same weights by another recipe, and no site opens a second sum on them "
                f"(secagg.differencing) without its operator's word; begin with others: --set seed={recipe.seed + 1}"
            )
    return None


def create(federation: Federation, recipe: Recipe, name: str | None, backbone: Path | None) -> RunFolder:
    """Make a run's folder, with all that is submitted.

    Raises: ConfigError if there is one of that name, or the federation has too few sites for the recipe, or it asks for
    what its aggregation cannot do, or has an optimizer that no site can bound.
    """
    from chexfound.pretrain.bounds import check_bounded

    registered = len(federation.sites().sites)
    if registered < recipe.federation.min_sites:
        raise ConfigError(
            f"the recipe needs federation.min_sites {recipe.federation.min_sites} sites, and the federation has "
            f"{registered}: chexfound-server add-site, or --set federation.min_sites={max(registered, 1)}"
        )
    composition.check(recipe, registered)
    check_bounded(recipe)  # or every site refuses it
    if backbone is not None:
        backbone = backbone.absolute()
        if not backbone.is_file():
            raise ConfigError(f"--backbone {str(backbone)!r}: no such file")
    made = _new_folder(federation, name, recipe.name)
    given = {"run-dir": str(made.path), **({"backbone": str(backbone)} if backbone else {})}
    about: dict[str, Any] = {
        "recipe": recipe.name,
        "rounds": recipe.rounds,
        "backbone": given.get("backbone"),
        "flower_runs": [],
    }
    try:
        write_text(made.path / "run.toml", recipes.to_run_config(recipe, given))
        write_text(made.path / "recipe.yaml", recipes.to_yaml(recipe))
        write_json(made.path / "run.json", {"schema": submission.SCHEMA, **about})
    except BaseException:  # half of it could be neither resumed nor made again under its name
        shutil.rmtree(made.path, ignore_errors=True)
        raise
    return made


def _new_folder(federation: Federation, name: str | None, recipe: str) -> RunFolder:
    if name is not None:
        check_name(name, "--name")
        if name.startswith("."):
            raise ConfigError(f"--name {name!r}: must not begin with a dot")
    tried = name or f"{_plain(recipe)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    made = RunFolder(federation, tried)
    with storage(made.path):
        made.path.parent.mkdir(exist_ok=True)
        for number in range(2, 100):
            try:
                made.path.mkdir()
                return made
            except FileExistsError:
                if name is not None:
                    break
                made = RunFolder(federation, f"{tried}-{number}")
    raise ConfigError(
        f"there is a run {name!r} already; to go on with it: chexfound-server resume {federation.folder} {name}; "
        "or choose another --name"
    )


def _plain(name: str) -> str:
    """A recipe's name as one part of a folder's, which nobody has to quote."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "run"


def submit(run: RunFolder) -> str:
    """Hand a run to the SuperLink; returns Flower's number of it.

    Killed anywhere, or with a disk that is full from anywhere on, it leaves either nothing submitted, or one submission
    that `flower_run` finds.

    Raises: ConfigError; SiteError; StorageError, and then nothing was submitted.
    """
    with _alone(run):
        return _submit(run)


def _submit(run: RunFolder) -> str:
    token = submission.intend(run.path)
    try:
        _check_free(run)
    except ConfigError:
        submission.withdraw(run.path)
        raise
    try:
        number = _hand_over(run, token)
    except ChexfoundError:  # which may be about its answer alone
        found = submitted(run.federation).get(token)
        if found is None:
            raise
        number = found
    submission.record(run.path, number)
    return number


def _check_free(run: RunFolder) -> None:
    """Raise ConfigError if a ServerApp of a submission before this one began in the last moment.

    From the new intent on none begins any more; one that finds so has ended soon.
    """
    deadline = time.monotonic() + SETTLE_S
    while submission.served(run.path):
        if time.monotonic() > deadline:
            raise ConfigError(f"run {run.name!r} has just begun, as it was submitted before; {see(run)}")
        time.sleep(0.05)


def _hand_over(run: RunFolder, token: str) -> str:
    with storage(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        app, config = Path(folder) / "app", Path(folder) / "run.toml"
        stage(app)
        config.write_text((run.path / "run.toml").read_text(encoding="utf-8") + f'submission = "{token}"\n', "utf-8")
        return str(flower_cli.ask(run.federation, ["run", str(app), CONNECTION, "-c", str(config)])["run-id"])


def stage(app: Path) -> None:
    """Lay out what the installed release ships, for Flower to build the bundle from."""
    for name, path in bundle.release_files().items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, app / name)


def resubmit(run: RunFolder) -> str:
    """Hand a run to the SuperLink again; it goes on after its last finished round.

    Raises: ConfigError if it is done, is still running or is being submitted; SiteError.
    """
    with _alone(run):
        return _resubmit(run)


@contextlib.contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """Keep a second `resume` out: both would find that the run has ended, and two ServerApps share its folder."""
    folder = os.open(run.path, os.O_RDONLY)
    try:
        lock(folder, ConfigError(f"run {run.name!r} is being submitted by another command"))
        yield
    finally:
        os.close(folder)


def _resubmit(run: RunFolder) -> str:
    if run.done:
        raise ConfigError(f"run {run.name!r} is done: chexfound-server report {run.federation.folder} {run.name}")
    number = run.flower_run()
    if number is not None and not ended(status := statuses(run.federation).get(number, "unknown")):
        if interrupted(run):
            submission.record(run.path, number)
            return number
        if not deserted(run):
            raise ConfigError(f"run {run.name!r} is {status}; {see(run)}")
        flower_cli.ask(run.federation, ["stop", number, CONNECTION])
    await_end(run)
    return _submit(run)


def stop(run: RunFolder) -> bool:
    """End a run and wait for its ServerApp; returns whether it was running.

    Raises: SiteError if the SuperLink refuses, or the ServerApp goes on.
    """
    number = run.flower_run()
    if number is None or ended(statuses(run.federation).get(number, "unknown")):
        return False
    flower_cli.ask(run.federation, ["stop", number, CONNECTION])
    await_end(run)
    return True


def await_end(run: RunFolder) -> None:
    """Wait until no process works at the run.

    Raises: SiteError.
    """
    deadline = time.monotonic() + END_S
    while submission.served(run.path):
        if time.monotonic() > deadline:
            raise SiteError(
                f"run {run.name!r}: its ServerApp has not ended after {END_S:.0f} s, and holds "
                f"{run.path / submission.LOCK}; end that process (server.services.task), then: chexfound-server resume "
                f"{shlex.quote(str(run.federation.folder))} {shlex.quote(run.name)}"
            )
        time.sleep(0.2)
