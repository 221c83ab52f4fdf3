"""The ServerApp: reads the recipe of the run and runs it over the Grid."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from chexfound import recipe as recipes
from server.exchange import GridExchange
from server.result import write_metrics
from server.run import Event, Run

log = logging.getLogger("chexfound.server")
logging.getLogger("chexfound").setLevel(logging.INFO)

app = ServerApp()
observers: list[Callable[[Event], None]] = []  # told each journal record; the simulation draws its progress from them


def run_folder(context: Context) -> Path:
    """Where this run is kept: run-config `run-dir`, else $CHEXFOUND_HOME/runs/RUN_ID."""
    given = context.run_config.get("run-dir")
    if given:
        return Path(str(given))
    home = Path(os.environ.get("CHEXFOUND_HOME") or Path.home() / ".chexfound")
    return home / "runs" / str(context.run_id)


def log_event(event: Event) -> None:
    """One line a round."""
    if event["event"] == "start":
        names = ",".join(member["site"] for member in event["roster"])
        log.info("event=start sites=%d names=%s findings=%d", len(event["roster"]), names, len(event["findings"]))
    elif event["event"] == "round":
        last = [site["history"][-1]["loss"] for site in event["sites"] if site["history"]]
        loss = sum(last) / len(last) if last else float("nan")
        log.info(
            "event=round phase=%s round=%d loss=%.4f seconds=%.1f up=%d down=%d",
            event["phase"], event["round"] + 1, loss, event["seconds"], event["bytes"]["up"], event["bytes"]["down"],
        )  # fmt: skip
    elif event["event"] == "done":
        log.info("event=done model_sha256=%s", event["model_sha256"])


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe; results go to the run's folder."""
    text = str(context.run_config.get("recipe") or "")
    recipe = recipes.from_json(text) if text else recipes.load("demo")
    folder = run_folder(context)
    log.info("event=begin run=%s folder=%s recipe=%s", context.run_id, folder, recipe.name)
    backbone = context.run_config.get("backbone")
    run = Run(
        recipe,
        GridExchange(grid, lambda seen, wanted: log.info("event=wait sites=%d of=%d", seen, wanted)),
        folder,
        backbone=Path(str(backbone)) if backbone else None,
        on_event=lambda event: [observer(event) for observer in (log_event, *observers)],
    )
    outcome = run.run()
    write_metrics(folder, recipe, outcome)
