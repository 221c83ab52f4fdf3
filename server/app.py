"""The ServerApp: reads the recipe of the run and runs it over the Grid."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from chexfound.errors import ChexfoundError
from chexfound.host import logs
from chexfound.host.processes import map_large
from chexfound.identity import roster
from chexfound.identity.roster import Roster
from chexfound.recipe import load as recipes
from chexfound.wire.inflate import inflate_once
from server.exchange.flwr_private import LocalGrid, keep_asking, retry_soon
from server.exchange.grid import GridExchange
from server.federation import policies
from server.rounds import health
from server.rounds.record import Event
from server.rounds.result import write_metrics
from server.rounds.start import run_of
from server.runs import submission, weight
from server.runs.live import Live

log = logging.getLogger("chexfound.server")

app = ServerApp()
observers: list[Callable[[Event], None]] = []  # told each journal record; the simulation draws its progress from them


def run_folder(context: Context) -> Path:
    """Give the folder of this run: run-config `run-dir`, else $CHEXFOUND_HOME/runs/RUN_ID."""
    given = context.run_config.get("run-dir")
    if given:
        return Path(str(given))
    home = Path(os.environ.get("CHEXFOUND_HOME") or Path.home() / ".chexfound")
    return home / "runs" / str(context.run_id)


def log_event(event: Event) -> None:
    """One line a round, and one for each new symptom."""
    if event["event"] == "start":
        names = ",".join(member["site"] for member in event["roster"])
        log.info("event=start sites=%d names=%s findings=%d", len(event["roster"]), names, len(event["findings"]))
    elif event["event"] == "resume":
        log.info("event=resume pretrain_rounds_done=%d adapt_rounds_done=%d", event["pretrain"], event["adapt"])
    elif event["event"] == "round":
        last = [site["history"][-1]["loss"] for site in event["sites"] if site["history"]]
        loss = sum(last) / len(last) if last else float("nan")
        log.info(
            "event=round phase=%s round=%d loss=%.4f seconds=%.1f up=%d down=%d%s",
            event["phase"], event["round"] + 1, loss, event["seconds"], event["bytes"]["up"], event["bytes"]["down"],
            " " + health.line(event["health"]["figures"]) if "health" in event else "",
        )  # fmt: skip
        for one in health.warnings(event):
            log.warning(
                "event=warning symptom=%s site=%s round=%d seen=%r advice=%r",
                one["symptom"], one["site"], event["round"] + 1, one["seen"], one["advice"],
            )  # fmt: skip
    elif event["event"] == "features":
        up, down = event["bytes"]["up"], event["bytes"]["down"]
        log.info("event=features seconds=%.1f up=%d down=%d", event["seconds"], up, down)
    elif event["event"] == "attempt":
        log.warning("event=attempt phase=%s round=%d failed=%r", event["phase"], event["round"] + 1, event["failed"])
    elif event["event"] in ("lost", "back", "refused"):
        log.warning(
            "event=%s site=%s phase=%s round=%d%s",
            event["event"], event["site"], event["phase"], event["round"] + 1,
            f" reason={event['reason']}" if "reason" in event else "",
        )  # fmt: skip
    elif event["event"] == "wait":
        log.info("event=wait sites=%d of=%d", event["sites"], event["of"])
    elif event["event"] == "done":
        log.info("event=done model_sha256=%s", event["model_sha256"])
    for text in weight.warnings(event):
        log.warning("event=warning %s", text)
    for one in event.get("missing", ()):
        log.warning(
            "event=missing phase=%s round=%d site=%s reason=%s",
            event.get("phase", "evaluate" if event["event"] == "done" else event["event"]), event.get("round", 0) + 1,
            one["site"], one["reason"],
        )  # fmt: skip


def tell(event: Event) -> None:
    """Pass a journal record on to the log and to whoever listens."""
    for observer in (log_event, *observers):
        observer(event)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe; results go to the run's folder.

    Raises: ChexfoundError, by which Flower marks the run as failed; its message is in the log.  What
    was done by then is in the folder and no metrics.json, which is written last.
    """
    if isinstance(grid, LocalGrid):  # the simulation shows progress and errors in its own way
        _run(grid, context, grid.sites)
        return
    logs.show()
    folder, number = run_folder(context), str(context.run_id)
    token = str(context.run_config.get("submission", ""))
    with contextlib.ExitStack() as holding:
        try:
            holding.enter_context(submission.alone(folder, token, number))
        except ChexfoundError as error:  # live.json is that of the run which goes on there
            log.error("event=failed error=%s exit_code=%d %s", error.code, error.exit_code, error)
            raise
        _serve(grid, context, Live(folder, number, token))


def _serve(grid: Grid, context: Context, live: Live) -> None:
    retry_soon()
    inflate_once()
    map_large()
    keep_asking(grid)
    observers.append(live)
    try:
        _run(grid, context, federation_sites())
    except ChexfoundError as error:
        live.failed(error)
        log.error("event=failed error=%s exit_code=%d %s", error.code, error.exit_code, error)
        raise error.with_traceback(None) from None  # ours says what to do; where in the code is noise
    except BaseException as error:
        live.failed(ChexfoundError(f"{type(error).__name__}; the SuperExec's log says where"))
        raise


def federation_sites() -> Roster | None:
    """The sites of the federation in $CHEXFOUND_HOME, and their keys; None where there is no federation.

    Raises: ConfigError.
    """
    path = Path(os.environ.get("CHEXFOUND_HOME") or "/nowhere") / "roster.json"
    return roster.load(path) if path.exists() else None


def _run(grid: Grid, context: Context, sites: Roster | None = None) -> None:
    recipe = recipes.from_run_config(context.run_config)
    folder = run_folder(context)
    log.info("event=begin run=%s folder=%s recipe=%s", context.run_id, folder, recipe.name)
    backbone = context.run_config.get("backbone")

    def hear(event: Event) -> None:
        if event["event"] != "policy":
            run.heard(event)
        elif not isinstance(grid, LocalGrid):
            policies.keep(Path(os.environ["CHEXFOUND_HOME"]), event["site"], event["limits"])

    exchange = GridExchange(
        grid,
        sites=sites,
        run_id=context.run_id,
        spool=None if isinstance(grid, LocalGrid) else folder / "parts",
        on_event=hear,
    )
    run = run_of(recipe, exchange, folder, backbone=Path(str(backbone)) if backbone else None, on_event=tell)
    outcome = run.run()
    write_metrics(folder, recipe, outcome)
    log.info("event=written folder=%s next='chexfound report %s'", folder, folder)
