"""Paths of a site's own files.  Imports nothing heavy: the command line stands on it."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from chexfound.durable.files import storage
from chexfound.errors import ConfigError

UMASK = 0o077  # of all of a site's processes: what they write is for this account only


def home() -> Path:
    """Give the folder of everything of ours: $CHEXFOUND_HOME, else ~/.chexfound."""
    return Path(os.environ.get("CHEXFOUND_HOME") or Path.home() / ".chexfound")


def site_home(name: str) -> Path:
    """The folder of a site: its store, its state between rounds, its Flower apps."""
    return home() / "sites" / name


def close(folder: Path) -> None:
    """Make a site's folder, or mend it: all of it is for this account only, and so is the folder that holds it.

    Raises: StorageError if a mode cannot be changed.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, *exposed(folder)):
            with contextlib.suppress(FileNotFoundError):  # a file on its way to its place
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~UMASK)


def exposed(folder: Path) -> Iterator[Path]:
    """Yield what other accounts have a right to in a site's folder, itself included; links to stores are followed."""
    for top in [folder, *(path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_dir())]:
        for here, _, files in os.walk(top):
            for path in (Path(here), *(Path(here, name) for name in sorted(files))):
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink() and path.stat().st_mode & UMASK:
                        yield path


def store_path(folder: Path, image_px: int) -> Path:
    """The store of a site's folder for images of one size."""
    return folder / f"store-{image_px}"


def site_name(name: str | None) -> str:
    """The site that is meant: that of `--name`, else the one enrolled on this machine.

    Raises: ConfigError if it is no name, or if none is given and there is none, or there are several.
    """
    from chexfound.identity.roster import check_name

    name = name or sole_site()
    check_name(name, "site name")
    return name


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
    """Give what a command for a site takes behind it: nothing where `sole_site` knows the name."""
    return "" if _enrolled() == [name] else f" --name {shlex.quote(name)}"


def _enrolled() -> list[str]:
    return sorted(path.parent.name for path in (home() / "sites").glob("*/keys"))
