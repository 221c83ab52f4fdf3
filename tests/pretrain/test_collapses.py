"""Collapses brought about here, each by what is known to bring it about: trained, watched, called by its name.

A model of 24 channels on drawn pictures.  The honest run differs from the others in nothing else than what they name.
"""

from __future__ import annotations

import numpy as np
import pytest

from chexfound.pretrain.health.probe import Probe
from chexfound.pretrain.health.symptoms import GRACE, WINDOW, symptoms
from chexfound.pretrain.train import Pretrainer

STEPS, BATCH, WIDTH = GRACE + WINDOW, 16, 24


def drawn(count: int) -> np.ndarray:
    """Pictures of three soft spots each on a noisy grey, uint8 (count, 32, 32)."""
    lots = np.random.default_rng(0)
    y, x = np.mgrid[0:32, 0:32]
    pictures = lots.normal(90, 10, (count, 32, 32))
    for picture in pictures:
        for _ in range(3):
            row, column, radius = lots.uniform(4, 28), lots.uniform(4, 28), lots.uniform(2, 7)
            spot = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * radius**2))
            picture += lots.uniform(-90, 130) * spot
    return pictures.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "symptom"),
    [
        pytest.param({}, None, id="honest"),
        pytest.param(  # centering without sharpening (Caron et al. 2021, 5.3)
            {"train__centering": "centering", "teacher__teacher_temp": 5.0, "teacher__warmup_teacher_temp": 5.0},
            "uniform-teacher",
            id="uniform",
        ),
        pytest.param(  # a sharp teacher that follows the student faster than centering can
            {
                "train__centering": "centering",
                "teacher__teacher_temp": 0.02,
                "teacher__momentum_teacher": 0.5,
                "dino__head_centered": False,
                "dino__koleo_loss_weight": 0.0,
                "ibot__loss_weight": 0.0,
            },
            "one-prototype",
            id="one prototype",
        ),
        pytest.param(  # a huge rate, and nothing that holds images apart
            {
                "optim__lr": 0.1,
                "dino__head_centered": False,
                "dino__koleo_loss_weight": 0.0,
                "ibot__loss_weight": 0.0,
            },
            "constant-features",
            id="constant",
        ),
    ],
)
def test_a_collapse_that_is_trained_is_called_by_its_name(small, change, symptom):
    recipe, pictures = small(train__rounds=STEPS // 5, train__local_steps=5, **change), drawn(60)
    patients = [str(number) for number in range(len(pictures))]
    unlabelled = np.full((len(pictures), 1), -1, np.int8)
    probe = Probe(lambda places: pictures[places], unlabelled, patients, every=20, limit=60, seed=0, roster_index=0)
    trainer = Pretrainer(recipe, lambda places: pictures[places], len(pictures), 0)
    rows = trainer.run(0, STEPS, BATCH, None, probe)
    found = [one.name for one in symptoms(rows, dim=WIDTH)]
    assert (found or [None])[0] == symptom  # what may come with it (few dimensions) comes after it
