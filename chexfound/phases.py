"""What a site does in a phase: (site, recipe, request) -> reply.

One piece of code for all: the ClientApp calls it at a hospital, the simulation calls it for the
centralized arm and for each site alone.  A site's state lives under its home on its own disk:
everything that a later request stands on is written, atomically, before the reply is given.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

import chexfound
from chexfound import cells, machine
from chexfound import recipe as recipes
from chexfound.adapt import features
from chexfound.adapt.train import HeadTrainer, predict, trainable_findings
from chexfound.cells import Told
from chexfound.data.split import SIMULATED, Membership, Part, View
from chexfound.data.store import UNKNOWN
from chexfound.errors import DataError, DivergedError, ProtocolError, StateError
from chexfound.evaluate.histograms import histograms
from chexfound.evaluate.metrics import Scores, result_rows, save_scores
from chexfound.model import checkpoint, vit
from chexfound.model.checkpoint import load_tensors
from chexfound.model.glori import build_head
from chexfound.parts import Apart
from chexfound.pretrain import curriculum, health, ranks, saves, teacher, watch
from chexfound.pretrain.beginning import FILE
from chexfound.pretrain.probe import Probe
from chexfound.pretrain.train import DTYPES, Pretrainer
from chexfound.schema import Recipe, Split

log = logging.getLogger("chexfound.site")
log.addHandler(logging.NullHandler())  # whoever runs the site shows its log; a simulation has its own display
COUNTS = ("images", "patients", "train", "val", "test")
ARM, TRAINED_ON = "federated", "all sites, federated"  # of the rows of results
Progress = Callable[[str, int, int], None]  # phase, done, of how many


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the coordinator asks of a site.  The recipe is not in it: it is the run's."""

    phase: str  # enrol | counts | pretrain | features | adapt | evaluate
    round: int = 0
    step: int = 0  # global step of the first local step
    steps: int = 0
    batch_size: int = 0
    roster_index: int = 0
    findings: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    apart: Apart | None = None  # the tensors, where they come apart from it
    # Of secure aggregation: advertise | share | masked | consistency | unmask; of arrays apart: deliver | collect.
    stage: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # what the coordinator says in that stage, as JSON
    chunk: np.ndarray | None = None  # uint8: what it delivers
    part_bytes: int = 0  # of a reply's arrays, from which on they are to be kept apart from it; 0: never
    fresh: bool = False  # start without state of earlier rounds; a site's own decision, which no message carries
    left_out: tuple[str, ...] = ()  # of what `parted` names: the site has no part in it; its own decision too

    def shared(self) -> dict[str, Any]:
        """The fields that all sites are told alike."""
        fields = {name: getattr(self, name) for name in ("phase", "round", "step", "steps", "batch_size")}
        return fields | {"findings": list(self.findings)}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a site answers: tensors and plain JSON values, by name; or arrays under masks, by bits of their ring."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    masked: dict[int, np.ndarray] = field(default_factory=dict)
    apart: Apart | None = None  # the tensors or masked arrays, where they are still to be collected
    chunk: np.ndarray | None = None  # uint8: what was collected of them


