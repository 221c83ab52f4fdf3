"""The sites whose replies make a round: all of them, or at its deadline a quorum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from chexfound.contract.request import Reply, Request
from chexfound.errors import ChexfoundError, ProtocolError, SiteError
from chexfound.recipe.schema import Recipe
from server.exchange.protocol import Exchange, Member, Missing


class Cohort:
    """Asks, and yields each site's reply as it comes and passes `check`, in the order of the sites.

    After the last, `missing` has each site that is not among them, with the reason; too many are a SiteError.
    Without a quorum in the recipe the first ends it.

    Args:
        asked: each site with its request; none for one that cannot have a part.
        check: of a reply; raises ProtocolError.
        where: in the run, for errors.
    """

    def __init__(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[Member, Request | None]],
        exchange: Exchange,
        check: Callable[[Member, Reply], None],
        where: str,
    ) -> None:
        self.recipe, self.asked, self.exchange, self.check, self.where = recipe, asked, exchange, check, where
        self.missing: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[tuple[Member, Reply]]:
        requests = [request for _, request in self.asked]
        came: list[Member] = []
        for (member, request), outcome in zip(self.asked, self.exchange.ask(requests), strict=True):
            if request is None:
                self.missing.append({"site": member.name, "reason": "behind"})
            elif isinstance(reply := self._checked(member, outcome), Reply):
                came.append(member)
                yield member, reply
            elif reply is not None:
                self._miss(member, reply.reason, reply.error)
        if self.missing:
            self._check_quorum(came)

    def _checked(self, member: Member, outcome: Reply | Missing | None) -> Reply | Missing | None:
        if not isinstance(outcome, Reply):
            return outcome
        try:
            self.check(member, outcome)
        except ProtocolError as error:
            return Missing(reason=error.code, error=ProtocolError(f"site {member.name!r} in {self.where}: {error}"))
        return outcome

    def _miss(self, member: Member, reason: str, error: ChexfoundError) -> None:
        if self.recipe.federation.quorum_sites is None:
            raise error
        self.missing.append({"site": member.name, "reason": reason})

    def _check_quorum(self, came: Sequence[Member]) -> None:
        """By number and by weight (training images).

        Raises: SiteError.
        """
        config = self.recipe.federation
        weight = sum(member.values["train"] for member in came)
        total = sum(member.values["train"] for member, _ in self.asked)
        if len(came) >= (config.quorum_sites or 0) and weight >= config.quorum_weight * total:
            return
        who = ", ".join(f"{one['site']} ({one['reason']})" for one in self.missing)
        raise SiteError(
            f"{self.where}: no quorum: {len(came)} of {len(self.asked)} sites with {weight} of {total} training images "
            f"replied (federation.quorum_sites {config.quorum_sites}, quorum_weight {config.quorum_weight:g}); "
            f"missing: {who}"
        )
