"""A site's secret: who is in it, and which of its patients train, nobody can tell without it.

    HOME/secret.key    32 random bytes, 0600; made at `enrol`, or when the site is served first

Four keys come of it, by HKDF-SHA256: one that names the patients in the site's own stores (a number that somebody
knows finds nobody there), one that stands in for paths and labels in their index (data/texts.py), one that decides who
trains, validates and tests (data/split.py), and one for the digest of the store, by which a coordinator sees that
images have changed, and cannot try whether they are those it guesses.

It never leaves.  With another one each patient has another name and another part, and whom a model has learned from
would test it: so a site whose stores were made with another secret, or with one that is gone, does nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chexfound.data.store.index import INDEX, key_id
from chexfound.data.store.naming import Naming
from chexfound.durable.files import replace_file
from chexfound.errors import DataError

BYTES = 32
ANEW = (
    "bring secret.key back from the backup of keys/. If it is lost for good, take the images in anew: remove {stores} "
    "(and {path}, if it is there), and start again. Then patients change parts: who trained a model of before may test "
    "one from then on, so tell the coordinator, and take part in no run that builds on a model of before"
)


@dataclass(frozen=True, kw_only=True)
class Secret:
    """The keys that one secret gives.

    Args:
        naming: of patients, and of all else that has a name, in the site's own stores.
        split: by which patients fall into parts.
        digest: by which the store's digest leaves.
    """

    naming: Naming
    split: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @staticmethod
    def of(secret: bytes) -> Secret:
        """Derive them."""

        def key(info: str) -> bytes:
            return HKDF(algorithm=SHA256(), length=BYTES, salt=None, info=info.encode()).derive(secret)

        naming = Naming(
            key_id=key("chexfound key id v1").hex()[:16],
            key=key("chexfound pseudonym v1"),
            texts=key("chexfound texts v1"),
        )
        return Secret(naming=naming, split=key("chexfound split v1"), digest=key("chexfound store v1"))


def path_of(home: Path) -> Path:
    """Give the path of a site's secret."""
    return home / "secret.key"


def of_site(home: Path) -> Secret:
    """The site's secret, made if there is none yet.

    Raises: as `present`; StorageError.
    """
    if (secret := present(home)) is not None:
        return secret
    with replace_file(path_of(home), 0o600) as temporary:
        temporary.write_bytes(os.urandom(BYTES))
    return Secret.of(path_of(home).read_bytes())


def present(home: Path) -> Secret | None:
    """The site's secret; None if none was made yet.

    Raises: DataError if it is gone, damaged, or another one than the site's stores were made with.
    """
    path, made_with = path_of(home), {store: found for store in own_stores(home) if (found := key_id(store))}
    anew = ANEW.format(stores=" and ".join(map(str, made_with)) or "its stores", path=path)
    try:
        read = path.read_bytes()
    except FileNotFoundError:
        if made_with:
            raise DataError(f"{path}: the site's secret is not there; {anew}") from None
        return None
    except OSError as error:
        raise DataError(f"{path}: the site's secret cannot be read ({error}); check its owner and mode") from error
    if len(read) != BYTES:
        raise DataError(f"{path}: holds {len(read)} bytes, not {BYTES}; {anew}")
    secret = Secret.of(read)
    if others := [store for store, found in made_with.items() if found != secret.naming.key_id]:
        raise DataError(f"{path}: {others[0]} was made with another secret; {anew}")
    return secret


def own_stores(home: Path) -> list[Path]:
    """The stores that the site made of its images."""
    return sorted(path.parent for path in home.glob(f"store-*/{INDEX}"))