@dataclass
class Site:
    """One hospital, or the process that plays it: its images and its disk.

    Args:
        shuffle_labels: permute the training labels by patient (the floor that tells how much of a
            score comes from no anatomy at all); only the simulation sets it.
        gpus: how many of the machine's GPUs it pretrains on, or "all"; empty: as $CHEXFOUND_GPUS says.
        cells: patients below which a count, a figure or a row does not leave; 0 (a simulation): all leave.
        words: names of findings that may leave; None (a simulation): all.
        split_key: by which its patients fall into parts; None (a simulation): by the recipe's seed.
        fractions: of its patients; None (a simulation): the recipe's.
        digest_key: under which the digest of its store leaves.
        limits: what its site.yaml grants, as it is told at enrolment; None (a simulation): whatever is asked.
        least: patients and images with a label below which it trains no head; 0 (a simulation): any.
        lineage: whether weights are held against where they may come from (client/weights.py); not in a simulation,
            whose coordinator is oneself.
    """

    view: View
    home: Path
    shuffle_labels: bool = False
    progress: Progress | None = None
    gpus: str = ""
    cells: int = 0
    words: frozenset[str] | None = None
    split_key: bytes | None = field(default=None, repr=False)
    fractions: Split | None = None
    digest_key: bytes = field(default=SIMULATED, repr=False)
    limits: dict[str, Any] | None = None
    least: tuple[int, int] = (0, 0)
    lineage: bool = False
    remembered: dict[str, Any] = field(default_factory=dict)  # digests of files, by what they were taken of

    @property
    def name(self) -> str:
        """The site's name."""
        return self.view.name

    def split(self, recipe: Recipe, which: Part) -> np.ndarray:
        """Ids of the images of a part, in canonical order."""
        return self.view.split(Membership.of(recipe, self.split_key, self.fractions), which)

    def training_ids(self, recipe: Recipe) -> np.ndarray:
        """Ids of the training images, in canonical order."""
        return self.split(recipe, "train")

    def patients(self, ids: np.ndarray) -> list[str]:
        """Key of the patient of each image."""
        return [self.view.store.keys[place] for place in ids]

    def told(self, ids: np.ndarray) -> Told:
        """How many images these are, if they are of enough patients."""
        return cells.told(len(ids), len(set(self.patients(ids))), self.cells)

    def findings(self) -> list[str]:
        """Names that the store knows and that may leave, sorted."""
        return [name for name in self.view.store.findings if self.words is None or name in self.words]

    def labels(self, ids: np.ndarray, findings: Sequence[str]) -> np.ndarray:
        """Labels int8 (N, F) of images, for work of which anything leaves.

        −1 in all of a finding that the store does not know, whose name may not leave, or that too few of these
        patients have or have not: of the three a coordinator cannot say which it is.
        """
        labels = self.view.store.labels(ids, findings)
        open_ = cells.large(labels, self.patients(ids), self.cells)
        if self.words is not None:
            open_ &= np.array([finding in self.words for finding in findings], bool)
        labels[:, ~open_] = UNKNOWN
        return labels

    def training_labels(self, recipe: Recipe, findings: Sequence[str]) -> np.ndarray:
        """Labels int8 (N, F) of the training images, as `labels` gives them."""
        ids = self.training_ids(recipe)
        labels = self.labels(ids, findings)
        if self.shuffle_labels:
            from chexfound.evaluate.floors import permute_by_patient

            labels = permute_by_patient(labels, self.patients(ids), recipe.seed, "shuffled", self.name)
        return labels

    def report(self, phase: str, before: int = 0, of: int | None = None) -> Callable[[int, int], None] | None:
        """The progress callback of a phase, of which `before` steps (of `of`) were done in earlier rounds."""
        if self.progress is None:
            return None
        progress = self.progress
        return lambda done, total: progress(phase, before + done, of or total)


