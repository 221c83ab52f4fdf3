"""The EMA teacher without its travelling: every site computes it from the students that it is sent.

A round takes k steps from the global student S0, at which the teacher is T0, to the next global student
S1.  The EMA is linear, so the mean of the sites' teachers is the EMA along the mean of their students'
paths.  Of that path only its ends are known to all; along the straight one, S0 + (S1 − S0)·j/k after step
j, the EMA has a closed form T1 = a·T0 + b·S0 + c·S1, which asks for nothing that a site has not.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from chexfound.pretrain import curriculum, schedules
from chexfound.schema import Recipe

DIGITS = 12  # of a coefficient: what two maths libraries' cosines differ by must not reach the weights


def coefficients(recipe: Recipe, step: int, steps: int) -> tuple[float, float, float]:
    """(a, b, c) of T1 = a·T0 + b·S0 + c·S1 for global steps step … step + steps − 1; their sum is 1.

    With one momentum m: a = mᵏ, c = Σ_j (1 − m)·m^(k − j)·j/k.  Here m is the schedule's at each step.
    """
    a, c = 1.0, 0.0
    for number in range(1, steps + 1):
        m = schedules.at(recipe, step + number - 1).momentum
        a, c = m * a, m * c + (1 - m) * number / steps
    a, c = round(a, DIGITS), round(c, DIGITS)
    return a, 1.0 - a - c, c


def rederived(
    recipe: Recipe, step: int, before: Mapping[str, Tensor], student: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The teacher at global step `step`, where a round begins.

    In float64, one operation a time: the same bits wherever it is done, from the same weights.

    Args:
        recipe: the run.
        step: the first of the round that begins; the round before took `train.local_steps`.
        before: `student.…` and `teacher.…` as they were when the round before began.
        student: `student.…` as it is now, in the stage of `step`; other names are not looked at.

    Returns: `teacher.…`, in the stage of `step`: where one begins, what was before is brought into it first.
    """
    a, b, c = coefficients(recipe, step - recipe.train.local_steps, recipe.train.local_steps)
    before = curriculum.enter(before, recipe, step)
    result = {}
    for name, old in before.items():
        if name.startswith("teacher."):
            path = "student." + name.removeprefix("teacher.")
            mean = old.double() * a + before[path].double() * b + student[path].double() * c
            result[name] = mean.to(old.dtype)
    return result
