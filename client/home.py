"""Where a site keeps what is its own.  Imports nothing heavy: the command line stands on it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from chexfound.errors import ConfigError


def home() -> Path:
    """Where everything of ours is kept: $CHEXFOUND_HOME, else ~/.chexfound."""
    return Path(os.environ.get("CHEXFOUND_HOME") or Path.home() / ".chexfound")


def site_home(name: str) -> Path:
    """The folder of a site: its store, its state between rounds, its Flower apps."""
    return home() / "sites" / name


def store_path(folder: Path, image_px: int) -> Path:
    """The store of a site's folder for images of one size."""
    return folder / f"store-{image_px}"


def sole_site() -> str:
    """The name of the one site that was enrolled on this machine.

    Raises: ConfigError if there is none, or there are several.
    """
    names = _enrolled()
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(f"several sites were enrolled on this machine ({', '.join(names)}); say which, with --name")
    raise ConfigError("no site was enrolled on this machine yet; begin with: chexfound-client enrol --name SITE")


def named(name: str) -> str:
    """What a command for a site takes behind it: nothing where `sole_site` knows the name."""
    return "" if _enrolled() == [name] else f" --name {shlex.quote(name)}"


def _enrolled() -> list[str]:
    return sorted(path.parent.name for path in (home() / "sites").glob("*/keys"))
