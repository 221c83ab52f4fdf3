"""FedAvg (McMahan et al. 2017): which weight a site's reply has in each phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from chexfound.contract import cells
from chexfound.contract.request import Reply
from chexfound.errors import ProtocolError
from chexfound.parsing import values
from strategies import robust
from strategies.aggregate import RunningMean
from strategies.ceiling import Ceiling, cut


def _count(value: object, what: str) -> int:
    if not values.count(value):
        raise ProtocolError(f"{what} must be a count (got {str(value)[:40]!r})")
    return value  # type: ignore[return-value]


class FedAvg:
    """The mean over sites, weighted by training images; per finding by its labelled images.

    A site is left out of a finding's rows unless it has both classes of it, and a row that no site
    trained stays as it was.

    Args:
        previous: what the sites were sent.
        rows: names of tensors whose first axis is the findings.
        ceiling: the most that a site may weigh; None: any.
        bound: the largest norm of an update that counts whole; None: any.
    """

    def __init__(
        self,
        phase: str,
        previous: Mapping[str, Tensor],
        n_findings: int = 0,
        rows: Sequence[str] = (),
        *,
        ceiling: Ceiling | None = None,
        bound: float | None = None,
    ) -> None:
        self.phase, self.n_findings, self.previous, self.bound = phase, n_findings, previous, bound
        self.ceiling = ceiling or Ceiling(labelled=(None,) * n_findings, capped={})
        self._fold = RunningMean(previous, rows)

    def add(self, reply: Reply) -> None:
        """Fold in one site's reply: `admit`, and what that returns."""
        self.admit(reply)()

    def admit(self, reply: Reply) -> Callable[[], None]:
        """Check one site's reply; what is returned folds it in.

        Raises: ProtocolError if its counts are not counts, or its tensors do not fit.
        """
        images = _count(cells.known(reply.values.get("images")), "a reply's images")
        weight = cut(images, self.ceiling.images)
        if self.phase == "pretrain":
            return self._admit(reply.tensors, weight)
        labelled = reply.values.get("labelled")
        if not isinstance(labelled, list) or len(labelled) != self.n_findings:
            raise ProtocolError(f"a reply's labelled must be {self.n_findings} counts")
        weights = [_count(cells.known(number), "a reply's labelled") for number in labelled]
        if any(weights):
            return self._admit(reply.tensors, weight, list(map(cut, weights, self.ceiling.labelled)))
        if images or reply.tensors:
            raise ProtocolError("a reply without a labelled image counts images, or holds tensors")
        return lambda: None

    def _admit(
        self, update: Mapping[str, Tensor], weight: int, row_weights: Sequence[int] | None = None
    ) -> Callable[[], None]:
        fold = self._fold.admit(update, weight, row_weights)
        if self.bound is None or (own := robust.norm(update, self.previous)) <= self.bound:
            return fold
        return self._fold.admit(robust.clipped(update, self.previous, own, self.bound), weight, row_weights)

    def result(self) -> dict[str, Tensor]:
        """The aggregated weights.

        Raises: ProtocolError if one is not finite.
        """
        return self._fold.result()
