"""The EMA teacher without its travelling: every site computes it from the students that it is sent.

A round takes k steps from the global student S0, at which the teacher is T0, to the next global student
S1.  The EMA is linear, so the mean of the sites' teachers is the EMA along the mean of their students'
paths.  Of that path only its ends are known to all; along the straight one, S0 + p_j·(S1 − S0) after step
j, the EMA has a closed form T1 = a·T0 + b·S0 + c·S1, which asks for nothing that a site has not.  The
pace p_j is that of the learning rate, p_j = (lr_1 + … + lr_j) / (lr_1 + … + lr_k): j/k where it is
constant, but in the warm-up the last steps of a round go furthest.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from chexfound.pretrain import positions, schedules
from chexfound.recipe.schema import Recipe

DIGITS = 12  # of a coefficient: what two maths libraries' cosines differ by must not reach the weights


def coefficients(recipe: Recipe, step: int, steps: int) -> tuple[float, float, float]:
    """(a, b, c) of T1 = a·T0 + b·S0 + c·S1 for global steps step … step + steps − 1; their sum is 1.

    With one momentum m and one learning rate: a = mᵏ, c = Σ_j (1 − m)·m^(k − j)·j/k.  Here both are the
    schedules' at each step.
    """
    values = [schedules.at(recipe, step + number) for number in range(steps)]
    rates = [value.lr for value in values] if any(value.lr for value in values) else [1.0] * steps
    a, c = 1.0, 0.0
    for number, value in enumerate(values, 1):
        pace = sum(rates[:number]) / sum(rates)
        a, c = value.momentum * a, value.momentum * c + (1 - value.momentum) * pace
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
    before = positions.enter(before, recipe, step)
    result = {}
    for name, old in before.items():
        if name.startswith("teacher."):
            path = "student." + name.removeprefix("teacher.")
            mean = old.double() * a + before[path].double() * b + student[path].double() * c
            result[name] = mean.to(old.dtype)
    return result
