"""Where a site keeps what is its own.  Imports nothing heavy: the command line stands on it."""

from __future__ import annotations

import os
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


def checked_name(name: str) -> str:
    """A site name that can name a folder.

    Raises: ConfigError.
    """
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name) > 64:
        raise ConfigError(f"site name {name!r}: use 1 to 64 printable characters and no slash")
    return name
