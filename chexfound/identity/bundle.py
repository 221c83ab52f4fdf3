"""The code that a run ships (Flower's app bundle, "FAB"): what is in it, by one hash, and what of it is not ours.

A bundle's digest is the SHA-256 over its sorted (path, SHA-256 of the file) pairs.  The archive's own hash would not
do: it depends on the zlib that packed it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chexfound._launch import application_root
from chexfound.errors import ProtocolError

FILES_MAX = 2000
BYTES_MAX = 64 * 2**20  # of the archive, and unpacked, all files together
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks the others without a bound on memory
PACKAGES = ("chexfound", "client", "server", "strategies")  # as [tool.flwr.app] fab-include in pyproject.toml has them
SUFFIXES = (".py", ".yaml")


@dataclass(frozen=True)
class Bundle:
    """Hold what is in a bundle.

    Args:
        files: SHA-256 (hex) by path.
    """

    files: Mapping[str, str]

    def digest(self) -> str:
        """SHA-256 over the sorted (path, sha256) pairs, each part after its length in 8 bytes; hex."""
        whole = hashlib.sha256()
        for path, sha256 in sorted(self.files.items()):
            for part in (path.encode(), bytes.fromhex(sha256)):
                whole.update(len(part).to_bytes(8, "big") + part)
        return whole.hexdigest()

    def differences(self, release: Bundle) -> list[str]:
        """Give what sets it apart from a release, a line a file; nothing if they are the same."""
        said = []
        for path in sorted(set(self.files) | set(release.files)):
            if path not in release.files:
                said.append(f"{path!r}: not in the installed release")
            elif path not in self.files:
                said.append(f"{path!r}: missing")
            elif self.files[path] != release.files[path]:
                said.append(f"{path!r}: differs")
        return said


def read(content: bytes) -> Bundle:
    """The files of a bundle from outside; nothing is unpacked to the disk, nothing but the archive is parsed.

    Raises: ProtocolError for what is no archive of Flower's kind, is too large, or names a file twice.
    """
    if len(content) > BYTES_MAX:
        raise ProtocolError(f"the bundle holds more than {BYTES_MAX} bytes")
    if content.count(b"PK\x01\x02") > FILES_MAX:  # each entry's mark; zipfile would list a million before we count
        raise ProtocolError(f"the bundle holds more than {FILES_MAX} files")
    files: dict[str, str] = {}
    left = BYTES_MAX
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if len(archive.infolist()) > FILES_MAX:
                raise ProtocolError(f"the bundle holds more than {FILES_MAX} files")
            for entry in archive.infolist():
                if entry.filename in files:
                    raise ProtocolError(f"the bundle names {entry.filename[:80]!r} twice")
                if entry.compress_type not in PACKINGS:
                    raise ProtocolError(f"the bundle's {entry.filename[:80]!r} is not packed as Flower packs")
                with archive.open(entry) as file:
                    data = file.read(left + 1)
                left -= len(data)
                if left < 0:
                    raise ProtocolError(f"the bundle holds more than {BYTES_MAX} bytes")
                files[entry.filename] = hashlib.sha256(data).hexdigest()
    except ProtocolError:
        raise
    except Exception as error:  # bytes from outside: zipfile and zlib raise a dozen kinds
        raise ProtocolError("the bundle is not a readable archive") from error
    return Bundle(files)


def release_files() -> dict[str, Path]:
    """The files that the installed release ships as a bundle: path in the bundle -> path on this disk."""
    root = application_root()
    library = Path(__file__).resolve().parents[1]
    result = {"pyproject.toml": root / "pyproject.toml"}
    for name in PACKAGES:
        folder = library if name == "chexfound" else root / name
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.suffix in SUFFIXES and "__pycache__" not in inside.parts and inside.parts[0] != "_app":
                result[f"{name}/{inside.as_posix()}"] = path
    return result
