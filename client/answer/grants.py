"""Grants, before a run touches an image: the policy against the recipe, the machine, and how many runs.

The same for runs in the clear and under masks.  A simulation on one's own images (`home` in the node's configuration)
has no policy, and is bound by none of it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.contract import limits as limiting
from chexfound.contract.detached import Envelope
from chexfound.contract.limits import Limits, Verdict
from chexfound.contract.request import PartRequest, Reply, Request
from chexfound.data.store.index import INDEX
from chexfound.data.store.reader import Store
from chexfound.errors import RefusedError
from chexfound.host import machine as has
from chexfound.phases import enrol
from chexfound.recipe import curriculum
from chexfound.recipe.schema import ARCHS, Recipe
from client.answer import asked, hospital
from client.home import ledger, membership
from client.home.ledger import Begun
from client.home.paths import store_path
from client.home.policy import Policy

log = logging.getLogger("chexfound.client")
GB = 10**9
COPIES = 10  # of the model in memory: weights, gradients, two moments and teacher; as much for messages
# Numbers that a block keeps of each token and channel for the way back; measured: 17 (ViT-S, bf16) to 49 (preset demo).
ACTIVATIONS = 16
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
        """Give the grant of a node's site; None for a simulated one.

        Raises: ConfigError if site.yaml cannot be read.
        """
        if "home" in node_config:
            return None
        home = hospital.folder_of(node_config)
        member = hospital.member_home(node_config)
        n_sites = None if member is None else len(membership.present(member).sites.sites)
        data = Path(str(node_config.get("data", "")))
        return Grant(home=home, name=str(node_config["site"]), data=data, policy=Policy.load(home), n_sites=n_sites)

    @property
    def limits(self) -> Limits:
        """Give what the coordinator is told of it."""
        return self.policy.limits(self.n_sites or 1)

    def judge(self, recipe: Recipe) -> list[Verdict]:
        """A verdict on each line of site.yaml that bears on a recipe."""
        return limiting.judge(recipe, self.limits, self.sharing(recipe))

    def sharing(self, recipe: Recipe) -> int:
        """How many sites a recipe's pooled batch is reckoned to be shared by: those of the roster, if there is one."""
        return self.n_sites or recipe.federation.min_sites

    def check(self, recipe: Recipe, envelope: Envelope[Request], run_id: int) -> Reply | None:
        """Hold recipe and request against the policy.

        Returns: what a site says that enrols under a recipe which it refuses: its policy and nothing of its images;
        None for all that is granted.

        Raises: RefusedError.
        """
        verdicts, request = self.judge(recipe), envelope.message
        against = [one for one in limiting.refused(verdicts) if one.code != "secagg.plain"]  # whose time is later
        if ledger.key_of(recipe, run_id) not in ledger.read(self.home) and (not against or request.phase == "enrol"):
            log.info("event=asked run=%d", run_id)
            for line in limiting.table(verdicts):
                log.info("event=asked run=%d %s", run_id, line)
        if against and request.kind == "enrol":
            return Reply(values={"site": self.name, "versions": enrol.versions(), "policy": self.limits.as_dict()})
        if against:
            raise RefusedError(against[0].code, f"{against[0].asked}; site.yaml says {against[0].line!r}")
        asked.check(recipe, envelope, self.limits, self.n_sites)
        return None

    def begin(self, recipe: Recipe, request: Request, run_id: int) -> None:
        """Take note of a run that is asked for; before a request's arrays, or an image, are touched.

        A run that is resumed counts again: a site cannot tell it from a new one of the same recipe.

        Raises: RefusedError for one run too many, or more than the machine may give.
        """
        runs, key = ledger.read(self.home), ledger.key_of(recipe, run_id)
        if key not in runs and (before := ledger.begun(runs)) >= self.policy.max_runs:
            raise RefusedError(
                "policy.runs",
                f"{before} runs were begun in 30 days; site.yaml says 'max_runs: {self.policy.max_runs}'",
            )
        self._check_machine(recipe, request.batch_size, runs.get(key))
        if key not in runs or not isinstance(request, PartRequest):
            ledger.asked(self.home, key)

    def worked(self, recipe: Recipe, run_id: int, seconds: float) -> None:
        """Take note of the time that an answer took."""
        ledger.worked(self.home, ledger.key_of(recipe, run_id), seconds)

    def _check_machine(self, recipe: Recipe, batch: int, run: Begun | None) -> None:
        machine = self.policy.machine
        if machine.hours is not None and run is not None and run.seconds >= 3600 * machine.hours:
            raise _too_much("hours", machine.hours, f"{run.seconds / 3600:.1f} hours were worked on this run")
        disk = disk_bytes(recipe, self._images(recipe))
        memory = memory_bytes(recipe, self.sharing(recipe), batch, on_gpu=has.device() != "cpu")
        _check_room(
            "memory_gb", machine.memory_gb, memory, has.memory(), f"it takes about {memory / GB:.1f} GB of memory"
        )
        _check_room(
            "disk_gb", machine.disk_gb, disk, _disk(self.home), f"it leaves about {disk / GB:.1f} GB on the disk"
        )

    def _images(self, recipe: Recipe) -> int:
        """In the store that the run would use; none where there is no such store yet."""
        found = [path for path in (self.data, store_path(self.home, recipe.image_px)) if (path / INDEX).exists()]
        return len(Store.open(found[0])) if found else 0


