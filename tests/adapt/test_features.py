from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from chexfound.adapt import features
from chexfound.adapt.features import Features
from chexfound.errors import StorageError
from chexfound.model import vit
from chexfound.model.vit import VisionTransformer
from chexfound.recipe.schema import Recipe

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 32, 32), dtype=np.uint8)


def backbone(recipe: Recipe) -> VisionTransformer:
    torch.manual_seed(0)
    return vit.build(recipe.student, recipe.input, 32)


def extract(recipe: Recipe, folder: Path, images: np.ndarray = IMAGES, roster_index: int = 0, **values) -> Features:
    return features.extract(
        recipe, backbone(recipe), lambda places: images[places], len(images), roster_index, folder, **values
    )


def drawn(seed: int, images: int) -> Features:
    generator = np.random.default_rng(seed)
    scale = np.exp(generator.normal(0, 2, 6))
    return Features(
        (generator.normal(3, 1, (3, images, 4, 6)) * scale).astype(np.float32),
        (generator.normal(-1, 1, (3, images, 6)) * scale).astype(np.float32),
    )


def test_tokens_are_those_of_the_last_blocks(small):
    model = backbone(small())
    patches, cls = features.tokens(model, IMAGES, 2)
    layers = model.get_intermediate_layers(torch.from_numpy(IMAGES), 2, return_class_token=True)
    assert np.array_equal(patches, torch.cat([layer[0] for layer in layers], -1).detach().numpy())
    assert np.array_equal(cls, torch.cat([layer[1] for layer in layers], -1).detach().numpy())
    assert (patches.shape, cls.shape) == ((7, 4, 48), (7, 48))


def test_chunks_are_no_other_than_the_whole(small, monkeypatch):
    model = backbone(small())
    whole = features.tokens(model, IMAGES, 2)
    monkeypatch.setattr(features, "CHUNK", 3)
    parts = features.tokens(model, IMAGES, 2)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))


def test_view_0_is_the_image_itself_and_the_others_are_not(small, tmp_path):
    recipe = small()
    seen: list[tuple[int, int]] = []
    kept = extract(recipe, tmp_path / "features", progress=lambda done, of: seen.append((done, of)))
    patches, cls = features.tokens(backbone(recipe), IMAGES, 2)
    assert (kept.patches.shape, kept.cls.shape) == ((3, 7, 4, 48), (3, 7, 48))
    assert np.array_equal(kept.patches[0], patches)
    assert np.array_equal(kept.cls[0], cls)
    assert all(not np.allclose(kept.cls[a], kept.cls[b], atol=1e-3) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert seen == [(7, 21), (14, 21), (21, 21)]
    assert sorted(os.listdir(tmp_path / "features")) == ["cls.npy", "patches.npy"]


def test_features_repeat_and_differ_by_site(small, tmp_path):
    first, again, other = (
        extract(small(), tmp_path / name, roster_index=i) for name, i in (("a", 0), ("b", 0), ("c", 1))
    )
    assert np.array_equal(first.patches, again.patches)
    assert np.array_equal(first.cls[0], other.cls[0])
    assert not np.array_equal(first.cls[1], other.cls[1])
    read = features.load(tmp_path / "a")
    assert np.array_equal(read.patches, first.patches)
    assert np.array_equal(read.cls, first.cls)


def test_no_views_beside_the_image(small, tmp_path):
    assert extract(small(adapt__views=0), tmp_path).cls.shape == (1, 7, 48)


def test_a_head_gets_the_pairs_that_it_asks_for():
    kept = drawn(0, 5)
    (patches,), (cls,) = kept.rows(np.array([2, 0]), np.array([4, 1]))
    assert np.array_equal(patches.numpy(), np.stack([kept.patches[2, 4], kept.patches[0, 1]]))
    assert np.array_equal(cls.numpy(), np.stack([kept.cls[2, 4], kept.cls[0, 1]]))


@pytest.mark.parametrize("function", ["fsync", "posix_fallocate"])
def test_a_full_disk_leaves_the_old_features(small, tmp_path, monkeypatch, function):
    before = np.array(extract(small(), tmp_path).cls)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(StorageError, match="no space left"):
            extract(small(), tmp_path, images=IMAGES[::-1])
    assert sorted(os.listdir(tmp_path)) == ["cls.npy", "patches.npy"]
    assert np.array_equal(features.load(tmp_path).cls, before)


def test_files_have_their_blocks_before_they_are_written_to(small, tmp_path):
    extract(small(), tmp_path)
    for name in ("cls.npy", "patches.npy"):
        status = (tmp_path / name).stat()
        assert status.st_blocks * 512 >= status.st_size
