"""What is drawn, against values worked out by hand in float64.  `Given` hands out the numbers that are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.crops import geometry as planning
from chexfound.data.crops.geometry import CropPlan, draw_gentle, draw_multi_crop, noise_field
from chexfound.errors import ConfigError
from chexfound.recipe.load import load
from chexfound.recipe.schema import Crops

PLAIN = {"horizontal_flip": 0.0, "rotation_deg": 0.0, "jitter": 0.0, "blur": 0.0}
PX = 60


class Given:
    """A generator whose `random` gives chosen numbers, in turn, again and again."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.at = numbers, 0

    def random(self, shape: int | tuple[int, ...] | None = None) -> np.ndarray | float:
        if shape is None:
            return float(self.random((1,))[0])  # type: ignore[index]
        count = math.prod(np.atleast_1d(shape))
        taken = [self.numbers[(self.at + place) % len(self.numbers)] for place in range(count)]
        self.at += count
        return np.array(taken).reshape(shape)


def crops(**values: object) -> Crops:
    return Crops(**{**PLAIN, **values})


def one(config: Crops, *numbers: float, scale: tuple[float, float] = (1.0, 1.0), size: int = PX) -> CropPlan:
    """The plan of one global crop, the first view, of an image of 60 × 60 pixels."""
    config = Crops(**{**vars(config), "global_crops_size": size, "global_crops_scale": scale, "local_crops_number": 0})
    return draw_multi_crop(config, 1, PX, PX, Given(*numbers))[0]  # type: ignore[arg-type]


# --- geometry


def test_the_whole_image_is_the_identity_map():
    plan = one(crops(), 0.3)
    assert np.array_equal(plan.affine[0, 0], [[1, 0, 0], [0, 1, 0]])
    assert plan.tables is None


def test_a_flip_mirrors_the_columns():
    """Pixel centre x goes to 60 − 1 − x."""
    plan = one(crops(horizontal_flip=1.0), 0.3)
    assert np.array_equal(plan.affine[0, 0], [[-1, 0, PX - 1], [0, 1, 0]])


def test_a_quarter_turn():
    """All the way to + 90°: the result's right is the image's down, its down the image's left."""
    plan = one(crops(rotation_deg=90.0), 0.5, 0.5, 0.5, 0.5, 1.0, 0.5)  # area, aspect, x, y, angle, flip
    assert plan.affine[0, 0] == pytest.approx(np.array([[0, -1, PX - 1], [1, 0, 0]]), abs=1e-12)


@pytest.mark.parametrize(("at", "start"), [(0.0, 0), (0.5, 15), (1.0, 30)])
def test_a_quarter_of_the_area_is_half_of_each_side(at, start):
    """Area 1/4 and aspect 1 (the middle of its log range): 30 × 30 pixels from `start`, magnified to 60.

    Pixel centre i + 0.5 of 60 lies at start + (i + 0.5) / 2, which is pixel start + i / 2 − 1/4.
    """
    plan = one(crops(), 0.5, 0.5, at, 0.0, 0.5, 0.5, scale=(0.25, 0.25))
    assert plan.affine[0, 0] == pytest.approx(np.array([[0.5, 0, start - 0.25], [0, 0.5, -0.25]]), abs=1e-12)


def test_an_aspect_of_four_thirds():
    """Area 3/16 of 60² = 675 = 30 wide × 22.5 high, at the right edge and the top, onto 30 × 30."""
    plan = one(crops(), 0.5, 1.0, 1.0, 0.0, 0.5, 0.5, scale=(0.1875, 0.1875), size=30)
    assert plan.affine[0, 0] == pytest.approx(np.array([[1, 0, 30], [0, 0.75, -0.125]]), abs=1e-12)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_the_share_of_the_area_is_in_its_range(first, other, seed):
    scale = (min(first, other), max(first, other))
    config = crops(rotation_deg=30.0, horizontal_flip=0.5, global_crops_size=20, global_crops_scale=scale)
    plan = draw_multi_crop(config, 1, PX, PX, np.random.default_rng(seed))[0]
    affine = plan.affine[0, 0]
    share = abs(np.linalg.det(affine[:, :2])) * 20**2 / PX**2
    assert max(scale[0], 1 / PX**2) - 1e-9 <= share <= max(scale[1], 1 / PX**2) + 1e-9
    width, height = (np.linalg.norm(affine[:, axis]) * 20 for axis in (0, 1))
    assert max(width, height) <= PX + 1e-9
    assert 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9
    middle = affine @ (9.5, 9.5, 1.0)  # of the crop, in the image: far enough inside for an unrotated crop
    assert width / 2 - 0.5 - 1e-9 <= middle[0] <= PX - width / 2 - 0.5 + 1e-9
    assert height / 2 - 0.5 - 1e-9 <= middle[1] <= PX - height / 2 - 0.5 + 1e-9


