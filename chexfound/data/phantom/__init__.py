"""Phantom hospitals: procedurally drawn chest radiographs in DICOM files, with their findings.

sites.py       the hospitals: scanner, patients, what their readers label
cases.py       who the patients are and what they have
canvas.py      the plane to draw in
frame.py       where the parts of one chest lie
anatomy.py     soft parts; skeleton.py: bones; findings.py: disease
projection.py  the sum along the beam
scanner.py     from the beam to stored values
write.py       DICOM headers
hospitals.py   folders, manifests
"""

from __future__ import annotations

from chexfound.data.phantom.hospitals import PhantomSummary, generate

__all__ = ["PhantomSummary", "generate"]
