"""What --resume may go on from: the same images, sites, recipe and arms, in files that can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from sim.arms.plan import ArmPlan, finished

DEEP = b"[" * 200_000


@pytest.fixture
def again(two_workers: Any, simulate: Any, tmp_path: Path) -> Callable[..., Any]:
    """`again(change)` copies a finished run, changes the copy and resumes it; nothing may be lost by that."""

    def run(change: Callable[[Path], Any]) -> Any:
        out = tmp_path / "out"
        shutil.copytree(two_workers.out, out)
        change(out)
        before = {path.name for path in out.iterdir()}
        ran = simulate("--resume", out=out)
        assert "Traceback" not in ran.stderr
        assert before <= {path.name for path in out.iterdir()}
        assert (out / "work" / "seed-0" / "federated" / "model.safetensors").exists()
        return ran

    return run


def options(**values: Any) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        path = out / "simulation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


# ---- the options


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": []},
        {"seeds": "abc"},
        {"seeds": [0.5]},
        {"seeds": [True]},
        {"seeds": [0, 0]},
        {"seeds": [-1]},
        {"data": 5},
        {"by": 3},
        {"arms": "federated"},
        {"arms": [1]},
        {"arms": []},
        {"arms": ["centralised"]},
        {"recipe": []},
        {"recipe": "demo"},
    ],
    ids=str,
)
def test_options_that_the_command_would_not_have_written(again: Any, values: dict[str, Any]) -> None:
    ran = again(options(**values))
    assert ran.code == 4
    assert "simulation.json: damaged" in " ".join(ran.stderr.split())


@pytest.mark.parametrize(
    ("values", "named"),
    [({"by": "iid:2"}, "recipe and sites"), ({"seeds": [1]}, "recipe"), ({"arms": ["federated"]}, "arms")],
    ids=str,
)
def test_options_that_changed(again: Any, values: dict[str, Any], named: str) -> None:
    ran = again(options(**values))
    assert ran.code == 2
    assert f"was prepared with other {'arms and ' if 'by' in values else ''}{named} than there are now" in " ".join(
        ran.stderr.split()
    )


def test_a_recipe_that_changed(again: Any) -> None:
    def change(out: Path) -> None:
        recipe = json.loads((out / "simulation.json").read_text())["recipe"]
        options(recipe=recipe | {"adapt": recipe["adapt"] | {"lr": 1e-5}})(out)

    ran = again(change)
    assert ran.code == 2
    assert "was prepared with other recipe" in ran.stderr


def test_a_store_that_grew(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    first, more = make_images(tmp_path / "first"), make_images(tmp_path / "more", {"delta": 9}, {"delta": ["Blob"]})
    ingest(first, tmp_path / "store", 64)
    ran = simulate("--arms", "histogram", data=tmp_path / "store")
    assert ran.code == 0, ran.stderr
    ingest(more, tmp_path / "store", 64)
    grown = simulate("--resume", out=ran.out)
    assert grown.code == 2
    assert "was prepared with other images and" in grown.stderr
    assert (ran.out / "metrics.json").exists()


# ---- damage


def test_all_is_kept_if_the_journal_is_empty_and_the_store_cannot_be_opened(again: Any) -> None:
    def change(out: Path) -> None:
        (out / "simulation.jsonl").write_bytes(b"")
        index = out / "store" / "index.sqlite"
        index.write_bytes(index.read_bytes()[:3000])

    assert again(change).code == 3


def test_a_start_that_fails_keeps_arms_that_have_begun(tmp_path: Path) -> None:
    from sim.options import abandon

    for name in ("simulation.json", "work/seed-0/federated/journal.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    abandon(tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("name", ["simulation.json", "simulation.jsonl", "work/seed-0/federated/journal.jsonl"])
@pytest.mark.parametrize("content", [DEEP + b"\n", b"\xff\xfe\n", b"\n"], ids=["deep", "bytes", "blank"])
def test_a_damaged_file_of_ours(again: Any, name: str, content: bytes) -> None:
    ran = again(lambda out: (out / name).write_bytes(content))
    assert ran.code == 4
    assert name.rpartition("/")[2] in ran.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100::50] = bytes(byte ^ 0xFF for byte in data[100::50])
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_scores_are_made_again(again: Any, two_workers: Any, damage: Callable[[Path], Any]) -> None:
    for arm in ("federated", "centralized"):
        assert (two_workers.out / "work" / "seed-0" / arm / "sites" / "01" / "scores.npz").exists()

    def change(out: Path) -> None:
        damage(out / "work" / "seed-0" / "federated" / "sites" / "01" / "scores.npz")
        damage(out / "work" / "seed-0" / "centralized" / "sites" / "01" / "scores.npz")

    ran = again(change)
    assert ran.code == 0, ran.stderr
    assert ran.hashes == two_workers.hashes
    assert ran.metrics["results"] == two_workers.metrics["results"]


# ---- folders


def test_sites_of_like_names_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["St. Mary", "St.+Mary", "st. mary", "St", "St_", "..", "/", "ä", "x" * 300, ""]
    plan = ArmPlan(recipe=Recipe(), store=tmp_path, sites={name: [] for name in names}, folder=tmp_path)
    folders = {plan.arm_folder(f"local:{name}") for name in names} | {plan.arm_folder("federated")}
    assert len({folder.name.casefold() for folder in folders}) == len(names) + 1
    assert all(folder.parent == tmp_path and len(folder.name) < 60 for folder in folders)
    assert plan.arm_folder("local:St. Mary").name == "local-00-St_Mary"


def test_an_arm_of_another_site_is_not_this_ones(two_workers: Any, tmp_path: Path) -> None:
    work = two_workers.out / "work" / "seed-0"
    sites = {path: json.loads((work / "shards" / f"{n:02d}.json").read_text()) for n, path in enumerate("abc")}
    sites = dict(zip(("alpha", "beta", "gamma"), sites.values(), strict=True))
    recipe = recipes.load(two_workers.out / "recipe.yaml")
    plan = ArmPlan(recipe=recipe, store=two_workers.out / "store", sites=sites, folder=tmp_path / "work")
    shutil.copytree(work, plan.folder)
    assert finished(plan, "local:alpha")
    assert finished(plan, "federated")
    shutil.rmtree(plan.arm_folder("local:alpha"))
    shutil.copytree(plan.arm_folder("local:beta"), plan.arm_folder("local:alpha"))
    assert not finished(plan, "local:alpha")
    assert not finished(replace(plan, recipe=curriculum.changed(recipe, seed=5)), "federated")


# ---- who trains on what


def test_the_centralized_arm_trains_on_what_the_sites_train_on(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    """With a given split at one site only, which the others' must not undo."""

    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["split"] = ("test" if row["patient_id"] < "a12" else "train") if row["source"] == "alpha" else ""

    ran = simulate("--arms", "centralized,federated", data=make_images(tmp_path / "images", change=change))
    assert ran.code == 0, ran.stderr

    def roster(arm: str) -> list[dict[str, Any]]:
        journal = (ran.out / "work" / "seed-0" / arm / "journal.jsonl").read_text()
        return json.loads(journal.splitlines()[0])["data"]["roster"]

    (pooled,) = roster("centralized")
    for part in ("train", "val", "test"):
        assert pooled[part] == sum(site[part] for site in roster("federated"))
    store = Store.open(ran.out / "store")
    train = View.of(store, "all").split(Membership.of(recipes.load(ran.out / "recipe.yaml")), "train")
    stated = np.array([split or "" for split in store.splits])
    assert not (stated[train] == "test").any()
    assert (stated == "test").any()