def test_area_and_aspect_are_distributed_as_in_the_literature():
    """Area uniform, log aspect uniform (Szegedy et al. 2015), place uniform: means and variances within 5 errors."""
    config = crops(local_crops_number=1, local_crops_scale=(0.05, 0.32), rotation_deg=10.0, horizontal_flip=0.3)
    n_crops = 40_000
    affine = draw_multi_crop(config, n_crops, PX, PX, np.random.default_rng(0))[1].affine[0] * config.local_crops_size
    width, height = np.linalg.norm(affine[:, :, 0], axis=1), np.linalg.norm(affine[:, :, 1], axis=1)
    angle = np.degrees(np.arctan2(-affine[:, 0, 1], affine[:, 1, 1]))
    middle = affine[:, :, :2] @ np.full(2, 0.5) + (affine[:, :, 2] / config.local_crops_size) + 0.5
    middle -= affine[:, :, :2] @ np.full(2, 0.5) / config.local_crops_size  # from pixel centres to their corners
    for values, low, high in (
        (width * height / PX**2, 0.05, 0.32),
        (np.log(width / height), -math.log(4 / 3), math.log(4 / 3)),
        (angle, -10, 10),
        ((middle[:, 0] - width / 2) / (PX - width), 0, 1),
        ((middle[:, 1] - height / 2) / (PX - height), 0, 1),
    ):
        deviation = (high - low) / math.sqrt(12)
        assert values.min() >= low - 1e-9
        assert values.max() <= high + 1e-9
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation / math.sqrt(n_crops)
        assert values.std() == pytest.approx(deviation, rel=0.02)
    assert np.mean(np.linalg.det(affine[:, :, :2]) < 0) == pytest.approx(0.3, abs=5 * 0.46 / math.sqrt(n_crops))


# --- grey values


def test_jitter_is_a_gamma_of_two_jitters_in_log_units():
    plan = one(crops(jitter=0.1), 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0)
    assert plan.tables.shape == (2, 1, 256)
    expected = [round(255 * (value / 255) ** math.exp(0.2)) for value in (0, 10, 64, 128, 200, 255)]
    assert plan.tables[0, 0, [0, 10, 64, 128, 200, 255]].tolist() == expected


def test_brightness_then_contrast_about_mid_grey():
    """100 · 1.4 = 140; 127.5 + 0.6 · (140 − 127.5) = 135.  200 · 1.4 is cut to 255, then 204."""
    config = crops(brightness=0.4, contrast=0.4, brightness_contrast_p=0.5)
    exposures = planning._exposures(1, 1, config, Given(0.4, 1.0, 0.0))  # type: ignore[arg-type]
    table = planning._tables(None, None, exposures, None)[0, 0]
    assert table[[0, 100, 200]].tolist() == [51, 135, 204]
    spared = planning._exposures(1, 1, config, Given(0.6, 1.0, 0.0))  # type: ignore[arg-type]
    assert np.array_equal(spared, np.ones((1, 1, 2)))


def test_solarisation_inverts_the_bright_half_of_some_second_views():
    config = crops(solarize=0.25, global_crops_size=16, local_crops_size=16)
    global_plan, local_plan = draw_multi_crop(config, 4000, PX, PX, np.random.default_rng(0))
    unchanged = np.arange(256)
    assert (global_plan.tables[0] == unchanged).all()
    solarized = (global_plan.tables[1] != unchanged).any(1)
    assert solarized.mean() == pytest.approx(0.25, abs=0.035)  # 5 errors
    assert (global_plan.tables[1][solarized] == np.where(unchanged < 128, unchanged, 255 - unchanged)).all()
    assert local_plan.tables is None


def test_a_tone_curve_by_hand():
    """Log slope −1 … +1, linear: (e^(2t) − 1) / (e² − 1), at t = 1/2: 1 / (e + 1) = 0.2689.  Equal knots: no change."""
    curve = planning._tone_curves(np.linspace(0, 1, 5), 1.0)
    assert (curve[0], curve[255]) == (0, 1)
    assert (curve[127] + curve[128]) / 2 == pytest.approx(1 / (math.e + 1), abs=1e-3)
    for level in (0.0, 0.7):
        assert planning._tone_curves(np.full(5, level), 2.0) == pytest.approx(np.arange(256) / 255)


