"""The runs of a federation: their folders, how one is submitted, and how it stands.

DIR/runs/NAME/run.json    what was submitted: recipe, rounds, backbone; and each submission, by token and number
DIR/runs/NAME/run.toml    what Flower is given: the resolved recipe, and this folder

The rest is the ServerApp's: recipe.yaml, journal.jsonl, live.json, serverapp.lock, rounds/; at the end model/,
metrics.json.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.durable.journal import read_journal
from chexfound.errors import ConfigError
from chexfound.identity.roster import check_name
from server.federation import flower_cli
from server.federation.settings import CONNECTION, Federation
from server.runs import submission

SETTLE_S = 2.0  # in which a ServerApp that finds that it was submitted again has ended
RUNS_MAX = "1000"  # that Flower lists; its own limit is 20

Event = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder."""

    federation: Federation
    name: str

    @property
    def path(self) -> Path:
        """Give its folder."""
        return self.federation.path("runs") / self.name

    @property
    def done(self) -> bool:
        """Tell whether the run went to its end: the ServerApp writes metrics.json last."""
        return (self.path / "metrics.json").is_file()

    def about(self) -> dict[str, Any] | None:
        """Give what was submitted; None for a run of which `chexfound-server run` knows nothing.

        Raises: CheckpointError.
        """
        return submission.about(self.path)

    def live(self) -> dict[str, Any] | None:
        """Give what its ServerApp last said of itself.

        Raises: CheckpointError.
        """
        return submission.live(self.path)

    def journal(self) -> list[Event]:
        """Give what has happened; nothing before the first site enrolled.

        Raises: CheckpointError.
        """
        path = self.path / "journal.jsonl"
        return read_journal(path) if path.is_file() else []

    def flower_run(self) -> str | None:
        """Flower's number of the last submission; None if it has none.

        Of one whose command did not live to note it, by the ServerApp's word or Flower's database.  One by hand has it
        in live.json, or as its folder's name.

        Raises: CheckpointError.
        """
        about, live = self.about(), self.live()
        if about is None:
            return live["flower_run"] if live else self.name if self.name.isdigit() else None
        if not (last := submission.last(about)):
            return None
        token, tokens = last.get("submission"), {one.get("submission") for one in about["flower_runs"]}
        if live is not None and (
            live["submission"] == token or (live["submission"] in tokens and submission.served(self.path))
        ):
            return str(live["flower_run"])
        return last["id"] or submitted(self.federation).get(str(token))


def submitted(federation: Federation) -> dict[str, str]:
    """Flower's number of each of its runs that has a token, by that."""
    from server.exchange import flwr_private

    return flwr_private.submitted(federation.path("superlink.sqlite"))


# -- which runs there are


def all_runs(federation: Federation) -> list[RunFolder]:
    """The runs, the latest submission last."""
    folders = federation.path("runs")
    names = [path.name for path in folders.iterdir() if path.is_dir()] if folders.is_dir() else []
    runs = [RunFolder(federation, name) for name in names if not name.startswith(".")]
    return sorted(runs, key=lambda run: (_touched(run.path), run.name))


def _touched(path: Path) -> float:
    """When it was submitted: run.json is written then and not after."""
    about = path / "run.json"
    return (about if about.exists() else path).stat().st_mtime


def find(federation: Federation, name: str) -> RunFolder:
    """The run of a name.

    Raises: ConfigError, which says which there are.
    """
    check_name(name, "run")
    found = RunFolder(federation, name)
    if not found.path.is_dir():
        there = ", ".join(run.name for run in all_runs(federation)[-5:])
        raise ConfigError(f"no run {name!r}; " + (f"the latest are {there}" if there else "there is none yet"))
    return found


def choose(federation: Federation, name: str | None, done: bool = False) -> RunFolder:
    """The run of a name; without one the latest, of those that went to their end if `done` is asked for.

    Raises: ConfigError if there is none.
    """
    if name is not None:
        return find(federation, name)
    runs = [run for run in all_runs(federation) if run.done or not done]
    if not runs:
        kind = "finished run" if done else "run"
        raise ConfigError(f"{federation.folder}: there is no {kind}; chexfound-server run starts one")
    return runs[-1]


def choose_going(federation: Federation, name: str | None) -> RunFolder:
    """The run of a name; without one the one that Flower has going.

    Raises: ConfigError if none is, or several; SiteError.
    """
    if name is not None:
        return find(federation, name)
    words = statuses(federation)
    going = [run for run in all_runs(federation) if not ended(words.get(run.flower_run() or "", "unknown"))]
    if len(going) != 1:
        raise ConfigError(
            f"which run? Going are {', '.join(run.name for run in going)}; name one" if going else "no run is going"
        )
    return going[0]


def see(run: RunFolder) -> str:
    """Tell by which commands a run that goes on is watched and stopped."""
    where = f"{shlex.quote(str(run.federation.folder))} {shlex.quote(run.name)}"
    return f"see it with chexfound-server watch {where}, end it with chexfound-server stop {where}"


def interrupted(run: RunFolder) -> bool:
    """Whether a run goes on whose command ended before it could say so: a full disk, or it was killed."""
    last = submission.last(run.about())
    return bool(last) and last["id"] is None and run.flower_run() is not None and not deserted(run)


def statuses(federation: Federation) -> dict[str, str]:
    """Flower's word for each of its runs by number: pending, starting, running, finished:completed|failed|stopped.

    Raises: SiteError.
    """
    return {
        str(one["run-id"]): str(one["status"])
        for one in flower_cli.ask(federation, ["list", CONNECTION, "--limit", RUNS_MAX])["runs"]
    }


def ended(status: str) -> bool:
    """Whether Flower's word for a run means that it is over; of a run that it does not know, it is."""
    return status.startswith("finished") or status == "unknown"


def deserted(run: RunFolder) -> bool:
    """Whether a run has begun and lost its ServerApp, which Flower notices within a minute only."""
    if not left(run):
        return False
    live = run.live()  # its last word, if it had one
    return not run.done and live is not None and live["state"] != "failed"


def left(run: RunFolder) -> bool:
    """Whether the ServerApp of a run's last submission has begun and ended: it holds the folder in between."""
    live = run.live()
    return live is not None and live["flower_run"] == run.flower_run() and not submission.served(run.path)
