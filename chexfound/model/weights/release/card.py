"""The model card of a release: what it is, how to use it in a few lines, what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chexfound.contract import cells
from chexfound.contract.request import ARM as FEDERATED
from chexfound.model.weights import describe
from chexfound.model.weights.in_parts import Weights
from chexfound.model.weights.release import timm_format

FRONT = """\
---
license: other
license_name: {license}
{library}pipeline_tag: image-feature-extraction
tags: [{tags}]
---
# {title}

{about} Not a medical device; not for clinical use.

{parts}
"""

OURS = """\

## With chexfound

```python
import chexfound
import torch

backbone = chexfound.load_backbone("this folder")
images = torch.zeros(1, {px}, {px}, dtype=torch.uint8)  # grey, 0 … 255; the backbone normalises them
with torch.inference_mode():
    features = backbone.forward_features(images)
cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]  # (1, {dim}), (1, {n_patches}, {dim})
```
"""

WITH_HEAD = """\

```python
head = chexfound.load_head("this folder")
with torch.inference_mode():
    layers = backbone.get_intermediate_layers(images, head.n_blocks, return_class_token=True)
    logits = head([patches for patches, _ in layers], [cls for _, cls in layers])
probabilities = logits.sigmoid()  # (1, {n_findings}): one of each of head.findings
```
"""

HEAD_ONLY = """\

## With chexfound

```python
import chexfound

head = chexfound.load_head("this folder")  # of (patch tokens, CLS) of the backbone's last head.n_blocks blocks
```
"""

TIMM = """\

## With timm

```python
import json
from pathlib import Path

import timm
import torch

config = json.loads(Path("this folder/config.json").read_text())
weights = "this folder/model.safetensors"
model = timm.create_model(config["architecture"], **config["model_args"], checkpoint_path=weights).eval()
images = torch.zeros(1, {in_chans}, {px}, {px})
with torch.inference_mode():
    tokens = model.forward_features(images)  # (1, {n_tokens}, {dim}): CLS, registers, patches
```

From timm {local_dir} on in one line, which knows the normalisation too:

```python
model = timm.create_model("local-dir:this folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of a PIL image in RGB
```

The name of the architecture is only timm's constructor: width, depth and the rest are arguments. Both give the \
features of `chexfound.load_backbone` at {px} px; at other sizes timm resizes the positions by a rule of its own.
"""

NO_TIMM = """\

## Not with timm

