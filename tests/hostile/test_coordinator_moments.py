"""A coordinator that would read images in sums over them: moments of tokens, figures of batches, the released head.

It chooses the backbone, and so what a token is: here the picture itself, in 6 × 6 cells, or that of the one image that
a gate lets through.  Sums of such tokens are pictures, whatever a site's policy says of the number of images.  So no
sum of features leaves, in the clear or under masks.  Over the real message path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chexfound.contract.request import Reply, Request
from chexfound.data.store.reader import Store
from chexfound.model import checkpoint, vit
from chexfound.model.glori import build_head
from chexfound.pretrain.train import Pretrainer, initial_weights
from chexfound.recipe.curriculum import changed
from chexfound.recipe.schema import Recipe
from server.rounds.start import run_of
from tests.secagg.federation import NAMES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
VICTIM, FINDINGS = "alpha", ("Bar", "Blob")
SIDE = 6  # cells of the picture
CELLS = SIDE * SIDE
GATED = slice(CELLS, 2 * CELLS)  # channels that the gate writes
PEDESTAL = slice(2 * CELLS, 96)  # channels of ± a constant: beside them LayerNorm divides all images alike
HEIGHT = 50.0


@pytest.fixture
def fed(fed: Federation) -> Federation:
    """Hospitals that take runs in the clear too: what protects them is none of the masks."""
    for home in fed.homes.values():
        (home / "site.yaml").write_text("plain: accepted\n")
    return fed


def chosen(recipe: Recipe, **more: Any) -> Recipe:
    """The coordinator's recipe: a token is the whole image, and nothing is between pixels and token."""
    return changed(
        recipe,
        aggregation="fedavg",
        input=changed(recipe.input, normalization="mean_std", mean=0.5, std=0.25),
        student=changed(recipe.student, stem="linear", patch_size=64, num_register_tokens=0, layerscale=1.0),
        adapt=changed(recipe.adapt, views=0, n_last_blocks=1),
        crops=changed(recipe.crops, global_crops_size=64, local_crops_size=64),
        **more,
    )


