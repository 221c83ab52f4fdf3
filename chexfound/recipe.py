"""A run, as a recipe: frozen dataclasses, read from YAML, sent over the wire as one JSON string.

Keys of the SSL step are named as in DINOv2's `ssl_default_config.yaml`.  Defaults live here and
nowhere else; a preset (`chexfound/presets/NAME.yaml`) or a file of one's own overrides them.  What
DINOv2 counts in epochs is counted in epochs of `train.OFFICIAL_EPOCH_LENGTH` global steps, since a
site's own passes over its images differ from site to site.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from chexfound import strict_yaml
from chexfound.errors import ConfigError, Problems
from chexfound.strict_yaml import shown

_frozen = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

LARGEST_IMAGE_PX = 4096  # as radiographs come; 64 of them are in memory while a store is filled
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
# Upper bounds are far above any model or run that is known; they keep a slip of the finger from taking a
# machine's whole memory, or from ending in a library's crash hours later.
Side = Annotated[int, Field(gt=0, le=LARGEST_IMAGE_PX)]
Width = Annotated[int, Field(gt=0, le=65_536)]  # of a layer
Prototypes = Annotated[int, Field(gt=0, le=1_000_000)]
Layers = Annotated[int, Field(gt=0, le=64)]
Steps = Annotated[int, Field(gt=0, le=10_000_000)]
Images = Annotated[int, Field(gt=0, le=1_000_000)]  # of a batch
Epochs = Annotated[float, Field(ge=0, le=10_000_000)]
Seconds = Annotated[float, Field(gt=0, le=100_000_000)]  # three years
Moment = Annotated[float, Field(ge=0, lt=1)]  # Adam's decay rates
Name = Annotated[str, Field(min_length=1, max_length=200)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Fraction, Fraction]

ARCHS = {  # width, depth, heads
    "vit_demo": (96, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}


@_frozen
class Input:
    """What the model does to a uint8 image before its stem; travels with the weights."""

    normalization: Literal["zscore", "mean_std"] = "zscore"  # zscore: each image by its own mean and deviation
    mean: Fraction = 0.5  # of pixels scaled to [0, 1]; for mean_std
    std: Rate = 0.25


@_frozen
class Student:
    """The backbone."""

    arch: Literal["vit_demo", "vit_tiny", "vit_small", "vit_base", "vit_large"] = "vit_demo"
    stem: Literal["linear", "conv"] = "conv"
    patch_size: Annotated[int, Field(gt=0, le=1024)] = 16
    in_chans: Literal[1, 3] = 1
    num_register_tokens: Annotated[int, Field(ge=0, le=1024)] = 4
    ffn_layer: Literal["mlp", "swiglu"] = "swiglu"
    layerscale: Weight = 0.1
    init: Literal["xavier", "trunc_normal"] = "xavier"  # of linear layers; trunc_normal: 0.02, as DINOv2
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0


@_frozen
class Dino:
    """DINO on the CLS tokens (Caron et al. 2021), and KoLeo (Sablayrolles et al. 2019)."""

    loss_weight: Weight = 1.0
    head_n_prototypes: Prototypes = 256
    head_bottleneck_dim: Width = 64
    head_nlayers: Layers = 3
    head_hidden_dim: Width = 256
    head_centered: bool = (
        True  # subtract the batch's mean in the bottleneck: keeps a homogeneous batch off the log K plateau
    )
    koleo_loss_weight: Weight = 0.1


@_frozen
class Ibot:
    """iBOT on masked patch tokens (Zhou et al. 2022), with a head of its own."""

    loss_weight: Weight = 1.0
    mask_sample_probability: Fraction = 0.5
    mask_ratio_min_max: Range = (0.1, 0.5)
    head_n_prototypes: Prototypes = 256
    head_bottleneck_dim: Width = 64
    head_nlayers: Layers = 3
    head_hidden_dim: Width = 256
    head_centered: bool = True


@_frozen
class Train:
    """Work: rounds of local steps, and how many images each takes."""

    rounds: Steps = 5
    local_steps: Steps = 20
    batch_size: Images | None = None  # images a step at each site …
    pooled_batch_size: Images | None = 32  # … or over all sites together; the centralized arm takes the pooled number
    OFFICIAL_EPOCH_LENGTH: Steps = 10
    centering: Literal["sinkhorn_knopp", "centering"] = "sinkhorn_knopp"
    optimizer_state: Literal["average", "local"] = "average"  # Adam's moments: averaged as the weights, or a site's own

    @property
    def total_steps(self) -> int:
        """Global steps of the phase."""
        return self.rounds * self.local_steps


@_frozen
class Teacher:
    """The EMA teacher, and whether it travels."""

    policy: Literal["average", "local"] = "average"
    momentum_teacher: Fraction = 0.95
    final_momentum_teacher: Fraction = 1.0
    warmup_teacher_temp: Rate = 0.02
    teacher_temp: Rate = 0.04
    warmup_teacher_temp_epochs: Epochs = 3


@_frozen
class Optim:
    """The optimizer of pretraining; its moments stay at the site."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 2e-3
    min_lr: Weight = 1e-6
    warmup_epochs: Epochs = 1
    weight_decay: Weight = 0.04
    weight_decay_end: Weight = 0.04
    adamw_beta1: Moment = 0.9
    adamw_beta2: Moment = 0.99
    clip_grad: Weight = 3.0  # per submodule; 0: none
    freeze_last_layer_epochs: Epochs = 0
    patch_embed_lr_mult: Weight = 1.0
    layerwise_decay: Annotated[float, Field(gt=0, le=1)] = 1.0


