"""What a site notes of runs, and what it takes one to cost; what is refused by them is in tests/hostile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chexfound.contract.request import PartRequest, Request
from chexfound.errors import ConfigError, RefusedError
from chexfound.host import machine
from chexfound.recipe import curriculum
from chexfound.recipe import load as recipes
from client.answer import asked, grants
from client.answer.grants import GB, Grant
from client.home import ledger
from client.home.policy import Policy

ENROL = Request(phase="enrol")


def grant(home: Path, **demands: object) -> Grant:
    return Grant(home=home, name="NORTH", data=home / "data", policy=Policy(**demands), n_sites=None)


def test_a_simulated_site_has_no_policy(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("max_runs: 1")
    assert Grant.of({"site": "NORTH", "home": str(tmp_path), "secured": True}) is None


def test_a_deployed_site_has_that_of_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    found = Grant.of({"site": "NORTH", "data": "/images"})
    assert found is not None
    assert (found.policy, found.n_sites, found.home) == (Policy(), None, tmp_path / "sites" / "NORTH")


def test_runs_are_counted_once_each_and_for_thirty_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, now = recipes.load("demo"), time.time()
    for _ in range(3):
        grant(tmp_path, max_runs=1).begin(recipe, ENROL, 7)
    with pytest.raises(RefusedError, match="max_runs: 1"):
        grant(tmp_path, max_runs=1).begin(recipe, ENROL, 8)
    monkeypatch.setattr(time, "time", lambda: now + 29 * 86400)
    with pytest.raises(RefusedError):
        grant(tmp_path, max_runs=1).begin(recipe, ENROL, 8)
    monkeypatch.setattr(time, "time", lambda: now + 31 * 86400)
    grant(tmp_path, max_runs=1).begin(recipe, ENROL, 8)


def test_a_run_begins_with_the_first_part_of_it_that_comes(tmp_path: Path) -> None:
    recipe = recipes.load("demo")
    part = PartRequest(phase="pretrain", stage="deliver")
    grant(tmp_path, max_runs=1).begin(recipe, part, 7)
    with pytest.raises(RefusedError, match="max_runs: 1"):
        grant(tmp_path, max_runs=1).begin(recipe, part, 8)


def test_a_run_that_goes_on_is_one_run_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hours are not begun anew after thirty days."""
    recipe, now = recipes.load("demo"), time.time()
    for days in (0, 20, 40):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * 86400)
        grant(tmp_path).begin(recipe, ENROL, 7)
        if not days:
            grant(tmp_path).worked(recipe, 7, 3600.0)
    (one,) = ledger.read(tmp_path).values()
    assert (one.began, one.last, one.seconds) == (now, now + 40 * 86400, 3600.0)


def test_hours_are_those_of_one_run(tmp_path: Path) -> None:
    recipe, held = recipes.load("demo"), {"machine": Policy().machine.__class__(hours=2.0)}
    grant(tmp_path, **held).begin(recipe, ENROL, 7)
    grant(tmp_path).worked(recipe, 7, 3600.0)
    grant(tmp_path, **held).begin(recipe, ENROL, 7)
    grant(tmp_path).worked(recipe, 7, 3601.0)
    with pytest.raises(RefusedError, match=r"2\.0 hours were worked"):
        grant(tmp_path, **held).begin(recipe, ENROL, 7)
    grant(tmp_path, **held).begin(recipe, ENROL, 8)


@pytest.mark.parametrize("text", ["", "[]", '{"7": {}}', '{"7": {"began": 1.0, "last": -1.0}}', '{"7": 1}', "{"])
def test_a_damaged_list_of_runs_is_told_and_not_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(ConfigError, match=r"runs\.json"):
        grant(tmp_path).begin(recipes.load("demo"), ENROL, 7)


def test_what_a_run_takes_is_near_what_was_measured() -> None:
    """1.1 GB in the worker for the preset demo; ViT-L's preset is for GPUs, and `check` asks for 16 GiB beside them."""
    assert 1.0 < grants.memory_bytes(recipes.load("demo"), 4) / GB < 1.3
    assert 15 < grants.memory_bytes(recipes.load("vitl16-cxr1m"), 4, on_gpu=True) / GB < 18
    assert grants.disk_bytes(recipes.load("demo"), 0) < GB
    assert grants.disk_bytes(recipes.load("demo"), 10_000) > GB


def test_what_travels_in_parts_lies_on_the_disk_too() -> None:
    """As student and teacher: what came last, and what left last."""
    demo = recipes.load("demo", {"phases": ("pretrain",)})
    model = asked.model_bytes(demo)
    for part_mb, models in ((2 * model / 1e6, 7), (2 * model / 1e6 - 0.001, 11)):
        recipe = curriculum.changed(demo, federation=curriculum.changed(demo.federation, part_mb=part_mb))
        assert grants.disk_bytes(recipe, 10**6) == models * model


def test_what_a_step_keeps_is_of_its_images_crops_and_depth() -> None:
    demo = recipes.load("demo")
    base = grants.memory_bytes(demo, 1, on_gpu=True)

    def step(n_sites: int = 1, **sections: dict[str, object]) -> int:
        changed = {name: curriculum.changed(getattr(demo, name), **values) for name, values in sections.items()}
        return grants.memory_bytes(curriculum.changed(demo, phases=("pretrain",), **changed), n_sites) - base

    assert step() == 4 * step(4) == 4 * 16 * 32 * (2 * 37 + 2 * 10) * 96 * 4  # see presets/demo.yaml
    assert step(train={"pooled_batch_size": 64}) == 2 * step()
    assert step(crops={"local_crops_number": 0}) < step() < step(crops={"local_crops_number": 256})
    assert step(train={"checkpointing": True}) * 4 == step()


def test_more_than_the_machine_has_is_refused_though_no_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = recipes.load("demo")
    few, many = (curriculum.changed(demo, crops=curriculum.changed(demo.crops, local_crops_number=n)) for n in (2, 256))
    monkeypatch.setattr(machine, "memory", lambda: 4 * GB)
    grant(tmp_path).begin(few, ENROL, 7)
    large = curriculum.changed(many, train=curriculum.changed(many.train, pooled_batch_size=4096))
    with pytest.raises(RefusedError, match=r"GB of memory, and this machine has 4\.0 GB in all"):
        grant(tmp_path).begin(large, ENROL, 8)
    monkeypatch.setattr(grants, "_disk", lambda home: 10**6)
    with pytest.raises(RefusedError, match="GB on the disk, and this machine has"):
        grant(tmp_path).begin(few, ENROL, 9)
    assert set(ledger.read(tmp_path)) == {ledger.key_of(few, 7)}


def test_a_step_is_as_large_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooled batch that sixty-four sites could share may be asked of the two that a recipe needs at least."""
    demo = recipes.load("demo")
    recipe = curriculum.changed(demo, train=curriculum.changed(demo.train, pooled_batch_size=4096))
    many = Grant(home=tmp_path, name="NORTH", data=tmp_path / "data", policy=Policy(), n_sites=64)
    monkeypatch.setattr(machine, "memory", lambda: 3 * GB // 2)
    many.begin(recipe, Request(phase="pretrain", batch_size=64), 7)
    with pytest.raises(RefusedError, match="GB of memory, and this machine has 1.5 GB"):
        many.begin(recipe, Request(phase="pretrain", batch_size=2048), 7)
