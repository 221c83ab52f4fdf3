"""The site.yaml that `enrol` writes: every field as a comment, with its default, and what it is for.

Without the `#` before it a line is in force; the others follow the release.
"""

from __future__ import annotations

import re
from pathlib import Path

from chexfound.durable.files import replace_file

TEXT = """\
# What this site demands, whatever a coordinator asks; docs/site.md has a paragraph on each field.
# Each line below is the default. To change one, take away the '#' before it (and before the section that it is in) and
# write another value. The file is read at each request: no restart is needed. Look at it with: chexfound-client check

# What the site takes part in, and what of a model may leave it, in the clear or under masks.
#phases: [pretrain, adapt, evaluate]
#tensors: [student, teacher, head, optimizer]

# What a recipe's model may be: a wide patch, or a LayerScale of 1, would make of it a camera.
#model:
#  min_patch_px: 14
#  max_patch_px: 16
#  min_tokens: 49  # patches of an image that features are of
#  min_crop_tokens: 9  # patches of a crop in pretraining
#  max_layerscale: 0.1
#  max_registers: 8
#  min_image_px: 64
#  max_image_px: 1024
#  normalizations: [zscore, grey, imagenet]
#  max_lr: 0.002  # of pretraining, multipliers included
#  max_adapt_lr: 0.004
#  max_clip_grad: 3  # a recipe that clips no gradient asks for more than any number

# How few patients, images and steps nothing is told of, and how much work a run may ask for.
#min_patients: 20  # with a training image; for a head, with a label
#min_images: 20
#min_batch: 4  # images a step
#max_batch: 4096  # images a step
#min_steps: 2  # of a round
#max_steps: 10000  # of a round
#max_rounds: 10000  # of a phase
#max_runs: 5  # begun in 30 days; a run that is resumed counts again
#min_bootstrap: 200  # draws of a figure's interval
#max_missed_rounds: 3  # that may pass without this site

# What a run may take of the machine; null: no more than it has.
#machine:
#  hours: null  # of work on one run
#  disk_gb: null
#  memory_gb: null

# Below so many patients a count, a figure or a row is told as 'suppressed'.
#cells:
#  patients: 10

# Shares of the patients; the rest is for the test. A recipe has no say in it.
#split:
#  train: 0.6
#  val: 0.15

# Names of findings that may leave beside the released vocabulary.
#findings: []

# How far the coordinator's weights may move in a round, over this site's own steps, before it is said, or refused.
#weights:
#  max_change: 1.1
#  max_tensor_change: 3  # in one tensor
#  refuse_change: false

# Secure aggregation. required: null is true where the federation has three sites or more.
#secagg:
#  required: null
#  colluders: null  # sites that may collude with the coordinator; null: a quarter
#  minimum: 3  # sites that a sum must be over
#  attempt_s: 86400  # after which an attempt's secrets are dropped

# Write 'accepted' to take runs in the clear though the federation has three sites or more. secagg.required, where it is
# true or false, wins over it.
#plain: null
"""


def uncommented(text: str = TEXT) -> str:
    """The file with every line in force."""
    return re.sub(r"(?m)^#(?! )(?=\S)|^#(?=  \S)", "", text)


def write(home: Path) -> Path | None:
    """Write HOME/site.yaml, for its owner alone; one that is there is left as it is, and None comes back."""
    path = home / "site.yaml"
    if path.exists():
        return None
    with replace_file(path, 0o600) as temporary:
        temporary.write_text(TEXT, encoding="utf-8")
    return path
