"""`chexfound weights`: take in published weights, look at any, make a release of ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from chexfound.durable.files import absent
from chexfound.errors import CheckpointError, ConfigError

IMPORT = """\
Reads a published checkpoint as it is, checks that no weight is missing and none is left over, and prints what it
found. The architecture is read off the shapes. With --out, a folder is written that chexfound.load_backbone,
chexfound.load_head and `chexfound weights export` take. Nothing in a checkpoint is ever run.

examples:
  chexfound weights import teacher_checkpoint.pth                      # only look and check
  chexfound weights import teacher_checkpoint.pth --out chexfound-l
  chexfound weights import model.safetensors glori.pth --out both      # backbone and head in one folder
  chexfound weights import model_checkpoint.pth --which student --out student
  chexfound weights import linear.pth --classifier lr=0_0005 --findings Effusion,Mass --out probe
"""
SHOW = """\
Tells what a checkpoint (.pth, .safetensors) or a folder holds: an imported one, a release, a run's. The SHA-256 of
every file that a folder states is checked.

examples:
  chexfound weights show teacher_checkpoint.pth
  chexfound weights show release --json
"""
EXPORT = """\
Writes a release directory, to be uploaded or copied as it is: model.safetensors and config.json as timm reads them,
the backbone in DINOv2's names, the DINO and iBOT heads, the head of findings, preprocessor, model card, recipe, a
summary of the training. SOURCE is the folder of a run (a simulation's --out, an arm's folder in it, a deployed
run's), the model/ in one, or an imported folder. DINO and iBOT heads are in a run's folder, not in its model/.

examples:
  chexfound weights export out/mine --out release                      # the federated model
  chexfound weights export out/mine/work/seed-0/centralized --out pooled
  chexfound weights export chexfound-l --out for-timm                  # what `weights import` wrote
  python -c 'import timm; timm.create_model("local-dir:release", pretrained=True)'
"""


def add(commands: Any) -> None:
    """Add the command to `chexfound`'s."""
    about = "import published weights, show any, export a release that timm can load"
    weights = commands.add_parser(
        "weights",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="Each has examples: chexfound weights import --help",
    )
    kinds = weights.add_subparsers(dest="weights", required=True, metavar="COMMAND")

    command = _command(kinds, "import", "take in a published checkpoint", IMPORT)
    command.add_argument(
        "files", metavar="FILE", nargs="+", help="teacher_checkpoint.pth, model.safetensors, glori.pth …"
    )
    command.add_argument("--out", metavar="DIR", help="a new folder; without it, nothing is written")
    _options(command)
    command.set_defaults(run=_import)

    command = _command(kinds, "show", "tell what a checkpoint or a folder holds", SHOW)
    command.add_argument("path", metavar="PATH", help="a checkpoint, or a folder")
    command.add_argument("--json", action="store_true", help="as JSON")
    _options(command)
    command.set_defaults(run=_show)

    command = _command(kinds, "export", "write a release directory", EXPORT)
    command.add_argument("source", metavar="SOURCE", help="a run's folder, its model/, or an imported folder")
    command.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    command.add_argument("--findings", metavar="A,B,…", default="", help="names of the head's findings, if it has none")
    command.set_defaults(run=_export)


def _command(kinds: Any, name: str, about: str, text: str) -> argparse.ArgumentParser:
    description, _, examples = text.partition("\nexamples:")
    command: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=about,
        description=description,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _options(command: argparse.ArgumentParser) -> None:
    """Add the options that say what the shapes of a checkpoint cannot tell."""
    group = command.add_argument_group("what the shapes of a checkpoint cannot tell")
    add = group.add_argument
    add("--heads", metavar="N", type=int, help="attention heads of the backbone (default: width / 64)")
    add("--which", choices=("teacher", "student"), default="teacher", help="of a file with both (default: %(default)s)")
    add("--mean", metavar="X[,Y,Z]", help="of pixels scaled to [0, 1] (default: ImageNet's, as CheXFound has)")
    add("--std", metavar="X[,Y,Z]", help="likewise")
    add("--classifier", metavar="NAME", help="which of several heads: its name, or a part that only it has")
    add("--findings", metavar="A,B,…", default="", help="names of the head's findings, in its order")
    add("--glori-heads", metavar="N", type=int, help="attention heads of GLoRI (default: the paper's 8)")
    add(
        "--n-last-blocks",
        metavar="N",
        type=int,
        help="blocks that the head looks at (default: as its name says, else 4)",
    )
    add(
        "--avgpool",
        action=argparse.BooleanOptionalAction,
        help="a linear head takes the last block's mean patch token (default: as its name says)",
    )


def _told(given: argparse.Namespace) -> Any:
    from chexfound.model.weights.in_parts import ImportOptions

    return ImportOptions(
        heads=given.heads,
        which=given.which,
        classifier=given.classifier,
        glori_heads=given.glori_heads,
        n_last_blocks=given.n_last_blocks,
        avgpool=given.avgpool,
        findings=_findings(given.findings),
        mean=_numbers(given.mean, "--mean"),
        std=_numbers(given.std, "--std"),
    )


def _findings(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(name and name.isprintable() for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"--findings {text[:80]!r}: give printable names with commas between, each once")
    return names


def _numbers(text: str | None, option: str) -> Any:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise ConfigError(f"{option} {text[:80]!r}: give one number, or three with commas between: {option} 0.5")
    return numbers if len(numbers) == 3 else numbers[0]


def _there(*paths: str) -> None:
    """Raise CheckpointError for a path at which there is nothing, before all that reads it is imported."""
    for path in paths:
        if absent(path):
            raise CheckpointError(f"{path}: cannot be read (No such file or directory)")


def _import(given: argparse.Namespace) -> int:
    _there(*given.files)
    from chexfound.durable.files import new_folder
    from chexfound.model.weights import describe, in_parts
    from chexfound.model.weights.release import folder

    options = _told(given)
    found = in_parts.merged([in_parts.of_file(Path(file), options) for file in given.files])
    print("\n".join([*describe.sources(found.source), *describe.lines(found)]))
    if not given.out:
        print("checked; nothing was written (--out DIR writes it)")
        return 0
    out = Path(given.out)
    with new_folder(out) as temporary:
        folder.write_parts(temporary, found)
        folder.write_config(temporary, found, "imported")
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    calls = [f'chexfound.load_{name}("{out}")' for name in ("backbone", "head") if name in found.parts]
    if calls:
        print(f"use it: python -c 'import chexfound; {'; '.join(calls)}'")
    return 0


def _show(given: argparse.Namespace) -> int:
    _there(given.path)
    from chexfound.model.weights import show

    seen = show.look(Path(given.path), _told(given))
    print(json.dumps(seen.values, indent=1) if given.json else "\n".join(show.text(seen)))
    return 0


def _export(given: argparse.Namespace) -> int:
    _there(given.source)
    from chexfound.model.weights import describe
    from chexfound.model.weights.export import export
    from chexfound.model.weights.in_parts import ImportOptions
    from chexfound.model.weights.release import timm_format

    out = Path(given.out)
    found, why_not, files = export(Path(given.source), out, ImportOptions(findings=_findings(given.findings)))
    print("\n".join([*describe.sources(found.source), *describe.lines(found, hints=False)]))
    print(f"wrote {out}: {', '.join(files)}")
    if why_not:
        print(f'timm cannot load it: {why_not}; chexfound.load_backbone("{out}") can')
    elif found.backbone is not None:
        print(f"use it: python -c 'import timm; timm.create_model(\"local-dir:{out}\", pretrained=True)'")
        print(f"        (timm {timm_format.LOCAL_DIR} or later; of an earlier one: the README.md in it)")
    return 0
