"""`chexfound pretrain`: its options, and how it ends.  What it does is in lone_store.py.

Imports nothing heavy: `chexfound --help` stands on it.
"""

from __future__ import annotations

import argparse
import shlex
import signal
from pathlib import Path
from typing import Any

from chexfound.errors import ConfigError, StoppedError, StorageError
from chexfound.parallel.environment import stoppable, to_come
from chexfound.parsing import names

DESCRIPTION = """\
Self-supervised pretraining (DINO + iBOT + KoLeo) on the training patients of one store, without a
federation: for whoever has the images and the GPUs in one place."""

EPILOG = """\
examples:
  chexfound ingest IMAGES store --image-px 128
  chexfound pretrain store --recipe vitt16-demo --out out/demo
  chexfound pretrain store --recipe vits16-224 --set train.num_workers=4 --out out/vits --gpus all
  CHEXFOUND_DEVICE=cpu chexfound pretrain store --recipe demo --out out/two --gpus 2   # to try it without a GPU

OUT/model is a release directory with the finished backbone (the teacher's) and its DINO and iBOT heads;
chexfound.load_backbone reads it, and its README.md says how others do. OUT/metrics.jsonl has a line a step,
OUT/journal.jsonl a record a round. It is the training of chexfound-sim's centralized arm, to the bit, in rounds
of an epoch at most.

The state is saved every train.saveckp_freq epochs of the recipe, and after each round. Ctrl-C and SIGTERM
save and end; after that, after kill -9 and after a power cut the same command goes on, and ends with the
same weights, to the bit, as if nothing had been. --out alone with --resume does too. The batch of the recipe
is that of all GPUs together: two GPUs take the same steps as one, but for rounding and drop path.
compute_precision.sharding_strategy of the recipe chooses between DDP (NO_SHARD) and FSDP2 (SHARD_GRAD_OP,
FULL_SHARD: weights and optimizer are dealt out to the GPUs).

exit codes: 0 done, 2 an option or the recipe is wrong (or does not fit into memory), 3 the images cannot be
used or training diverged, 4 a save is damaged, 7 a GPU's process died, 8 the disk is full, 130 Ctrl-C, 143
SIGTERM.
"""


def add(commands: Any) -> None:
    """Add the command, with its options, to argparse's `commands` of `chexfound`."""
    parser = commands.add_parser(
        "pretrain",
        help="pretrain on one store, on one GPU or on several, without a federation",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("store", metavar="STORE", nargs="?", help="a store, made by `chexfound ingest`")
    option("--recipe", metavar="NAME", help="a preset or a YAML file (`chexfound recipe` lists the presets)")
    option("--set", metavar="KEY=VALUE", action="append", default=[], help="change a value of the recipe; repeatable")
    option("--out", metavar="DIR", required=True, help="where everything goes; goes on with what is there")
    option("--gpus", metavar="N", help="train on N GPUs of this machine, or on all (default: $CHEXFOUND_GPUS, else 1)")
    option("--resume", action="store_true", help="go on with what is in --out; STORE and --recipe may be left out then")
    option(
        "--log-every",
        metavar="N",
        type=int,
        default=50,
        help="steps, at least, between two lines of loss and speed, which come after a round (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Pretrain until it is done or a signal comes; returns the exit code.

    Raises: ChexfoundError; what was saved is kept.
    """
    if not names.utf8(given.out):
        raise ConfigError(f"--out {given.out!r}: holds bytes that are not UTF-8; choose another name")
    if given.log_every < 1:
        raise ConfigError(f"--log-every {given.log_every}: at least 1")
    if not given.resume and (not given.store or not given.recipe):
        missing = "STORE" if not given.store else "--recipe"
        raise ConfigError(f"{missing} is missing: name both, or give --resume to go on with what is in --out")
    if to_come() > 1:
        raise ConfigError("start it without torchrun: with --gpus N it starts a process for each GPU by itself")
    from sim import lone_store

    out, text = Path(given.out), "stopping after this step; a second time ends it at once"
    with stoppable(signal.SIGINT, signal.SIGTERM, text=text) as asked:
        try:
            work = lone_store.prepare(
                out, given.store, given.recipe, given.set, resume=given.resume, gpus=given.gpus or ""
            )
            work.run(lambda: bool(asked), given.log_every)
        except StoppedError as error:
            print(f"{error} of {work.recipe.pretrain_steps}; the same command goes on from there")
            return 128 + asked[0]
        except StorageError as error:
            begun = (out / lone_store.ABOUT).exists()
            again = f"; then go on with: chexfound pretrain --out {shlex.quote(given.out)} --resume" if begun else ""
            raise StorageError(f"{error}{again}") from error
    return 0