@given(st.floats(0.01, 5), st.integers(0, 2**32))
def test_tone_curves_rise_from_black_to_white(strength, seed):
    lots = np.random.default_rng(seed).random((3, 2, 5))
    curves = planning._tone_curves(lots, strength)
    assert (np.diff(curves, axis=-1) > 0).all()
    assert (curves[..., 0] == 0).all()
    assert curves[..., -1] == pytest.approx(np.ones((3, 2)))


def test_the_z_score_undoes_brightness_and_contrast_but_no_tone_curve():
    """Why the look of a scanner is a curve: on grey values that nothing is cut from."""
    values = np.random.default_rng(0).integers(20, 200, 5000)

    def z(table: np.ndarray) -> np.ndarray:
        seen = table[values].astype(float)
        return (seen - seen.mean()) / seen.std()

    exposures = np.array([[[1.2, 0.7]]])
    plain = z(np.arange(256))
    assert np.abs(z(planning._tables(None, None, exposures, None)[0, 0]) - plain).max() < 0.05
    curve = planning._tone_curves(np.linspace(0, 1, 5), 1.0)
    assert np.abs(z(planning._tables(None, curve[None, None], None, None)[0, 0]) - plain).max() > 0.3


def test_detail_and_noise_lie_in_their_ranges():
    config = crops(detail=math.log(2), noise=0.1, global_crops_size=16)
    plan = draw_multi_crop(config, 3000, PX, PX, np.random.default_rng(0))[0]
    sigma, gain = plan.detail[..., 0], plan.detail[..., 1]
    assert (0.5 <= sigma.min() < 0.51, 1.99 < sigma.max() <= 2.0) == (True, True)
    assert (0.5 <= gain.min() < 0.51, 1.99 < gain.max() <= 2.0) == (True, True)
    assert np.log(gain).mean() == pytest.approx(0, abs=0.03)  # soft as often as sharp
    assert (0 <= plan.noise.min() < 0.1, 25.4 < plan.noise.max() <= 25.5) == (True, True)
    assert plan.noise_from.min() >= 0
    assert plan.noise_from.max() <= 1024 - 16


@pytest.mark.parametrize("size", [16, 512, 700])
def test_the_noise_field_holds_a_crop_at_many_places(size):
    field = noise_field(size)
    assert field.shape[0] >= 2 * size
    assert field.mean() == pytest.approx(0, abs=5e-3)
    assert field.std() == pytest.approx(1, abs=5e-3)
    assert abs(np.corrcoef(field[:, 1:].ravel(), field[:, :-1].ravel())[0, 1]) < 5e-3


# --- how much is drawn, and for which view

NEW = [
    {"brightness": 0.4},
    {"contrast": 0.4},
    {"solarize": 0.5},
    {"tone_curve": 1.0},
    {"detail": 1.0},
    {"noise": 0.1},
    {"tone_curve": 1.0, "detail": 1.0, "noise": 0.1, "look_per_image": True},
]


@pytest.mark.parametrize("added", NEW)
def test_what_was_added_moves_nothing_that_was_there(added):
    """Old crops stay where they were, and are blurred as they were, when a new option is switched on."""
    before = draw_multi_crop(Crops(blur=0.5), 3, PX, PX, np.random.default_rng(1))
    after = draw_multi_crop(Crops(blur=0.5, **added), 3, PX, PX, np.random.default_rng(1))
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.affine, new.affine)
        assert np.array_equal(old.blur, new.blur)
    changed = [
        field.name
        for field in fields(CropPlan)
        if differs(getattr(before[0], field.name), getattr(after[0], field.name))
    ]
    assert changed


