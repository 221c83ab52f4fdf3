"""The values that may leave a site, by phase: which keys, of which type, and words from which lists.

`suppressed` may stand in the place of any count or figure: what is told of too few patients (site.yaml: cells).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from chexfound.contract.limits import STRICT, Limits
from chexfound.errors import REFUSALS
from chexfound.secagg import messages
from chexfound.secagg.messages import Advert, Digest, Opened, Packet, Signature, Word

_strict = dataclass(frozen=True, kw_only=True, config=STRICT)
Suppressed = Literal["suppressed"]
Number = Annotated[int, Field(ge=0, lt=2**40)]
Told = Number | Suppressed
Share = Annotated[float, Field(ge=0, le=1)] | Suppressed | None
Interval = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)] | Suppressed | None
Finding = Annotated[str, Field(min_length=1, max_length=200)]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!_-]{1,64}$")]
_IMAGES = r"[0-9]+ held-out images?"
REASONS = (  # why a row of results lacks a figure
    "suppressed",
    "no labelled held-out image",
    rf"no (positive|negative) among the {_IMAGES}",
    "no interval: all (positives|negatives) are of one patient",
    "no interval: only [0-9]+ of [0-9]+ bootstrap draws have both classes",
)
Reason = Annotated[str, Field(pattern=f"^({'|'.join(REASONS)})$", max_length=200)]


@_strict
class Versions:
    """Name the versions of a site's programs."""

    chexfound: Version
    torch: Version
    python: Version


@_strict
class Both:
    """Training images with a finding, and without it."""

    positives: Told
    negatives: Told


@_strict
class Refusing:
    """Hold what a site says that enrols under a recipe which its policy refuses."""

    site: Word
    versions: Versions
    policy: Limits


@_strict
class Named:
    """An enrolment under secure aggregation: no count."""

    site: Word
    versions: Versions
    cells: Number
    withheld: bool
    findings: Annotated[list[Finding], Field(max_length=4096)]
    policy: Limits = None  # type: ignore[assignment]


@_strict
class Counted:
    """An enrolment in the clear."""

    site: Word
    versions: Versions
    cells: Number
    withheld: bool
    images: Told
    patients: Told
    train: Told
    val: Told
    test: Told
    findings: Annotated[dict[Finding, Both], Field(max_length=4096)]
    store_hmac: Digest
    policy: Limits = None  # type: ignore[assignment]


@_strict
class Step:
    """A row of a pretraining's history; the last four, of a batch without masks or of a probe, may be absent."""

    step: Number
    loss: float
    dino: float
    log_k: float
    teacher_entropy: float
    prototype_perplexity: float
    prototype_usage: float
    feature_std: float
    koleo: float = 0.0
    ibot: float = 0.0
    probe_images: Told = 0
    rankme: float | Suppressed = 0.0
    knn_auroc: float | Suppressed = 0.0


@_strict
class Pretrained:
    """A round of pretraining."""

    images: Told
    state: Literal["travels", "kept", "fresh"]
    history: list[Step]


@_strict
class HeadStep:
    """A row of a head's history."""

    step: Number
    loss: float


@_strict
class Adapted:
    """A round of the head."""

    images: Told
    labelled: list[Told]
    history: list[HeadStep]


@_strict
class DeclaredResult:
    """A row of results."""

    arm: Literal["federated"]
    trained_on: Literal["all sites, federated"]
    tested_on: Word
    finding: Finding
    n: Told
    positives: Told
    auroc: Share
    auroc_ci: Interval
    auprc: Share
    auprc_ci: Interval
    reason: Reason | None


@_strict
class Evaluated:
    """The figures of one site."""

    results: list[DeclaredResult]


# -- the stages of secure aggregation, and of arrays apart from their message


@_strict
class Advertised:
    """Keys, and which findings are labelled."""

    advert: Advert


@_strict
class Shared:
    """Sealed shares."""

    context: Digest
    packets: Annotated[list[Packet], Field(max_length=128)]


@_strict
class Masked:
    """Hold a site's word for its masked arrays: the context, their SHA-256, and its signature."""

    context: Digest
    payload: Digest
    signature: Signature


@_strict
class Signed:
    """A signature over the survivors."""

    signature: Signature


@_strict
class Unmasked:
    """One share of each dealer."""

    shares: dict[Word, Opened]


@_strict
class Blaming:
    """A refusal that names the dealers of wrong shares."""

    refused: Word
    dealers: Annotated[list[Word], Field(max_length=128)]


@_strict
class Delivered:
    """Hold how many bytes of a delivery are at the site."""

    size: Annotated[int, Field(ge=0, le=2**40)]


@_strict
class Nothing:
    """No value."""


KINDS: dict[str, tuple[type[Any], ...]] = {
    "enrol": (Counted, Named, Refusing),
    "pretrain": (Pretrained,),
    "features": (Nothing,),
    "adapt": (Adapted,),
    "evaluate": (Evaluated,),
    "advertise": (Advertised,),
    "share": (Shared,),
    "masked": (Masked, Blaming),
    "consistency": (Signed,),
    "unmask": (Unmasked, Blaming),
    "deliver": (Delivered,),
    "collect": (Nothing,),
}


def read(phase: str, values: dict[str, Any]) -> Any:
    """A reply's values as what may leave in this phase, chosen by their keys.

    Raises: ProtocolError for anything else.
    """
    kinds = KINDS[phase]
    fitting = [kind for kind in kinds if set(values) <= set(kind.__dataclass_fields__)]
    # Of several the one with the fewest other keys: what is told under masks is no part of what is told in the clear.
    kind = min(fitting or kinds[:1], key=lambda one: len(set(one.__dataclass_fields__) - set(values)))
    return messages.parse(kind, values, f"{phase}: the reply's values")


def strangers(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names that are not of a list."""
    return sorted(set(names) - set(known))


def refusal(code: str) -> bool:
    """Whether a word is one that a site refuses with."""
    return code in REFUSALS
