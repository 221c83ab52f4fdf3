"""Outputs of a simulation: figures, curves, pictures, the model, TensorBoard, the report."""

from __future__ import annotations

import datetime
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.durable.files import replace_file, write_json, write_text
from chexfound.durable.journal import read_journal
from chexfound.evaluate.results import LOCAL, SCHEMA
from chexfound.host.machine import RUN_PACKAGES, machine, versions
from chexfound.model.weights import export
from chexfound.model.weights.load import load_backbone, load_head
from chexfound.parsing.names import ALL_SITES
from chexfound.recipe import load as recipes
from server.rounds import result
from sim.arms import compare
from sim.arms.plan import FITTED_ARMS, ArmPlan, finished, trained_on

SAMPLES, ATTENDED = 6, 2  # pictures a site in the report


def write(
    out: Path,
    plans: Sequence[ArmPlan],
    arms: Sequence[str],
    notes: Sequence[str],
    not_trained: Sequence[dict[str, str]],
    seconds: dict[str, float],
) -> Path:
    """Write everything that a run leaves in its output folder; returns the report's path."""
    plan = plans[0]
    write_text(out / "recipe.yaml", recipes.to_yaml(plan.recipe))
    trained = [arm for arm in arms if arm not in FITTED_ARMS]
    judged = "adapt" in plan.recipe.phases and "evaluate" in plan.recipe.phases
    metrics = _metrics(plans, arms, judged) | {"not_trained": list(not_trained), "notes": list(notes)}
    metrics["seconds"] |= seconds
    write_json(out / "metrics.json", metrics)
    _write_history(out, plan, trained)
    _write_sites(out, plan, trained)
    _write_samples(out, plan)
    best = "federated" if "federated" in arms else trained[0] if trained else None
    if best:
        export.of_finished(plan.arm_folder(best), out / "model", metrics)
        if judged:
            _write_attention(out, plan)
    from chexfound.report.build import build

    return build(out)


def _metrics(plans: Sequence[ArmPlan], arms: Sequence[str], judged: bool) -> dict[str, Any]:
    """All figures: the first seed's at the top, the others' under `replicates`."""
    plan = plans[0]
    scores = [compare.all_scores(one, arms) if judged else {} for one in plans]
    by_seed = []
    for one, by_arm in zip(plans, scores, strict=True):
        results, differences, comparisons = compare.figures(one, by_arm)
        by_seed.append(
            {
                "seed": one.recipe.seed,
                "results": results,
                "differences": differences,
                "comparisons": comparisons,
                "model_sha256": {arm: finished(one, arm)["model_sha256"] for arm in arms if arm not in FITTED_ARMS},
                "drawn": {arm: one.drawn(arm) for arm in arms if arm not in FITTED_ARMS},
            }
        )
    over_seeds, others_over_seeds = compare.over_seeds(plans, scores)
    phase_seconds, moved = result.costs(plan.arm_folder("federated")) if "federated" in arms else ({}, {})
    return {
        "schema": SCHEMA,
        "sites": list(plan.sites),
        "findings": list(plan.recipe.adapt.findings or ()),
        **by_seed[0],
        "replicates": by_seed[1:],
        "across_seeds": over_seeds,
        "comparisons_across_seeds": others_over_seeds,
        "seconds": {f"federated/{phase}": value for phase, value in phase_seconds.items()},
        "bytes": {f"federated/{phase}": value for phase, value in moved.items()},
        "secagg": result.secagg(read_journal(plan.arm_folder("federated") / "journal.jsonl"))
        if "federated" in arms
        else None,
        "void": None,  # it and `floor` are benchmarks/hog_floor.py's to write
        "floor": None,
        "machine": machine(),
        "versions": versions(*RUN_PACKAGES),
        "date": datetime.date.today().isoformat(),
    }


def _write_history(out: Path, plan: ArmPlan, arms: Sequence[str]) -> None:
    """history.json, and the same curves for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    curves: dict[str, dict[str, Any]] = {"pretrain": {}, "adapt": {}}
    for arm in arms:
        for phase, rows in result.history(plan.arm_folder(arm)).items():
            curves[phase][arm] = rows
    write_json(out / "history.json", curves)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    for phase, by_arm in curves.items():
        for arm, rows in by_arm.items():
            for site in sorted({row["site"] for row in rows}):
                folder = "all-sites" if site == ALL_SITES else f"site-{plan_index(plan, site):02d}"
                with SummaryWriter(out / "tensorboard" / plan.arm_folder(arm).name / folder) as writer:
                    for row in (row for row in rows if row["site"] == site):
                        for name, value in row.items():
                            if name not in ("step", "site", "log_k"):
                                writer.add_scalar(f"{phase}/{name}", value, row["step"])


def plan_index(plan: ArmPlan, site: str) -> int:
    """A site's place in the roster; the lone site of an arm has none and is 0."""
    return list(plan.sites).index(site) if site in plan.sites else 0


