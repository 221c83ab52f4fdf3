"""Reducers of the updates of one round in the clear: the interface that a strategy of one's own has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from chexfound.contract.request import Reply
from strategies.ceiling import Ceiling


class Reducer(Protocol):
    """Takes the sites' replies one at a time, in the order of the sites, and gives what they come to.

    One is made for each round, as `MakeReducer` says.

    Attributes:
        ceiling: the most that a site may weigh; the journal tells whom it cut.
        bound: the largest norm of an update that counts whole (`robust.clip`); None: any.
    """

    ceiling: Ceiling
    bound: float | None

    def admit(self, reply: Reply) -> Callable[[], None]:
        """Check one site's reply; what is returned takes it in, once the coordinator's own checks have passed.

        Raises: ProtocolError for a reply that does not fit, which is then not counted.
        """

    def result(self) -> dict[str, Tensor]:
        """Give the round's weights, by the names, shapes and dtypes that the sites were sent.

        Raises: ProtocolError if one is not finite.
        """


class MakeReducer(Protocol):
    """Makes the reducer of one round; a class whose constructor takes these is one."""

    def __call__(
        self,
        phase: str,
        previous: Mapping[str, Tensor],
        n_findings: int = 0,
        rows: Sequence[str] = (),
        *,
        ceiling: Ceiling | None = None,
        bound: float | None = None,
    ) -> Reducer:
        """Make it.

        Args:
            phase: pretrain or adapt.
            previous: what the sites were sent.
            n_findings: of the head; 0 in pretraining.
            rows: names of tensors whose first axis is the findings.
            ceiling: the most that a site may weigh; None: any.
            bound: the largest norm of an update that counts whole; None: any.
        """
