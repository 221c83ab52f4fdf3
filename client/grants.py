"""What a site does before a run touches an image: its policy against the recipe, the machine, and how many runs.

The same for runs in the clear and under masks.  A simulation on one's own images (`home` in the node's configuration)
has no policy, and is bound by none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound import limits as limiting
from chexfound import parts, phases
from chexfound.data.store import INDEX, Store
from chexfound.errors import RefusedError
from chexfound.limits import Limits, Verdict
from chexfound.phases import Reply, Request
from chexfound.schema import ARCHS, Recipe
from client import asked, ledger, membership, site
from client.home import store_path
from client.ledger import Begun
from client.policy import Policy

log = logging.getLogger("chexfound.client")
GB = 10**9
COPIES = 10  # of the model in memory: weights, gradients, two moments and teacher; as much for messages
BESIDE = 11 * GB // 10  # the programs themselves: the preset demo takes that (measured)
MODELS_KEPT = 7  # a site's own: teacher and Adam's two moments, now and a round ago; and the run's backbone
IN_PARTS = 4  # models more, of a run whose student and teacher travel in parts: what came last, and what left last


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A site's policy in force.

    Args:
        home: where the site keeps what is its own.
        name: of the site.
        data: its images, or the store of them.
        policy: site.yaml.
        n_sites: of its federation, where it is in one.
    """

    home: Path
    name: str
    data: Path
    policy: Policy
    n_sites: int | None

    @staticmethod
    def of(node_config: Mapping[str, Any]) -> Grant | None:
        """That of a node's site; None for a simulated one.

        Raises: ConfigError if site.yaml cannot be read.
        """
        if "home" in node_config:
            return None
        home = site.folder_of(node_config)
        member = site.member_home(node_config)
        n_sites = None if member is None else len(membership.present(member).sites.sites)
        data = Path(str(node_config.get("data", "")))
        return Grant(home=home, name=str(node_config["site"]), data=data, policy=Policy.load(home), n_sites=n_sites)

    @property
    def limits(self) -> Limits:
        """What the coordinator is told of it."""
        return self.policy.limits(self.n_sites or 1)

    def judge(self, recipe: Recipe) -> list[Verdict]:
        """A verdict on each line of site.yaml that bears on a recipe."""
        return limiting.judge(recipe, self.limits, self.sharing(recipe))

    def sharing(self, recipe: Recipe) -> int:
        """How many sites a recipe's pooled batch is reckoned to be shared by: those of the roster, if there is one."""
        return self.n_sites or recipe.federation.min_sites

    def check(self, recipe: Recipe, request: Request, run_id: int) -> Reply | None:
        """Hold recipe and request against the policy.

        Returns: what a site says that enrols under a recipe which it refuses: its policy and nothing of its images;
        None for all that is granted.

        Raises: RefusedError.
        """
        verdicts = self.judge(recipe)
        against = [one for one in limiting.refused(verdicts) if one.code != "secagg.plain"]  # whose time is later
        if str(run_id) not in ledger.read(self.home) and (not against or request.phase == "enrol"):
            log.info("event=asked run=%d", run_id)
            for line in limiting.table(verdicts):
                log.info("event=asked run=%d %s", run_id, line)
        if against and request.phase == "enrol" and not request.stage:
            return Reply(values={"site": self.name, "versions": phases.versions(), "policy": self.limits.as_dict()})
        if against:
            raise RefusedError(against[0].code, f"{against[0].asked}; site.yaml says {against[0].line!r}")
        asked.check(recipe, request, self.limits, self.n_sites)
        return None

    def begin(self, recipe: Recipe, request: Request, run_id: int) -> None:
        """Take note of a run that is asked for; before a request's arrays, or an image, are touched.

        A run that is resumed counts again: a site cannot tell it from a new one of the same recipe.

        Raises: RefusedError for one run too many, or more than the machine may give.
        """
        runs, key = ledger.read(self.home), str(run_id)
        if key not in runs and (before := ledger.begun(runs)) >= self.policy.max_runs:
            raise RefusedError(
                "policy.runs",
                f"{before} runs were begun in 30 days; site.yaml says 'max_runs: {self.policy.max_runs}'",
            )
        self._check_machine(recipe, runs.get(key))
        if key not in runs or request.stage not in parts.STAGES:
            ledger.asked(self.home, run_id)

    def worked(self, run_id: int, seconds: float) -> None:
        """Take note of the time that an answer took."""
        ledger.worked(self.home, run_id, seconds)

    def _check_machine(self, recipe: Recipe, run: Begun | None) -> None:
        machine = self.policy.machine
        if machine.hours is not None and run is not None and run.seconds >= 3600 * machine.hours:
            raise _too_much("hours", machine.hours, f"{run.seconds / 3600:.1f} hours were worked on this run")
        if machine.memory_gb is not None and (memory := memory_bytes(recipe) / GB) > machine.memory_gb:
            raise _too_much("memory_gb", machine.memory_gb, f"it takes about {memory:.1f} GB of memory")
        if machine.disk_gb is not None and (disk := disk_bytes(recipe, self._images(recipe)) / GB) > machine.disk_gb:
            raise _too_much("disk_gb", machine.disk_gb, f"it leaves about {disk:.1f} GB on the disk")

    def _images(self, recipe: Recipe) -> int:
        """In the store that the run would use; none where there is no such store yet."""
        found = [path for path in (self.data, store_path(self.home, recipe.image_px)) if (path / INDEX).exists()]
        return len(Store.open(found[0])) if found else 0


def _too_much(key: str, most: float, text: str) -> RefusedError:
    return RefusedError("policy.machine", f"{text}; site.yaml says 'machine: {{{key}: {most:g}}}'")


def memory_bytes(recipe: Recipe) -> int:
    """What a run takes of a site's memory, about, where it trains on the processor: without a step's images."""
    return COPIES * asked.model_bytes(recipe) + BESIDE


def disk_bytes(recipe: Recipe, images: int) -> int:
    """What a run leaves on a site's disk, about: the features of its images, and its state from round to round."""
    tokens = (recipe.image_px // recipe.student.patch_size) ** 2 + 1
    width = ARCHS[recipe.student.arch][0] * recipe.adapt.n_last_blocks
    model = asked.model_bytes(recipe)
    models = MODELS_KEPT + IN_PARTS * (2 * model > 1e6 * recipe.federation.part_mb)
    features = images * (1 + recipe.adapt.views) * tokens * width * 4 if "adapt" in recipe.phases else 0
    return features + models * model
