"""The SSL step with `train.compile` against the step without: images a second, and the seconds that compiling takes.

ViT-S/16 with 4 registers and SwiGLU, 2 x 112 + 8 x 48 px, batch 8, 4,096 prototypes, in float32 and in bfloat16.
The two take the same steps from the same weights in turns, on one thread where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from chexfound.host import machine
from chexfound.pretrain.batches import Batches
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import load as recipes

PX, IMAGES, BATCH = 256, 64, 8
SETTINGS = {
    "image_px": PX,
    "student.arch": "vit_small",
    "student.stem": "linear",
    "crops.global_crops_size": 112,
    "crops.local_crops_size": 48,
    "crops.local_crops_number": 8,
    "dino.head_n_prototypes": 4096,
    "ibot.head_n_prototypes": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", metavar="N", type=int, default=8, help="of each, in turns (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="default: both")
    parser.add_argument("--drop-path", metavar="RATE", type=float, default=0.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for precision in given.precision or ("fp32", "bf16"):
        values = measure(precision, given.drop_path, given.repeats)
        if given.json:
            print(machine.benchmark_line("compile", ("torch",), precision=precision, **values), flush=True)
        else:
            print(
                f"{precision}: compiled {values['ours']:6.2f} img/s, as it is {values['rival']:6.2f}: "
                f"{values['ratio']:.2f} x; compiling took {values['compile_s']:.0f} s; "
                f"losses {values['largest_relative_difference']:.1e} apart at most",
                flush=True,
            )


def measure(precision: str, drop_path: float, repeats: int) -> dict[str, object]:
    """Median speeds of the two, the first step's excess, and how far apart the losses are."""
    settings = {**SETTINGS, "compute_precision.param_dtype": precision, "student.drop_path_rate": drop_path}
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, PX, PX), dtype=np.uint8)
    both = [
        Pretrainer(
            recipes.load("demo", {**settings, "train.compile": wanted}),
            lambda places: images[places],
            IMAGES,
            0,
            device=machine.device(),
        )
        for wanted in (True, False)
    ]
    batches = Batches(both[0].recipe, lambda places: images[places], IMAGES, BATCH, 0, device=machine.device())
    seconds: tuple[list[float], list[float]] = ([], [])
    losses: tuple[list[float], list[float]] = ([], [])
    for step in range(repeats + 1):
        batch = batches.batch(step)
        for one, times, seen in zip(both, seconds, losses, strict=True):
            torch.manual_seed(step)  # of drop path
            began = time.perf_counter()
            seen.append(one.step(batch, step)["loss"])
            _wait()
            times.append(time.perf_counter() - began)
    ours, rival = (statistics.median(times[1:]) for times in seconds)
    return {
        "ours": round(BATCH / ours, 2),
        "rival": round(BATCH / rival, 2),
        "unit": "img/s",
        "ratio": round(rival / ours, 3),
        "compile_s": round(seconds[0][0] - ours, 1),
        "largest_relative_difference": max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