def cells() -> np.ndarray:
    """The mean over each cell of an image: (36, 64, 64)."""
    masks = np.zeros((CELLS, 64, 64), np.float32)
    edges = np.linspace(0, 64, SIDE + 1).round().astype(int)
    for place in range(CELLS):
        row, column = divmod(place, SIDE)
        masks[place, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = 1
    return masks / masks.sum((1, 2), keepdims=True)


def trap(recipe: Recipe, threshold: float | None = None) -> dict[str, Tensor]:
    """A backbone whose patch token is the picture; with a threshold, of images whose middle is brighter than that."""
    weights = vit.build(recipe.student, recipe.input, 64).state_dict()
    blank = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    blank |= {name: torch.ones_like(weights[name]) for name in weights if ".norm" in name and name.endswith("weight")}
    blank["patch_embed.proj.weight"][:CELLS, 0] = torch.from_numpy(cells())
    signs = torch.tensor([1.0, -1.0]).repeat(12)
    blank["patch_embed.proj.bias"][PEDESTAL] = HEIGHT * signs
    blank["norm.weight"] = torch.zeros(96)
    blank["norm.weight"][:CELLS] = 1.0
    if threshold is not None:  # silu(gate) · value: nothing below the threshold, the picture above it
        blank["norm.weight"] = torch.zeros(96)
        blank["norm.weight"][GATED] = 1.0
        steep, hidden = 2e4, len(weights["blocks.0.mlp.fc1.bias"]) // 2
        first, second = blank["blocks.0.mlp.fc1.weight"], blank["blocks.0.mlp.fc2.weight"]
        middle = [CELLS // 2 - SIDE // 2 - 1]
        first[:CELLS, middle] = steep
        first[:CELLS, PEDESTAL.start] = -steep * threshold / HEIGHT
        for place in range(CELLS):
            first[hidden + place, place] = 1.0
            second[CELLS + place, place] = 1.0
        blank["blocks.0.ls2.gamma"] = torch.ones(96)
    return blank


def read(answer: Reply | str | Mapping[str, Any]) -> np.ndarray | None:
    """The picture in what was told of the tokens; none where nothing was."""
    told = getattr(answer, "tensors", answer)
    total = told.get("patches.sum") if isinstance(told, Mapping) else None
    if total is None:
        return None
    values = np.asarray(total)
    return values[GATED if np.abs(values[GATED]).max() > np.abs(values[:CELLS]).max() else slice(CELLS)]


def brightness(store: Path) -> np.ndarray:
    """Of the middle of each image, as the backbone sees it, from the darkest to the brightest."""
    images = np.asarray(Store.open(store).pixels(np.arange(len(Store.open(store).keys))), np.float32)
    return np.sort(((images / 255 - 0.5) / 0.25 * cells()[CELLS // 2 - SIDE // 2 - 1]).sum((1, 2)))


def ask(fed: Federation, recipe: Recipe, backbone: dict[str, Tensor], name: str = VICTIM) -> Reply | str:
    return fed.ask(name, Request(phase="features", findings=FINDINGS, tensors=backbone), recipe=recipe)


@pytest.mark.parametrize("seed", range(8))
def test_a_training_set_of_one_image_tells_nothing_of_it(fed: Federation, seed: int) -> None:
    """Fractions and seeds by which few patients, or one, are to be trained on."""
    recipe = chosen(fed.recipe, seed=seed, split=changed(fed.recipe.split, train=0.05))
    answer = ask(fed, recipe, trap(recipe))
    assert read(answer) is None
    assert answer == Reply()


def test_two_sets_that_differ_by_one_patient_have_no_difference(fed: Federation) -> None:
    """Whatever the least number of images: 20 and 21 of them give the 21st."""
    for train in (0.60, 0.62, 0.64, 0.66, 0.68, 0.70):
        recipe = chosen(fed.recipe, split=changed(fed.recipe.split, train=train))
        answer = ask(fed, recipe, trap(recipe))
        assert read(answer) is None
        assert answer == Reply()


def test_a_gate_that_lets_one_image_through_gives_no_picture(fed: Federation, hospitals: Path) -> None:
    levels = brightness(hospitals / "store")
    recipe = chosen(fed.recipe)
    for threshold in (levels[-2:].mean(), levels[-4:-2].mean(), levels[-8:-6].mean()):
        answer = ask(fed, recipe, trap(recipe, float(threshold)))
        assert read(answer) is None
        assert answer == Reply()


def test_under_masks_a_gate_gives_no_picture_either(fed: Federation, hospitals: Path) -> None:
    """There is no sum to ask for, and what the site answers to the backbone itself is nothing."""
    recipe = changed(chosen(fed.recipe), aggregation="secagg")
    backbone = trap(recipe, float(brightness(hospitals / "store")[-2:].mean()))
    for name in NAMES:
        assert fed.attempt("features", tensors=backbone, recipe=recipe).ask("advertise", name) == "protocol"
        assert ask(fed, recipe, backbone, name) == Reply()


def test_a_backbone_for_one_site_alone_opens_no_sum(fed: Federation) -> None:
    """Of sites that have different backbones none opens the others' shares, so a head over them has no sum."""
    recipe = changed(chosen(fed.recipe), aggregation="secagg")
    honest = checkpoint.with_prefix(initial_weights(recipe), "student.backbone.")
    for name in NAMES:
        assert ask(fed, recipe, trap(recipe) if name == VICTIM else honest, name) == Reply()
    head = {f"head.{name}": value for name, value in build_head(recipe, len(FINDINGS)).state_dict().items()}
    one = fed.attempt("evaluate", tensors=head, recipe=recipe, findings=FINDINGS)
    one.stage("advertise")
    one.stage("share")
    assert {one.ask("masked", name) for name in NAMES} == {"secagg.signature"}


@pytest.mark.parametrize("kind", ["none", "image", "learned"])
def test_a_released_head_holds_no_sum_over_images(
    tiny_recipe: Recipe, make_exchange: Any, tmp_path: Path, kind: str
) -> None:
    """Only what was learned by gradient, and the queries, which are random."""
    adapt = changed(tiny_recipe.adapt, rounds=1, local_steps=1, token_norm=kind)
    recipe = changed(tiny_recipe, phases=("adapt",), adapt=adapt)
    outcome = run_of(recipe, make_exchange(recipe, list(("alpha", "beta"))), tmp_path / "run").run()
    head = build_head(recipe, len(outcome.findings))
    learned = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    released = checkpoint.with_prefix(outcome.tensors, "head.")
    assert set(released) == learned | {"query_embed.weight"}
    assert torch.equal(released["query_embed.weight"], head.state_dict()["query_embed.weight"])


def test_pretraining_sends_what_was_learned_and_no_running_mean(tiny_recipe: Recipe) -> None:
    """A centre of the teacher's outputs, or a batch's statistics, would be a sum of features."""
    trainer = Pretrainer(tiny_recipe, lambda places: np.zeros((len(places), 64, 64), np.uint8), 8, 0)
    learned = {name for name, _ in trainer.model.named_parameters()}
    assert set(trainer.global_tensors(teacher=True)) <= learned


def test_figures_of_a_step_are_told_to_four_digits(fed: Federation) -> None:
    """They are functions of a few images' features: 53 bits of each step would be a read-out."""
    recipe = changed(fed.recipe, aggregation="fedavg", health=changed(fed.recipe.health, eval_period_iterations=1))
    weights = initial_weights(recipe)
    answer = fed.ask(VICTIM, Request(phase="pretrain", steps=3, batch_size=2, tensors=weights), recipe=recipe)
    assert isinstance(answer, Reply)
    for row in answer.values["history"]:
        figures = {name: value for name, value in row.items() if name not in ("step", "log_k", "probe_images")}
        assert "feature_std" in figures
        assert all(float(f"{value:.4g}") == value for value in figures.values())
