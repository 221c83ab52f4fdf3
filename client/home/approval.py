"""Which code and which weights the site's operator approved, and which were refused and wait for a word.

SITE/code.json             digests of bundles of code that were approved
SITE/refused/DIGEST.fab    what came and was not; kept to be looked at, never unpacked
SITE/weights.json          digests of weights that were approved, and of those that were refused: of a file, of its
                           bytes; of weights whose lineage was lost, of what was sent
"""

from __future__ import annotations

import contextlib
import datetime
import re
from pathlib import Path

from chexfound.durable.files import storage, write_bytes, write_json
from chexfound.errors import ChexfoundError, ConfigError, ProtocolError
from chexfound.identity import bundle, roster
from chexfound.identity.bundle import Bundle
from client.home.paths import named

FORMAT = 1
KEPT = 5  # refused bundles, the latest


def approved(home: Path) -> dict[str, str]:
    """When each bundle was approved, by digest.

    Raises: ConfigError if the file was damaged.
    """
    path = home / "code.json"
    if not path.exists():
        return {}
    values = roster.read_json(path)
    if (
        not isinstance(values, dict)
        or values.get("format") != FORMAT
        or not isinstance(values.get("approved"), dict)
        or not all(re.fullmatch("[0-9a-f]{64}", key) for key in values["approved"])
    ):
        raise ConfigError(f"{path}: damaged; remove it, and approve the code again: chexfound-client approve")
    return {str(key): str(value) for key, value in values["approved"].items()}


def approve(home: Path, digest: str) -> None:
    """From now on runs of this bundle are accepted."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(home / "code.json", {"format": FORMAT, "approved": approved(home) | {digest: now}})
    with storage(home):
        (home / "refused" / f"{digest}.fab").unlink(missing_ok=True)


def withdraw(home: Path, digest: str) -> None:
    """Runs of this bundle are refused again.

    Raises: ConfigError if it was not approved.
    """
    left = approved(home)
    if left.pop(digest, None) is None:
        raise ConfigError(f"{digest}: was not approved")
    write_json(home / "code.json", {"format": FORMAT, "approved": left})


def check(home: Path, content: bytes) -> str | None:
    """Hold a bundle that came against what was approved; one that was not is kept for the operator to look at.

    Returns: None if it was approved, else why not.
    """
    try:
        digest = bundle.read(content).digest()
    except ProtocolError as error:
        return str(error)
    try:
        if digest in approved(home):
            return None
        keep(home, digest, content)
    except (ChexfoundError, OSError) as error:
        return str(error)
    look = f"chexfound-client approve {digest[:12]}{named(home.name)}"
    return f"the code {digest} was not approved here; look at it with: {look}"


def keep(home: Path, digest: str, content: bytes) -> None:
    """Put a refused bundle where the operator finds it, the oldest of many away."""
    write_bytes(home / "refused" / f"{digest}.fab", content)
    for path in sorted((home / "refused").glob("*.fab"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        path.unlink(missing_ok=True)


def refused(home: Path) -> dict[str, Bundle]:
    """The bundles that were refused, by digest, the latest first; without files that were damaged here."""
    held = {}
    for path in sorted((home / "refused").glob("*.fab"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ProtocolError):
            came = bundle.read(path.read_bytes())
            if came.digest() == path.stem:
                held[path.stem] = came
    return held


def approved_weights(home: Path) -> dict[str, str]:
    """When each file of weights was approved, by digest.

    Raises: ConfigError if the file was damaged.
    """
    return _weights(home)["approved"]


def refused_weights(home: Path) -> dict[str, str]:
    """Which rule was broken by weights that came and were not approved, by digest, the latest last."""
    return _weights(home)["refused"]


def approve_weights(home: Path, digest: str) -> None:
    """From now on these weights may begin a run, or go on with one that was lost."""
    now, held = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), _weights(home)
    held["refused"].pop(digest, None)
    _write_weights(home, held["approved"] | {digest: now}, held["refused"])


def withdraw_weights(home: Path, digest: str) -> None:
    """These weights are refused again.

    Raises: ConfigError if they were not approved.
    """
    held = _weights(home)
    if held["approved"].pop(digest, None) is None:
        raise ConfigError(f"{digest}: was not approved")
    _write_weights(home, held["approved"], held["refused"])


def keep_weights(home: Path, digest: str, code: str) -> None:
    """Remember weights that were refused, the latest of them."""
    held = _weights(home)
    held["refused"].pop(digest, None)
    latest = list(held["refused"].items())[1 - KEPT :]
    _write_weights(home, held["approved"], dict(latest) | {digest: code})


def _weights(home: Path) -> dict[str, dict[str, str]]:
    path = home / "weights.json"
    if not path.exists():
        return {"approved": {}, "refused": {}}
    values = roster.read_json(path)
    if (
        not isinstance(values, dict)
        or values.get("format") != FORMAT
        or not all(isinstance(values.get(key), dict) for key in ("approved", "refused"))
        or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (*values["approved"], *values["refused"]))
    ):
        raise ConfigError(
            f"{path}: damaged; remove it, and approve the weights again: chexfound-client approve --weights"
        )
    return {key: {str(d): str(v) for d, v in values[key].items()} for key in ("approved", "refused")}


def _write_weights(home: Path, approved: dict[str, str], refused: dict[str, str]) -> None:
    write_json(home / "weights.json", {"format": FORMAT, "approved": approved, "refused": refused})
