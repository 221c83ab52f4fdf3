"""What a site does in each phase, and that asking twice gives the same bits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.request import Reply, Request
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import Membership, View
from chexfound.errors import CheckpointError, DataError, ProtocolError
from chexfound.evaluate import floors
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.phases import dispatch
from chexfound.phases.site_state import Site
from chexfound.pretrain.meta_arch import SSLMetaArch
from chexfound.pretrain.train import initial_weights
from server.exchange import protocol

FINDINGS = ("Bar", "Blob")


def own_moments(recipe: Any) -> Any:
    """The recipe with each site keeping its optimizer's moments."""
    train, adapt = (replace(part, optimizer_state="local") for part in (recipe.train, recipe.adapt))
    return replace(recipe, train=train, adapt=adapt)


def student(recipe: Any) -> dict[str, torch.Tensor]:
    return initial_weights(recipe)


def pretrain(recipe: Any, tensors: dict[str, torch.Tensor], step: int = 0) -> Request:
    return Request(phase="pretrain", round=step // 2, step=step, steps=2, batch_size=4, tensors=tensors)


def backbone(recipe: Any) -> dict[str, torch.Tensor]:
    return checkpoint.with_prefix(initial_weights(recipe), "student.backbone.")


def prepared(site: Site, recipe: Any) -> dict[str, torch.Tensor]:
    """A site that has its features; the head to start from."""
    dispatch.run(site, recipe, Request(phase="features", findings=FINDINGS, tensors=backbone(recipe)))
    return build_head(recipe, len(FINDINGS)).state_dict()


def adapt(head: dict[str, torch.Tensor], step: int = 0) -> Request:
    return Request(phase="adapt", round=step // 3, step=step, steps=3, batch_size=4, findings=FINDINGS, tensors=head)


# ---- enrol


def test_enrol_counts(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    values = dispatch.run(make_site("beta"), tiny_recipe, Request(phase="enrol")).values
    assert (values["site"], values["patients"], values["images"]) == ("beta", 20, 24)
    assert values["train"] + values["val"] + values["test"] == 24
    assert set(values["findings"]) == {"Blob", "No Finding"}  # what no training image is labelled with is not told
    blob = values["findings"]["Blob"]
    assert blob["positives"] + blob["negatives"] == values["train"]
    assert dispatch.run(make_site("beta"), tiny_recipe, Request(phase="enrol")).values == values
    assert "b00" not in str(values)  # no patient


def test_a_store_of_another_size(make_images: Any, tmp_path: Any, tiny_recipe: Any) -> None:
    images = make_images(tmp_path / "images", {"alpha": 8})
    ingest(images, tmp_path / "store", 32)
    store = Store.open(tmp_path / "store")
    site = Site(view=View(store, store.ids, "alpha"), home=tmp_path / "home")
    for phase in ("enrol", "pretrain"):
        with pytest.raises(DataError, match="32 px, the recipe asks for 64; ingest again with --image-px 64"):
            dispatch.run(site, tiny_recipe, Request(phase=phase))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("phase", ["", "unknown", "__init__", "run", "Pretrain"])
def test_an_unknown_phase(make_site: Callable[..., Site], tiny_recipe: Any, phase: str) -> None:
    with pytest.raises(ProtocolError, match="unknown phase"):
        dispatch.run(make_site("alpha"), tiny_recipe, Request(phase=phase))


def test_threads_are_the_recipes(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    before = torch.get_num_threads()
    try:
        dispatch.run(make_site("alpha"), replace(tiny_recipe, threads=2), Request(phase="enrol"))
        assert torch.get_num_threads() == 2
        dispatch.run(make_site("alpha"), tiny_recipe, Request(phase="enrol"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- pretrain


def test_pretrain_moves_the_weights(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    told: list[Any] = []
    site = make_site("alpha", progress=lambda *what: told.append(what))
    start = student(tiny_recipe)
    reply = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, start))
    assert set(reply.tensors) == set(start)
    assert any(not torch.equal(reply.tensors[name], start[name]) for name in start)
    assert reply.values["images"] == len(site.training_ids(tiny_recipe))
    assert reply.values["state"] == "travels"
    assert [row["step"] for row in reply.values["history"]] == [0, 1]
    assert told == [("pretrain", 1, 4), ("pretrain", 2, 4)]


def test_a_local_teacher_stays_at_the_site(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    recipe = replace(own_moments(tiny_recipe), teacher=replace(tiny_recipe.teacher, policy="local"))
    only = {name: tensor for name, tensor in student(recipe).items() if name.startswith("student.")}
    reply = dispatch.run(make_site("alpha"), recipe, pretrain(recipe, only))
    assert set(reply.tensors) == set(only)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_a_request_asked_again_gives_the_same_bits(
    make_site: Callable[..., Site], tiny_recipe: Any, cold: bool
) -> None:
    """The coordinator died before its checkpoint and asks for the round again; the site may have restarted too."""

    def again(site: Site) -> Site:
        return make_site("alpha") if cold else site

    site = make_site("alpha")
    start = student(tiny_recipe)
    first = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, start))
    site = again(site)
    second = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, start))
    assert checkpoint.digest(first.tensors) == checkpoint.digest(second.tensors)
    assert first.values == second.values
    later = [dispatch.run(again(site), tiny_recipe, pretrain(tiny_recipe, first.tensors, 2)) for _ in range(3)]
    assert {checkpoint.digest(reply.tensors) for reply in later} == {checkpoint.digest(later[0].tensors)}
    assert [reply.values["state"] for reply in later] == ["travels"] * 3


def test_a_site_that_lost_its_disk_goes_on_where_all_travels(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    """With teacher and moments averaged a round stands on the request alone."""
    site = make_site("alpha")
    first = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, student(tiny_recipe)))
    kept = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    shutil.rmtree(site.home, ignore_errors=True)
    lost = dispatch.run(make_site("alpha"), tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    assert kept.values["state"] == lost.values["state"] == "travels"
    assert checkpoint.digest(kept.tensors) == checkpoint.digest(lost.tensors)


def test_averaged_moments_are_taken_up_in_adapt(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("alpha")
    first = dispatch.run(site, tiny_recipe, adapt(prepared(site, tiny_recipe))).tensors
    zeroed = {
        name: torch.zeros_like(tensor) if name.startswith("optimizer.") else tensor for name, tensor in first.items()
    }
    replies = [dispatch.run(site, tiny_recipe, adapt(tensors, 3)).tensors for tensors in (first, zeroed)]
    assert checkpoint.digest(replies[0]) != checkpoint.digest(replies[1])


def test_a_site_that_lost_its_state_says_so(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    tiny_recipe = own_moments(tiny_recipe)
    site = make_site("alpha")
    first = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, student(tiny_recipe)))
    kept = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    shutil.rmtree(site.home)
    lost = dispatch.run(make_site("alpha"), tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    assert (kept.values["state"], lost.values["state"]) == ("kept", "fresh")
    assert checkpoint.digest(kept.tensors) != checkpoint.digest(lost.tensors)  # the moments matter


def test_state_of_another_recipe_is_not_taken(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    """One process serves one run after another; the step alone does not say whose state is warm."""
    tiny_recipe = own_moments(tiny_recipe)
    site, other = make_site("alpha"), replace(tiny_recipe, seed=7)
    first = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, student(tiny_recipe)))
    expected = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    dispatch.run(site, other, pretrain(other, student(other)))  # now at step 2 as well
    assert dispatch.run(site, other, pretrain(other, first.tensors, 2)).values["state"] == "kept"
    again = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))
    assert checkpoint.digest(again.tensors) == checkpoint.digest(expected.tensors)