@_frozen
class Crops:
    """Multi-crop and photometry, on grey uint8."""

    global_crops_size: Side = 96
    global_crops_scale: Range = (0.7, 1.0)
    local_crops_number: Annotated[int, Field(ge=0, le=256)] = 2
    local_crops_size: Side = 48
    local_crops_scale: Range = (0.3, 0.7)
    horizontal_flip: Fraction = 0.5
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 5.0
    jitter: Annotated[float, Field(ge=0, le=5)] = (
        0.1  # log gamma is uniform in ± 2 · jitter; brightness and contrast fall to the z-score
    )
    blur: Fraction = 0.0


@_frozen
class Adapt:
    """A head on the frozen backbone."""

    head: Literal["glori", "linear"] = "glori"
    findings: tuple[Name, ...] | None = None  # None: all with min_positives and min_negatives at the sites together
    min_positives: Positive = 20
    rounds: Steps = 5
    local_steps: Steps = 40
    batch_size: Images | None = None
    pooled_batch_size: Images | None = 64
    optimizer_state: Literal["average", "local"] = "average"
    n_last_blocks: Layers = 2
    views: Annotated[int, Field(ge=0, le=1000)] = 3  # augmented views cached beside the image itself
    lr: Rate = 4e-3
    weight_decay: Weight = 0.05
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 20
    clip_grad: Weight = 3.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    glori_dim: Width = 96
    glori_heads: Annotated[int, Field(gt=0, le=1024)] = 4
    glori_ffn_dim: Annotated[int, Field(gt=0, le=262_144)] = 192
    glori_cls: bool = True  # concatenate the CLS tokens of the last blocks
    glori_stats: bool = True  # concatenate mean, deviation and maximum over the patch tokens
    glori_grid: Annotated[int, Field(ge=0, le=256)] = (
        4  # concatenate the mean of each of so many by so many cells of the image; 0: none
    )
    glori_positions: bool = True  # add position embeddings to the memory

    @property
    def total_steps(self) -> int:
        """Global steps of the phase."""
        return self.rounds * self.local_steps


