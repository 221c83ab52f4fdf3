"""Weights in words: what `import`, `show` and the card say of each part."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from chexfound.model.weights.architecture import Backbone, Glori, Linear, Projection
from chexfound.model.weights.in_parts import Part, Weights
from chexfound.recipe.schema import Input

HINTS = {
    "heads": "--heads",
    "input": "--mean, --std",
    "glori_heads": "--glori-heads",
    "n_last_blocks": "--n-last-blocks",
    "findings": "--findings",
}
NORMS = {"none": "", "image": ", tokens standardised image by image", "learned": ", tokens by a learned gain and shift"}


def size(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors and parameters a part has."""
    counted = [tensor.numel() for tensor in tensors.values() if tensor.numel()]
    return {"tensors": len(counted), "parameters": sum(counted)}


def part(found: Part) -> str:
    """A part's architecture in a line."""
    config = found.config
    if isinstance(config, Backbone):
        return backbone(config)
    if isinstance(config, Projection):
        widths = "-".join(str(width) for width in config.widths)
        return f"{widths}, {config.n_prototypes:,} prototypes" + (", centred" if config.centered else "")
    return head(config)


def backbone(config: Backbone) -> str:
    """A backbone's architecture."""
    channels = "1 channel" if config.in_chans == 1 else f"{config.in_chans} channels"
    return (
        f"{config.arch or 'a vision transformer'}: width {config.dim}, depth {config.depth}, heads {config.heads}, "
        f"patch {config.patch_size}, {channels}, {config.registers} registers, {config.ffn} (hidden {config.ffn_dim}), "
        f"{'LayerScale' if config.layerscale else 'no LayerScale'}, positions {config.grid} × {config.grid} "
        f"({config.position_px} px)" + (", conv stem" if config.stem == "conv" else "")
    )


def head(config: Glori | Linear) -> str:
    """A head's architecture."""
    taken = f"the last {config.n_blocks} blocks of width {config.dim}"
    plural = "finding" if config.n_findings == 1 else "findings"
    if isinstance(config, Linear):
        extra = _extras(stats=config.stats, grid=config.grid, avgpool=config.avgpool) + NORMS[config.token_norm]
        return f"linear: {config.n_findings} {plural} from the CLS of {taken}{extra}"
    extra = _extras(cls=config.cls, stats=config.stats, grid=config.grid, positions=config.positions)
    extra += NORMS[config.token_norm]
    return (
        f"GLoRI: {config.n_findings} {plural}, width {config.embed_dim}, {config.heads} attention heads, "
        f"FFN {config.ffn_dim}, on the patches of {taken}{extra}"
    )


def _extras(**values: Any) -> str:
    words = {
        "cls": "their CLS",
        "stats": "mean, deviation and maximum",
        "avgpool": "the last one's mean patch token",
    }
    said = [words[name] for name, value in values.items() if name in words and value]
    if values.get("grid"):
        said.append(f"{values['grid']} × {values['grid']} cells")
    text = f", with {', '.join(said)}" if said else ""
    return text + (f", {values['positions']} positions" if values.get("positions") else "")


def normalization(config: Input) -> str:
    """Give what the model does to a uint8 image."""
    if config.normalization == "zscore":
        return "zscore: each image by its own mean and deviation, (x − mean) / (deviation + 1), x of 0 … 255"
    return f"mean_std: (x / 255 − {_numbers(config.mean)}) / {_numbers(config.std)}"


def _numbers(value: float | tuple[float, ...]) -> str:
    return f"{value:g}" if isinstance(value, float) else f"({', '.join(f'{one:g}' for one in value)})"


def lines(weights: Weights, hints: bool = True) -> list[str]:
    """Give what each part is, and what is beside them, for a terminal.

    Args:
        weights: of any source.
        hints: name the option that says what was assumed.
    """
    result: list[tuple[str, str]] = []
    for name, found in weights.parts.items():
        counted = size(found.tensors)
        result += [
            (name, part(found)),
            ("", f"{counted['tensors']} tensors, {counted['parameters']:,} parameters; 0 missing, 0 unexpected"),
        ]
    if weights.findings:
        result.append(("findings", ", ".join(weights.findings)))
    if weights.input is not None:
        result.append(("input", f"{normalization(weights.input)}; {weights.image_px} px"))
    for name, what in weights.assumed.items():
        hint = f"; the file does not say: {HINTS[name]}" if hints and name in HINTS else ""
        result.append(("assumed", what + hint))
    result += [("left out", f"{name}: {why}") for name, why in weights.left_out.items()]
    return table(result)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of label and text as lines of a terminal; a label that stands above is not repeated."""
    result, before = [], ""
    for label, text in rows:
        first, *rest = textwrap.wrap(text, 104, break_long_words=False, break_on_hyphens=False) or [""]
        result.append(f"  {'' if label == before else label:<10}{first}")
        result += [f"  {'':<12}{line}" for line in rest]
        before = label or before
    return result


def sources(values: Mapping[str, Any]) -> list[str]:
    """Say where weights came from, a line for each file."""
    return [_source(one) for one in values.get("files") or [values]]


def _source(values: Mapping[str, Any]) -> str:
    if "run" in values:
        whose = f", its {values['whose']}'s" if values.get("whose") else ""
        return f"run {values['run']!r}{whose}, weights {values['weights_sha256'][:16]}…"
    said = ", ".join(f"{key} {value}" for key, value in (values.get("says") or {}).items())
    converted = [dtype for dtype in values.get("dtypes", []) if dtype not in ("float32", "int64")]
    return (
        f"{values.get('file')} (SHA-256 {str(values.get('sha256'))[:16]}…)"
        + (f", the {values['whose']}'s" if values.get("whose") else "")
        + (f", head {values['classifier']!r}" if values.get("classifier") else "")
        + (f"; it says {said}" if said else "")
        + (f"; {', '.join(converted)} there, float32 here" if converted else "")
    )
