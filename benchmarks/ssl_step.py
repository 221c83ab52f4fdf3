"""The SSL step against the public CheXFound's: images a second from stored images to updated weights, and equal loss.

    python benchmarks/ssl_step.py --rival DIR [--data DIR] [--json]     DIR: a checkout that runs on a CPU
    python benchmarks/ssl_step.py [--data DIR] [--json]                 against benchmarks/plain_ssl.py

ViT-S/16 with 4 registers and SwiGLU, 2 x 112 + 8 x 48 px, batch 8, one thread each.  The images are
256 px: JPEG files for the rival, which decodes them as its datasets do, and the uint8 store for us.

1. The rival exports its initial weights and its first batches.  Both train on these batches from these
   weights (drop path 0, float32; ours once more in bfloat16), and the losses are compared step by step.
2. Ours in the precision and with or without `train.compile`, whichever takes the least time here, is `ssl_step`.
   The two are timed in turns, a step each, so that both meet the same load; the figures are medians over
   the rounds.  A checkout runs in a process of its own, which waits while we work.  `ratio` is by the
   clock; `ratio_of_cpu_time` depends less on what else the machine does.

The rival is timed in float32, which is what the published code computes in on a CPU; ours in float32 and
bfloat16; `ssl_step_alone_bf16_both` has the rival under bfloat16 autocast as well.  On a processor without
bfloat16 arithmetic, where it takes many times as long, ours is float32 throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ssl_engine import clocks
from torch import Tensor

from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError, ConfigError, DataError
from chexfound.host.machine import benchmark_line, slowdown
from chexfound.model import checkpoint
from chexfound.model.weights.published.tensor_names import backbone_names
from chexfound.pretrain import schedules
from chexfound.pretrain.batches import make_batch
from chexfound.pretrain.meta_arch import Batch
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import check
from chexfound.recipe.schema import ARCHS, Recipe

PX = 256  # of the stored images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BEARABLE = 3  # times as long in bfloat16 as in float32: beyond it a step in bfloat16 is not worth the wait
TOLERANCE = 0.02  # relative difference of the loss
PHOTOMETRY = {  # DINOv2's, as far as it means something on grey
    "rotation_deg": 0.0,
    "jitter": 0.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "blur": (1.0, 0.1, 0.5),
    "solarize": 0.2,
}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless")


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    try:
        for name, values in compare(options):
            tell(name, values, options.json)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rival", type=Path, help="a checkout of the public CheXFound, made runnable on a CPU")
    parser.add_argument("--data", type=Path, help="a store of 256 px, or a folder to ingest (default: phantoms)")
    parser.add_argument("--arch", choices=sorted(ARCHS), default="vit_small")
    parser.add_argument("--px", default="112,48", help="global and local crops, pixels (default 112,48)")
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--drop-path", type=float, default=0.0, help="while timing; the paper's is 0.4")
    parser.add_argument(
        "--prototypes",
        type=int,
        default=4096,
        help="of each head (default 4096: with the paper's 131072 AdamW and EMA of the heads outweigh a batch of 8)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--loss-steps", type=int, default=6)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of ours in the line ssl_step (default: the one in which this machine's products take less time)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave train.compile alone (it needs a C++ compiler)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


Line = tuple[str, dict[str, Any]]
Turn = tuple[Callable[[], list[float]], int]  # gives the seconds of so many steps


def tell(name: str, values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(benchmark_line(name, PACKAGES, **values), flush=True)
    elif "equal" in values:
        word = "equal" if values["equal"] else "NOT equal"
        worst = values["largest_relative_difference"]
        print(f"{name:<26} {word} within {TOLERANCE:.0%}: {worst:.1e} at most over {len(values['ours'])} steps")
        for side in ("ours", "rival"):
            print(f"{'':<26} {side:<6}" + "".join(f" {loss:8.4f}" for loss in values[side]), flush=True)
    elif values.get("rival"):
        low, high = values["ratio_of_rounds"]
        print(
            f"{name:<26} ours {values['ours']:8.2f} img/s, rival {values['rival']:8.2f}: {values['ratio']:6.2f} x"
            f"  (rounds {low:.2f} to {high:.2f}; by processor time {values['ratio_of_cpu_time']:.2f})",
            flush=True,
        )
    else:
        print(f"{name:<26}", ", ".join(f"{key} {value}" for key, value in values.items()), flush=True)


# ---- the two sides


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """What both sides are given, named as in DINOv2's YAML; an epoch has two steps, so that the schedules are seen."""
    global_px, local_px = (int(part) for part in options.px.split(","))
    head = {"head_n_prototypes": options.prototypes, "head_nlayers": 3, "head_hidden_dim": 2048}
    return {
        "student": {
            "arch": options.arch,
            "patch_size": 16,
            "num_register_tokens": 4,
            "ffn_layer": "swiglufused",
            "layerscale": 1e-5,
            "drop_path_rate": 0.0,
        },
        "dino": {"loss_weight": 1.0, "koleo_loss_weight": 0.1, "head_bottleneck_dim": 384, **head},
        "ibot": {
            "loss_weight": 3.0,
            "mask_sample_probability": 0.5,
            "mask_ratio_min_max": [0.1, 0.5],
            "separate_head": True,
            "head_bottleneck_dim": 256,
            **head,
        },
        "train": {"centering": "sinkhorn_knopp", "OFFICIAL_EPOCH_LENGTH": 2},
        "teacher": {
            "momentum_teacher": 0.994,
            "final_momentum_teacher": 1.0,
            "warmup_teacher_temp": 0.04,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 3,
        },
        "optim": {
            "lr": 5e-4,
            "min_lr": 1e-6,
            "warmup_epochs": 1,
            "weight_decay": 0.04,
            "weight_decay_end": 0.2,
            "adamw_beta1": 0.9,
            "adamw_beta2": 0.999,
            "clip_grad": 3.0,
            "freeze_last_layer_epochs": 1,
            "patch_embed_lr_mult": 0.2,
            "layerwise_decay": 0.9,
        },
        "crops": {
            "global_crops_size": global_px,
            "global_crops_scale": [0.32, 1.0],
            "local_crops_number": options.local_crops,
            "local_crops_size": local_px,
            "local_crops_scale": [0.05, 0.32],
        },
    }


