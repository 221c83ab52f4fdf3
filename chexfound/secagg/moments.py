"""Adam's moments in a masked sum: the first as it is, of the second the root, and the steps as whole numbers.

Squares span twice as many orders of magnitude as gradients, more than fixed point holds; their roots span as many.  The
mean of the roots is not the root of the mean, and lies below it where sites differ; yet what makes a step safe stays
true of it: at each site m² ≤ S·v (pretrain/bounds.py), so |m| ≤ √S·√v, and both sides may be averaged.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from chexfound.contract.request import MOMENTS
from chexfound.pretrain.bounds import squared

KEYS = ("exp_avg", "exp_avg_sq", "step")


def is_step(name: str) -> bool:
    """Whether a tensor is the number of an optimizer's steps."""
    return name.startswith(MOMENTS) and name.endswith(".step")


def is_square(name: str) -> bool:
    """Whether a tensor is of Adam's squares."""
    return name.startswith(MOMENTS) and name.endswith(".exp_avg_sq")


def names(parameter: str) -> list[str]:
    """The moments of a parameter."""
    return [f"{MOMENTS}{parameter}.{key}" for key in KEYS]


def with_moments(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, and of their moments."""
    found = dict(shapes)
    for parameter, shape in shapes.items():
        found |= {name: () if is_step(name) else shape for name in names(parameter)}
    return found


def row_names(rows: Collection[str]) -> frozenset[str]:
    """Parameters whose first axis is the findings, and those of their moments that have it too."""
    return frozenset(rows) | {name for row in rows for name in names(row) if not is_step(name)}


def summed(name: str, tensor: Tensor) -> Tensor:
    """Give what is summed of a tensor: the root of Adam's squares, or the tensor itself."""
    return tensor.sqrt() if is_square(name) else tensor


def lift(tensors: dict[str, Tensor], beta1: float, beta2: float) -> None:
    """Raise squares, in place, to what their first moments allow: no root that was rounded down makes a step too long.

    Args:
        tensors: by name; where a parameter's squares are, all its moments are.
        beta1: of the optimizer.
        beta2: likewise.
    """
    for name in tensors:
        if is_square(name):
            parameter = name.rpartition(".")[0]
            most = float(squared(beta1, beta2, float(tensors[f"{parameter}.step"])))
            if most > 0:
                least = tensors[f"{parameter}.exp_avg"].double().square_().div_(most)
                tensors[name] = tensors[name].maximum(least.to(tensors[name].dtype))
