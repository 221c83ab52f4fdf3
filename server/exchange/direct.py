"""An exchange with one site in this process: the centralized arm, and each site alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chexfound.contract.request import Reply, Request
from chexfound.phases import dispatch, site_state
from chexfound.recipe.schema import Recipe
from server.exchange.protocol import Member, checked_roster


class DirectExchange:
    """One site in this process, asked by a plain call: the pooled data, or a site alone."""

    def __init__(self, site: site_state.Site) -> None:
        self.site = site
        self._recipe: Recipe | None = None

    def enrol(self, recipe: Recipe, before: Sequence[Member] = ()) -> list[Member]:
        """A roster of one."""
        self._recipe = recipe
        enrolment = dispatch.run(self.site, recipe, Request(phase="enrol"))
        return checked_roster([enrolment], [f"site {self.site.name!r}"], recipe)

    def ask(self, requests: Sequence[Request | None], timeout_s: float | None = None) -> Iterator[Reply | None]:
        """Do what is asked, here and now."""
        assert self._recipe is not None
        for request in requests:
            yield None if request is None else dispatch.run(self.site, self._recipe, request)