def run(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Do what is asked, once the recipe's thread count is set (another count gives other bits).

    Raises: ChexfoundError; the site's state is then what it was before.
    """
    torch.set_num_threads(recipe.threads)
    request = replace(request, tensors={n: t for n, t in request.tensors.items() if n != FILE})  # looked at before
    if site.view.store.px != recipe.image_px:
        raise DataError(
            f"site {site.name!r}: the store holds images of {site.view.store.px} px, the recipe asks "
            f"for {recipe.image_px}; ingest again with --image-px {recipe.image_px}"
        )
    if request.phase not in PHASES:
        raise ProtocolError(f"unknown phase {request.phase!r}")
    if request.phase in ("pretrain", "adapt") and not (request.steps > 0 and request.batch_size > 0):
        raise ProtocolError(f"phase {request.phase!r} asks for no step, or for no image a step")
    return PHASES[request.phase](site, recipe, request)


def enrol(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Counts, versions and hashes; no image, no patient.  Under secure aggregation no count: of findings the names."""
    about = {"site": site.name, "versions": versions(), "cells": site.cells, "withheld": _withholds(site)}
    if site.limits is not None:
        about["policy"] = site.limits
    if recipe.aggregation == "secagg":
        numbers = counts(site, recipe, request).values
        if not numbers["train"]:  # which the coordinator cannot see
            raise DataError(f"site {site.name!r} has no training image, or of few patients; leave it out")
        return Reply(values={**about, "findings": sorted(numbers["findings"])})
    parts = {which: site.told(site.split(recipe, which)) for which in get_args(Part)}
    values = {**about, **_totals(site, parts), **parts, "findings": _listed(site, recipe)}
    store_hmac = hmac.new(site.digest_key, site.view.store.digest().encode(), "sha256").hexdigest()
    return Reply(values={**values, "store_hmac": store_hmac})


def versions() -> dict[str, str]:
    """Give the releases that a site's numbers hang on."""
    return {"chexfound": chexfound.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _withholds(site: Site) -> bool:
    """Whether the site has findings of enough patients whose names may not leave."""
    names = sorted(set(site.view.store.findings) - set(site.findings()))
    labelled = (site.view.store.labels(site.view.ids, names) != UNKNOWN).any(1)
    patients = len(set(site.patients(site.view.ids[labelled])))
    return patients >= max(site.cells, 1)


def _totals(site: Site, parts: Mapping[str, Told]) -> dict[str, Told]:
    """Of all images, where none of the parts is small: else it would be what the others leave."""
    if cells.SUPPRESSED in parts.values():
        return {"images": cells.SUPPRESSED, "patients": cells.SUPPRESSED}
    return {"images": len(site.view.ids), "patients": len(set(site.patients(site.view.ids)))}


def _listed(site: Site, recipe: Recipe) -> dict[str, dict[str, Told]]:
    """Training images with and without each finding that enough patients are labelled for; both, or neither."""
    names = site.findings()
    labels, patients = site.training_labels(recipe, names), site.patients(site.training_ids(recipe))
    numbers = _by_finding(names, labels)
    if not site.cells:
        return numbers
    any_label = site.view.store.labels(site.training_ids(recipe), names) != UNKNOWN
    listed = cells.patients_with(any_label, patients) >= site.cells
    none: dict[str, Told] = {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
    return {name: numbers.get(name, none) for name, one in zip(names, listed.tolist(), strict=True) if one}


def _by_finding(names: Sequence[str], labels: np.ndarray) -> dict[str, dict[str, Told]]:
    """Images with and without each finding that any image is labelled for."""
    counted = zip(names, (labels == 1).sum(0).tolist(), (labels == 0).sum(0).tolist(), strict=True)
    return {name: {"positives": ones, "negatives": zeros} for name, ones, zeros in counted if ones or zeros}


def counts(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Images, patients and the split, and training images by finding, as numbers that are to be added up.

    What is of few patients adds nothing.
    """
    parts = {which: cells.known(site.told(site.split(recipe, which))) for which in get_args(Part)}
    patients = len(set(site.patients(site.view.ids)))
    names = site.findings()
    values = {
        "images": sum(parts.values()),
        "patients": cells.known(cells.told(patients, patients, site.cells)),
        **parts,
        "findings": _by_finding(names, site.training_labels(recipe, names)),
    }
    return Reply(values=values)


def pretrain(site: Site, recipe: Recipe, request: Request) -> Reply:
    """K local steps of DINO + iBOT + KoLeo from the coordinator's student, on one GPU or on several."""
    if ranks.size() == 1 and (gpus := machine.gpus(site.gpus)) > 1:
        from chexfound.pretrain import rank

        return rank.ask_all(site, recipe, request, gpus)  # each of them comes by here again
    ids = site.training_ids(recipe)
    store = site.view.store
    trainer = Pretrainer(
        recipe,
        lambda places: store.pixels(ids[places]),
        len(ids),
        request.roster_index,
        step=request.step,
        device=machine.device(),
    )
    travels = _all_travels(recipe)
    kept = {} if travels else _carried(site, recipe, request)
    if kept:
        trainer.load_state(curriculum.enter(kept, recipe, request.step))
    trainer.load_global(request.tensors)
    _take_teacher(site, trainer, recipe, request, kept)
    # What every site and the coordinator knows of this round, and the next teacher is derived from.
    began = trainer.global_tensors(teacher=True) if recipe.teacher.policy == "rederive" else {}
    progress = site.report("pretrain", request.step, recipe.pretrain_steps)
    under_way = _saves(site, recipe, request, kept) if recipe.train.saveckp_freq else None
    state = "travels" if travels else "kept" if kept else "fresh"
    kept.clear()  # it is in the trainer
    try:
        probe = _probe(site, recipe, request)
        rows = saves.run(trainer, request.step, request.steps, request.batch_size, progress, under_way, probe)
    except DivergedError as error:
        raise saves.diverged(site.home, store, ids, trainer, error) from error
    if not travels:
        _carry(site, recipe, request, trainer.state(copy=False) | checkpoint.add_prefix(began, "model."))
    if ranks.first():
        _warn(site, recipe, request, rows)
    tensors = trainer.global_tensors(teacher=recipe.teacher.policy == "average", copy=False)
    if recipe.train.optimizer_state == "average":
        tensors |= trainer.moments(copy=False)
    if under_way is not None:
        under_way.clear()
    return Reply(tensors=tensors, values={"images": len(ids), "state": state, "history": health.told(rows)})


def _take_teacher(site: Site, trainer: Pretrainer, recipe: Recipe, request: Request, kept: dict[str, Tensor]) -> None:
    """Where no teacher was sent: the one derived anew, the site's own, or, where there is none yet, the student."""
    if any(name.startswith("teacher.") for name in request.tensors):
        return
    if request.step and recipe.teacher.policy == "rederive":
        if not kept:
            raise StateError(
                f"site {site.name!r}: pretraining step {request.step} needs the weights that the round before began "
                "with, and they are not on its disk; resume the run, which sends the teacher once"
            )
        before = checkpoint.with_prefix(kept, "model.")
        derived = teacher.rederived(recipe, request.step, before, request.tensors)
        load_tensors(trainer.model, derived, list(derived))
    elif not kept:
        trainer.model.teacher.load_state_dict(trainer.model.student.state_dict())


def _probe(site: Site, recipe: Recipe, request: Request) -> Probe | None:
    """What looks at the teacher while it trains: the run's findings, or all whose names may leave."""
    config, findings = recipe.health, request.findings or tuple(site.findings())
    ids = site.training_ids(recipe)
    if not config.eval_period_iterations:
        return None
    return Probe(
        lambda places: site.view.store.pixels(ids[places]),
        site.training_labels(recipe, findings),
        site.patients(ids),
        every=config.eval_period_iterations,
        limit=config.probe_images,
        seed=recipe.seed,
        roster_index=request.roster_index,
        dtype=DTYPES[recipe.compute_precision.param_dtype],
        fewest=max(health.FEWEST_PATIENTS, site.cells),
        left_out=request.left_out,
    )


def _warn(site: Site, recipe: Recipe, request: Request, rows: list[dict[str, Any]]) -> None:
    """Say in the site's own log what begins to ail its training."""
    path = site.home / "health" / f"{_digest(recipe)}.json"
    for one in watch.new_symptoms(path, recipe, request.step, rows):
        log.warning(
            "event=warning symptom=%s site=%s round=%d seen=%r advice=%r",
            one.name, site.name, request.round + 1, one.seen, one.advice,
        )  # fmt: skip


def _saves(site: Site, recipe: Recipe, request: Request, kept: dict[str, Tensor]) -> saves.Saves:
    """Where a round keeps its state while it is under way, for a site that dies in it and is asked again."""
    asked = [request.step, request.steps, request.batch_size, request.roster_index]
    given = [checkpoint.digest(tensors) for tensors in (request.tensors, kept)]
    images = [site.view.store.digest(), hashlib.sha256(site.training_ids(recipe).tobytes()).hexdigest()]
    return saves.Saves(site.home / "saves", saves.key(recipes.to_json(recipe), asked, given, images))


def extract(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Take the backbone and make the training images' features of it; they stay here, and the reply holds nothing.

    No sum of them leaves either: whoever chose the backbone would read single images in it (docs/decisions/0012).
    """
    backbone = _backbone(recipe, request.tensors)
    checkpoint.save(site.home / "backbone.safetensors", request.tensors)
    labels = site.training_labels(recipe, request.findings)
    ids = site.training_ids(recipe)
    ids = ids[(labels >= 0).any(1)]
    folder = site.home / "features"
    if not len(ids) or _too_few(site, recipe, labels):
        shutil.rmtree(folder, ignore_errors=True)
        return Reply()
    features.extract(
        recipe,
        backbone,
        lambda places: site.view.store.pixels(ids[places]),
        len(ids),
        request.roster_index,
        folder,
        site.report("features"),
    )
    return Reply()


def adapt(site: Site, recipe: Recipe, request: Request) -> Reply:
    """K local steps of the head on the frozen features; per finding, by how many labelled images."""
    labels = site.training_labels(recipe, request.findings)
    trainable = _trainable(site, recipe, labels) & ~np.isin(request.findings, request.left_out)
    labels = labels[(labels >= 0).any(1)]
    labels = np.where(trainable, labels, np.int8(-1)).astype(np.int8)
    counts = (labels >= 0).sum(0)
    none = _none(site, recipe)
    values = {
        "images": int((labels >= 0).any(1).sum()) or none,
        "labelled": [int(n) or none for n in counts],
    }
    if not trainable.any():
        return Reply(values={**values, "history": []})
    trainer = HeadTrainer(recipe, features.load(site.home / "features"), labels, request.roster_index)
    own_moments = recipe.adapt.optimizer_state == "local"
    if own_moments:
        trainer.load_state(_carried(site, recipe, request))
    trainer.load_global(request.tensors)
    rows = trainer.run(
        request.step,
        request.steps,
        request.batch_size,
        site.report("adapt", request.step, recipe.adapt.total_steps),
    )
    tensors = trainer.global_tensors()
    if own_moments:
        _carry(site, recipe, request, trainer.state())
    else:
        tensors |= trainer.state()
    return Reply(tensors=tensors, values={**values, "history": health.told(rows)})


def evaluate(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Judge backbone and head on the site's held-out patients; the scores stay at the site."""
    backbone_tensors = checkpoint.with_prefix(request.tensors, "backbone.")
    backbone = _backbone(recipe, backbone_tensors or checkpoint.load(site.home / "backbone.safetensors"))
    head = build_head(recipe, len(request.findings))
    load_tensors(head, checkpoint.with_prefix(request.tensors, "head."), list(head.state_dict()))
    ids = site.split(recipe, "test")
    labels = site.labels(ids, request.findings)
    probabilities = predict(backbone, head, site.view.store.pixels(ids), recipe.adapt.n_last_blocks)
    scores = Scores(
        patients=site.patients(ids),
        labels=labels,
        scores=probabilities.reshape(len(ids), len(request.findings)),
        findings=list(request.findings),
    )
    save_scores(site.home / "scores.npz", scores)
    if recipe.aggregation == "secagg":
        return Reply(values={"histograms": histograms(labels, scores.scores)})
    rows = result_rows(
        ARM,
        TRAINED_ON,
        site.name,
        scores,
        recipe.evaluate.bootstrap_samples,
        recipe.evaluate.confidence,
        recipe.seed,
    )
    if site.cells:
        rows = [row if row["n"] else cells.row(row) for row in rows]
    return Reply(values={"results": rows})


PHASES: dict[str, Callable[[Site, Recipe, Request], Reply]] = {
    "enrol": enrol,
    "counts": counts,
    "pretrain": pretrain,
    "features": extract,
    "adapt": adapt,
    "evaluate": evaluate,
}


def _none(site: Site, recipe: Recipe) -> Told:
    """What stands for no labelled image: what stands for few; 0 where masked numbers are added up."""
    return 0 if recipe.aggregation == "secagg" else cells.told(0, 0, site.cells)


def _too_few(site: Site, recipe: Recipe, labels: np.ndarray) -> bool:
    """Whether so few of its training images, or patients, have one of these labels that the site keeps out.

    It then answers as one that has none, so that nobody can tell the two apart.
    """
    ids = site.training_ids(recipe)[(labels >= 0).any(1)]
    patients, images = site.least
    return len(ids) < images or len(set(site.patients(ids))) < patients


def _trainable(site: Site, recipe: Recipe, labels: np.ndarray) -> np.ndarray:
    """Which findings the site trains, of the labels (N, F) of its training images."""
    if not len(labels):
        return np.zeros(labels.shape[1], bool)
    both = trainable_findings(labels)
    if _too_few(site, recipe, np.where(both, labels, np.int8(-1))):
        return np.zeros(labels.shape[1], bool)
    return both


def parted(recipe: Recipe, request: Request) -> list[str]:
    """What of a phase one site may have a part in and another none: findings; of pretraining the probe's figures."""
    if request.phase != "pretrain":
        return list(request.findings)
    return list(health.PROBED) if recipe.health.eval_period_iterations else []


def declared(site: Site, recipe: Recipe, request: Request) -> list[str]:
    """Of what `parted` names, that in which the site has a part."""
    if request.phase == "pretrain":
        probe = _probe(site, recipe, request)
        return probe.figures() if probe is not None else []
    if request.phase == "evaluate":
        labels = site.labels(site.split(recipe, "test"), request.findings)
    else:
        labels = site.training_labels(recipe, request.findings)
    if not len(labels):
        return []
    has = np.any(labels >= 0, axis=0)
    if request.phase == "adapt":
        has = _trainable(site, recipe, labels)
    return [finding for finding, one in zip(request.findings, has.tolist(), strict=True) if one]


def state_folder(site: Site, recipe: Recipe, phase: str) -> Path:
    """Where a site keeps what it carries from a phase's round to the next: STEP.safetensors, by global step."""
    return site.home / "state" / _digest(recipe) / phase


def carries(recipe: Recipe, phase: str) -> bool:
    """Whether a phase's rounds stand on state that stays at the site."""
    if phase == "pretrain":
        return not _all_travels(recipe)
    return phase == "adapt" and recipe.adapt.optimizer_state == "local"


def _backbone(recipe: Recipe, tensors: dict[str, Tensor]) -> vit.VisionTransformer:
    backbone = vit.build(recipe.student, recipe.input, recipe.position_px)
    load_tensors(backbone, tensors, list(backbone.state_dict()))
    return backbone.to(machine.device())


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipes.to_json(recipe).encode()).hexdigest()[:16]


def _all_travels(recipe: Recipe) -> bool:
    """Whether a pretraining round stands on nothing but what the coordinator sends."""
    return (
        recipe.teacher.policy == "average"
        and recipe.train.optimizer_state == "average"
        and recipe.train.centering == "sinkhorn_knopp"
        and not recipe.train.sinkhorn_queue
        and not (recipe.compute_precision.param_dtype == "fp16" and recipe.compute_precision.grad_scaler)
    )


def _carried(site: Site, recipe: Recipe, request: Request) -> dict[str, Tensor]:
    """State as it was at the start of global step `request.step`; nothing at step 0, afresh, or where there is none."""
    if not request.step or request.fresh:
        if ranks.first():
            shutil.rmtree(state_folder(site, recipe, request.phase), ignore_errors=True)
        return {}
    path = state_folder(site, recipe, request.phase) / f"{request.step:08d}.safetensors"
    return checkpoint.load(path) if path.exists() else {}


def _carry(site: Site, recipe: Recipe, request: Request, state: dict[str, Tensor]) -> None:
    """Keep the state for the next round, and this round's own start until the next is done.

    The coordinator may die between our reply and its checkpoint, and then ask for this round again.
    """
    if not ranks.first():
        return
    folder = state_folder(site, recipe, request.phase)
    after = request.step + request.steps
    path = folder / f"{after:08d}.safetensors"
    checkpoint.save(path, state)
    for old in folder.glob("*.safetensors"):
        if int(old.stem) not in (request.step, after):
            old.unlink()
