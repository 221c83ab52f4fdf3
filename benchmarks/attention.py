"""Attention on a processor: what `chexfound.model.vit.attend` chooses, against PyTorch's fused kernel.

Forward and backward pass of one layer of ViT-S at the sequence lengths of multi-crop training, in bf16,
one thread, the two in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from chexfound.host.machine import benchmark_line
from chexfound.model.vit import attend

SHAPES = {  # images, heads, tokens (CLS, 4 registers, patches), width of a head
    "local 48 px": (64, 6, 14, 64),
    "global 112 px": (16, 6, 54, 64),
    "global 224 px": (8, 6, 201, 64),
    "global 512 px": (2, 6, 1029, 64),
}


def seconds(function: object, tensors: list[torch.Tensor], gradient: torch.Tensor) -> float:
    started = time.perf_counter()
    function(*tensors).backward(gradient)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", metavar="N", type=int, default=20, help="of each, in turns (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(shape, dtype=torch.bfloat16)
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.repeats + 1):
            for times, function in zip(both, (attend, F.scaled_dot_product_attention), strict=True):
                times.append(1e3 * seconds(function, tensors, gradient))
        ours, rival = (statistics.median(times[1:]) for times in both)
        if given.json:
            values = {"ours": round(ours, 2), "rival": round(rival, 2), "unit": "ms", "ratio": round(rival / ours, 2)}
            print(benchmark_line("attention", ("torch",), shape=name, **values))
        else:
            print(f"{name:14} {ours:8.2f} ms, fused kernel {rival:8.2f} ms: {rival / ours:.1f} x")


if __name__ == "__main__":
    main()