def our_recipe(
    config: dict[str, Any], batch: int, precision: str, drop_path: float = 0.0, *, compiled: bool = False
) -> Recipe:
    """The same as a recipe: the paper's model with RGB statistics, so that the rival's weights fit."""
    values = {section: dict(keys) for section, keys in config.items()}
    values["student"] |= {"stem": "linear", "in_chans": 3, "init": "trunc_normal", "drop_path_rate": drop_path}
    for head in ("dino", "ibot"):
        values[head] |= {"head_centered": False, "head_norm_last_layer": False}
    values["train"] |= {"rounds": 500, "local_steps": 2, "pooled_batch_size": batch, "optimizer_state": "local"}
    values["train"]["compile"] = compiled
    values["crops"] |= PHOTOMETRY
    values["input"] = {"normalization": "mean_std", "mean": list(MEAN), "std": list(STD)}
    values["compute_precision"] = {"param_dtype": precision}
    values |= {"name": "ssl_step", "image_px": PX}
    return check.validate(values, "ssl_step")


def our_weights(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Student and teacher as published, under our modules' names."""
    result = {}
    for who in ("student.", "teacher."):
        tensors = checkpoint.with_prefix(published, who)
        backbone = backbone_names(checkpoint.with_prefix(tensors, "backbone."))
        heads = {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}
        result |= checkpoint.add_prefix(heads | checkpoint.add_prefix(backbone, "backbone."), who)
    return result


@dataclass
class Images:
    """The same radiographs for both: ours in a store, the rival's in files."""

    store: Store
    ids: np.ndarray
    files: list[str]

    def pixels(self, places: np.ndarray) -> np.ndarray:
        """uint8 (n, PX, PX) of the images at these places."""
        return self.store.pixels(self.ids[places])


class Ours:
    """Our step, over our data path."""

    def __init__(self, recipe: Recipe, images: Images, weights: dict[str, Tensor], batches: list[Batch]) -> None:
        self.recipe, self.images, self.batches = recipe, images, batches
        self.batch_size = batches[0].size
        self.trainer = Pretrainer(recipe, images.pixels, len(images.ids), 0)
        model = self.trainer.model
        expected = [name for name in model.state_dict() if name.startswith(("student.", "teacher."))]
        checkpoint.load_tensors(model, our_weights(weights), expected)
        model.train()
        self.steps = 0

    def losses(self) -> list[float]:
        """As the rival's: train on the exported batches."""
        return [self._step(batch) for batch in self.batches]

    def seconds(self, what: str, steps: int) -> list[float]:
        """As the rival's: wall and processor seconds of `data`, `alone` or `whole`."""
        start = clocks()
        if what == "whole":
            self.trainer.run(self.steps, steps, self.batch_size)
            self.steps += steps
        else:
            for _ in range(steps):
                self._data() if what == "data" else self._step(self.batches[0])
        return [after - before for before, after in zip(start, clocks(), strict=True)]

    def _step(self, batch: Batch) -> float:
        loss = self.trainer.step(batch, self.steps)["loss"]
        self.steps += 1
        return loss

    def _data(self) -> Batch:
        self.steps += 1
        places = np.arange(self.steps, self.steps + self.batch_size) % len(self.images.ids)
        return make_batch(self.recipe, self.images.pixels(places), self.steps, 0)


class Remote:
    """The rival in a process of its own, asked over a pipe; the methods are those of `ssl_engine.Engine`."""

    def __init__(self, folder: Path, settings: dict[str, Any], log: Path) -> None:
        self.log = log
        environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("ssl_rival.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=log.parent,
                env=environment,
            )
        self._ask(settings)

    def _ask(self, question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self.close()
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise ConfigError(f"--rival: the checkout does not run on this machine; its last words:\n{tail}")
        return json.loads(answer)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._ask([method, *arguments])

    def close(self) -> None:
        """Let it end: it does at the end of its input."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.wait(timeout=60)


# ---- the comparison


def compare(options: argparse.Namespace) -> Iterator[Line]:
    """Losses first, then speed."""
    config = configuration(options)
    slower = slowdown(torch.bfloat16)
    options.precision = options.precision or ("fp32" if slower > 1 else "bf16")
    options.precisions = ("fp32", "bf16") if slower < BEARABLE or options.precision == "bf16" else ("fp32",)
    with tempfile.TemporaryDirectory() as scratch:
        images = open_images(options.data, Path(scratch))
        recipe = our_recipe(config, options.batch, "fp32")
        settings = _settings(config, recipe, images, options)
        rival = start(options.rival, settings, Path(scratch) / "equal.log")
        try:
            exported = Path(scratch) / "exported.safetensors"
            rival.export(str(exported), options.loss_steps)
            weights, batches = _exported(exported)
            yield from compare_losses(rival, config, images, weights, batches, options.precisions)
            if options.drop_path:
                rival.close()
                settings["config"]["student"]["drop_path_rate"] = options.drop_path
                rival = start(options.rival, settings, Path(scratch) / "timed.log")
                rival.export(str(exported), 1)
            yield from compare_speed(rival, config, images, weights, batches, options)
        finally:
            rival.close()
    if "bf16" not in options.precisions:
        yield "ssl_step_bf16", {"figure": f"not measured: products take {slower:.0f} times as long as in fp32 here"}


def _settings(config: dict[str, Any], recipe: Recipe, images: Images, options: argparse.Namespace) -> dict[str, Any]:
    theirs = {section: dict(keys) for section, keys in config.items()}
    theirs["compute_precision"] = {"grad_scaler": False}
    theirs["student"]["block_chunks"] = 0
    steps = [dataclasses.asdict(schedules.at(recipe, step)) for step in range(options.loss_steps)]
    return {"config": theirs, "files": images.files, "batch_size": options.batch, "schedules": steps, "seed": 0}


def start(folder: Path | None, settings: dict[str, Any], log: Path) -> Any:
    """The rival: a checkout's step in a process of its own, or the plain one in this process."""
    if folder is not None:
        if not (folder / "chexfound" / "train" / "ssl_meta_arch.py").is_file():
            raise ConfigError(f"--rival {folder}: no chexfound/train/ssl_meta_arch.py there; give a checkout's root")
        return Remote(folder, settings, log)
    from plain_ssl import Plain

    return Plain(settings)


def _exported(path: Path) -> tuple[dict[str, Tensor], list[Batch]]:
    tensors = checkpoint.load(path)
    batches = []
    for number in itertools.count():
        if f"batch.{number}.masks" not in tensors:
            break
        crops = (tensors.pop(f"batch.{number}.{name}") for name in ("global_crops", "local_crops", "masks"))
        batches.append(Batch(*crops))
    return tensors, batches


def compare_losses(
    rival: Any,
    config: dict[str, Any],
    images: Images,
    weights: dict[str, Tensor],
    batches: list[Batch],
    precisions: Sequence[str],
) -> Iterator[Line]:
    """From the same weights, over the same batches: the loss of each step, in each of our precisions."""
    theirs = rival.losses()
    for precision in precisions:
        ours = Ours(our_recipe(config, batches[0].size, precision), images, weights, batches).losses()
        worst = max(abs(mine / their - 1) for mine, their in zip(ours, theirs, strict=True))
        yield (
            f"ssl_step_loss_{precision}",
            {
                "ours": [round(value, 6) for value in ours],
                "rival": [round(value, 6) for value in theirs],
                "unit": "loss of each step",
                "largest_relative_difference": worst,
                "within": TOLERANCE,
                "equal": worst <= TOLERANCE,
            },
        )


def compare_speed(
    rival: Any,
    config: dict[str, Any],
    images: Images,
    weights: dict[str, Tensor],
    batches: list[Batch],
    options: argparse.Namespace,
) -> Iterator[Line]:
    """Turn by turn; each line has images a second."""
    ours = {
        precision: Ours(our_recipe(config, options.batch, precision, options.drop_path), images, weights, batches)
        for precision in options.precisions
    }
    headline, compiled = options.precision, False
    if not options.no_compile:
        recipe = our_recipe(config, options.batch, headline, options.drop_path, compiled=True)
        candidate = _compiled(recipe, images, weights, batches)
        if compiled := candidate is not None and _faster(candidate, ours[headline]):
            ours["compiled"] = candidate
    turns: dict[str, Turn] = {}
    for what, steps in (("whole", 1), ("alone", 1), ("data", 3)):
        turns[f"rival {what}"] = (lambda what=what, steps=steps: rival.seconds(what, steps, "fp32")), steps
        for precision, side in ours.items():
            if what != "data" or precision == "fp32":
                turns[f"{precision} {what}"] = (lambda s=side, what=what, steps=steps: s.seconds(what, steps)), steps
    if "bf16" in ours:
        turns["rival alone bf16"] = (lambda: rival.seconds("alone", 1, "bf16")), 1
    speeds = interleave(turns, options.rounds, options.batch)
    gflop = step_flops(config, options.batch, int(batches[0].masks.sum())) / 1e9
    common = {"arch": options.arch, "batch": options.batch, "drop_path": options.drop_path}
    common |= {"prototypes": options.prototypes, "against": "checkout" if options.rival else "plain_ssl.py"}
    pairs = {
        "ssl_step": (f"{'compiled' if compiled else headline} whole", "rival whole", headline),
        "ssl_step_fp32": ("fp32 whole", "rival whole", "fp32"),
        "ssl_step_bf16": ("bf16 whole", "rival whole", "bf16"),
        "ssl_step_alone": (f"{'compiled' if compiled else headline} alone", "rival alone", headline),
        "ssl_step_alone_fp32": ("fp32 alone", "rival alone", "fp32"),
        "ssl_step_alone_bf16": ("bf16 alone", "rival alone", "bf16"),
        "ssl_step_alone_bf16_both": ("bf16 alone", "rival alone bf16", "bf16"),
        "ssl_data_path": ("fp32 data", "rival data", "uint8"),
    }
    for name, (mine, theirs, precision) in pairs.items():
        if mine not in speeds:
            continue
        values = _ratio(speeds[mine], speeds[theirs])
        if "data" not in mine and not options.drop_path:
            values["gflop_per_step"] = gflop
        yield name, values | {"precision": precision, "compiled": mine.startswith("compiled")} | common


def _compiled(recipe: Recipe, images: Images, weights: dict[str, Tensor], batches: list[Batch]) -> Ours | None:
    """Ours with `train.compile`, after the step that compiles; None where there is nothing to compile with."""
    side = Ours(recipe, images, weights, batches)
    try:
        side.seconds("alone", 1)
    except Exception as error:  # noqa: BLE001 (Inductor's own errors are many)
        print(f"not compiled: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return side


def _faster(one: Ours, other: Ours) -> bool:
    """By processor time of the best of three steps each, in turns."""
    times = [[side.seconds("alone", 1)[1] for side in (one, other)] for _ in range(3)]
    return min(mine for mine, _ in times) < min(theirs for _, theirs in times)


def interleave(turns: dict[str, Turn], rounds: int, batch: int) -> dict[str, list[tuple[float, ...]]]:
    """Images a second, by wall and by processor time, of each turn in each round.

    A first round warms up and does not count; the order is reversed every other round.
    """
    speeds: dict[str, list[tuple[float, ...]]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name in reversed(turns) if number % 2 else turns:
            timed, steps = turns[name]
            speed = tuple(steps * batch / seconds for seconds in timed())
            if number:
                speeds[name].append(speed)
    return speeds


def _ratio(ours: list[tuple[float, ...]], rival: list[tuple[float, ...]]) -> dict[str, Any]:
    each = sorted(mine[0] / theirs[0] for mine, theirs in zip(ours, rival, strict=True))
    (mine, mine_cpu), (theirs, theirs_cpu) = (
        [statistics.median(kind) for kind in zip(*side, strict=True)] for side in (ours, rival)
    )
    return {
        "ours": mine,
        "rival": theirs,
        "unit": "img/s",
        "ratio": mine / theirs,
        "ratio_of_rounds": [round(each[0], 3), round(each[-1], 3)],
        "ratio_of_cpu_time": mine_cpu / theirs_cpu,
        "rounds": len(each),
    }


def open_images(data: Path | None, scratch: Path) -> Images:
    """Up to 64 radiographs, from a store or folder, or drawn (phantoms)."""
    from chexfound.data.intake.ingest import ingest

    if data is None or not (data / "index.sqlite").is_file():
        if data is None:
            from chexfound.data.phantom import generate

            data = scratch / "phantoms"
            generate(data, sites=2, patients=16)
        ingest(data, scratch / "store", PX)
        data = scratch / "store"
    store = Store.open(data)
    if store.px != PX:
        raise DataError(f"{data}: the store holds images of {store.px} px; this benchmark is defined at {PX} px")
    if len(store) < 8:
        raise DataError(f"{data}: {len(store)} images; this benchmark needs at least 8")
    ids = np.unique(np.linspace(0, len(store) - 1, 64).astype(int))
    return Images(store, ids, write_files(store.pixels(ids), scratch / "files"))


def write_files(pixels: np.ndarray, folder: Path) -> list[str]:
    """The images as grey JPEG files, which is what the public code's pretraining folders hold."""
    from PIL import Image

    folder.mkdir()
    files = []
    for number, image in enumerate(pixels):
        files.append(str(folder / f"{number:06d}.jpg"))
        Image.fromarray(image).save(files[-1], quality=95)
    return files


# ---- arithmetic


def step_flops(config: dict[str, Any], batch: int, masked: int) -> float:
    """Floating-point operations of one step of ours, two a multiply-add; matrix products only.

    A linear layer takes 2 · rows · in · out; attention 4 · N² · D a sequence of N tokens.  A block has
    3·D² (qkv), D² (projection) and 3·D·H (SwiGLU of hidden width H).  The student runs forward and
    backward (three times the forward pass; the stem twice, as nobody takes the pixels' gradient) on
    2 global and L local crops, the teacher forward on the global ones.  The DINO head sees all student
    CLS tokens, the iBOT head the masked patches; in the last block only these tokens go on after the
    attention.  Drop path by subset computes a share (1 − rate) of the student's blocks; nothing counts that is
    recomputed.
    """
    student, crops = config["student"], config["crops"]
    dim, depth, _ = ARCHS[student["arch"]]
    hidden = (int(dim * 4 * 2 / 3) + 7) // 8 * 8

    def head(rows: int, section: dict[str, Any]) -> float:
        wide, narrow = section["head_hidden_dim"], section["head_bottleneck_dim"]
        inner = (section["head_nlayers"] - 2) * wide * wide
        return 2 * rows * (dim * wide + inner + wide * narrow + narrow * section["head_n_prototypes"])

    def stem(images: int, px: int) -> float:
        return images * 2 * (px // student["patch_size"]) ** 2 * 3 * student["patch_size"] ** 2 * dim

    def blocks(images: int, px: int, read: int) -> float:
        tokens = (px // student["patch_size"]) ** 2 + 1 + student["num_register_tokens"]
        attention, rest = 2 * tokens * 3 * dim * dim + 4 * tokens**2 * dim, 2 * (dim * dim + 3 * dim * hidden)
        return images * (depth * attention + (depth - 1) * tokens * rest) + read * rest

    big = 2 * batch, crops["global_crops_size"]
    small = crops["local_crops_number"] * batch, crops["local_crops_size"]
    heads = head(big[0], config["dino"]) + head(masked, config["ibot"])
    seen = blocks(*big, big[0] + masked)
    teacher = stem(*big) + seen + heads
    learnt = (
        (1 - student["drop_path_rate"]) * (seen + blocks(*small, small[0])) + heads + head(small[0], config["dino"])
    )
    return teacher + 3 * learnt + 2 * (stem(*big) + stem(*small))


if __name__ == "__main__":
    sys.exit(main())