timm cannot load this backbone: {why}. So there is no model.safetensors in its names here.
"""


def card(weights: Weights, timm_obstacle: str | None, files: Mapping[str, str]) -> str:
    """Markdown.

    Args:
        weights: what is released.
        timm_obstacle: why timm cannot load the backbone; None if it can.
        files: what each file of the release is.
    """
    own = weights.recipe is not None
    loads = weights.backbone is not None and timm_obstacle is None
    text = FRONT.format(
        license="as-the-images" if own else "as-the-source",
        library="library_name: timm\n" if loads else "",
        tags=f"chest-x-ray, self-supervised{', federated' if own else ''}",
        title=_title(weights),
        about=_about(weights),
        parts="\n".join(f"- **{label}**: {value}" for label, value in _parts(weights)),
    )
    text += _usage(weights, timm_obstacle)
    text += "\n## Files\n\n| file | what |\n|---|---|\n"
    text += "".join(f"| `{name}` | {what} |\n" for name, what in files.items())
    text += "\n`config.json` has the SHA-256 of each; `chexfound` checks it when it loads one.\n"
    return text + _training(weights)


def _title(weights: Weights) -> str:
    if weights.recipe is not None:
        return f"{weights.recipe.name}: {weights.summary.get('arm', 'a')} model"
    sources = weights.source.get("files") or [weights.source]
    return " and ".join(Path(str(one.get("file"))).stem for one in sources)


def _about(weights: Weights) -> str:
    if weights.recipe is not None:
        return "Weights of a run of federated CheXFound."
    return (
        f"Taken from {_files(weights)} by federated CheXFound, which changed names and no value. Who trained it, "
        "on what, and under which licence, is for its source to say."
    )


def _files(weights: Weights) -> str:
    sources = weights.source.get("files") or [weights.source]
    return " and ".join(f"`{one.get('file')}` (SHA-256 `{one.get('sha256')}`)" for one in sources)


def _parts(weights: Weights) -> list[tuple[str, str]]:
    rows = []
    for name, part in weights.parts.items():
        parameters = describe.size(part.tensors)["parameters"]
        rows.append((name, f"{describe.part(part)}; {parameters:,} parameters"))
    if weights.findings:
        rows.append(("findings", ", ".join(weights.findings)))
    if weights.input is not None:
        rows.append(("input", f"{weights.image_px} × {weights.image_px} px, {describe.normalization(weights.input)}"))
    rows += [("assumed", text) for text in weights.assumed.values()]
    return rows


def _usage(weights: Weights, timm_obstacle: str | None) -> str:
    if weights.backbone is None:
        return HEAD_ONLY
    config, px = weights.backbone.config, weights.image_px or weights.backbone.config.position_px
    n_patches = math.prod([px // config.patch_size] * 2)
    values = {
        "px": px,
        "dim": config.dim,
        "in_chans": config.in_chans,
        "n_patches": n_patches,
        "local_dir": timm_format.LOCAL_DIR,
        "n_tokens": 1 + config.registers + n_patches,
    }
    text = OURS.format(**values)
    if weights.head is not None:
        text += WITH_HEAD.format(n_findings=weights.head.config.n_findings)
    return text + (NO_TIMM.format(why=timm_obstacle) if timm_obstacle else TIMM.format(**values))


def _training(weights: Weights) -> str:
    """Sites, rounds and results of a run of ours."""
    if weights.recipe is None:
        return ""
    said = weights.summary
    lines = ["\n## Training\n"]
    if said.get("sites"):
        sites = ", ".join(
            site["site"] if site["train"] is None else f"{site['site']} ({_counted(site)})" for site in said["sites"]
        )
        sites += f" (together {_counted(said['all_sites'])})" if "all_sites" in said else ""
        lines.append(f"- **Sites**: {sites}. The images' licences bind what is done with the weights.")
    else:
        lines.append("- The images' licences bind what is done with the weights.")
    for phase, what in (("pretrain", "DINO + iBOT + KoLeo"), ("adapt", "the head, on the frozen backbone")):
        done = said.get(phase)
        lines.append(
            f"- **{phase}**: " + (f"{done['steps']} steps in {done['rounds']} rounds, {what}" if done else "none")
        )
    if weights.recipe.aggregation == "secagg" and said.get("arm") == FEDERATED:
        lines.append("- **Aggregation**: secure; no site's update, loss or count was seen, only sums over sites.")
    sha256 = weights.source["weights_sha256"]
    lines.append(f"- **Weights**: SHA-256 over names, dtypes, shapes, bytes is `{sha256}`.")
    lines.append("- All values: `recipe.yaml`. Losses, bytes, seconds, machine, versions: `training_summary.json`.")
    return "\n".join(lines) + "\n" + _results(said.get("results") or [], weights)


def _counted(site: Mapping[str, Any]) -> str:
    return f"{site['train']} training images; {site['patients']} patients"


def _results(rows: list[dict[str, Any]], weights: Weights) -> str:
    if not rows or weights.recipe is None:
        return ""
    confidence = f"{weights.recipe.evaluate.confidence:.0%}"
    table = f"\n| tested on | finding | images | positives | AUROC [{confidence} interval] |\n|---|---|---|---|---|\n"
    return table + "".join(_result_row(row) for row in rows)


def _result_row(row: Mapping[str, Any]) -> str:
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
