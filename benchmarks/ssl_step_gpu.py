"""The SSL step of ViT-L on a GPU, in bf16, against a straightforward one: images a second, memory, share of the peak.

    python benchmarks/ssl_step_gpu.py [--rounds 5] [--drop-path 0.4] [--json]

ViT-L/16 with the paper's heads, at the first and the last stage of the preset vitl16-cxr1m, plain and compiled: the
step alone, in turns with plain_ssl.py under autocast.  The rival gets its crops normalised and on the GPU, ours
renders nothing either; `whole` has ours with its data path: images from memory, crops rendered on the GPU, batches
made ahead by eight threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from plain_ssl import Plain
from ssl_step import MEAN, STD, Line, configuration, our_recipe, step_flops, tell
from torch import Tensor

from chexfound.errors import ChexfoundError
from chexfound.pretrain import schedules
from chexfound.pretrain.batches import Batches
from chexfound.pretrain.train import Pretrainer
from chexfound.recipe import curriculum

PEAK_TFLOPS = {  # dense bfloat16, from the makers' data sheets
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "RTX 4090": 165,
}
STAGES = {(224, 96): 64, (512, 144): 16}  # crops of the first and the last stage of vitl16-cxr1m: images in a batch
LOCAL_CROPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the timing, of three steps each (default 5)")
    parser.add_argument("--drop-path", type=float, default=0.0, help="the paper's is 0.4 (default 0)")
    parser.add_argument("--no-compile", action="store_true", help="leave train.compile alone (it needs a C++ compiler)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bf16, where its name is not known")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for name, values in measure(options):
            tell(name, values, options.json)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(options: argparse.Namespace) -> Iterator[Line]:
    """Each stage, plain and compiled."""
    if not torch.cuda.is_available():
        yield "ssl_step_cuda", {"figure": "not measured: no GPU"}
        return
    for stage, images in STAGES.items():
        for compiled in (False, True) if not options.no_compile else (False,):
            yield "ssl_step_cuda", on_gpu(options, stage, images, compiled)
            torch.cuda.empty_cache()


def on_gpu(options: argparse.Namespace, stage: tuple[int, int], images: int, compiled: bool) -> dict[str, Any]:
    """One line."""
    px = f"{stage[0]},{stage[1]}"
    options = argparse.Namespace(
        **vars(options) | {"arch": "vit_large", "px": px, "prototypes": 131_072, "local_crops": LOCAL_CROPS}
    )
    config = configuration(options)
    config["student"]["drop_path_rate"] = options.drop_path
    recipe = our_recipe(config, images, "bf16", options.drop_path, compiled=compiled)
    recipe = curriculum.changed(recipe, train=curriculum.changed(recipe.train, num_workers=8))
    pixels = np.random.default_rng(0).integers(0, 256, (images, 512, 512), dtype=np.uint8)
    trainer = Pretrainer(recipe, lambda places: pixels[places], images, 0, device="cuda")
    trainer.model.train()
    batch = Batches(recipe, lambda places: pixels[places], images, images, 0, device="cuda").batch(0)
    values = dataclasses.asdict(schedules.at(recipe, 0))
    rival = Plain(
        {"config": config, "files": [], "batch_size": images, "schedules": [values], "seed": 0, "device": "cuda"}
    )
    crops = [_normalised(batch.global_crops), _normalised(batch.local_crops)]
    sides = {
        "ours": lambda step: trainer.step(batch, step),
        "rival": lambda step: rival.step((*crops, batch.masks), values, "bf16"),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    began = time.perf_counter()
    for step in range(1 + 3 * options.rounds):
        for name, side in sides.items():
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            side(step)
            torch.cuda.synchronize()
            took[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks[name], (torch.cuda.max_memory_allocated() - held) / 2**30)
            if step == 0 and name == "ours":
                first = time.perf_counter() - began
    ours, theirs = (statistics.median(times[1:]) for times in took.values())
    steps = len(took["ours"])
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.run(steps, 10, images)
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) / 10
    tflops = step_flops(config, images, int(batch.masks.sum())) / ours / 1e12
    name = torch.cuda.get_device_name()
    peak = options.peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    return {
        "ours": images / ours, "rival": images / theirs, "unit": "img/s", "ratio": theirs / ours,
        "against": "plain_ssl.py", "whole": images / whole, "first_step_s": first, "compiled": compiled,
        "tflops": tflops, "peak_tflops": peak, "share_of_peak": tflops / peak if peak else None,
        "step_memory_gib": round(peaks["ours"], 2), "rival_step_memory_gib": round(peaks["rival"], 2),
        "gpu": name, "batch": images, "px": px, "drop_path": options.drop_path,
    }  # fmt: skip


def _normalised(crops: Tensor) -> Tensor:
    """uint8 (n, s, s) to what the rival takes: float32 (n, 3, s, s)."""
    grey = crops[:, None].float() / 255
    mean, std = (torch.tensor(values, device=crops.device)[:, None, None] for values in (MEAN, STD))
    return (grey - mean) / std


if __name__ == "__main__":
    sys.exit(main())
