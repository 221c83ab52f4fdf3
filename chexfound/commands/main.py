"""`chexfound`: the library's commands on one machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from chexfound import __version__
from chexfound.commands import weights
from chexfound.durable.files import absent
from chexfound.errors import ConfigError, DataError
from chexfound.host.exits import ended


def parser(pretrain: ModuleType | None = None) -> argparse.ArgumentParser:
    """Make the command's options; `pretrain` adds those of its own, where whoever started us has it."""
    result = argparse.ArgumentParser(
        prog="chexfound",
        description="Federated chest X-ray pretraining: make phantoms, take in images, show recipes, pretrain, "
        "draw reports, import and export weights.",
        epilog="The federation itself: chexfound-sim (one machine), chexfound-client (a hospital), "
        "chexfound-server (the coordinator).",
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    phantom = commands.add_parser("phantom", help="draw DICOM chest phantoms of several sites, with labelled findings")
    add = phantom.add_argument
    add("--out", metavar="DIR", required=True, help="a new folder; one folder a site in it")
    add("--sites", metavar="N", type=int, default=4, help="each with its own scanner (default: %(default)s)")
    add("--patients", metavar="N", type=int, default=200, help="at each site (default: %(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    phantom.set_defaults(run=_phantom)

    ingest = commands.add_parser("ingest", help="take images into a store, or add what is new to it")
    add = ingest.add_argument
    add("source", metavar="SOURCE", help="DICOM folder, or folder with a manifest.csv")
    add("store", metavar="STORE", help="the store; made if it is not there")
    add("--image-px", metavar="N", type=int, default=128, help="side of the stored images (default: %(default)s)")
    ingest.set_defaults(run=_ingest)

    recipe = commands.add_parser("recipe", help="show a recipe with all its values, or write it for `flwr run -c`")
    add = recipe.add_argument
    add("recipe", metavar="NAME", nargs="?", help="a preset or a YAML file; without it, the presets are listed")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change a value; may be repeated")
    add("--toml", metavar="FILE", help="write the run-config file there instead of showing the recipe")
    recipe.set_defaults(run=_recipe)

    if pretrain is not None:
        pretrain.add(commands)

    report = commands.add_parser("report", help="draw report.html from a run's folder")
    report.add_argument("folder", metavar="DIR", help="of a simulation or of a deployed run; holds metrics.json")
    report.set_defaults(run=_report)

    weights.add(commands)
    return result


def _progress(title: str) -> tuple[object, Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
    task = bar.add_task(title, total=None)
    return bar, lambda done, total: bar.update(task, completed=done, total=total)


def _phantom(given: argparse.Namespace) -> int:
    from chexfound.data.phantom import generate

    bar, progress = _progress("drawing")
    with bar:  # type: ignore[attr-defined]
        summary = generate(
            Path(given.out), sites=given.sites, patients=given.patients, seed=given.seed, progress=progress
        )
    images = ", ".join(f"{site} {number}" for site, number in summary.images.items())
    print(f"{summary.patients} patients drawn into {given.out}; images: {images}")
    return 0


def _ingest(given: argparse.Namespace) -> int:
    if absent(given.source):
        raise DataError(f"{given.source}: no such folder; give the folder that holds the images")
    from chexfound.data.intake.ingest import ingest

    bar, progress = _progress("taking in")
    with bar:  # type: ignore[attr-defined]
        summary = ingest(Path(given.source), Path(given.store), given.image_px, progress=progress)
    print(
        f"{summary.images} images of {summary.patients} patients taken in, "
        f"{summary.skipped_existing} were there already, {len(summary.refused)} files refused"
    )
    for file, reason in summary.refused:
        print(f"  refused {file}: {reason}")
    return 0


def _recipe(given: argparse.Namespace) -> int:
    from chexfound.recipe import load as recipes

    if not given.recipe:
        for name in recipes.presets():
            print(f"{name:<13} {recipes.about(name)}")
        return 0
    resolved = recipes.load(given.recipe, recipes.parse_overrides(given.set))
    if not given.toml:
        print(recipes.to_yaml(resolved), end="")
        return 0
    from chexfound.durable.files import write_text

    if not given.toml.endswith(".toml"):
        raise ConfigError(
            f"--toml {given.toml!r}: the name must end in .toml; Flower reads any other as key=value text"
        )
    write_text(Path(given.toml), recipes.to_run_config(resolved))
    print(f"wrote {given.toml}; run it with: flwr run . NAME --stream -c {given.toml}")
    return 0


def _report(given: argparse.Namespace) -> int:
    if absent(given.folder):
        raise DataError(f"{given.folder}: no such folder; a report is drawn from the folder of a finished run")
    from chexfound.report.build import build

    print(f"report: {build(Path(given.folder))}")
    return 0


def main(arguments: list[str] | None = None, pretrain: ModuleType | None = None) -> int:
    """Run the command, with `pretrain` where that is given (sim/pretrain.py); returns the exit code."""

    def run() -> int:
        given = parser(pretrain).parse_args(arguments)
        code: int = given.run(given)
        return code

    return ended(run)


if __name__ == "__main__":
    sys.exit(main())
