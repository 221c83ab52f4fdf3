"""From layers to one radiograph: what is left of the beam behind the chest.

Beer and Lambert: the logarithm of what the beam loses is the sum over its path of attenuation times
thickness.  Coefficients are those of a 120 kV chest exposure, rounded, in 1/cm.
"""

from __future__ import annotations

import numpy as np

from chexfound.data.phantom import anatomy, findings, skeleton
from chexfound.data.phantom.canvas import Plane
from chexfound.data.phantom.cases import Case
from chexfound.data.phantom.frame import Frame

SOFT, LUNG, BONE = 0.185, 0.045, 0.42


def attenuation(case: Case) -> Plane:
    """The line integral of attenuation of one chest: float32, (SIDE, SIDE), 0 beside the body."""
    frame = Frame(case)
    vessels, bronchi = anatomy.vessels(frame)
    heart = anatomy.mediastinum(frame)
    layers = findings.Layers(
        filled=np.zeros_like(heart),
        density=np.ones_like(heart),
        vessels=vessels,
        bronchi=bronchi,
        show=np.zeros_like(heart),
        extra=np.zeros_like(heart),
    )
    for finding in case.findings:
        findings.add(frame, layers, finding)
    air = np.maximum(anatomy.lungs(frame) - heart, 0) * (1 - layers.filled)
    share = np.clip(air / 5.5, 0, 1)
    aerated = air * (1 - LUNG / SOFT * layers.density * (1 + 0.10 * anatomy.grain(frame)))
    soft = anatomy.torso(frame)
    inside = soft > 0
    soft = soft - aerated - anatomy.airways(frame) - anatomy.stomach(frame)
    soft = soft + 0.25 * anatomy.aorta(frame) * (share > 0)
    soft = soft + 1.9 * layers.vessels * share - 1.1 * layers.bronchi * layers.show
    total = SOFT * np.maximum(soft, 0) + BONE * skeleton.bones(frame) * inside + layers.extra * inside
    return np.asarray(total, np.float32)
