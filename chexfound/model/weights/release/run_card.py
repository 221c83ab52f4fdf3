"""The model card that a run leaves beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.cells import Told
from chexfound.recipe.schema import Recipe

TEMPLATE = """\
---
license: other
license_name: as-the-images
tags: [chest-x-ray, self-supervised, federated]
---
# {recipe.name}: {arm} model

A {recipe.student.arch} backbone ({parameters:,} parameters, {recipe.student.stem} stem, \
patch {recipe.student.patch_size}) and a {recipe.adapt.head} head, trained by federated CheXFound. \
Not a medical device; not for clinical use.

```python
import numpy as np
from chexfound.adapt.fit import predict
from chexfound.model import release

recipe, findings, backbone, head = release.load("this folder")
images = np.zeros((1, {recipe.image_px}, {recipe.image_px}), np.uint8)  # grey, as `chexfound ingest` makes them
probabilities = predict(backbone, head, images, recipe.adapt.n_last_blocks)  # (1, {n_findings}): one a finding
```

- **Data**: {sites} ({patients} patients). The images' licences bind what is done with the weights.
- **Pretraining**: {pretrained} (DINO + iBOT + KoLeo), teacher {recipe.teacher.policy}.
{aggregated}- **Head**: {recipe.adapt.total_steps} global steps in {recipe.adapt.rounds} rounds on the frozen backbone.
- **Input**: {recipe.image_px} × {recipe.image_px} px, grey uint8; normalisation `{recipe.input.normalization}` is \
done by the model (`config.json`).
- **Seconds** (wall): {seconds}.
- **Weights**: SHA-256 over names, dtypes, shapes, bytes is `{sha256}`.

| tested on | finding | images | positives | AUROC [{recipe.evaluate.confidence:.0%} interval] |
|---|---|---|---|---|
"""

SUMMED = """\
- **Aggregation**: secure; no site's update, loss or count was seen, only sums over sites.
"""


def card(recipe: Recipe, arm: str, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any], patients: Told) -> str:
    """Markdown: what the model is, what it was trained on (`patients` at all sites together), how to use it.

    Of `metrics`, the run's metrics.json, the arm's part is told.
    """
    steps = recipe.pretrain_steps if "pretrain" in recipe.phases else 0
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("backbone."))
    head = TEMPLATE.format(
        recipe=recipe,
        arm=arm,
        sites=", ".join(metrics["sites"]),
        patients=patients,
        n_findings=len(metrics["findings"]),
        parameters=parameters,
        pretrained=f"{steps} global steps in {recipe.pretrain_rounds} rounds" if steps else "none",
        seconds=", ".join(f"{name} {value}" for name, value in metrics["seconds"].items()),
        aggregated=SUMMED if recipe.aggregation == "secagg" and arm == "federated" else "",
        sha256=metrics["model_sha256"][arm],
    )
    return head + "".join(result_row(row) for row in metrics["results"] if row["arm"] == arm)


def result_row(row: Mapping[str, Any]) -> str:
    """A line of the table of results, of a row of metrics.json."""
    if row["n"] == cells.SUPPRESSED:
        figure = "of few patients"
    elif row["auroc"] is None:
        figure = f"– ({row['reason']})"
    else:
        figure = f"{row['auroc']:.3f}"
        if row["auroc_ci"]:
            figure += f" [{row['auroc_ci'][0]:.3f}, {row['auroc_ci'][1]:.3f}]"
    return f"| {row['tested_on']} | {row['finding']} | {row['n']} | {row['positives']} | {figure} |\n"


PRETRAINED = """\
---
license: other
license_name: as-the-images
tags: [chest-x-ray, self-supervised]
---
# {recipe.name}: pretrained backbone

A {recipe.student.arch} backbone ({parameters:,} parameters, {recipe.student.stem} stem, \
patch {recipe.student.patch_size}), the teacher of {recipe.pretrain_steps} steps of DINO + iBOT + KoLeo by federated \
CheXFound, on the images of one place. Not a medical device; not for clinical use.

```python
from chexfound.model import release

recipe, _, backbone, _ = release.load("this folder")
```

- **Data**: {images} images of {patients} patients. The images' licences bind what is done with the weights.
- **Input**: grey uint8, trained at up to {recipe.position_px} × {recipe.position_px} px; normalisation \
`{recipe.input.normalization}` is done by the model (`config.json`).
- **Weights**: SHA-256 over names, dtypes, shapes, bytes is `{sha256}`.
"""


def pretraining_card(recipe: Recipe, tensors: Mapping[str, Tensor], images: int, patients: int, sha256: str) -> str:
    """Markdown on a backbone that was pretrained on one store and has no head."""
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return PRETRAINED.format(recipe=recipe, parameters=parameters, images=images, patients=patients, sha256=sha256)