@_frozen
class Evaluate:
    """How a model is judged, on the patients held out."""

    bootstrap_samples: Annotated[int, Field(gt=0, le=1_000_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


@_frozen
class Split:
    """Fractions of the patients; the rest is for the test."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.6
    val: Annotated[float, Field(ge=0, lt=1)] = 0.15


@_frozen
class Federation:
    """Who takes part, and how long the coordinator waits."""

    min_sites: Positive = 2
    wait_s: Seconds = 600.0  # for min_sites to connect
    round_timeout_s: Seconds = 3600.0  # for a round's replies


@_frozen
class Recipe:
    """A run. `phases` says which are done; each has its section."""

    name: Annotated[str, Field(max_length=200)] = "demo"
    seed: Annotated[int, Field(ge=0, le=2**128)] = 0
    threads: Annotated[int, Field(gt=0, le=1024)] = 1  # of each process; another number gives other bits
    image_px: Side = 128  # side of the store's images, and of the input at evaluation
    phases: tuple[Literal["pretrain", "adapt", "evaluate"], ...] = ("pretrain", "adapt", "evaluate")
    aggregation: Literal["fedavg"] = "fedavg"
    codec: Literal["none"] = "none"
    federation: Federation = Federation()
    split: Split = Split()
    input: Input = Input()
    student: Student = Student()
    dino: Dino = Dino()
    ibot: Ibot = Ibot()
    train: Train = Train()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    crops: Crops = Crops()
    adapt: Adapt = Adapt()
    evaluate: Evaluate = Evaluate()


_adapter = TypeAdapter(Recipe)
Section = TypeVar("Section")


def changed(section: Section, **values: Any) -> Section:
    """A recipe, or a section of one, with other values (not checked again)."""
    return dataclasses.replace(section, **values)  # type: ignore[type-var]


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("chexfound").joinpath("presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def about(preset: str) -> str:
    """What a preset is for: the first line of its file."""
    return _read(preset)[0].partition("\n")[0].removeprefix("# ")


def load(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a preset by name, or a YAML file by path, and apply overrides such as {"train.rounds": 3}.

    Raises: ConfigError naming every problem at once, with a suggestion for an unknown key.
    """
    text, where = _read(str(name_or_path))
    try:
        values = strict_yaml.load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of keys, not {type(values).__name__}")
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    return validate(values, where)


def _read(name: str) -> tuple[str, str]:
    if name in presets():
        return resources.files("chexfound").joinpath("presets", f"{name}.yaml").read_text(), f"preset {name!r}"
    path = Path(name)
    try:
        there = path.is_file()
    except OSError as error:  # too long, say
        raise ConfigError(f"recipe {shown(name)}: cannot be read: {error.strerror}") from error
    if not there:
        near = difflib.get_close_matches(name, presets(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no recipe {shown(name)}: {hint}give a YAML file, or one of the presets {', '.join(presets())}"
        )
    try:
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Turn `--set train.rounds=3` options into a mapping (values are YAML)."""
    result = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {shown(pair)}: write KEY=VALUE, for example --set train.rounds=3")
        try:
            result[key.strip()] = strict_yaml.load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
            why = getattr(error, "problem", None)
            raise ConfigError(
                f"--set {shown(pair)}: the value is not valid YAML" + (f": {why}" if why else "")
            ) from error
    return result


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key[:80]}: {shown(parent)} holds a value, not a section")
        values = child
    values[leaf] = value


def validate(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a Recipe from plain values; everything that is wrong is told in one ConfigError."""
    problems = Problems(ConfigError, where)
    try:
        recipe = _adapter.validate_python(values)
    except ValidationError as error:
        for entry in error.errors():
            problems.add(_explain(entry))
        problems.check()
        raise
    for problem in _inconsistencies(recipe):
        problems.add(problem)
    problems.check()
    return recipe


def _explain(entry: Any) -> str:
    path = [str(part) for part in entry["loc"]]
    key = ".".join(path)[:80]
    if entry["type"] == "unexpected_keyword_argument":
        section: Any = Recipe
        for part in path[:-1]:
            section = {field.name: field.default for field in dataclasses.fields(section)}[part].__class__
        near = difflib.get_close_matches(path[-1], [field.name for field in dataclasses.fields(section)], n=1)
        return f"unknown key {key!r}" + (f"; did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else "")
    return f"{key}: {entry['msg'][0].lower()}{entry['msg'][1:]} (got {shown(entry['input'])})"


def _inconsistencies(recipe: Recipe) -> list[str]:
    found = []
    for name, phase in (("train", recipe.train), ("adapt", recipe.adapt)):
        if (phase.batch_size is None) == (phase.pooled_batch_size is None):
            found.append(
                f"{name}: give either batch_size (a site's) or pooled_batch_size (all sites together), "
                "and set the other to null"
            )
    for key, low_high in (
        ("crops.global_crops_scale", recipe.crops.global_crops_scale),
        ("crops.local_crops_scale", recipe.crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", recipe.ibot.mask_ratio_min_max),
    ):
        if low_high[0] > low_high[1]:
            found.append(f"{key}: the first number must not be above the second (got {list(low_high)})")
    for key, size in (
        ("image_px", recipe.image_px),
        ("crops.global_crops_size", recipe.crops.global_crops_size),
        ("crops.local_crops_size", recipe.crops.local_crops_size),
    ):
        if size % recipe.student.patch_size:
            found.append(f"{key}: must be a multiple of student.patch_size {recipe.student.patch_size} (got {size})")
    if recipe.student.stem == "conv" and recipe.student.patch_size != 16:
        found.append(
            f"student.patch_size: the conv stem halves four times, so it must be 16 (got {recipe.student.patch_size})"
        )
    if recipe.split.train + recipe.split.val >= 1:
        found.append("split: train + val must leave patients for the test (their sum must be below 1)")
    if not recipe.phases:
        found.append("phases: name at least one of pretrain, adapt, evaluate")
    if "evaluate" in recipe.phases and "adapt" not in recipe.phases:
        found.append("phases: evaluate judges the head, so it needs adapt (leave evaluate out, or add adapt)")
    if recipe.adapt.n_last_blocks > (depth := ARCHS[recipe.student.arch][1]):
        found.append(
            f"adapt.n_last_blocks: {recipe.student.arch} has {depth} blocks (got {recipe.adapt.n_last_blocks})"
        )
    if recipe.adapt.glori_dim % recipe.adapt.glori_heads:
        found.append(
            f"adapt.glori_dim: must be a multiple of adapt.glori_heads "
            f"(got {recipe.adapt.glori_dim} and {recipe.adapt.glori_heads})"
        )
    if recipe.adapt.findings == ():
        found.append("adapt.findings: name at least one, or set it to null for all that are frequent enough")
    if len(set(recipe.adapt.findings or ())) != len(recipe.adapt.findings or ()):
        found.append("adapt.findings: a finding is named twice")
    return found


def site_batch_size(phase: Train | Adapt, n_sites: int, section: str) -> int:
    """Images that one of `n_sites` sites takes a step.

    Raises: ConfigError if the pooled batch cannot be divided equally.
    """
    if phase.batch_size is not None:
        return phase.batch_size
    assert phase.pooled_batch_size is not None
    if phase.pooled_batch_size % n_sites:
        near = -(-phase.pooled_batch_size // n_sites) * n_sites
        raise ConfigError(
            f"{section}.pooled_batch_size {phase.pooled_batch_size} cannot be divided equally among {n_sites} sites; "
            f"choose a multiple of {n_sites}: --set {section}.pooled_batch_size={near}"
        )
    return phase.pooled_batch_size // n_sites


def pooled_batch_size(phase: Train | Adapt, n_sites: int) -> int:
    """Images that the centralized arm takes a step: those of `n_sites` sites together."""
    return phase.pooled_batch_size if phase.pooled_batch_size is not None else phase.batch_size * n_sites  # type: ignore[operator]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML and JSON have them."""
    values: dict[str, Any] = _adapter.dump_python(recipe, mode="json")
    return values


def to_json(recipe: Recipe) -> str:
    """The one string that travels as run-config key `recipe`."""
    return json.dumps(to_dict(recipe), sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> Recipe:
    """The inverse of `to_json`; the text is checked like any input.

    Raises: ConfigError.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("run-config 'recipe': not valid JSON") from error
    if not isinstance(values, dict):
        raise ConfigError("run-config 'recipe': must be a JSON object")
    return validate(values, "run-config 'recipe'")


def to_run_config(recipe: Recipe) -> str:
    """The text of a TOML file for `flwr run -c FILE.toml`, which has the recipe under the key `recipe`.

    A literal string in triple quotes takes everything as it stands but quotes and control characters;
    JSON can write these as escapes, so none is left in it.
    """
    text = to_json(recipe).replace("'", "\\u0027").replace("\x7f", "\\u007f")
    return f"recipe = '''{text}'''\n"


def from_run_config(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a run, the same at the coordinator and at a site; the preset "demo" if none is given.

    Raises: ConfigError.
    """
    text = values.get("recipe") or ""
    return from_json(str(text)) if text else load("demo")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as a person reads it."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
