"""Every wrong input ends with a message, an exit code, and no folder that blocks the corrected command."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.durable import journal
from sim.engine.pool import Pool

NOTHING: tuple[str, ...] = ("--arms", "histogram")  # no training: what is wrong is found before it


def text(ran: Any) -> str:
    """Standard error on one line (the console folds what is long)."""
    return " ".join(ran.stderr.split())


def check_refused(ran: Any, code: int, *parts: str) -> None:
    """The message and the code, and that nothing is left behind."""
    assert ran.code == code, ran.stderr
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr
    for part in parts:
        assert part in text(ran), ran.stderr
    assert not ran.out.exists()


# ---- images


def test_no_images(simulate: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(simulate(data=tmp_path / "empty"), 3, "no images: neither DICOM files nor a manifest.csv")
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    (tmp_path / "empty" / "x.png").write_bytes(b"not listed")
    check_refused(simulate(data=tmp_path / "empty"), 3, "1 PNG or JPEG files lie there, and need a manifest.csv")


def test_no_data(simulate: Any, tmp_path: Path) -> None:
    check_refused(simulate(data=tmp_path / "absent"), 2, "--data", "no such folder")
    from sim.cli import main

    assert main(["--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_skipped_and_listed(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    path = images / "beta" / "03-0.png"
    path.write_bytes(path.read_bytes()[:200])
    ran = simulate(*NOTHING, data=images)
    assert ran.code == 0, ran.stderr
    assert "76 images of 63 patients taken in, 1 files refused" in ran.stdout
    assert "refused beta/03-0.png: cannot be decoded" in " ".join(ran.stdout.split())
    sites = {site["name"]: site["refused"] for site in json.loads((ran.out / "sites.json").read_text())}
    assert sites == {"alpha": 0, "beta": 1, "gamma": 0}


def test_all_images_unreadable(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"alpha": 9})
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    check_refused(simulate(data=images), 3, "no usable image among 11 files", "cannot be decoded")


# ---- the manifest


def without_column(rows: list[dict[str, str]]) -> None:
    for row in rows:
        del row["patient_id"]


def unknown_file(rows: list[dict[str, str]]) -> None:
    rows[3]["file"] = "alpha/absent.png"


def two_splits(rows: list[dict[str, str]]) -> None:
    for number, row in enumerate(rows):
        row["split"] = ("train", "test")[number % 2]


def outside(rows: list[dict[str, str]]) -> None:
    rows[0]["file"] = "../secret.png"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without_column, ["manifest.csv", "no column 'patient_id'"]),
        (unknown_file, ["manifest.csv", "line 5", "no file 'alpha/absent.png'"]),
        (two_splits, ["manifest.csv", "patient 'a00' of 'alpha' is in two splits, test and train"]),
        (outside, ["line 2", "must be below the manifest's folder"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_manifest_at_fault(simulate: Any, make_images: Any, tmp_path: Path, change: Any, parts: list[str]) -> None:
    check_refused(simulate(data=make_images(tmp_path / "images", change=change)), 3, *parts)


def test_the_corrected_command_runs(simulate: Any, make_images: Any, tmp_path: Path, tiny_images: Path) -> None:
    """In the same output folder, which a bad start must not block."""
    bad = make_images(tmp_path / "images", change=unknown_file)
    out = tmp_path / "out"
    check_refused(simulate(data=bad, out=out), 3, "absent.png")
    check_refused(simulate("--set", "adapt.findings=[Blub]", out=out), 2, "no image is labelled 'Blub'")
    assert simulate(*NOTHING, out=out).code == 0


def test_a_batch_that_does_not_divide_becomes_one_that_does_and_it_is_said(simulate: Any, tmp_path: Path) -> None:
    ran = simulate(*NOTHING, "--set", "adapt.pooled_batch_size=11", out=tmp_path / "out")
    assert ran.code == 0
    told = "adapt.pooled_batch_size is 12, not 11: 3 sites take 4 images each"
    assert told in ran.stdout
    assert f"{told}." in ran.metrics["notes"]


def test_a_folder_that_was_there_stays(simulate: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = simulate("--set", "adapt.findings=[Blub]", out=tmp_path / "out")
    assert ran.code == 2
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---- the recipe


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("train.ronds=3", ["unknown key 'train.ronds'; did you mean 'train.rounds'?"]),
        ("sed=3", ["unknown key 'sed'; did you mean 'seed'?"]),
        ("train.rounds=none", ["train.rounds", "got 'none'"]),
        ("train.rounds", ["write KEY=VALUE"]),
        ("=3", ["write KEY=VALUE"]),
        ("train.rounds=[", ["not valid YAML"]),
        ("name.x=1", ["'name' holds a value, not a section"]),
        ("train.batch_size=4", ["give either batch_size (a site's) or pooled_batch_size"]),
        ("crops.global_crops_size=30", ["multiple of student.patch_size 16 (got 30)"]),
        ("adapt.min_positives=500", ["no finding has adapt.min_positives 500", "the closest is 'Blob'"]),
        ("adapt.findings=[Blub]", ["no image is labelled 'Blub'; did you mean 'Blob'?"]),
    ],
)
def test_a_recipe_at_fault(simulate: Any, setting: str, parts: list[str]) -> None:
    check_refused(simulate("--set", setting, recipe=None), 2, *parts)


def test_an_unknown_recipe(simulate: Any, tmp_path: Path) -> None:
    check_refused(simulate(recipe="lapto"), 2, "no recipe 'lapto': did you mean 'laptop'?")
    (tmp_path / "r.yaml").write_text("trainn:\n  rounds: 3\n")
    check_refused(simulate(recipe=str(tmp_path / "r.yaml")), 2, "r.yaml", "unknown key 'trainn'; did you mean 'train'?")
    (tmp_path / "r.yaml").write_text("- a\n")
    check_refused(simulate(recipe=str(tmp_path / "r.yaml")), 2, "a recipe is a mapping")


# ---- options


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--by", "iid:99"), ["64 patients cannot fill 99 sites: some would be empty; ask for fewer"]),
        (("--by", "iid:0"), ["there must be at least 1 site"]),
        (("--by", "idd:3"), ["did you mean"]),
        (("--by", "dirichlet:3:-1"), ["ALPHA must be a number above 0"]),
        (("--seeds", "0,x"), ["--seeds '0,x': whole numbers with commas between"]),
        (("--seeds", "1,1"), ["--seeds '1,1': each seed once"]),
        (("--seeds", "-1"), ["none negative"]),
        (("--arms", "federated,centralised"), ["--arms: unknown 'centralised'; choose from federated,centralized"]),
        (("--arms", ","), ["--arms: unknown ''"]),
        (("--workers", "0"), ["--workers 0: at least one"]),
    ],
)
def test_options_at_fault(simulate: Any, tiny_store_path: Path, arguments: tuple[str, ...], parts: list[str]) -> None:
    arguments = tuple(f"{arguments[0]}={value}" for value in arguments[1:])
    if arguments[0].startswith("--workers"):
        arguments = ("--workers", "0")
    check_refused(simulate(*arguments, data=tiny_store_path), 2, *parts)


def test_options_of_another_kind(simulate: Any, capsys: Any) -> None:
    for arguments in (("--workers", "many"), ("--no-such",)):
        with pytest.raises(SystemExit) as ended:
            simulate(*arguments)
        assert ended.value.code == 2


def test_a_site_without_a_training_image(simulate: Any) -> None:
    check_refused(
        simulate("--set", "split.train=0.001"), 3, "has no training image with seed 0", "give it more patients"
    )


def test_a_store_of_another_image_size(simulate: Any, tiny_store_path: Path) -> None:
    sizes = ("--set", "image_px=32")
    check_refused(
        simulate(*sizes, data=tiny_store_path), 3, "the store holds images of 64 px, the recipe asks for image_px 32"
    )
    assert tiny_store_path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--by", "iid:2", "--arms", "local:alpha"),
        ("--by", "dirichlet:2:1", "--set", "aggregation=secagg"),
    ],
)
def test_what_needs_no_image_is_seen_before_they_are_taken_in(
    simulate: Any, monkeypatch: Any, arguments: tuple[str, ...]
) -> None:
    from sim import simulate as module

    monkeypatch.setattr(module, "ingest", lambda *_, **__: pytest.fail("hours were spent"))
    check_refused(simulate(*arguments), 2, "sites" if "--arms" not in arguments else "no such site")


def test_no_more_processes_than_can_have_work(simulate: Any, monkeypatch: Any) -> None:
    from sim import simulate as module

    asked: list[int] = []

    def pool(workers: int, *listeners: Any) -> Any:
        asked.append(workers)
        return Pool(1, *listeners)

    monkeypatch.setattr(module, "Pool", pool)
    assert simulate(*NOTHING, "--workers", "24").code == 0
    assert asked == [3]  # sites


# ---- one class


def test_a_finding_with_one_class(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    """Named in the recipe, it trains no row, and its figures are null with the reason."""
    images = make_images(tmp_path / "images", {"alpha": 12, "gamma": 12}, {"alpha": ["Blob"], "gamma": ["Bar"]})
    ran = simulate("--arms", "federated,histogram", "--set", "adapt.findings=[Bar, Blob]", data=images)
    assert ran.code == 0, ran.stderr
    for row in ran.metrics["results"]:
        if row["finding"] == "Bar":
            assert (row["auroc"], row["auroc_ci"], row["auprc"], row["auprc_ci"]) == (None, None, None, None)
            assert row["reason"]


# ---- the output folder


def test_an_output_folder_in_use(simulate: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    ran = simulate(out=tmp_path)
    assert (ran.code, sorted(path.name for path in tmp_path.iterdir())) == (2, ["mine.txt"])
    assert "the output folder is in use; choose another with --out" in text(ran)
    ran = simulate(out=tmp_path / "mine.txt")
    assert ran.code == 2
    ran = simulate(out=tmp_path / "mine.txt" / "out")
    assert ran.code == 2
    assert "a part of its path is a file" in text(ran)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/proc/x"], ids=["long", "nul", "proc"])
def test_an_output_folder_that_cannot_be(simulate: Any, tmp_path: Path, name: str, resume: tuple[str, ...]) -> None:
    ran = simulate(*resume, out=tmp_path / name)
    assert ran.code in (2, 8), ran.stderr
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_a_path(simulate: Any, tmp_path: Path) -> None:
    check_refused(simulate(data=tmp_path / ("x" * 300)), 2, "--data", "File name too long")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail] can't allocate memory\nmore"), MemoryError(), RecursionError(), OSError(5, "x")],
)
def test_what_no_check_foresaw(simulate: Any, monkeypatch: Any, error: Exception) -> None:
    """One line, and the run is kept; the traceback is for whoever mends it."""
    from sim import simulate as module

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module.Simulation, "_run_arms", fails)
    ran = simulate(*NOTHING)
    assert ran.code == 1
    assert ran.stderr.startswith(f"error: {type(error).__name__}: ")
    assert len(ran.stderr.splitlines()) == 1
    assert "is kept: --resume goes on from it. The traceback is in" in text(ran)
    assert "in fails" in (ran.out / "error.log").read_text()
    monkeypatch.undo()
    assert simulate("--resume", out=ran.out).code == 0


def test_a_worker_s_traceback_travels(tmp_path: Path) -> None:
    with Pool(2) as pool, pytest.raises(RuntimeError, match="ValueError: math domain error") as caught:
        pool.result(pool.submit(0, "a task", ("math:sqrt", (-1.0,))))
    assert "Traceback" in "".join(caught.value.__notes__)


def test_an_output_folder_that_holds_a_run(simulate: Any, two_workers: Any) -> None:
    before = two_workers.metrics
    ran = simulate(out=two_workers.out)
    assert ran.code == 2
    assert "in use; continue it with --resume, or choose another with --out" in text(ran)
    assert two_workers.metrics == before


def test_two_processes_on_one_folder(simulate: Any, two_workers: Any) -> None:
    with journal.Journal(two_workers.out / "simulation.jsonl"):
        ran = simulate("--resume", out=two_workers.out)
    assert ran.code == 2
    assert "another process is writing this journal" in text(ran)


def test_two_that_start_at_once(simulate: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The second has put its own options there before the first has its lock: neither runs with the other's."""
    from sim import options as module_options

    real = module_options.start

    def start(options: Any, out: Path) -> None:
        real(options, out)
        real_file = out / "simulation.json"
        real_file.write_text(real_file.read_text().replace('"by": "source"', '"by": "iid:2"'))

    monkeypatch.setattr(module_options, "start", start)
    ran = simulate(*NOTHING, out=tmp_path / "out")
    assert ran.code == 2
    assert "another process has just started a run here" in text(ran)
    assert (tmp_path / "out" / "simulation.json").exists()


