"""`chexfound.load_backbone` and `chexfound.load_head`: a module from a checkpoint or a folder, whatever wrote it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.glori import GLoRI
from chexfound.model.heads import LinearHead
from chexfound.model.vit import VisionTransformer
from chexfound.model.weights import in_parts
from chexfound.model.weights.architecture import attention_heads, filled
from chexfound.model.weights.in_parts import ALL, ImportOptions, Triple, Weights
from chexfound.model.weights.published.untrusted import at
from chexfound.model.weights.release import folder, of_run

KINDS = (
    "a published checkpoint (.pth or .safetensors), a folder that `chexfound weights import` or `export` wrote, "
    "or the folder of a run or its model/"
)


def read(path: Path, options: ImportOptions, wanted: Collection[str] = ALL) -> Weights:
    """The wanted parts of whatever lies at a path; an option overrules what a folder says.

    Raises: CheckpointError if it is none of the kinds that are known, damaged, or holds code.
    """
    path = Path(path)
    with at(path):
        return _folder(path, options, wanted) if path.is_dir() else in_parts.of_file(path, options, wanted)


def _folder(path: Path, options: ImportOptions, wanted: Collection[str]) -> Weights:
    if options.classifier or options.glori_heads or options.n_last_blocks or options.avgpool is not None:
        raise ConfigError(f"{path}: a folder says itself what its head is: options of a head are for a checkpoint file")
    if folder.stated(path) is not None:
        found = folder.read(path, wanted)
    elif of_run.is_run(path):
        found = of_run.read(path, wanted)
    else:
        raise CheckpointError(f"no weights that are known; give {KINDS}")
    return _told(found, options)


def _told(found: Weights, options: ImportOptions) -> Weights:
    """With what the user says in place of what the folder says."""
    if found.backbone is not None and options.heads is not None:
        config = found.backbone.config
        heads = attention_heads(config.dim, config.depth, options.heads)
        found = replace(found, backbone=found.backbone._replace(config=replace(config, heads=heads)))
    if found.backbone is not None and (options.mean is not None or options.std is not None):
        found = replace(found, input=in_parts.input_config(options.mean, options.std, found.backbone.config.in_chans))
    if found.head is not None and options.findings:
        found = replace(found, findings=in_parts.named_findings(options.findings, found.head.config))
    return found


def load_backbone(
    path: str | Path,
    heads: int | None = None,
    *,
    which: str = "teacher",
    mean: Triple | None = None,
    std: Triple | None = None,
) -> VisionTransformer:
    """See `chexfound.load_backbone`."""
    found = read(Path(path), ImportOptions(heads=heads, which=which, mean=mean, std=std), ("backbone",))
    if found.backbone is None or found.input is None:
        raise CheckpointError(f"{path}: holds no backbone, but {_named(found)}; give {KINDS}")
    part, config = found.backbone, found.input
    backbone: VisionTransformer = filled(lambda: part.config.build(config), part.tensors, f"{path}: backbone")
    return backbone


def load_head(
    path: str | Path,
    *,
    classifier: str | None = None,
    heads: int | None = None,
    n_last_blocks: int | None = None,
    avgpool: bool | None = None,
) -> GLoRI | LinearHead:
    """See `chexfound.load_head`."""
    options = ImportOptions(classifier=classifier, glori_heads=heads, n_last_blocks=n_last_blocks, avgpool=avgpool)
    found = read(Path(path), options, ("head",))
    if found.head is None:
        raise CheckpointError(f"{path}: holds no head of findings; give {KINDS} that has one")
    head: GLoRI | LinearHead = filled(found.head.config.build, found.head.tensors, f"{path}: head")
    head.findings = found.findings
    return head


def _named(found: Weights) -> str:
    return " and ".join(found.parts) or "other parts"
