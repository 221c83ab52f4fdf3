"""`chexfound-sim`: a federation on one machine, compared with pooling the images and with each site alone."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.errors import ChexfoundError, ConfigError

if TYPE_CHECKING:
    from sim.simulate import Options

ARMS = "federated,centralized,local,random,shuffled,site-view,histogram"

EPILOG = """\
examples:
  chexfound phantom --sites 4 --patients 40 --out phantoms
  chexfound-sim --data phantoms --recipe demo --out out/demo
  chexfound-sim --data ../shared/data/cxr --by source --out out/real
  chexfound-sim --data images --by dirichlet:8:0.5 --set train.rounds=30 --seeds 0,1,2
  chexfound-sim --out out/real --resume

A folder of DICOM files, a folder with a manifest.csv (see docs/data.md), or a store made by
`chexfound ingest` will do as --data. Ctrl-C keeps what is done; --resume goes on to the same result.
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
    result.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        report = _simulate(given)
    except KeyboardInterrupt:
        errors.print(
            f"\nStopped. What is done is kept; go on with: chexfound-sim --out {escape(given.out)} --resume",
            highlight=False,
        )
        return 130
    except ChexfoundError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return error.exit_code
    print(f"report: {report}")
    return 0


def _simulate(given: argparse.Namespace) -> Path:
    from rich.console import Console

    out = Path(given.out)
    workers = (
        given.workers
        if given.workers is not None
        else min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    )
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least one")
    from sim.display import Display
    from sim.simulate import Options, Simulation, start

    if given.resume:
        clashing = [f"--{name}" for name in ("data", "by", "recipe", "set", "seeds", "arms") if getattr(given, name)]
        if clashing:
            raise ConfigError(f"--resume goes on with what the run was started with; leave out {', '.join(clashing)}")
        options = Options.read(out)
    else:
        options = _options(given)
        start(options, out)
    with Display(Console()) as display:
        return Simulation(options, out, workers, display).run()


def _options(given: argparse.Namespace) -> Options:
    from chexfound import recipe as recipes
    from sim.partition import Rule
    from sim.simulate import ARMS as KNOWN
    from sim.simulate import Options

    if not given.data:
        raise ConfigError("--data is missing: name a folder of images, for example one made by `chexfound phantom`")
    data = Path(given.data)
    if not data.is_dir():
        raise ConfigError(f"--data {given.data!r}: no such folder")
    Rule.parse(given.by or "source")
    recipe = recipes.load(given.recipe or "laptop", recipes.parse_overrides(given.set))
    try:
        seeds = tuple(int(part) for part in given.seeds.split(",")) if given.seeds else (recipe.seed,)
    except ValueError as error:
        raise ConfigError(f"--seeds {given.seeds!r}: whole numbers with commas between, such as 0,1,2") from error
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds {given.seeds!r}: each seed once, none negative")
    arms = tuple(part.strip() for part in (given.arms or ARMS).split(","))
    unknown = [arm for arm in arms if arm not in KNOWN and not arm.startswith("local:")]
    if unknown:
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
