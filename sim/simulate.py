"""The simulation: take in the images, deal them to sites, run the arms, compare, report."""

from __future__ import annotations

import difflib
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store, is_store
from chexfound.data.store.split import Membership, View
from chexfound.durable.files import canonical
from chexfound.durable.journal import Journal
from chexfound.errors import ConfigError, DataError
from chexfound.host import machine
from chexfound.pretrain.train import slow_arithmetic
from chexfound.recipe import check as recipes_check
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import fitted
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe
from chexfound.secagg.parameters import MINIMUM, Parameters, labelling
from server.rounds.work import choose_findings
from sim import outputs
from sim.arms import alone as arms_alone
from sim.arms import federated
from sim.arms import plan as arms
from sim.arms.plan import FEDERATED_ARMS, FITTED_ARMS, ArmPlan
from sim.display import Display
from sim.engine.pool import Pool
from sim.options import ARMS, Options, PartitionRule, abandon, damage_told
from sim.partition import OTHER, partition
from strategies import composition


class Simulation:
    """One run of `chexfound-sim` in one output folder.

    Everything that takes long is kept as it is done; calling `run` again goes on from there.
    """

    def __init__(self, options: Options, out: Path, workers: int, display: Display, *, resume: bool = False) -> None:
        self.options, self.out, self.workers, self.display = options, out, workers, display
        self.resume = resume
        self.recipe = recipes_check.validate(options.recipe, str(out / "simulation.json"))
        self.notes: list[str] = []

    def run(self) -> Path:
        """Do it all; returns the report's path.

        Raises: ChexfoundError; what was done is kept.
        """
        started = time.monotonic()
        with damage_told(self.out / "simulation.jsonl"):
            self.journal = Journal(self.out / "simulation.jsonl")
        with self.journal as journal:  # its lock keeps a second process out
            if Options.read(self.out) != self.options:
                raise ConfigError(f"{self.out}: another process has just started a run here; choose another folder")
            plans, arm_names = self._begin()
            with Pool(min(self.workers, _at_work(plans, arm_names)), self.display.update, self._warn) as pool:
                self._run_arms(plans, arm_names, pool)
            self.display.clear()
            self.display.say("comparing the arms, drawing the report")
            journal.append({"event": "finished", "seconds": round(time.monotonic() - started, 1)})
            seconds = self._seconds()
        return outputs.write(self.out, plans, arm_names, self.notes, self._not_trained(plans[0]), seconds)

    # -- before the arms

    def _begin(self) -> tuple[list[ArmPlan], list[str]]:
        """Everything that can be found wrong is found here, before any training; then nothing is left behind."""
        try:
            self._check_early()
            store, sites = self._prepare()
            plans = [self._plan(store, sites, seed) for seed in self.options.seeds]
            names = self._arm_names(plans[0])
        except (ConfigError, DataError):
            if not self.resume:
                abandon(self.out)
            raise
        self._check_unchanged(plans, names)
        for plan in plans:
            plan.write_shards()
        return plans, names

    def _check_early(self) -> None:
        """Check what needs no image, before hours are spent on taking them in."""
        if slow := slow_arithmetic(self.recipe.compute_precision.param_dtype, torch.device(machine.device()).type):
            self.display.say(f"[yellow]slow[/yellow]: {escape(slow)}")
        rule = PartitionRule.parse(self.options.by)
        self._check_composition(rule.shards or None)
        if not rule.shards or is_store(Path(self.options.data)):
            return
        names = [f"shard-{number}" for number in range(rule.shards)]
        for arm in self.options.arms:
            if arm.startswith("local:") and arm.removeprefix("local:") not in (*names, OTHER):
                raise ConfigError(f"--arms {arm!r}: there is no such site; the sites are {', '.join(names)}")

    def _check_composition(self, n_sites: int | None) -> None:
        if self._federates:
            composition.check(self.recipe, n_sites)

    @property
    def _federates(self) -> bool:
        return any(arm in FEDERATED_ARMS for arm in self.options.arms)

    def _check_unchanged(self, plans: Sequence[ArmPlan], names: Sequence[str]) -> None:
        """Note what all arms stand on, or check that it is what was noted when the run was prepared."""
        stands = {
            "images": Store.open(plans[0].store).digest(),
            "sites": hashlib.sha256(canonical(plans[0].sites)).hexdigest(),
            "recipe": {str(plan.recipe.seed): recipes.digest(plan.recipe) for plan in plans},
            "arms": list(names),
        }
        noted = [entry["stands_on"] for entry in self.journal.entries if "stands_on" in entry]
        if not noted:
            self.journal.append({"event": "prepared", "stands_on": stands})
        elif other := sorted(key for key in stands if noted[-1].get(key) != stands[key]):
            raise ConfigError(
                f"{self.out}: the run was prepared with other {' and '.join(other)} than there are now, so its "
                "finished arms cannot be compared with new ones; give back what it was started with, or start anew "
                "with another --out"
            )

    def _prepare(self) -> tuple[Path, dict[str, list[str]]]:
        """The store and the sites."""
        started = time.monotonic()
        data = Path(self.options.data)
        if is_store(data):
            path = data
        else:
            path = self.out / "store"
            if not path.exists():
                summary = ingest(
                    data,
                    path,
                    self.recipe.image_px,
                    progress=lambda done, total: self.display.update("images", "taken in", done, total),
                )
                self.journal.append(
                    {"event": "timed", "what": "ingest", "seconds": round(time.monotonic() - started, 1)}
                )
                self.display.clear()
                self.display.say(
                    f"{summary.images} images of {summary.patients} patients taken in, "
                    f"{len(summary.refused)} files refused"
                )
        store = Store.open(path)
        if store.px != self.recipe.image_px:
            raise DataError(
                f"{path}: the store holds images of {store.px} px, the recipe asks for image_px {self.recipe.image_px}"
            )
        for file, reason in store.refused[:5]:
            self.display.say(f"[yellow]refused[/yellow] {escape(file)}: {escape(reason)}")
        if len(store.refused) > 5:
            self.display.say(f"… and {len(store.refused) - 5} more; all are listed in the store's index")
        if store.refused:
            self.notes.append(f"{len(store.refused)} files were refused, each with a reason in the store's index.")
        dealt = partition(store, self.options.by, self.options.seeds[0])
        self.notes += dealt.notes
        for note in dealt.notes:
            self.display.say(escape(note))
        self._check_sites(store, dealt.sites)
        return path, dealt.sites

    def _check_sites(self, store: Store, sites: dict[str, list[str]]) -> None:
        self.recipe, told = fitted(self.recipe, len(sites))
        for text in told:
            self.display.say(escape(text))
        self.notes += [f"{text}." for text in told]
        self._check_composition(len(sites))
        known = set(store.findings)
        for finding in self.recipe.adapt.findings or () if "adapt" in self.recipe.phases else ():
            if finding not in known:
                near = difflib.get_close_matches(finding, known, n=1)
                raise ConfigError(
                    f"adapt.findings: no image is labelled {finding!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known)) or 'none'}")
                )
        for name, patients in sites.items():
            view = View.of(store, name, patients)
            counts = {
                which: len(view.split(Membership.simulated(self.options.seeds[0], self.recipe.split), which))
                for which in ("train", "val", "test")
            }
            for seed in self.options.seeds:
                if not len(view.split(Membership.simulated(seed, self.recipe.split), "train")):
                    raise DataError(
                        f"site {name!r} has no training image with seed {seed} "
                        f"(its {len(view)} images fell to validation and test); give it more patients"
                    )
            self.display.say(
                f"site [bold]{escape(name)}[/bold]: {len(patients)} patients, {len(view)} images: "
                + ", ".join(f"{n} {w}" for w, n in counts.items())
            )

    def _plan(self, store_path: Path, sites: dict[str, list[str]], seed: int) -> ArmPlan:
        # The in-process grid has all its sites at once: no other number is worth waiting for.
        recipe = changed(self.recipe, seed=seed, federation=changed(self.recipe.federation, min_sites=len(sites)))
        if "adapt" in recipe.phases:
            first = changed(recipe, seed=self.options.seeds[0])  # the same findings in every replicate
            counts = self._summed(label_counts(store_path, sites, first))
            recipe = changed(recipe, adapt=changed(recipe.adapt, findings=choose_findings(first, counts)))
        return ArmPlan(
            recipe=recipe,
            store=store_path.resolve(),
            sites=sites,
            folder=self.out.resolve() / "work" / f"seed-{seed}",
        )

    def _summed(self, counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give the counts by which a federation would choose findings: secure aggregation tells no rare one's."""
        if self.recipe.aggregation != "secagg" or not self._federates:
            return counts
        least = labelling(MINIMUM, Parameters.of(len(counts), self.recipe.secagg.colluders).c)
        at = Counter(name for site in counts for name, count in site.items() if sum(count.values()))
        rare = sorted(name for name, sites in at.items() if sites < least)
        note = f"Labelled at fewer than {least} sites, of which secure aggregation tells no sum: {', '.join(rare)}."
        if rare and note not in self.notes:
            self.notes.append(note)
        return [{name: count for name, count in site.items() if name not in rare} for site in counts]

    def _arm_names(self, plan: ArmPlan) -> list[str]:
        wanted = self.options.arms
        odd = [arm for arm in wanted if arm.startswith("local:") and arm.removeprefix("local:") not in plan.sites]
        if odd:
            raise ConfigError(f"--arms {odd[0]!r}: there is no such site; the sites are {', '.join(plan.sites)}")
        names: list[str] = []
        for arm in ARMS:
            if arm == "local":
                local = [f"local:{site}" for site in plan.sites if "local" in wanted or f"local:{site}" in wanted]
                names += [name for name in local if arms_alone.trainable(plan, name.removeprefix("local:"))]
            elif arm in wanted:
                names.append(arm)
        if "shuffled" in names and "federated" not in names:
            names.remove("shuffled")
            self.notes.append(
                "The shuffled-labels floor stands on the federated backbone; without the federated arm it is left out."
            )
        if "adapt" not in plan.recipe.phases:
            names = [arm for arm in names if arm == "federated" or arm == "centralized" or arm.startswith("local:")]
        return names

    def _not_trained(self, plan: ArmPlan) -> list[dict[str, str]]:
        return [
            {"arm": f"local:{site}", "reason": "no finding has both classes among its training images"}
            for site in plan.sites
            if ("local" in self.options.arms or f"local:{site}" in self.options.arms)
            and not arms_alone.trainable(plan, site)
        ]

    # -- the arms

    def _run_arms(self, plans: Sequence[ArmPlan], names: Sequence[str], pool: Pool) -> None:
        """All arms of all seeds: first those in which all sites take part, then the lone sites side by side."""
        alone: dict[str, tuple[ArmPlan, str]] = {}
        self.left = sum(arm not in FITTED_ARMS and not arms.finished(plan, arm) for plan in plans for arm in names)
        for plan in plans:
            seed = plan.recipe.seed
            todo = [arm for arm in names if arm not in FITTED_ARMS and not arms.finished(plan, arm)]
            if done := [arm for arm in names if arm not in FITTED_ARMS and arm not in todo]:
                self.display.say(f"seed {seed}: already done: {escape(', '.join(done))}")
            for arm in todo:
                if arm in FEDERATED_ARMS:
                    began, self.display.arm = time.monotonic(), arm
                    federated.run_federated(plan, arm, pool)
                    self._done(plan, arm, time.monotonic() - began)
                else:
                    alone[f"{arm} (seed {seed})"] = (plan, arm)
        self.display.arm = ""
        for label, seconds in pool.run([(label, ("sim.arms.alone:run_alone", task)) for label, task in alone.items()]):
            self._done(*alone[label], seconds)

    def _done(self, plan: ArmPlan, arm: str, seconds: float) -> None:
        self.journal.append({"event": "timed", "what": arm, "seed": plan.recipe.seed, "seconds": round(seconds, 1)})
        arms.discard(plan, arm)
        self.display.clear()
        self.left -= 1
        left = f"; {self.left} to go" if self.left else ""
        self.display.say(f"seed {plan.recipe.seed}: [bold]{escape(arm)}[/bold] done in {seconds:.0f} s{left}")

    def _warn(self, seed: int, arm: str, found: Sequence[dict[str, Any]]) -> None:
        """Say what a round found to ail an arm's pretraining: one line a symptom, at the sites where it begins."""
        for symptom in dict.fromkeys(one["symptom"] for one in found):
            same = [one for one in found if one["symptom"] == symptom]
            where = "; ".join(f"{one['site']}: {one['seen']}" for one in same)
            self.display.say(
                f"seed {seed}: [bold]{escape(arm)}[/bold], round {same[0]['since'] + 1}: "
                f"[yellow]{symptom}[/yellow] ({escape(where)}): {same[0]['advice']}"
            )

    def _seconds(self) -> dict[str, float]:
        """Wall seconds, added over resumptions; arms of replicates are named arm@seed."""
        seconds: dict[str, float] = {}
        for entry in self.journal.entries:
            if entry["event"] == "timed":
                suffix = (
                    f"@{entry['seed']}" if entry.get("seed", self.options.seeds[0]) != self.options.seeds[0] else ""
                )
                name = entry["what"] + suffix
                seconds[name] = round(seconds.get(name, 0.0) + entry["seconds"], 1)
            elif entry["event"] == "finished":
                seconds["total"] = round(seconds.get("total", 0.0) + entry["seconds"], 1)
        return seconds


def _at_work(plans: Sequence[ArmPlan], names: Sequence[str]) -> int:
    """How many processes can have work at one time: one a site, then one a lone arm."""
    alone = [arm for arm in names if arm not in FEDERATED_ARMS and arm not in FITTED_ARMS]
    return max(len(plans[0].sites), len(plans) * len(alone))


def label_counts(store_path: Path, sites: dict[str, list[str]], recipe: Recipe) -> list[dict[str, Any]]:
    """Positives and negatives among each site's training images, as a site enrols with them."""
    store = Store.open(store_path)
    counts = []
    for name, patients in sites.items():
        labels = store.labels(View.of(store, name, patients).split(Membership.of(recipe), "train"), store.findings)
        counts.append(
            {
                finding: {
                    "positives": int((labels[:, column] == 1).sum()),
                    "negatives": int((labels[:, column] == 0).sum()),
                }
                for column, finding in enumerate(store.findings)
            }
        )
    return counts
