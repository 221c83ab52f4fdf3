"""How many sites, how many that may collude with the coordinator, and how many it takes to open a sum."""

from __future__ import annotations

from dataclasses import dataclass

from chexfound.errors import ConfigError

SITES_MAX = 128  # a complete graph: every site deals to every other
MINIMUM = 3  # that a sum is over, at the least: of two, each site can tell the other's part


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Hold the numbers of one federation (Bonawitz et al. 2017, section 6; argued in docs/secure-aggregation.md).

    Args:
        n: sites of the roster, not those that take part: two views of the cohort would give two sums.
        c: of these, that may collude with the coordinator.
        t: shares that open a secret, and sites that must sign before one is given: 2t > n + c, t − c ≥ 2.
        minimum: sites that a sum must be over, by this site's own wish.

    Raises: ConfigError for numbers that do not protect.
    """

    n: int
    c: int
    t: int
    minimum: int = MINIMUM

    def __post_init__(self) -> None:
        if not MINIMUM <= self.n <= SITES_MAX:
            raise ConfigError(f"secure aggregation is for {MINIMUM} to {SITES_MAX} sites; this federation has {self.n}")
        if self.c < 0 or self.t > self.n or 2 * self.t <= self.n + self.c or self.t - self.c < 2:
            raise ConfigError(
                f"secagg.colluders: a sum of {self.n} sites cannot hold against c = {self.c} colluders with a "
                f"threshold of t = {self.t}; c is at most {colluders_max(self.n)} (2t > n + c, t - c >= 2 and t <= n)"
            )
        if not MINIMUM <= self.minimum <= self.n:
            raise ConfigError(f"secagg.minimum must be {MINIMUM} to {self.n}, the sites of the federation")

    @staticmethod
    def of(n: int, colluders: int | None = None, minimum: int = MINIMUM) -> Parameters:
        """The smallest threshold for n sites and so many colluders; a quarter of the sites, if not given.

        Raises: ConfigError.
        """
        c = n // 4 if colluders is None else colluders
        return Parameters(n=n, c=c, t=max((n + c) // 2 + 1, c + 2), minimum=minimum)

    @property
    def survivors(self) -> int:
        """Sites that a sum must be over for this site to help open it."""
        return max(self.t, self.minimum)

    @property
    def dropouts(self) -> int:
        """Sites that may be lost in a round."""
        return self.n - self.survivors

    def shared(self) -> dict[str, int]:
        """Give what all sites must have alike."""
        return {"n": self.n, "c": self.c, "t": self.t}


def colluders_max(n: int) -> int:
    """The most colluders that some threshold holds against: the sum is then of all sites or of none."""
    return max(n - 2, 0)


def labelling(minimum: int, c: int) -> int:
    """Sites that must label a finding for it to have a part: what c colluders know taken off, two are left."""
    return max(minimum, c + 2)
