"""The sections of a recipe, as frozen dataclasses, and the bounds of their values.

Keys of the SSL step are named as in DINOv2's `ssl_default_config.yaml`.  Defaults live here and
nowhere else.  What DINOv2 counts in epochs is counted in epochs of `train.OFFICIAL_EPOCH_LENGTH`
global steps, since a site's own passes over its images differ from site to site.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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
# How sites share a pooled batch, in whole numbers that sum to it: alike but for one image, or by their training images.
Deal = Literal["equally", "by_size"]
Epochs = Annotated[float, Field(ge=0, le=10_000_000)]
Seconds = Annotated[float, Field(gt=0, le=100_000_000)]  # three years
Moment = Annotated[float, Field(ge=0, lt=1)]  # Adam's decay rates
Name = Annotated[str, Field(min_length=1, max_length=200)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Strength = Annotated[float, Field(ge=0, le=5)]  # in log units
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Fraction, Fraction]
TokenNorm = Literal["none", "image", "learned"]

ARCHS = {  # width, depth, heads
    "vit_demo": (96, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


@_frozen
class Input:
    """Hold what the model does to a uint8 image before its stem; travels with the weights."""

    normalization: Literal["zscore", "mean_std"] = "zscore"  # zscore: each image by its own mean and deviation
    mean: Fraction | tuple[Fraction, Fraction, Fraction] = 0.5  # of pixels scaled to [0, 1]; for mean_std
    std: Rate | tuple[Rate, Rate, Rate] = 0.25


@_frozen
class Student:
    """The backbone."""

    arch: Literal["vit_demo", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"] = "vit_demo"
    stem: Literal["linear", "conv"] = "conv"
    patch_size: Annotated[int, Field(gt=0, le=1024)] = 16
    in_chans: Literal[1, 3] = 1
    num_register_tokens: Annotated[int, Field(ge=0, le=1024)] = 4
    ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = "swiglu"  # swiglufused: DINOv2's other name of swiglu
    layerscale: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    init: Literal["xavier", "trunc_normal"] = "xavier"  # of all linear layers; trunc_normal: 0.02, as DINOv2
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path_uniform: bool = True  # false: the rate rises from 0 at the first block to drop_path_rate at the last


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
    head_norm_last_layer: bool = True  # keep the prototypes' gain at 1; DINOv2 trains it (false)
    koleo_loss_weight: Weight = 0.1
    koleo_loss_distributed: bool = True  # neighbours over all GPUs of a site, not each GPU's own


@_frozen
class Ibot:
    """iBOT on masked patch tokens (Zhou et al. 2022), with a head of its own."""

    loss_weight: Weight = 1.0
    mask_sample_probability: Fraction = 0.5
    mask_ratio_min_max: Range = (0.1, 0.5)
    separate_head: Literal[True] = True
    head_n_prototypes: Prototypes = 256
    head_bottleneck_dim: Width = 64
    head_nlayers: Layers = 3
    head_hidden_dim: Width = 256
    head_centered: bool = True
    head_norm_last_layer: bool = True


@_frozen
class Train:
    """Work: rounds of local steps, and how many images each takes."""

    rounds: Steps = 5
    local_steps: Steps = 20
    batch_size: Images | None = None  # images a step at each site …
    pooled_batch_size: Images | None = 32  # … or over all sites together; the centralized arm takes the pooled number
    deal: Deal = "equally"
    OFFICIAL_EPOCH_LENGTH: Steps = 10
    centering: Literal["sinkhorn_knopp", "centering"] = "sinkhorn_knopp"
    sinkhorn_distributed: bool = True  # over all GPUs of a site, not each GPU's own batch
    sinkhorn_queue: Count = 0  # batches whose teacher logits join the present one's in Sinkhorn-Knopp
    compile: bool = False  # torch.compile the blocks: a minute first; then, on a processor in fp32, 1.1 times the speed
    checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0  # threads that prepare batches ahead; the bits do not change
    saveckp_freq: Epochs = 0  # epochs between a site's saves within a round; 0: at a round's end only
    optimizer_state: Literal["average", "local"] = "average"  # Adam's moments: averaged as the weights, or a site's own


@_frozen
class Teacher:
    """The EMA teacher, and whether it travels."""

    # average: it travels, and is averaged.  local: each site keeps its own.  rederive: every site computes it from
    # the students that it is sent, so it never travels.
    policy: Literal["average", "local", "rederive"] = "average"
    momentum_teacher: Fraction = 0.95
    final_momentum_teacher: Fraction = 1.0
    warmup_teacher_temp: Rate = 0.02
    teacher_temp: Rate = 0.04
    warmup_teacher_temp_epochs: Epochs = 3


@_frozen
class Optim:
    """The optimizer of pretraining; whether its moments travel is `train.optimizer_state`."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 2e-3
    base_lr: Rate | None = None  # with scaling_rule, in place of lr: the rate at a batch of 1024
    scaling_rule: Literal["sqrt_wrt_1024"] | None = None  # lr = base_lr · √(images a step over all sites / 1024)
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
    """Multi-crop and photometry, on grey uint8; argued in docs/decisions/0007."""

    global_crops_size: Side = 96
    global_crops_scale: Range = (0.7, 1.0)
    local_crops_number: Annotated[int, Field(ge=0, le=256)] = 2
    local_crops_size: Side = 48
    local_crops_scale: Range = (0.3, 0.7)
    horizontal_flip: Fraction = 0.5
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 5.0
    jitter: Strength = 0.1  # log gamma is uniform in ± 2 · jitter
    # How often a crop is blurred: one number, or those of the first global view, the second, and the local ones
    # (DINOv2 means 1.0, 0.1, 0.5, and does 0.0, 0.9, 0.5).
    blur: Fraction | tuple[Fraction, Fraction, Fraction] = 0.0
    # As DINOv2's colour jitter (0.4, 0.4, 0.8).  The z-score undoes them, but for what they push to black and white.
    brightness: Fraction = 0.0  # the factor is uniform in 1 ± this
    contrast: Fraction = 0.0  # likewise, about mid grey
    brightness_contrast_p: Fraction = 0.8  # how often the two are done
    solarize: Fraction = 0.0  # how often the second global view is (DINOv2: 0.2)
    # The look of a scanner, which no normalisation undoes: remedies for a site whose images all look alike.
    tone_curve: Strength = 0.0  # log slope of a random rising grey-value curve is uniform in ± this at five knots
    detail: Strength = 0.0  # log gain of what is finer than 2 pixels is uniform in ± this: soft to sharp
    noise: Fraction = 0.0  # deviation of white noise is uniform from 0 to this share of the grey range
    look_per_image: bool = False  # one look for all crops of an image, as if each came from a scanner of its own


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
    deal: Deal = "equally"
    optimizer_state: Literal["average", "local"] = "average"
    n_last_blocks: Layers = 2
    # What the head does to the tokens first: nothing, as the reference's; standardise them by the image's own; or a
    # gain and a shift that it learns.  Never by figures of other images, which would have to leave a site.
    token_norm: TokenNorm = "none"  # noqa: S105 (tokens of an image)
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
    """Fractions of the patients of a simulation; the rest is for the test.  A hospital has its own (site.yaml)."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.6
    val: Annotated[float, Field(ge=0, lt=1)] = 0.15


@_frozen
class ComputePrecision:
    """Number formats and where the weights lie.  Weights and optimizer are float32 throughout."""

    param_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the arithmetic (autocast)
    grad_scaler: bool = True  # scale the loss against underflow; fp16 only
    # Several GPUs at a site: NO_SHARD is DDP, the others FSDP2 (weights gathered once a step, or anew in the backward).
    sharding_strategy: Literal["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"] = "NO_SHARD"


@_frozen
class Health:
    """Hold what is looked at while pretraining runs."""

    eval_period_iterations: Count = 0  # steps between two kNN probes; 0: none
    probe_images: Images = 512  # training images at most, that a probe looks at


@_frozen
class Stage:
    """A further stage of the curriculum: at another resolution, from where the one before ended.

    Schedules begin anew in a stage, as they do in the reference, where each is a run of its own; not
    so the warm-up of the teacher's temperature and the freeze of the last layer.  None: as before.
    """

    rounds: Steps
    global_crops_size: Side
    local_crops_size: Side
    batch_size: Images | None = None
    pooled_batch_size: Images | None = None
    lr: Rate | None = None
    base_lr: Rate | None = None
    warmup_epochs: Epochs | None = None
    momentum_teacher: Fraction | None = None


@_frozen
class Participation:
    """Hold who takes part, and how long the coordinator waits."""

    min_sites: Positive = 2
    wait_s: Seconds = 600.0  # for min_sites to connect
    round_timeout_s: Seconds = 3600.0  # for a round's replies: its deadline
    quorum_sites: Positive | None = None  # that close a round at its deadline without the others; none: all must answer
    quorum_weight: Fraction = 0.5  # of all sites' training images, that those of the quorum must have
    part_mb: Annotated[float, Field(ge=0.001, le=1000)] = 32.0  # MB (10**6 bytes) of arrays in a message at most


@_frozen
class SecAgg:
    """Secure aggregation; how many must agree and may collude is each site's own to say (site.yaml)."""

    ring: Literal[16, 32] = 32  # bits of a value under masks; 16: half the bytes, coarser, and fewer sites
    colluders: Count | None = None  # as the sites' own: another number here than there, and they refuse
    attempts: Positive = 3  # at one sum, each with fresh keys
    stage_timeout_s: Seconds = 300.0  # for the stages without training; that has federation.round_timeout_s
    range_margin: Annotated[float, Field(ge=1, le=1e6)] = 8.0  # of a tensor's range over its last update's largest step


