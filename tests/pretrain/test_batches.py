"""Batches made ahead: the same bits whoever makes them, in order, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch

from chexfound.data.crops import on_device as augment_torch
from chexfound.errors import CheckpointError, ConfigError, DataError
from chexfound.pretrain.batches import AHEAD, Batches, draw, make_batch
from chexfound.pretrain.meta_arch import Batch
from chexfound.recipe.schema import Recipe

Small = Callable[..., Recipe]
PHOTOMETRY = {"crops__blur": (1.0, 0.1, 0.5), "crops__tone_curve": 1.0, "crops__noise": 0.05, "crops__solarize": 0.5}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "chexfound-batches" in thread.name]


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch))


def batches(recipe: Recipe, images: np.ndarray, batch_size: int = 4, **options: object) -> Batches:
    return Batches(recipe, lambda places: images[places], len(images), batch_size, 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_any_number_of_threads_makes_the_same_bits(small, images, batch_size, on_device):
    def made(num_workers: int) -> list[tuple[int, Batch]]:
        recipe = small(train__num_workers=num_workers, **PHOTOMETRY)
        return list(batches(recipe, images, batch_size, on_device=on_device).steps(3, 9))

    alone = made(0)
    assert [step for step, _ in alone] == [3, 4, 5, 6, 7, 8, 9]
    assert not equal(alone[0][1], alone[1][1])
    for num_workers in (1, 4):
        found = made(num_workers)
        assert [step for step, _ in found] == [step for step, _ in alone]
        assert all(equal(one, other) for (_, one), (_, other) in zip(alone, found, strict=True))


def test_they_are_the_batches_of_make_batch_and_of_any_first_step(small, images):
    recipe = small(train__num_workers=2)
    one = batches(recipe, images)
    for step, batch in one.steps(5, 8):
        assert equal(batch, make_batch(recipe, images[one.positions(step)], step, 1))
        assert equal(batch, one.batch(step))
    assert not equal(one.batch(5), make_batch(recipe, images[one.positions(5)], 5, 0))  # another site's stream
    assert list(one.steps(5, 4)) == []


def test_the_device_renders_the_same_plan(small, images):
    recipe = small(**PHOTOMETRY)
    one = batches(recipe, images, on_device=True)
    chosen = images[one.positions(2)]
    plans, masks = draw(recipe, 4, 32, 32, 2, 1)
    batch = one.batch(2)
    assert torch.equal(batch.global_crops, augment_torch.render(torch.from_numpy(chosen), plans[0]))
    assert torch.equal(batch.local_crops, augment_torch.render(torch.from_numpy(chosen), plans[1]))
    assert torch.equal(batch.masks, torch.from_numpy(masks))
    by_opencv = make_batch(recipe, chosen, 2, 1)
    assert torch.equal(batch.masks, by_opencv.masks)
    assert (batch.global_crops.float() - by_opencv.global_crops.float()).abs().mean() < 0.5


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])  # fmt: skip
def test_on_a_gpu(small, images, device):
    recipe = small(train__num_workers=2, **PHOTOMETRY)
    by_opencv = [batch for _, batch in batches(recipe, images).steps(0, 3)]
    for on_device in (None, False):
        for (_, batch), expected in zip(
            batches(recipe, images, device=device, on_device=on_device).steps(0, 3), by_opencv, strict=True
        ):
            assert {getattr(batch, field.name).device.type for field in fields(Batch)} == {device}
            assert torch.equal(batch.masks.cpu(), expected.masks)
            away = (batch.global_crops.cpu().float() - expected.global_crops.float()).abs().mean()
            assert away < (0.5 if on_device is None else 1e-9)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_crops_of_one_view_stand_together(small, num_workers):
    """Flat images, whose crops are flat: (2·B) and (L·B) in the order of the batch, view after view."""
    images = np.stack([np.full((32, 32), 20 * place + 5, np.uint8) for place in range(10)])
    recipe = small(train__num_workers=num_workers, crops__jitter=0.0, crops__local_crops_number=3)
    one = batches(recipe, images, 6)
    for step, batch in one.steps(0, 2):
        values = (20 * one.positions(step) + 5).tolist()
        assert batch.size == 6
        assert batch.global_crops.flatten(1).unique(dim=1).flatten().tolist() == values * 2
        assert batch.local_crops.flatten(1).unique(dim=1).flatten().tolist() == values * 3
        assert batch.masks.shape == (12, 4)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("n_local", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_have_the_joint_batch(small, images, world_size, n_local, on_device):
    recipe = small(train__num_workers=2, crops__local_crops_number=n_local, **PHOTOMETRY)
    joint = batches(recipe, images, 8, on_device=on_device).batch(5)
    ranks = []
    for rank in range(world_size):
        one = batches(recipe, images, 8, rank=rank, world_size=world_size, on_device=on_device)
        ((_, batch),) = one.steps(5, 5)
        assert batch.size == 8 // world_size
        assert np.array_equal(one.positions(5), batches(recipe, images, 8).positions(5))
        ranks.append(batch)
    for name, n_views in (("global_crops", 2), ("local_crops", n_local), ("masks", 2)):
        whole = getattr(joint, name)
        views = [getattr(batch, name).reshape(n_views, 8 // world_size, *whole.shape[1:]) for batch in ranks]
        assert torch.equal(torch.cat(views, 1).flatten(0, 1), whole)
    assert joint.masks.any()


def test_a_batch_that_the_ranks_cannot_share_is_refused(small, images):
    with pytest.raises(ConfigError, match=r"batch of 6 images cannot be divided equally among the 4 GPUs.*as 8"):
        batches(small(), images, 6, world_size=4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        batches(small(), images, rank=2, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (DataError("no image 7"), DataError, "pretraining step 4: no image 7"),
        (CheckpointError("odd"), CheckpointError, "pretraining step 4: odd"),
        (OSError("disk gone"), DataError, "pretraining step 4: the images of the batch cannot be read: disk gone"),
        (ZeroDivisionError("slip"), ZeroDivisionError, r"slip\nwhile the batch of pretraining step 4 was made"),
    ],
)
def test_what_goes_wrong_is_told_when_its_step_comes(small, images, num_workers, raised, expected, message):
    recipe = small(train__num_workers=num_workers)
    good = batches(recipe, images)
    bad = set(good.positions(4).tolist()).difference(*(good.positions(step).tolist() for step in (2, 3)))
    assert bad

    def pixels(places: np.ndarray) -> np.ndarray:
        if bad.intersection(places.tolist()):
            raise raised
        return images[places]

    coming = Batches(recipe, pixels, len(images), 4, 1).steps(2, 9)
    assert [next(coming)[0], next(coming)[0]] == [2, 3]
    with pytest.raises(expected, match=message):
        next(coming)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_the_threads_end_when_the_loop_does(small, images, stop):
    def train() -> None:
        for step, _ in batches(small(train__num_workers=3), images).steps(0, 100):
            assert threads()
            if step == 1:
                raise stop

    with pytest.raises(stop):
        train()
    assert threads() == []
    for step, _ in batches(small(train__num_workers=3), images).steps(0, 100):
        if step == 1:
            break
    assert threads() == []


def test_no_more_is_made_ahead_than_promised(small, images):
    n_images = 4000  # no image comes twice in 41 steps
    positions = Batches(small(), images.__getitem__, n_images, 4, 1).positions
    step_of = {place: step for step in range(41) for place in positions(step).tolist()}
    asked: set[int] = set()

    def pixels(places: np.ndarray) -> np.ndarray:
        asked.update(step_of[place] for place in places.tolist())
        return images[places % 10]

    for step, _ in Batches(small(train__num_workers=2), pixels, n_images, 4, 1).steps(0, 40):
        assert max(asked) <= step + AHEAD
        if step == 5:
            deadline = time.monotonic() + 20
            while max(asked) < 5 + AHEAD and time.monotonic() < deadline:
                time.sleep(0.01)
            assert max(asked) == 5 + AHEAD
            break


def test_slow_and_fast_parts_come_in_order(small, images):
    """Each part of each batch takes another time to read."""
    lots = np.random.default_rng(0)

    def pixels(places: np.ndarray) -> np.ndarray:
        time.sleep(lots.uniform(0, 0.01))
        return images[places]

    recipe = small(train__num_workers=4)
    for step, batch in Batches(recipe, pixels, len(images), 4, 1).steps(0, 20):
        assert equal(batch, batches(recipe, images).batch(step))