def _epochs(plan: ArmPlan, trained: Sequence[str], site: str, train: Mapping[str, int]) -> dict[str, float]:
    """Tell how often each arm that saw a site's training images pretrained on them, by the images that it drew."""
    arms = {
        "federated": ("federated", site, train[site]),
        "local": (f"{LOCAL}{site}", site, train[site]),
        "centralized": ("centralized", trained_on("centralized"), sum(train.values())),
    }
    return {
        kind: round(drawn[counted_by] / images, 2)
        for kind, (arm, counted_by, images) in arms.items()
        if arm in trained and (drawn := plan.drawn(arm).get("pretrain"))
    }


def _write_sites(out: Path, plan: ArmPlan, trained: Sequence[str]) -> None:
    recipe, store = plan.recipe, Store.open(plan.store)
    train = {name: len(View.of(store, name, p).split(plan.membership, "train")) for name, p in plan.sites.items()}
    refused = Counter(Path(file).parts[0] for file, _ in store.refused)
    rows = []
    for name, patients in plan.sites.items():
        view = View.of(store, name, patients)
        parts = {which: view.split(plan.membership, which) for which in ("train", "val", "test")}
        labels = store.labels(view.ids, store.findings)
        shown = [store.views[place] or "unknown" for place in view.ids]
        rows.append(
            {
                "name": name,
                "images": len(view),
                "patients": len(patients),
                **{which: len(ids) for which, ids in parts.items()},
                "refused": refused[name] if set(refused) <= set(plan.sites) else None,  # told by folder only
                "epochs": _epochs(plan, trained, name, train),
                "views": {kind: shown.count(kind) for kind in sorted(set(shown))},
                "findings": {
                    finding: {
                        "positives": int((labels[:, column] == 1).sum()),
                        "negatives": int((labels[:, column] == 0).sum()),
                        "unknown": int((labels[:, column] < 0).sum()),
                    }
                    for column, finding in enumerate(store.findings)
                    if finding in (recipe.adapt.findings or store.findings)
                },
            }
        )
    write_json(out / "sites.json", rows)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _write_samples(out: Path, plan: ArmPlan) -> None:
    store = Store.open(plan.store)
    arrays = {}
    for name, patients in plan.sites.items():
        ids = View.of(store, name, patients).ids
        arrays[name] = store.pixels(ids[np.linspace(0, len(ids) - 1, min(SAMPLES, len(ids))).astype(int)])
    _save_arrays(
        out / "artifacts" / "samples.npz",
        {f"site {number}": array for number, array in enumerate(arrays.values())},
    )
    write_json(out / "artifacts" / "samples.json", {f"site {number}": name for number, name in enumerate(arrays)})


def _write_attention(out: Path, plan: ArmPlan) -> None:
    """GLoRI's attention over held-out images: two of each site, one with and one without the commonest finding."""
    recipe, findings = plan.recipe, list(plan.recipe.adapt.findings or ())
    if recipe.adapt.head != "glori" or not (out / "model" / "head.safetensors").is_file():
        return
    backbone, head = load_backbone(out / "model"), load_head(out / "model")
    store = Store.open(plan.store)
    chosen: list[int] = []
    sites: list[str] = []
    for name, patients in plan.sites.items():
        ids = View.of(store, name, patients).split(plan.membership, "test")
        labels = store.labels(ids, list(findings))
        column = int(np.argmax(np.minimum((labels == 1).sum(0), (labels == 0).sum(0)))) if len(ids) else 0
        for value in (1, 0):
            found = ids[labels[:, column] == value][: ATTENDED // 2]
            chosen += found.tolist()
            sites += [name] * len(found)
    if not chosen:
        return
    images = store.pixels(np.array(chosen))
    with torch.inference_mode():
        layers = backbone.get_intermediate_layers(
            torch.from_numpy(images), recipe.adapt.n_last_blocks, return_class_token=True
        )
        logits, attention = head([layer[0] for layer in layers], [layer[1] for layer in layers], return_attention=True)
    side = recipe.image_px // recipe.student.patch_size
    maps = attention.mean(1).reshape(len(chosen), len(findings), side, side).numpy().astype(np.float32)
    _save_arrays(
        out / "artifacts" / "attention.npz",
        {
            "images": images,
            "maps": maps,
            "scores": torch.sigmoid(logits).numpy(),
            "labels": store.labels(np.array(chosen), list(findings)),
        },
    )
    captions = [f"{name}, {store.views[place] or 'view unknown'}" for name, place in zip(sites, chosen, strict=True)]
    write_json(
        out / "artifacts" / "attention.json",
        {"findings": list(findings), "sites": sites, "captions": captions},
    )