def test_damaged_state_is_told(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    tiny_recipe = own_moments(tiny_recipe)
    site = make_site("alpha")
    first = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, student(tiny_recipe)))
    (path,) = site.home.rglob("00000002.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        dispatch.run(make_site("alpha"), tiny_recipe, pretrain(tiny_recipe, first.tensors, 2))


def test_no_more_than_two_states_are_kept(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    tiny_recipe = own_moments(tiny_recipe)
    site, tensors = make_site("alpha"), student(tiny_recipe)
    for step in (0, 2, 4, 6):
        tensors = dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, tensors, step)).tensors
    assert sorted(path.stem for path in site.home.rglob("*.safetensors")) == ["00000006", "00000008"]


def test_weights_that_do_not_fit(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    start = student(tiny_recipe)
    name = next(iter(start))
    for wrong in (
        {},
        {key: value for key, value in start.items() if key != name},
        {**start, "student.more": torch.zeros(1)},
        {**start, name: start[name].double()},
        {**start, name: torch.full_like(start[name], float("nan"))},
        {**start, name: torch.zeros(1, 2, 3)},
    ):
        with pytest.raises(CheckpointError, match="weights do not fit"):
            dispatch.run(make_site("alpha"), tiny_recipe, pretrain(tiny_recipe, wrong))


def test_a_site_that_cannot_watch_itself_trains_on(
    make_site: Callable[..., Site], tiny_recipe: Any, tmp_path: Any
) -> None:
    site, well = make_site("alpha"), make_site("alpha", home=tmp_path / "well")
    site.home.mkdir(parents=True)
    (site.home / "health").touch()  # where its folder should be
    request = pretrain(tiny_recipe, student(tiny_recipe))
    tensors = [dispatch.run(one, tiny_recipe, request).tensors for one in (site, well)]
    assert checkpoint.digest(tensors[0]) == checkpoint.digest(tensors[1])
    assert [one.home.joinpath("health").is_dir() for one in (site, well)] == [False, True]


# ---- features and adapt


def test_a_step_that_diverges_names_its_files_and_leaves_the_state_before_it(
    make_site: Callable[..., Site], tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site("alpha")
    start = student(tiny_recipe)
    good = dispatch.run(site, tiny_recipe, replace(pretrain(tiny_recipe, start), steps=1)).tensors
    real = SSLMetaArch.forward
    calls = iter((1, math.nan))

    def forward(self: Any, batch: Any, temp: float) -> Any:
        total, parts = real(self, batch, temp)
        return total * next(calls), parts

    monkeypatch.setattr(SSLMetaArch, "forward", forward)
    with pytest.raises(DataError, match=r"step 1: the loss is nan; .* Its images: alpha/\d\d-\d\.png.* and 1 more"):
        dispatch.run(site, tiny_recipe, pretrain(tiny_recipe, start))
    told = json.loads((site.home / "diverged" / "step-00000001.json").read_text())
    assert told["step"] == 1
    assert len(told["files"]) == 4
    assert all(file.startswith("alpha/") for file in told["files"])
    state = checkpoint.load(site.home / "diverged" / "step-00000001.safetensors")
    assert checkpoint.digest(checkpoint.with_prefix(state, "model.student.")) == checkpoint.digest(
        checkpoint.with_prefix(good, "student.")
    )


def test_features_are_made_and_stay(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("beta")
    request = Request(phase="features", findings=FINDINGS, tensors=backbone(tiny_recipe))
    assert dispatch.run(site, tiny_recipe, request) == Reply()
    n, views, patches = len(site.training_ids(tiny_recipe)), 2, 16
    made = np.load(site.home / "features" / "patches.npy")
    assert made.shape[:3] == (views, n, patches)
    dispatch.run(site, tiny_recipe, request)
    assert np.array_equal(np.load(site.home / "features" / "patches.npy"), made)


def test_features_without_labels(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("beta")
    asked = Request(phase="features", findings=("Bar",), tensors=backbone(tiny_recipe))
    assert dispatch.run(site, tiny_recipe, asked) == Reply()
    assert not (site.home / "features").exists()


def test_adapt_trains_what_has_both_classes(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    """Of beta only Blob is known: Bar counts no image and its row has the weight 0."""
    tiny_recipe = own_moments(tiny_recipe)
    site = make_site("beta")
    head = prepared(site, tiny_recipe)
    reply = dispatch.run(site, tiny_recipe, adapt(head))
    n = len(site.training_ids(tiny_recipe))
    assert (reply.values["images"], reply.values["labelled"]) == (n, [0, n])
    assert set(reply.tensors) == set(head)
    assert [row["step"] for row in reply.values["history"]] == [0, 1, 2]


def test_adapt_again_gives_the_same_bits(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("alpha")
    head = prepared(site, tiny_recipe)
    first = dispatch.run(site, tiny_recipe, adapt(head))
    assert checkpoint.digest(dispatch.run(site, tiny_recipe, adapt(head)).tensors) == checkpoint.digest(first.tensors)
    second = dispatch.run(site, tiny_recipe, adapt(first.tensors, 3))
    cold = make_site("alpha")
    prepared(cold, tiny_recipe)  # as after a restart of the run
    assert checkpoint.digest(dispatch.run(cold, tiny_recipe, adapt(first.tensors, 3)).tensors) == checkpoint.digest(
        second.tensors
    )


def test_a_site_with_one_class_trains_nothing(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("gamma")
    reply = dispatch.run(site, tiny_recipe, adapt(prepared(site, tiny_recipe)))
    assert reply.tensors == {}
    assert reply.values == {"images": 0, "labelled": [0, 0], "history": []}


# ---- evaluate


def test_evaluate_gives_rows_and_keeps_the_scores(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site = make_site("beta")
    head = checkpoint.add_prefix(prepared(site, tiny_recipe), "head.")
    reply = dispatch.run(site, tiny_recipe, Request(phase="evaluate", findings=FINDINGS, tensors=head))
    bar, blob = reply.values["results"]
    assert (bar["finding"], bar["n"], bar["auroc"]) == ("Bar", 0, None)
    assert bar["reason"]
    assert 0 <= blob["auroc"] <= 1
    assert blob["tested_on"] == "beta"
    assert (site.home / "scores.npz").exists()
    assert reply.tensors == {}
    whole = head | checkpoint.add_prefix(backbone(tiny_recipe), "backbone.")
    other = make_site("beta", home=site.home / "other")  # has no backbone of its own on disk
    again = dispatch.run(other, tiny_recipe, Request(phase="evaluate", findings=FINDINGS, tensors=whole))
    assert again.values == reply.values


def test_evaluate_without_a_backbone(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    with pytest.raises(CheckpointError, match="backbone.safetensors"):
        dispatch.run(make_site("beta"), tiny_recipe, Request(phase="evaluate", findings=FINDINGS))


def test_evaluate_without_a_test_image(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    """Figures are null, with the reason; nothing breaks."""
    recipe = replace(tiny_recipe, split=replace(tiny_recipe.split, train=0.9, val=0.09999))
    site = make_site("beta")
    head = checkpoint.add_prefix(prepared(site, recipe), "head.")
    assert len(site.view.split(Membership.of(recipe), "test")) == 0
    rows = dispatch.run(site, recipe, Request(phase="evaluate", findings=FINDINGS, tensors=head)).values["results"]
    assert [(row["n"], row["auroc"], bool(row["reason"])) for row in rows] == [(0, None, True)] * 2


def test_a_shuffled_site_enrols_with_the_labels_that_it_trains_with(
    make_site: Callable[..., Site], tiny_recipe: Any
) -> None:
    """Where patients have unequally many images, the shuffled counts are others; the coordinator holds them equal."""
    recipe = replace(tiny_recipe, seed=1)  # of which the lots give other counts
    site = make_site("alpha", shuffle_labels=True)
    counts = dispatch.run(site, recipe, Request(phase="enrol")).values["findings"]
    assert counts != dispatch.run(make_site("alpha"), recipe, Request(phase="enrol")).values["findings"]
    reply = dispatch.run(site, recipe, adapt(prepared(site, recipe)))
    assert reply.values["labelled"] == [sum(counts[finding].values()) for finding in FINDINGS]


def test_a_finding_that_the_lots_left_to_nobody_is_not_listed(
    make_site: Callable[..., Site], tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patient of one image may get the labels of one who has several, and the rare ones of these are gone."""

    def lots(labels: np.ndarray, *of: Any) -> np.ndarray:
        return np.where(np.arange(labels.shape[1]) == 0, np.int8(-1), labels)

    monkeypatch.setattr(floors, "permute_by_patient", lots)
    reply = dispatch.run(make_site("alpha", shuffle_labels=True), tiny_recipe, Request(phase="enrol"))
    (member,) = protocol.checked_roster([reply], ["alpha"], tiny_recipe)
    true = dispatch.run(make_site("alpha"), tiny_recipe, Request(phase="enrol")).values["findings"]
    assert member.values["findings"] == dict(list(true.items())[1:])


def test_shuffled_labels_are_the_training_images_only(make_site: Callable[..., Site], tiny_recipe: Any) -> None:
    site, shuffled = make_site("alpha"), make_site("alpha", shuffle_labels=True)
    true, drawn = (one.training_labels(tiny_recipe, FINDINGS) for one in (site, shuffled))
    assert (true != drawn).any()
    assert set(map(tuple, drawn.tolist())) == set(map(tuple, true.tolist()))
    np.testing.assert_array_equal(shuffled.training_labels(tiny_recipe, FINDINGS), drawn)