@_frozen
class Robust:
    """Against a site whose updates are too large."""

    clip: Rate | None = None  # an update counts up to so many times the median norm of the round before; none: any does


@_frozen
class Recipe:
    """A run. `phases` says which are done; each has its section."""

    name: Annotated[str, Field(max_length=200)] = "demo"
    seed: Annotated[int, Field(ge=0, le=2**128)] = 0
    threads: Annotated[int, Field(gt=0, le=1024)] = 1  # of each process; another number gives other bits
    image_px: Side = 128  # side of the store's images, and of the input at evaluation
    phases: tuple[Literal["pretrain", "adapt", "evaluate"], ...] = ("pretrain", "adapt", "evaluate")
    aggregation: Literal["fedavg", "secagg"] = "fedavg"  # secagg: no site's update is seen, only their sum
    codec: Literal["none"] = "none"
    federation: Participation = Participation()
    secagg: SecAgg = SecAgg()
    robust: Robust = Robust()
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
    compute_precision: ComputePrecision = ComputePrecision()
    health: Health = Health()
    curriculum: tuple[Stage, ...] = ()  # after the stage that the other sections describe

    @property
    def pretrain_rounds(self) -> int:
        """Rounds of pretraining, all stages together."""
        return self.train.rounds + sum(stage.rounds for stage in self.curriculum)

    @property
    def rounds(self) -> dict[str, int]:
        """Rounds of each phase of this run that has some."""
        numbers = {"pretrain": self.pretrain_rounds, "adapt": self.adapt.rounds}
        return {phase: number for phase, number in numbers.items() if phase in self.phases}

    @property
    def pretrain_steps(self) -> int:
        """Global steps of pretraining, all stages together."""
        return self.pretrain_rounds * self.train.local_steps

    @property
    def position_px(self) -> int:
        """Side of the images that the finished backbone's position embeddings are made for."""
        return self.curriculum[-1].global_crops_size if self.curriculum else self.crops.global_crops_size