def test_resume_without_a_run(simulate: Any, tmp_path: Path) -> None:
    for out in (tmp_path / "absent", tmp_path):
        ran = simulate("--resume", out=out)
        assert ran.code == 2
        assert "no simulation to resume here" in text(ran)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "clash",
    [
        ("--by", "iid:2"),
        ("--seeds", "1"),
        ("--arms", "random"),
        ("--set", "seed=1"),
        ("--data", "x"),
        ("--recipe", "demo"),
    ],
)
def test_resume_with_other_options(simulate: Any, two_workers: Any, clash: tuple[str, str]) -> None:
    ran = simulate("--resume", *clash, out=two_workers.out)
    assert ran.code == 2
    assert f"leave out {clash[0]}" in text(ran)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"data": "x"}', '{"data":"x","by":1,"seeds":2,"arms":3,"recipe":4}']
)
def test_resume_with_damaged_options(simulate: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "simulation.json").write_text(content)
    ran = simulate("--resume", out=tmp_path)
    assert ran.code == 4
    assert "simulation.json: damaged" in text(ran)


def test_a_resumed_run_that_cannot_start_is_kept(simulate: Any, make_images: Any, tmp_path: Path) -> None:
    """Its images went away; they may come back."""
    images = make_images(tmp_path / "images")
    ingest(images, tmp_path / "store", 64)
    ran = simulate(*NOTHING, data=tmp_path / "store", out=tmp_path / "out")
    assert ran.code == 0
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    again = simulate("--resume", out=tmp_path / "out")
    assert again.code == 3
    assert (tmp_path / "out" / "metrics.json").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert simulate("--resume", out=tmp_path / "out").code == 0