def differs(one: object, other: object) -> bool:
    return not (one is other or np.array_equal(one, other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blur", "expected"), [(0.3, (0.3, 0.3, 0.3)), ((1.0, 0.1, 0.5), (1.0, 0.1, 0.5)), ((0.0, 1.0, 0.0), (0, 1, 0))]
)
def test_blur_by_view(blur, expected):
    global_plan, local_plan = draw_multi_crop(crops(blur=blur), 2000, PX, PX, np.random.default_rng(0))
    found = [(view > 0).mean() for view in (*global_plan.blur, local_plan.blur)]
    assert found == pytest.approx(list(expected), abs=5 * 0.5 / math.sqrt(2000))
    drawn = np.concatenate([global_plan.blur.ravel(), local_plan.blur.ravel()])
    assert drawn[drawn > 0].min() == pytest.approx(0.1, abs=0.02)
    assert drawn.max() == pytest.approx(2.0, abs=0.02)


def test_blur_by_view_is_read_from_a_recipe_and_checked():
    assert load("demo", {"crops.blur": [1.0, 0.1, 0.5]}).crops.blur == (1.0, 0.1, 0.5)
    for wrong in ([1.0, 0.1], [1.0, 0.1, 1.5], -0.1):
        with pytest.raises(ConfigError, match=r"crops\.blur"):
            load("demo", {"crops.blur": wrong})


def test_one_look_for_all_crops_of_an_image_or_one_for_each_crop():
    looks = {"tone_curve": 1.0, "detail": 1.0, "noise": 0.1}
    shared = draw_multi_crop(crops(**looks, look_per_image=True), 3, PX, PX, np.random.default_rng(0))
    for name in ("tables", "detail", "noise"):
        rows = np.concatenate([getattr(plan, name) for plan in shared])  # (2 + L, B, …)
        assert (rows == rows[:1]).all(), name
        assert len(np.unique(rows[0].reshape(3, -1), axis=0)) == 3, name
    corners = np.concatenate([plan.noise_from for plan in shared])
    assert len(np.unique(corners.reshape(-1, 2), axis=0)) == 12  # the deviation is shared, the noise is not
    own = draw_multi_crop(crops(**looks), 3, PX, PX, np.random.default_rng(0))
    assert len(np.unique(np.concatenate([plan.tables for plan in own]).reshape(-1, 256), axis=0)) == 12


def test_shapes_and_no_local_crops():
    everything = {**{key: value for added in NEW for key, value in added.items()}, "blur": 0.5, "jitter": 0.1}
    for n_local in (0, 3):
        config = crops(**everything, local_crops_number=n_local, global_crops_size=32, local_crops_size=16)
        global_plan, local_plan = draw_multi_crop(config, 5, 40, 70, np.random.default_rng(0))
        assert global_plan.shape == (2, 5, 32, 32)
        assert local_plan.shape == (n_local, 5, 16, 16)
        for plan in (global_plan, local_plan):
            for name, rest in (
                ("affine", (2, 3)),
                ("tables", (256,)),
                ("detail", (2,)),
                ("noise", ()),
                ("noise_from", (2,)),
            ):
                assert getattr(plan, name).shape == (*plan.shape[:2], *rest), name


@pytest.mark.parametrize("draw", [draw_multi_crop, draw_gentle])
def test_a_plan_is_a_function_of_the_stream(draw: Callable[..., CropPlan | list[CropPlan]]):
    def arrays(seed: int) -> list[np.ndarray]:
        plans = draw(Crops(), 3, PX, PX, np.random.default_rng(seed))
        return [plan.affine for plan in (plans if isinstance(plans, list) else [plans])]

    assert all(np.array_equal(one, other) for one, other in zip(arrays(1), arrays(1), strict=True))
    assert not np.array_equal(arrays(1)[0], arrays(2)[0])


def test_a_part_of_a_plan_is_its_images():
    config = crops(tone_curve=1.0, noise=0.1, blur=0.5)
    plan = draw_multi_crop(config, 6, PX, PX, np.random.default_rng(0))[1]
    part = plan.part(2, 5)
    assert part.shape == (2, 3, 48, 48)
    for name in ("affine", "tables", "blur", "noise", "noise_from"):
        assert np.array_equal(getattr(part, name), getattr(plan, name)[:, 2:5])
    assert part.detail is None


def test_gentle_views_have_the_images_height_and_no_strong_photometry():
    config = Crops(solarize=1.0, tone_curve=1.0, noise=0.1, detail=1.0, blur=(1.0, 0.0, 1.0), brightness=0.5)
    plan = draw_gentle(config, 50, PX, PX, np.random.default_rng(0))
    assert plan.shape == (1, 50, PX, PX)
    assert (plan.blur == 0).all()
    assert (plan.detail, plan.noise) == (None, None)
    shares = np.abs(np.linalg.det(plan.affine[0, :, :, :2]))
    assert 0.75 - 1e-9 <= shares.min() < 0.8
    assert 0.95 < shares.max() <= 1 + 1e-9
