"""Entry points of the console scripts.

`client`, `server`, `sim` and `strategies` are names that another distribution could overwrite, so a
wheel carries them inside `chexfound/_app`; a checkout has them beside `chexfound`.  The right folder
is put first on the path, and a module that came from elsewhere is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGES = ("client", "server", "sim", "strategies")


def application_root() -> Path:
    """The folder that holds our four packages: the checkout's root, else chexfound/_app."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (
        all((checkout / name / "__init__.py").is_file() for name in PACKAGES)
        and (checkout / "pyproject.toml").is_file()
    ):
        return checkout
    return package / "_app"


def _enter(module: str, **more: str) -> int:
    """Call `main` of a module of ours, with other modules of ours that it may not import, by the argument's name."""
    root = application_root()
    sys.path.insert(0, str(root))
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or Path(found.origin).resolve().parent.parent != root:
            where = found.origin if found else "nowhere"
            print(
                f"error: the package {name!r} comes from {where}, not from {root}; install into a fresh environment",
                file=sys.stderr,
            )
            return 2
    given = {name: importlib.import_module(other) for name, other in more.items()}
    code: int = importlib.import_module(module).main(**given)
    return code


def chexfound() -> int:
    """`chexfound`; its `pretrain` is the loop that trains every arm, and stands above the library."""
    return _enter("chexfound.commands.main", pretrain="sim.pretrain")


def sim() -> int:
    """`chexfound-sim`."""
    return _enter("sim.cli")


def client() -> int:
    """`chexfound-client`."""
    return _enter("client.cli")


def server() -> int:
    """`chexfound-server`."""
    return _enter("server.cli")
