"""Aggregation as a fold: updates come one at a time, in roster order, and are dropped once added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chexfound.errors import ProtocolError


def check_tensors(update: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> None:
    """Check that an update holds what was sent, by names, shapes and dtypes, in finite numbers.

    Raises: ProtocolError.
    """
    if odd := sorted(set(update) ^ set(previous)):
        raise ProtocolError(f"an update holds other tensors than were sent: {odd[:3]}")
    for name, tensor in update.items():
        if tensor.shape != previous[name].shape or tensor.dtype != previous[name].dtype:
            raise ProtocolError(f"an update's {name!r} has another shape or dtype than was sent")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ProtocolError(f"an update's {name!r} holds a value that is not a finite number")


class RunningMean:
    """The weighted mean of updates, without keeping any of them.

    Accumulates in float64.  A lone float32 update comes back bit for bit, the sign of a zero included.
    The order of the updates does not matter where the sum is exact: float32 values of like size with
    integer weights are, up to 53 bits in all.  Beyond, another order may round the last bit otherwise,
    which is why updates are folded in roster order.

    Args:
        previous: what the sites were sent; every update holds the same names, shapes and dtypes.
        rows: names of tensors whose first axis is the findings: each row has a weight of its own.
    """

    def __init__(self, previous: Mapping[str, Tensor], rows: Sequence[str] = ()) -> None:
        self.previous, self.rows = previous, frozenset(rows)
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._row_weights: Tensor | None = None

    def add(self, update: Mapping[str, Tensor], weight: float, row_weights: Sequence[float] | None = None) -> None:
        """Add one site's update: `admit`, and what that returns."""
        self.admit(update, weight, row_weights)()

    def admit(
        self, update: Mapping[str, Tensor], weight: float, row_weights: Sequence[float] | None = None
    ) -> Callable[[], None]:
        """Check one site's update; what is returned adds it, once whoever asked has looked at it too.

        Args:
            update: tensors by name, as those that were sent.
            weight: of the tensors that are not rows; 0 leaves the update out of them.
            row_weights: (F,), for the row tensors.

        Raises: ProtocolError if names, shapes, dtypes, values or weights do not fit.
        """
        rows = None if row_weights is None else torch.tensor(list(row_weights), dtype=torch.float64)
        self._check(update, weight, rows)
        return lambda: self._add(update, weight, rows)

    def _add(self, update: Mapping[str, Tensor], weight: float, rows: Tensor | None) -> None:
        for name, tensor in update.items():
            by_row = name in self.rows and rows is not None
            part = tensor.double() * (_over(rows, tensor) if by_row else weight)  # type: ignore[arg-type]
            # The first is taken as it is: added to a zero, −0.0 would become 0.0.
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part
        self._weight += weight
        if rows is not None:
            self._row_weights = rows if self._row_weights is None else self._row_weights + rows
        self.count += 1

    def _check(self, update: Mapping[str, Tensor], weight: float, rows: Tensor | None) -> None:
        if not 0 <= weight < float("inf") or (
            rows is not None and not bool(((rows >= 0) & torch.isfinite(rows)).all())
        ):
            raise ProtocolError("an update's weight must be a finite number that is not negative")
        check_tensors(update, self.previous)
        for name, tensor in update.items():
            if name in self.rows and rows is not None and tensor.shape[:1] != rows.shape:
                raise ProtocolError(
                    f"an update's {name!r} has shape {tuple(tensor.shape)}, its weights {len(rows)} rows"
                )

    def result(self) -> dict[str, Tensor]:
        """The mean; what no site gave any weight stays as it was sent (rows one by one).

        Raises: ProtocolError if a mean is not finite.
        """
        result = {}
        for name, before in self.previous.items():
            total = self._sums.get(name)
            if total is None:
                result[name] = before.clone()
            elif name in self.rows and self._row_weights is not None:
                weights = _over(self._row_weights, before)
                mean = (total / weights.clamp_min(1e-300)).to(before.dtype)
                result[name] = torch.where(weights > 0, mean, before)
            else:
                result[name] = (total / self._weight).to(before.dtype) if self._weight else before.clone()
            if not bool(torch.isfinite(result[name]).all()):
                raise ProtocolError(f"the mean of the updates' {name!r} is not finite")
        return result


def _over(weights: Tensor, like: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (like.ndim - 1))
