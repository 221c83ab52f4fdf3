"""From a node's configuration to its site: which images, and which disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chexfound.data.sources import ingest
from chexfound.data.split import View
from chexfound.data.store import Store
from chexfound.errors import ConfigError, DataError
from chexfound.phases import Site
from chexfound.roster import check_name
from client.home import site_home, store_path

on_progress: Callable[[str, str, int, int], None] | None = (
    None  # told (site, phase, done, of how many); set by who runs the sites
)
_open: dict[tuple[tuple[str, Any], ...], Site] = {}  # sites of this process, opened once


def site_of(node_config: Mapping[str, Any], image_px: int, *, enrolling: bool) -> Site:
    """The site that a node's configuration describes.

    Keys: `site` (name), `data` (a store, or a folder of images, which is taken into a store under
    the site's home), `gpus` (how many to pretrain on, or "all"), `secured` (true: it has keys, and signs); and
    for the simulation `home` (of its keys too), `lineage` (true: weights are checked as in a deployment), `patients` (a
    JSON file with the shard's patients) and `shuffle-labels`.  New images are taken in at enrolment only: a run's
    images must not change between its rounds.

    Raises: ConfigError if `site` or `data` is missing; DataError.
    """
    key = (*sorted(node_config.items()), ("image_px", image_px))
    if enrolling or key not in _open:
        _open[key] = _make(node_config, image_px, enrolling)
    site = _open[key]
    listener = on_progress
    site.progress = (lambda phase, done, total: listener(site.name, phase, done, total)) if listener else None
    return site


def member_home(node_config: Mapping[str, Any]) -> Path | None:
    """The home of a site that takes part with its keys (`secured`); None for one that has none."""
    if node_config.get("secured") is not True:
        return None
    return folder_of(node_config)


def folder_of(node_config: Mapping[str, Any]) -> Path:
    """Where a node's site keeps what is its own.

    Raises: ConfigError for a name that none can have.
    """
    if "home" in node_config:
        return Path(str(node_config["home"]))
    name = str(node_config.get("site", ""))
    check_name(name, "site name")
    return site_home(name)


def forget() -> None:
    """Drop what is kept warm between messages; it is all on the disk too."""
    _open.clear()


def _make(node_config: Mapping[str, Any], image_px: int, enrolling: bool) -> Site:
    missing = [name for name in ("site", "data") if not isinstance(node_config.get(name), str) or not node_config[name]]
    if missing:
        raise ConfigError(
            f"the node's configuration lacks {' and '.join(missing)}; "
            'start it with --node-config \'site="NAME" data="DIR"\''
        )
    name, data = str(node_config["site"]), Path(str(node_config["data"]))
    folder = folder_of(node_config)
    if (data / "index.sqlite").exists():
        store = Store.open(data)
    else:
        path = store_path(folder, image_px)
        if enrolling or not path.exists():
            ingest(data, path, image_px)
        store = Store.open(path)
    patients = None
    if "patients" in node_config:
        patients = json.loads(Path(str(node_config["patients"])).read_text())
    view = View.of(store, name, patients)
    if not len(view.ids):
        raise DataError(f"site {name!r}: no image of its patients is in {data}")
    return Site(
        view=view,
        home=folder,
        shuffle_labels=bool(node_config.get("shuffle-labels", False)),
        gpus=str(node_config.get("gpus", "")),
        lineage="home" not in node_config or node_config.get("lineage") is True,
    )