# ---- a full disk


def check_stopped_and_resumed(ran: Any, simulate: Callable[..., Any], expected: str) -> None:
    assert ran.code in (7, 8), ran.stderr  # 7: it was a site's disk, and the coordinator is told a code
    assert "Traceback" not in ran.stderr
    assert "no space left to write" in text(ran) if ran.code == 8 else "error 'storage' (exit code 8)" in text(ran)
    assert not list(ran.out.rglob("*.tmp"))
    resumed = simulate("--resume", out=ran.out)
    assert resumed.code == 0, resumed.stderr
    assert resumed.hashes == {"federated": expected}


@pytest.mark.parametrize("number", [8, 16, 24])
def test_the_disk_fills_up(
    simulate: Any, one_worker: Any, tiny_store_path: Path, tmp_path: Path, monkeypatch: Any, number: int
) -> None:
    """At the n-th file that is made durable; nothing is half-written, and the run goes on when there is room."""
    calls, real = iter(range(1, 10**6)), os.fsync

    def fsync(handle: int) -> None:
        if next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", fsync)
        ran = simulate("--arms", "federated", data=tiny_store_path, out=tmp_path / "out")
    check_stopped_and_resumed(ran, simulate, one_worker.hashes["federated"])


def test_the_disk_is_full_at_once(simulate: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", fsync)
        ran = simulate(*NOTHING, out=tmp_path / "out")
    assert ran.code == 8
    assert simulate(*NOTHING, out=tmp_path / "out").code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("12m")` mounts a tmpfs of that size, or changes its size."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    where = tmp_path / "disk"
    where.mkdir()

    def mount(size: str) -> Path:
        options = f"size={size}" + (",remount" if os.path.ismount(where) else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True)
        if done.returncode:
            pytest.skip("this machine does not let a small disk be mounted")
        return where

    yield mount
    if os.path.ismount(where):
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.parametrize("size", ["100k", "6m", "14m"])
def test_a_disk_that_is_really_full(
    simulate: Any, one_worker: Any, small_disk: Callable[[str], Path], tiny_images: Path, size: str
) -> None:
    """At taking in the images, at a site's state, at the coordinator's weights."""
    out = small_disk(size) / "out"
    ran = simulate("--arms", "federated", out=out)
    small_disk("200m")
    check_stopped_and_resumed(ran, simulate, one_worker.hashes["federated"])