def _too_much(key: str, most: float, text: str) -> RefusedError:
    return RefusedError("policy.machine", f"{text}; site.yaml says 'machine: {{{key}: {most:g}}}'")


def _check_room(key: str, most: float | None, taken: float, there: float | None, text: str) -> None:
    """Raise RefusedError for more than site.yaml grants; or, where it grants all, than the machine has (bytes)."""
    if most is not None and taken / GB > most:
        raise _too_much(key, most, text)
    if most is None and there is not None and taken > there:
        raise RefusedError("policy.machine", f"{text}, and this machine has {there / GB:.1f} GB in all")


def _disk(home: Path) -> int:
    """How large the disk is that a site's home is on, or will be; bytes."""
    return shutil.disk_usage(next(path for path in (home, *home.absolute().parents) if path.exists())).total


def memory_bytes(recipe: Recipe, n_sites: int, batch: int = 0, *, on_gpu: bool = False) -> int:
    """Give what a run takes of a site's memory, about, and never much more.

    Args:
        recipe: of the run.
        n_sites: that share a pooled batch.
        batch: images a step that are asked for, where that is known: fewer sites may share than there are.
        on_gpu: what a step keeps is in a GPU's own.
    """
    model = COPIES * asked.model_bytes(recipe) + BESIDE
    if on_gpu:
        return model
    steps = []
    if "pretrain" in recipe.phases:
        for stage in curriculum.stages(recipe):
            steps.append(_step_bytes(stage, max(batch, limiting.shares(stage.train, n_sites)[1])))
    if "adapt" in recipe.phases:
        width = ARCHS[recipe.student.arch][0] * recipe.adapt.n_last_blocks
        images = max(batch, limiting.shares(recipe.adapt, n_sites)[1])
        steps.append(4 * images * _tokens(recipe, recipe.image_px) * width)
    return model + max(steps, default=0)


def _step_bytes(recipe: Recipe, images: int) -> int:
    """Estimate the bytes of one step of pretraining: what its blocks keep of each token for the way back."""
    crops, (width, depth, _) = recipe.crops, ARCHS[recipe.student.arch]
    tokens = 2 * _tokens(recipe, crops.global_crops_size)
    tokens += crops.local_crops_number * _tokens(recipe, crops.local_crops_size)
    blocks = 1 if recipe.train.checkpointing else depth
    size = 4 if recipe.compute_precision.param_dtype == "fp32" else 2
    return size * ACTIVATIONS * images * tokens * width * blocks


def _tokens(recipe: Recipe, px: int) -> int:
    return (px // recipe.student.patch_size) ** 2 + 1


def disk_bytes(recipe: Recipe, images: int) -> int:
    """Give what a run leaves on a site's disk, about: the features of its images, and its state from round to round."""
    tokens = _tokens(recipe, recipe.image_px)
    width = ARCHS[recipe.student.arch][0] * recipe.adapt.n_last_blocks
    model = asked.model_bytes(recipe)
    models = MODELS_KEPT + IN_PARTS * (2 * model > 1e6 * recipe.federation.part_mb)
    features = images * (1 + recipe.adapt.views) * tokens * width * 4 if "adapt" in recipe.phases else 0
    return features + models * model
