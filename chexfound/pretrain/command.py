"""`chexfound pretrain`: its options, and whether it is done here or by a process for each GPU.

Imports nothing heavy: `chexfound --help` stands on it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.errors import ConfigError, StorageError
from chexfound.parallel.environment import PARENT, follow_parent, to_come
from chexfound.parsing import names

if TYPE_CHECKING:
    from chexfound.pretrain.central import Pretraining

DESCRIPTION = """\
Self-supervised pretraining (DINO + iBOT + KoLeo) on the training patients of one store, without a
federation: for whoever has the images and the GPUs in one place."""

EPILOG = """\
examples:
  chexfound ingest IMAGES store --image-px 128
  chexfound pretrain store --recipe vitt16-demo --out out/demo
  chexfound pretrain store --recipe vits16-224 --set train.num_workers=4 --out out/vits --gpus all
  torchrun --standalone --nproc-per-node 8 -m chexfound.pretrain store --recipe vitl16-cxr1m --out out/vitl
  CHEXFOUND_DEVICE=cpu chexfound pretrain store --recipe demo --out out/two --gpus 2   # to try it without a GPU

OUT/model is the finished backbone (the teacher's), as chexfound.load_backbone reads it; OUT/heads.safetensors
the DINO and iBOT heads of student and teacher; OUT/metrics.jsonl a line a step.

The state is saved every train.saveckp_freq epochs of the recipe (0: after each of its rounds), the last two
are kept. Ctrl-C and SIGTERM save and end; after that, after kill -9 and after a power cut the same command
goes on, and ends with the same weights, to the bit, as if nothing had been. --out alone with --resume does
too. The batch of the recipe is that of all GPUs together: two GPUs take the same steps as one, but for
rounding and drop path. compute_precision.sharding_strategy of the recipe chooses between DDP (NO_SHARD) and
FSDP2 (SHARD_GRAD_OP, FULL_SHARD: weights and optimizer are dealt out to the GPUs).

exit codes: 0 done, 2 an option or the recipe is wrong (or does not fit into memory), 3 the images cannot be
used or training diverged, 4 a save is damaged, 7 a GPU's process died, 8 the disk is full, 130 Ctrl-C, 143
SIGTERM.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("store", metavar="STORE", nargs="?", help="a store, made by `chexfound ingest`")
    add("--recipe", metavar="NAME", help="a preset or a YAML file (`chexfound recipe` lists the presets)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change a value of the recipe; repeatable")
    add("--out", metavar="DIR", required=True, help="where everything goes; goes on with what is there")
    add("--gpus", metavar="N", help="train on N GPUs of this machine, or on all (default: $CHEXFOUND_GPUS, else 1)")
    add("--resume", action="store_true", help="go on with what is in --out; STORE and --recipe may be left out then")
    add(
        "--log-every",
        metavar="N",
        type=int,
        default=50,
        help="steps between two lines of loss and speed (default: %(default)s)",
    )


def run(given: argparse.Namespace) -> int:
    """Pretrain, here or by a process for each GPU; returns the exit code."""
    if not names.utf8(given.out):
        raise ConfigError(f"--out {given.out!r}: holds bytes that are not UTF-8; choose another name")
    if given.log_every < 1:
        raise ConfigError(f"--log-every {given.log_every}: at least 1")
    if not given.resume and (not given.store or not given.recipe):
        missing = "STORE" if not given.store else "--recipe"
        raise ConfigError(f"{missing} is missing: name both, or give --resume to go on with what is in --out")
    try:
        return _run(given)
    except StorageError as error:
        from chexfound.pretrain.central import ABOUT

        begun = (Path(given.out) / ABOUT).exists()
        again = f"; then go on with: chexfound pretrain --out {shlex.quote(given.out)} --resume" if begun else ""
        raise StorageError(f"{error}{again}") from error


def _run(given: argparse.Namespace) -> int:
    if to_come() > 1:
        if given.gpus:
            raise ConfigError("--gpus: leave it out under torchrun, which has started the processes already")
        follow_parent()
        return _here(given)
    from chexfound.host import machine

    gpus = machine.gpus(given.gpus)
    return _here(given) if gpus == 1 else _by_ranks(given, gpus)


def _by_ranks(given: argparse.Namespace, number: int) -> int:
    from chexfound.parallel.launch import Ranks, died

    work = _prepared(given)
    if work.finished:
        return int(work.run())
    work.check(number)  # here, before the processes take their time to start
    arguments = ["-m", "chexfound.pretrain", "--out", given.out, "--log-every", str(given.log_every)]
    arguments += ["--recipe", given.recipe] if given.recipe else []
    arguments += ["--resume"] if given.resume else []
    for pair in given.set:
        arguments += ["--set", pair]
    arguments += ["--", given.store] if given.store else []
    ranks = Ranks(arguments, number)
    with ranks.signals():
        codes = ranks.run()
    if ranks.asked is not None:
        return 128 + ranks.asked
    failed = [(number, code) for number, code in enumerate(codes) if code]
    for _, code in failed:
        if code > 1:
            return code  # that rank has told why
    if failed:
        raise died(failed[0][0], len(codes), failed[0][1])
    return 0


def _here(given: argparse.Namespace) -> int:
    from chexfound.parallel import group

    with _stoppable() as asked, group.process_group():
        stopped = _prepared(given).run(lambda: bool(asked))
    return 128 + (asked or [signal.SIGTERM])[0] if stopped else 0


def _prepared(given: argparse.Namespace) -> Pretraining:
    from chexfound.pretrain import central

    return central.prepare(
        Path(given.out), given.store, given.recipe, given.set, resume=given.resume, log_every=given.log_every
    )


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM put their number into the list, once; a second time they do what they did before."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = [signal.SIGTERM] if PARENT in os.environ else [signal.SIGTERM, signal.SIGINT]

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        for each in numbers:
            signal.signal(each, before[each])
        if os.environ.get("RANK", "0") == "0":
            print("stopping after this step; a second time ends it at once", file=sys.stderr, flush=True)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number in numbers:
            signal.signal(number, before[number])
