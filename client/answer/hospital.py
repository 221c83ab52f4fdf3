"""From a node's configuration to its site: which images, and which disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chexfound.data.intake.ingest import ingest
from chexfound.data.store import vocabulary
from chexfound.data.store.index import key_id
from chexfound.data.store.naming import Naming
from chexfound.data.store.reader import Store, is_store
from chexfound.data.store.split import Membership, View
from chexfound.errors import ConfigError, DataError, EmptyError, RefusedError
from chexfound.identity.roster import check_name
from chexfound.phases.site_state import Site
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Split
from client.home import secret
from client.home.paths import close, site_home, store_path
from client.home.policy import Policy

on_progress: Callable[[str, str, int, int], None] | None = (
    None  # told (site, phase, done, of how many); set by who runs the sites
)
# Sites of this process, opened once for as long as the operator leaves site.yaml as it was.
_open: dict[tuple[tuple[str, Any], ...], tuple[Site, tuple[int, ...]]] = {}


def site_of(node_config: Mapping[str, Any], image_px: int, *, enrolling: bool) -> Site:
    """The site that a node's configuration describes.

    Keys: `site` (name), `data` (a store, or a folder of images, which is taken into a store under
    the site's home), `gpus` (how many to pretrain on, or "all"), `secured` (true: it has keys, and signs); and
    for the simulation `home` (of its keys too), `lineage` (true: weights are checked as in a deployment), `patients` (a
    JSON file with the shard's patients), `split-key` (in the place of the seed's, hex) and `shuffle-labels`.  New
    images are taken in at enrolment only: a run's images must not change between its rounds.

    Raises: ConfigError if `site` or `data` is missing; DataError; RefusedError, see `_hospital`.
    """
    missing = [name for name in ("site", "data") if not isinstance(node_config.get(name), str) or not node_config[name]]
    if missing:
        raise ConfigError(
            f"the node's configuration lacks {' and '.join(missing)}; "
            'start it with --node-config \'site="NAME" data="DIR"\''
        )
    key, policy = (*sorted(node_config.items()), ("image_px", image_px)), _written(folder_of(node_config) / "site.yaml")
    if enrolling or key not in _open or _open[key][1] != policy:
        _open[key] = _make(node_config, image_px, enrolling), policy
    site, _ = _open[key]
    listener = on_progress
    site.progress = (lambda phase, done, total: listener(site.name, phase, done, total)) if listener else None
    return site


def member_home(node_config: Mapping[str, Any]) -> Path | None:
    """The home of a site that takes part with its keys (`secured`); None for one that has none."""
    if node_config.get("secured") is not True:
        return None
    return folder_of(node_config)


def folder_of(node_config: Mapping[str, Any]) -> Path:
    """Give the folder in which a node's site keeps what is its own.

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


def _written(path: Path) -> tuple[int, ...]:
    """When a file was written last, and what there is of it; nothing of one that is not there."""
    try:
        about = path.stat()
    except OSError:
        return ()
    return about.st_mtime_ns, about.st_size, about.st_ino


def _make(node_config: Mapping[str, Any], image_px: int, enrolling: bool) -> Site:
    name, data, folder = str(node_config["site"]), Path(str(node_config["data"])), folder_of(node_config)
    gpus = str(node_config.get("gpus", ""))
    if "home" not in node_config:
        return _hospital(name, data, folder, image_px, enrolling, gpus)
    patients = None
    if "patients" in node_config:
        patients = json.loads(Path(str(node_config["patients"])).read_text())
    view = View.of(_store(data, folder, image_px, enrolling), name, patients)
    if not len(view.ids):
        raise DataError(f"site {name!r}: no image of its patients is in {data}")
    return Site(
        view=view,
        home=folder,
        shuffle_labels=bool(node_config.get("shuffle-labels", False)),
        tally=True,
        gpus=gpus,
        lineage=node_config.get("lineage") is True,
        split_key=bytes.fromhex(str(node_config["split-key"])) if "split-key" in node_config else None,
    )


def _hospital(name: str, data: Path, folder: Path, image_px: int, enrolling: bool, gpus: str) -> Site:
    """A site that is no simulation's: what tells of its patients hangs on its own secret and its own policy.

    Raises: RefusedError where it has too few to take part, or none: which of both, nobody is told.
    """
    close(folder)
    own, policy = secret.of_site(folder), Policy.load(folder)
    try:
        store = _store(data, folder, image_px, enrolling, own.naming, name)
    except EmptyError as error:
        raise RefusedError("policy.patients", str(error)) from error
    fractions = changed(Split(), train=policy.split.train, val=policy.split.val)
    view = View.of(store, name)
    ids = view.split(Membership(key=own.split, fractions=fractions), "train")
    images, patients = len(ids), len({store.keys[place] for place in ids})
    least = max(policy.min_patients, policy.cells.patients)  # below which not even their number leaves
    if images < policy.min_images or patients < least:
        raise RefusedError(
            "policy.patients",
            f"site {name!r}: {images} images of {patients} patients to train on; {folder / 'site.yaml'} asks for "
            f"{policy.min_images} of {least} (min_images, min_patients, cells.patients)",
        )
    return Site(
        view=view,
        home=folder,
        gpus=gpus,
        lineage=True,
        cells=policy.cells.patients,
        words=vocabulary.permitted(policy.findings),
        split_key=own.split,
        fractions=fractions,
        digest_key=own.digest,
    )


def _store(
    data: Path, folder: Path, image_px: int, enrolling: bool, naming: Naming | None = None, name: str = ""
) -> Store:
    """The store that `data` is, as it is; or the site's own, that its images are taken into."""
    if is_store(data):
        return Store.open(data)
    path = store_path(folder, image_px)
    if enrolling or not path.exists() or (naming is not None and not key_id(path)):
        ingest(data, path, image_px, naming=naming, site=name)
    return Store.open(path)
