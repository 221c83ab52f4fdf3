"""A model in parts (backbone, DINO and iBOT head, head of findings), wherever it was read from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.weights.architecture import Backbone, Head, Projection, check, section
from chexfound.model.weights.published import classifiers, pth, tensor_names
from chexfound.model.weights.published.pth import float32
from chexfound.model.weights.published.untrusted import at
from chexfound.parsing.names import shown
from chexfound.recipe.schema import Input, Recipe

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation; CheXFound keeps them
IMAGENET_GREY = (0.449, 0.226)  # their means
LARGEST_COUNT = 1024  # heads, blocks: far above any model
ALL = ("backbone", "dino_head", "ibot_head", "head")

Triple = float | tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Hold what no shape tells, as the user says it; None: not said."""

    heads: int | None = None
    which: str = "teacher"
    classifier: str | None = None
    glori_heads: int | None = None
    n_last_blocks: int | None = None
    avgpool: bool | None = None
    findings: tuple[str, ...] = ()
    mean: Triple | None = None
    std: Triple | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError for what no model can have, whether the option will be used or not."""
        if self.which not in ("teacher", "student"):
            raise ConfigError(f"which {self.which!r}: must be 'teacher' or 'student'")
        counts = {"heads": self.heads, "glori-heads": self.glori_heads, "n-last-blocks": self.n_last_blocks}
        for name, value in counts.items():
            if value is not None and not (isinstance(value, Integral) and 1 <= value <= LARGEST_COUNT):
                raise ConfigError(f"--{name} {value!r}: must be a whole number from 1 to {LARGEST_COUNT}")
        input_config(self.mean, self.std, in_chans=3)


class Part(NamedTuple):
    """A part's architecture and its tensors, under our names."""

    config: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model in parts; those that the source lacks are None, or absent."""

    backbone: Part | None = None
    projections: dict[str, Part] = field(default_factory=dict)  # dino_head, ibot_head
    head: Part | None = None
    findings: tuple[str, ...] = ()  # their names, if they are known
    input: Input | None = None  # with a backbone
    image_px: int | None = None  # side of the images that the model is used at
    source: dict[str, Any] = field(default_factory=dict)  # plain values: where it came from
    left_out: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)  # what the source does not say, by name of the option
    recipe: Recipe | None = None  # of a run of our own
    summary: dict[str, Any] = field(default_factory=dict)  # plain values: how it was trained

    @property
    def parts(self) -> dict[str, Part]:
        """All parts by name."""
        found = {"backbone": self.backbone, **self.projections, "head": self.head}
        return {name: part for name, part in found.items() if part is not None}


def of_file(path: Path, options: ImportOptions, wanted: Collection[str] = ALL) -> Weights:
    """The wanted parts of a published checkpoint, checked: none missing, none unexpected.

    Raises: CheckpointError if it is damaged, holds code, or another architecture; ConfigError if an option is lacking.
    """
    return of_tensors(pth.read(path), options, wanted)


def of_tensors(file: pth.File, options: ImportOptions, wanted: Collection[str] = ALL) -> Weights:
    """The same of a file that was read.

    Raises: CheckpointError, ConfigError, as there.
    """
    with at(file.path):
        names = tensor_names.sort(file.tensors, options.which)
        if names.ours:
            raise CheckpointError(
                "written by a run of federated CheXFound, which keeps beside it how images are normalised and how "
                "the head is set: give the run's folder, or its model/"
            )
        result = Weights(source=_source(file, names.whose), left_out={**file.left_out, **names.left_out})
        if names.backbone and "backbone" in wanted:
            result = _with_backbone(result, float32(names.backbone), options)
        for name, tensors in names.projections.items():
            if name in wanted:
                config = Projection.of_shapes(tensors)
                result.projections[name] = checked(name, config, float32(tensors))
        if names.classifiers and "head" in wanted:
            result = _with_head(result, names.classifiers, options)
    return result


def _source(file: pth.File, whose: str | None) -> dict[str, Any]:
    return {
        "file": shown(file.path.name),
        "format": file.format,
        "sha256": file.sha256,
        "dtypes": dtypes(file),
        **({"whose": whose} if whose else {}),
        **({"says": said(file)} if said(file) else {}),
    }


def _with_backbone(weights: Weights, tensors: dict[str, Tensor], options: ImportOptions) -> Weights:
    config = Backbone.of_shapes(tensors, options.heads)
    assumed = dict(weights.assumed)
    if options.heads is None:
        how = f"as {config.arch} has" if config.arch else "width / 64"
        assumed["heads"] = f"{config.heads} attention head{'s' * (config.heads > 1)} of the backbone ({how})"
    if options.mean is None:
        assumed["input"] = "ImageNet's mean and deviation, as CheXFound has"
    given = input_config(options.mean, options.std, config.in_chans)
    return replace(
        weights,
        backbone=checked("backbone", config, tensors),
        input=given,
        image_px=config.position_px,
        assumed=assumed,
    )


def _with_head(weights: Weights, found: dict[str, dict[str, Tensor]], options: ImportOptions) -> Weights:
    name = classifiers.choose(found, options.classifier)
    config, tensors = classifiers.read(
        name,
        float32(found[name]),
        heads=options.glori_heads,
        n_last_blocks=options.n_last_blocks,
        avgpool=options.avgpool,
    )
    findings = named_findings(options.findings, config)
    assumed = dict(weights.assumed)
    if config.kind == "glori" and options.glori_heads is None:
        assumed["glori_heads"] = f"{config.heads} attention heads of GLoRI (as in the paper)"
    if options.n_last_blocks is None and classifiers.blocks_of(name) is None:
        assumed["n_last_blocks"] = f"tokens of the last {config.n_blocks} blocks (as in the paper)"
    if not findings:
        assumed["findings"] = "no names of the findings"
    others = {other: "another head; take it with --classifier" for other in found if other != name}
    return replace(
        weights,
        head=checked("head", config, tensors),
        findings=findings,
        assumed=assumed,
        left_out={**weights.left_out, **others},
        source={**weights.source, "classifier": name},
    )


def checked(name: str, config: Any, tensors: dict[str, Tensor]) -> Part:
    """A part, if its tensors are those of its architecture.

    Raises: CheckpointError naming what is missing, unexpected, of another shape or not finite.
    """
    build = (lambda: config.build(Input())) if name == "backbone" else config.build
    check(build, tensors, name)
    return Part(config, tensors)


def named_findings(given: tuple[str, ...], config: Head) -> tuple[str, ...]:
    """The names that the user gives a head's findings.

    Raises: ConfigError if they are not one for each.
    """
    if given and len(given) != config.n_findings:
        raise ConfigError(f"--findings: {len(given)} names for a head of {config.n_findings} findings")
    return tuple(given)


def input_config(mean: Triple | None, std: Triple | None, in_chans: int) -> Input:
    """Normalisation by a mean and a deviation: ImageNet's where none is said.

    Raises: ConfigError.
    """
    if (mean is None) != (std is None):
        raise ConfigError("say both --mean and --std, or neither")
    if mean is None or std is None:
        mean, std = IMAGENET if in_chans == 3 else IMAGENET_GREY
    try:
        given: Input = section(Input, dict(normalization="mean_std", mean=mean, std=std), "")
    except CheckpointError as error:
        raise ConfigError(
            f"--mean {mean}, --std {std}: must be of pixels scaled to [0, 1], deviations above 0"
        ) from error
    if in_chans == 1 and (isinstance(given.mean, tuple) or isinstance(given.std, tuple)):
        raise ConfigError("--mean, --std: this backbone takes one channel, so give one number each")
    return given


def merged(found: list[Weights]) -> Weights:
    """The parts of several files as one model.

    Raises: ConfigError if two hold the same part; CheckpointError if they do not fit each other.
    """
    result = found[0]
    for other in found[1:]:
        twice = sorted(set(result.parts) & set(other.parts))
        if twice:
            raise ConfigError(f"two of the files hold a {twice[0]}; give each part once")
        result = Weights(
            backbone=result.backbone or other.backbone,
            projections=result.projections | other.projections,
            head=result.head or other.head,
            findings=result.findings or other.findings,
            input=result.input or other.input,
            image_px=result.image_px or other.image_px,
            left_out=result.left_out | other.left_out,
            assumed=result.assumed | other.assumed,
        )
    if len(found) > 1:
        result = replace(result, source={"files": [weights.source for weights in found]})
    check_widths(result)
    return result


def check_widths(weights: Weights) -> None:
    """Every head must take the backbone's width.

    Raises: CheckpointError.
    """
    if weights.backbone is None:
        return
    for name, part in weights.parts.items():
        if part.config.dim != weights.backbone.config.dim:
            raise CheckpointError(
                f"the {name} is made for a backbone of width {part.config.dim}, this one's is "
                f"{weights.backbone.config.dim}; they are of different models (or --n-last-blocks is another)"
            )


def dtypes(file: pth.File) -> list[str]:
    """Kinds of numbers in a file."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})


def said(file: pth.File) -> dict[str, Any]:
    """Give what a file says beside its tensors."""
    pairs = file.values.items()
    return {key: value for key, value in pairs if (key, value) != ("format", "pt")}  # "pt": safetensors' own
