"""The sum of masked inputs: each is spooled to the disk as it comes, and only those of the survivors are added."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from chexfound.durable.files import storage
from chexfound.errors import ProtocolError
from chexfound.phases.payload import map_new
from chexfound.secagg import mask
from chexfound.secagg.fixed import Layout, decode_section

CHUNK = 2**20  # values that are added at a time


class Sums(Mapping[str, np.ndarray]):
    """A sum by section, each decoded anew when it is looked at: decoded, all of them take twice the memory.

    Args:
        layout: of the arrays.
        arrays: by bits of their ring, without masks.
    """

    def __init__(self, layout: Layout, arrays: Mapping[int, np.ndarray]) -> None:
        self._layout, self._arrays = layout, arrays
        self._sections = {section.name: section for section in layout.payload}

    def __getitem__(self, name: str) -> np.ndarray:
        return decode_section(self._layout, self._sections[name], self._arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)


class MaskedSum:
    """Add up the masked arrays of one attempt.  Inputs lie on the disk, and so does their sum, which is mapped.

    Args:
        layout: of the arrays.
        folder: for the spools; emptied.
    """

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout, self.folder = layout, folder
        shutil.rmtree(folder, ignore_errors=True)
        with storage(folder):
            folder.mkdir(parents=True)
        # On the disk too: in memory it would be another model beside the one before and the one after.  And now: when
        # its turn comes, sites have opened it.
        self._sums = {
            ring: map_new(folder / f"sum-{ring}.bin", f"<u{ring // 8}", size) if size else np.zeros(0, f"<u{ring // 8}")
            for ring, size in layout.sizes.items()
        }
        self._sites: list[str] = []

    def add(self, site: str, arrays: Mapping[int, np.ndarray]) -> None:
        """Take in one site's masked arrays, by bits of their ring.

        Raises: ProtocolError if they are not of the layout.
        """
        sizes = {ring: array.size for ring, array in arrays.items()}
        if sizes != dict(self.layout.sizes) or any(a.dtype != f"uint{ring}" for ring, a in arrays.items()):
            raise ProtocolError("the masked arrays are not of the layout that was asked for")
        for ring, array in arrays.items():
            path = self._path(site, ring)
            with storage(path):
                array.astype(f"<u{ring // 8}", copy=False).tofile(path)
        self._sites.append(site)

    def result(self, survivors: Sequence[str], masks: Sequence[tuple[int, bytes]]) -> Sums:
        """The survivors' sum by section.

        Args:
            survivors: of those that were added.
            masks: what lies on it: (sign, seed).

        Raises: ProtocolError for a survivor that was not added.
        """
        if absent := sorted(set(survivors) - set(self._sites)):
            raise ProtocolError(f"a sum over sites whose arrays did not come: {absent[:3]}")
        sums = self._sums
        for site in survivors:
            for ring, total in sums.items():
                if not total.size:
                    continue
                spool = np.memmap(self._path(site, ring), f"<u{ring // 8}", "r")
                for start in range(0, total.size, CHUNK):
                    total[start : start + CHUNK] += spool[start : start + CHUNK]
        mask.add_masks(sums, self.layout, [(-sign, seed) for sign, seed in masks])
        self.close()
        return Sums(self.layout, sums)

    def close(self) -> None:
        """Drop the spools."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, site: str, ring: int) -> Path:
        if site not in self._sites:
            index = len(self._sites)
        else:
            index = self._sites.index(site)
        return self.folder / f"{index:03d}-{ring}.bin"  # a site's name may be no file's
