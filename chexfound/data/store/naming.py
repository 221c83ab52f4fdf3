"""How a hospital's own store names patients, files and labels: by keys, so that what somebody knows finds nobody."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

DIGITS = 32  # hex: two patients share a name once in 10^26 pairs


@dataclass(frozen=True, kw_only=True)
class Naming:
    """HMAC-SHA256 over the name that a patient has without a key: the manifest's, or `dicom.pseudonym` of PatientID.

    Args:
        key_id: tells the key from others, and nothing else of it; stands in the store.
        key: of the hospital, for its patients.
        texts: likewise, for all else that its index would say in words (`chexfound.data.store.texts`).
    """

    key_id: str
    key: bytes = field(repr=False)
    texts: bytes = field(repr=False)

    def name(self, patient: str) -> str:
        """The name in the store."""
        return hmac.digest(self.key, patient.encode(), "sha256").hex()[:DIGITS]

    def hide(self, text: str) -> str:
        """Give what stands in the index in place of a text; of none, none."""
        return hmac.digest(self.texts, text.encode(), "sha256").hex()[:DIGITS] if text else ""
