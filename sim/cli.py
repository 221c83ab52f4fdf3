"""`chexfound-sim`: a federation on one machine, compared with pooling the images and with each site alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.errors import ChexfoundError, ConfigError, SiteError, StorageError
from chexfound.host.exits import ended

if TYPE_CHECKING:
    from sim.options import Options

ARMS = "federated,centralized,local,random,shuffled,site-view,histogram"

EPILOG = """\
examples:
  chexfound phantom --sites 4 --patients 40 --out phantoms
  chexfound-sim --data phantoms --recipe demo --out out/demo
  chexfound-sim --data ../shared/data/cxr --by source --out out/real
  chexfound-sim --data images --by dirichlet:8:0.5 --set train.rounds=30 --seeds 0,1,2
  chexfound-sim --out out/real --resume

A folder of DICOM files, a folder with a manifest.csv (see docs/data.md), or a store made by
`chexfound ingest` will do as --data. With many images run `chexfound ingest IMAGES STORE` first and give
the store: one that is made here goes again if the run cannot start, say for a label that is too rare.
Ctrl-C keeps what is done; --resume goes on to the same result (under secure aggregation: but for rounding,
which is by chance there).
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="chexfound-sim",
        description="Simulate federated chest X-ray pretraining on one machine, and report how close it comes to "
        "pooling the images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--data", metavar="DIR", help="images: DICOM folder, folder with manifest.csv, or store")
    result.add_argument("--out", metavar="DIR", default="out/sim", help="where everything goes (default: %(default)s)")
    result.add_argument(
        "--by", metavar="RULE", help="sites: source, site, iid:N or dirichlet:N:ALPHA (default: source)"
    )
    result.add_argument("--recipe", metavar="NAME", help="a preset or a YAML file (default: laptop)")
    result.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the recipe, e.g. train.rounds=3; may be repeated",
    )
    result.add_argument(
        "--seeds",
        metavar="N,N,…",
        help="one replicate for each; the first one is reported in full (default: the recipe's)",
    )
    result.add_argument("--arms", metavar="A,B,…", help=f"what to compare (default: {ARMS})")
    result.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes, each of the recipe's number of threads (default: one a core, at most 8)",
    )
    result.add_argument(
        "--gpus",
        metavar="N",
        help="GPUs that each site, and the centralized arm, pretrains on, or all; with more than one, --workers is 1 "
        "unless given (default: $CHEXFOUND_GPUS, else 1)",
    )
    result.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    again = f"go on with: chexfound-sim --out {shlex.quote(given.out)} --resume"

    def run() -> int:
        try:
            print(f"report: {_simulate(given)}")
        except ChexfoundError as error:
            if isinstance(error, SiteError | StorageError) and (Path(given.out) / "simulation.json").exists():
                error.add_note(f"what is done is kept; {again}")
            raise
        except BrokenPipeError:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            print(f"error: {_unforeseen(error, Path(given.out))}", file=sys.stderr)
            return 1
        return 0

    return ended(run, f"Stopped. What is done is kept; {again}")


def _unforeseen(error: Exception, out: Path) -> str:
    """One line on what no check foresaw, such as a model too large for the memory; the traceback goes to OUT."""
    what = (str(error).strip().splitlines() or ["no more is known"])[0][:200]
    text = f"{type(error).__name__}: {what}; what is done in {out} is kept: --resume goes on from it"
    try:
        (out / "error.log").write_text("".join(traceback.format_exception(error)))
    except OSError:
        return text
    return f"{text}. The traceback is in {out / 'error.log'}"


def _simulate(given: argparse.Namespace) -> Path:
    out = Path(given.out)
    gpus = _gpus(given.gpus)
    workers = given.workers if given.workers is not None else 1 if gpus > 1 else _cores()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least one")
    from sim.options import Options, start

    if given.resume:
        clashing = [f"--{name}" for name in ("data", "by", "recipe", "set", "seeds", "arms") if getattr(given, name)]
        if clashing:
            raise ConfigError(f"--resume goes on with what the run was started with; leave out {', '.join(clashing)}")
        with path_told("--out", given.out):
            options = Options.read(out)
    else:
        options = _options(given)
        with path_told("--out", given.out):
            start(options, out)
    from rich.console import Console

    from sim.display import Display
    from sim.simulate import Simulation

    with Display(Console()) as display:
        return Simulation(options, out, workers, display, resume=given.resume).run()


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _gpus(asked: str | None) -> int:
    """How many GPUs a site takes; told to all processes of this run.

    Raises: ConfigError if the machine has fewer.
    """
    if not asked and not os.environ.get("CHEXFOUND_GPUS"):
        return 1
    from chexfound.host import machine

    number = machine.gpus(asked)
    os.environ["CHEXFOUND_GPUS"] = str(number)
    return number


@contextlib.contextmanager
def path_told(option: str, path: str) -> Iterator[None]:
    """Say of a path that the system does not take (too long, a part of it a file, in /proc) which option it was.

    Raises: ConfigError.
    """
    try:
        yield
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"{option} {path!r}: cannot be a folder: a part of its path is a file; choose another"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{option} {path[:80]!r}: cannot be used: {why}; choose another folder") from error


def _options(given: argparse.Namespace) -> Options:
    from sim.options import Options, PartitionRule, unknown_arms

    if not given.data:
        raise ConfigError("--data is missing: name a folder of images, for example one made by `chexfound phantom`")
    data = Path(given.data)
    with path_told("--data", given.data):
        there = data.is_dir()
    if not there:
        raise ConfigError(f"--data {given.data!r}: no such folder")
    PartitionRule.parse(given.by or "source")
    from chexfound.recipe import load as recipes

    recipe = recipes.load(given.recipe or "laptop", recipes.parse_overrides(given.set))
    try:
        seeds = tuple(int(part) for part in given.seeds.split(",")) if given.seeds else (recipe.seed,)
    except ValueError as error:
        raise ConfigError(f"--seeds {given.seeds!r}: whole numbers with commas between, such as 0,1,2") from error
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds {given.seeds!r}: each seed once, none negative")
    arms = tuple(part.strip() for part in (given.arms or ARMS).split(","))
    if unknown := unknown_arms(arms):
        raise ConfigError(f"--arms: unknown {unknown[0]!r}; choose from {ARMS}, or local:SITE for one site")
    return Options(
        data=str(data.resolve()),
        by=given.by or "source",
        seeds=seeds,
        arms=arms,
        recipe=recipes.to_dict(recipe),
    )


if __name__ == "__main__":
    sys.exit(main())
