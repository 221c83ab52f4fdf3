"""The errors of the project, each with the exit code that a command ends with.

ChexfoundError            1
├── ConfigError           2   a recipe, an option or a folder was given wrongly
├── DataError             3   images, manifests or stores that cannot be used
│   ├── DivergedError     3   a training step whose loss or gradient is not finite
│   └── EmptyError        3   a folder without an image that can be used
├── CheckpointError       4   weights or saved state that do not fit or are damaged
│   └── StateError        4   a site without the state that its next round stands on
├── ProtocolError         5   a message that is not what the two ends agreed on
│   └── VersionError      5   the two ends are of different releases
├── PolicyError           6   what a site's policy forbids to leave (or to run)
│   ├── CodeError         6   a run of code that the site's operator did not approve
│   ├── RosterError       6   a run with sites that the site's operator did not approve
│   └── RefusedError      6   a request that a site does not take; its code says which rule it breaks
├── SiteError             7   a site, or the process that plays it, failed in a round
│   └── StoppedError      7   a site that was asked to stop, and saved what it had
└── StorageError          8   the disk is full or refuses to be written

130 is Ctrl-C and 143 SIGTERM, as everywhere.  A message says what was wrong, where, and what to do; an offending
value is shown with !r.  The text stays where it was raised: what leaves a site is only `code`.
"""

from __future__ import annotations


class ChexfoundError(Exception):
    """Base of every error that we raise on purpose."""

    exit_code = 1
    code = "internal"


class ConfigError(ChexfoundError):
    """A recipe, an option or a folder was given wrongly."""

    exit_code = 2
    code = "config"


class DataError(ChexfoundError):
    """Images, manifests or stores that cannot be used."""

    exit_code = 3
    code = "data"


class DivergedError(DataError):
    """A training step whose loss or gradient is not finite.

    `step` and `places` (of its images among the training images) are set by the loop that took it; `when` says
    whether the state that is there is that "before" the step or "after" it.
    """

    step: int = -1
    places: list[int] = []
    when: str = "before"


class EmptyError(DataError):
    """A folder without an image that can be used."""


class CheckpointError(ChexfoundError):
    """Weights or saved state that do not fit or are damaged."""

    exit_code = 4
    code = "checkpoint"


class StateError(CheckpointError):
    """A site without the state that its next round stands on: the run's next start brings it all that is needed."""

    code = "state"


class ProtocolError(ChexfoundError):
    """A message that is not what the two ends agreed on."""

    exit_code = 5
    code = "protocol"


class VersionError(ProtocolError):
    """The two ends are of different releases."""

    code = "version"


class PolicyError(ChexfoundError):
    """Refuse what a site's policy forbids to leave, or to run."""

    exit_code = 6
    code = "policy"


class CodeError(PolicyError):
    """A run of code that the site's operator did not approve."""

    code = "code"


class RosterError(PolicyError):
    """A run with sites that the site's operator did not approve."""

    code = "roster"


class RefusedError(PolicyError):
    """A request that a site does not take; `code` names the rule it breaks, or the attack that it would be part of.

    Args:
        code: one of REFUSALS.
        text: what was seen; stays at the site.
    """

    code = "refused"

    def __init__(self, code: str, text: str = "") -> None:
        super().__init__(text or REFUSALS[code])
        self.code = code


REFUSALS = {  # by the code that leaves the site: what the request was, or would have done
    "weights.initial": "first weights that are neither the recipe's own nor a file that the site's operator approved",
    "weights.file": "a file of weights that the site's operator has not approved",
    "weights.box": "weights that the recipe's steps cannot lead to from those that this site last accepted",
    "weights.frozen": "another value of a tensor that is not trained",
    "weights.missed": "weights after more rounds without this site than its policy lets pass (max_missed_rounds)",
    "weights.lost": "a later round, and what this site last accepted is not on its disk",
    "weights.backbone": "another backbone than the one that this run gave the site",
    "weights.change": "weights that moved further in a round than this site's own steps allow for",
    "policy.phase": "a phase that the site's policy does not take part in",
    "policy.model": "a model that the site's policy does not train",
    "policy.tensors": "tensors of which the site's policy lets none leave",
    "policy.rate": "learning rates beyond the site's policy",
    "policy.work": "more or fewer rounds, steps or images than the site's policy allows",
    "policy.runs": "one run more than the site's policy allows in a month",
    "policy.patients": "work over fewer patients or images than the site's policy asks for, or over none",
    "policy.machine": "more memory, disk or time than the site's policy allows",
    "request.beyond": "more, or other work, than its own recipe has",
    "request.tensors": "other tensors than its recipe's model has",
    "secagg.plain": "asked for its own update, which this site gives only in a masked sum",
    "secagg.parameters": "told other numbers of sites, colluders or shares than this site's own",
    "secagg.attempt": "an attempt that is past, or was seen before: its secrets would serve twice",
    "secagg.order": "a step before its turn, or of no attempt that is open",
    "secagg.repeat": "a second, different request for a step that was answered",
    "secagg.late": "a request after the attempt's time",
    "secagg.incomplete": "what the site needs for its answer is not on its disk any more",
    "secagg.cohort": "keys of sites that are not in the roster, too few, twice, or not with this site's own",
    "secagg.signature": "a word of another site that this site did not say",
    "secagg.shares": "a share that does not open, or is not the one that its dealer signed",
    "secagg.sharers": "a set of sharing sites that is too small, without this site, or not of those that advertised",
    "secagg.weights": "other weights, or another request, than the sites agreed to train from",
    "secagg.survivors": "a set of survivors that is too small, without this site, or not of those that shared",
    "secagg.survivors-twice": "a second set of survivors in one attempt: two sums could be opened",
    "secagg.findings": "a sum over too few sites that label one of its findings",
    "secagg.signers": "too few signatures of the survivors over the same set",
    "secagg.differencing": "a second sum on these weights or of this step, over other sites or of other work: "
    "the difference can tell",
}


class SiteError(ChexfoundError):
    """A site, or the process that plays it, failed in a round."""

    exit_code = 7
    code = "site"


class StoppedError(SiteError):
    """A site that was asked to stop in a round of pretraining, and saved what it had: asked again, it goes on."""

    code = "stopped"


class StorageError(ChexfoundError):
    """The disk is full or refuses to be written."""

    exit_code = 8
    code = "storage"


CODES: dict[str, type[ChexfoundError]] = {  # but for RefusedError, whose codes are those of REFUSALS
    cls.code: cls
    for cls in (
        ChexfoundError,
        ConfigError,
        DataError,
        CheckpointError,
        StateError,
        ProtocolError,
        VersionError,
        PolicyError,
        CodeError,
        RosterError,
        SiteError,
        StoppedError,
        StorageError,
    )
}


class Problems:
    """Collects what is wrong with a config or a folder, so that all of it is told at once."""

    def __init__(self, error: type[ChexfoundError], where: str) -> None:
        self.error = error
        self.where = where
        self.found: list[str] = []

    def add(self, text: str) -> None:
        """Note one problem."""
        self.found.append(text)

    def check(self) -> None:
        """Raise everything that was noted, if anything was."""
        if len(self.found) == 1:
            raise self.error(f"{self.where}: {self.found[0]}")
        if self.found:
            raise self.error(
                f"{self.where}: {len(self.found)} problems:\n" + "\n".join(f"  - {text}" for text in self.found)
            )
