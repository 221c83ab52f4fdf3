"""A site's round of pretraining on several GPUs: asked of N processes, each of which does `phases.pretrain`.

`python -m chexfound.phases.gpus FOLDER` is one of them.  What they need stands in the folder, under the
site's home, and so does what they answer: safetensors and JSON, nothing that is executed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from chexfound.contract.request import Reply, Request
from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.durable.files import write_json
from chexfound.errors import CODES, ChexfoundError, StoppedError
from chexfound.host import logs
from chexfound.model import checkpoint
from chexfound.parallel import group
from chexfound.parallel.environment import GRACE_S, end, named, stoppable
from chexfound.parallel.launch import Ranks, died
from chexfound.phases.pretrain import pretrain
from chexfound.phases.site_state import Decision, Site
from chexfound.recipe import check, curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe, Split

log = logging.getLogger("chexfound.pretrain")


def ask_all(site: Site, recipe: Recipe, request: Request, decision: Decision, number: int) -> Reply:
    """The reply to a request, by `number` processes of this machine.

    Raises: ChexfoundError of the first that failed; SiteError if one died; StoppedError if they were asked to stop.
    """
    group.share(request.batch_size, number)
    folder = site.home / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, site, recipe, request, decision)
    try:
        codes = Ranks(["-m", "chexfound.phases.gpus", str(folder)], number, _listener(site), site.stop).run()
        if any(codes) or not (folder / "reply.json").is_file():
            raise _failure(folder, codes, asked=site.stop is not None and site.stop())
        values = json.loads((folder / "reply.json").read_text())
        return Reply(tensors=checkpoint.load(folder / "reply.safetensors"), values=values)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, site: Site, recipe: Recipe, request: Request, decision: Decision) -> None:
    checkpoint.save(folder / "request.safetensors", request.tensors)
    np.save(folder / "images.npy", site.view.ids)
    here = {
        "name": site.name,
        "home": str(site.home),
        "store": str(site.view.store.path),
        "shuffle_labels": site.shuffle_labels,
        "tally": site.tally,
        "cells": site.cells,
        "words": None if site.words is None else sorted(site.words),
        "split_key": site.split_key.hex() if site.split_key else None,
        "fractions": vars(site.fractions) if site.fractions else None,
        "stops": site.stop is not None,
    }
    write_json(
        folder / "job.json",
        {"recipe": recipes.to_dict(recipe), "request": request.place(), "decision": asdict(decision), "site": here},
    )


def _read(folder: Path) -> tuple[Site, Recipe, Request, Decision]:
    job = json.loads((folder / "job.json").read_text())
    here, asked = job["site"], job["request"]
    ids = np.load(folder / "images.npy", allow_pickle=False)
    view = View(Store.open(Path(here["store"])), ids, here["name"])
    site = Site(
        view=view,
        home=Path(here["home"]),
        shuffle_labels=here["shuffle_labels"],
        tally=here["tally"],
        cells=here["cells"],
        words=None if here["words"] is None else frozenset(here["words"]),
        split_key=bytes.fromhex(here["split_key"]) if here["split_key"] else None,
        fractions=curriculum.changed(Split(), **here["fractions"]) if here["fractions"] else None,
        stop=(lambda: False) if here["stops"] else None,
    )
    tensors = checkpoint.load(folder / "request.safetensors")
    request = Request(**{**asked, "findings": tuple(asked["findings"])}, tensors=tensors)
    decided = job["decision"]
    decision = Decision(reset_state=decided["reset_state"], excluded=tuple(decided["excluded"]))
    return site, check.validate(job["recipe"], "recipe"), request, decision


def _listener(site: Site) -> Callable[[bytes], None]:
    def listen(line: bytes) -> None:
        if site.progress is not None:
            site.progress(*json.loads(line))

    return listen


def _failure(folder: Path, codes: list[int], *, asked: bool = False) -> ChexfoundError:
    """Say what the ranks died of: the error that one of them told, else that they were asked, else how one ended."""
    for number in range(len(codes)):
        path = folder / f"error-{number}.json"
        if path.is_file():
            told = json.loads(path.read_text())
            return CODES[told["code"]]((named(number, len(codes)) if number else "") + told["text"])
    if asked:  # before they could hear it
        return StoppedError("stopped before a step was taken")
    number, code = next((number, code) for number, code in enumerate(codes) if code)
    return died(number, len(codes), code)


def main(folder: Path) -> int:
    """Do the work of one rank; returns its exit code."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not for whoever listens
    logs.show()
    try:
        with stoppable(signal.SIGTERM) as asked, group.process_group():
            site, recipe, request, decision = _read(folder)
            site.stop = (lambda: bool(asked)) if site.stop is not None else None
            if group.first():
                site.progress = lambda *told: print(json.dumps(told), file=channel)
            torch.set_num_threads(recipe.threads)
            reply = pretrain(site, recipe, request, decision)
            if group.first():
                checkpoint.save(folder / "reply.safetensors", reply.tensors)
                write_json(folder / "reply.json", reply.values)
            return 0
    except ChexfoundError as error:
        write_json(folder / f"error-{os.environ['RANK']}.json", {"code": error.code, "text": str(error)})
        return 0 if isinstance(error, StoppedError) else error.exit_code  # all stop, and none ends another's save
    except Exception:
        time.sleep(GRACE_S)  # another's death shows here as an error of the connection: let it be told instead
        log.exception("phase=pretrain rank=%s error=internal", os.environ.get("RANK"))
        return 1


if __name__ == "__main__":
    end(main(Path(sys.argv[1])))
