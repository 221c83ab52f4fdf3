"""Drawings hold no text from the data and take their colours from the page; heat maps keep their scale."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chexfound.evaluate.results import Point
from chexfound.report import figures


def dots():
    return [
        figures.Dot("Federated", "federated", "o", 0.8, (0.75, 0.85)),
        figures.Dot("Pooled", "centralized", "s", None, None),
        figures.Dot("Shuffled", "floor", "o", 0.35, (0.28, 0.4), filled=False, floor=True),
    ]


def words(svg):
    tree = ET.fromstring(svg.replace("xlink:href", "href"))
    return [element.text for element in tree.iter("text")]


def test_a_panel_writes_its_figures_and_the_gap():
    svg = figures.dot_panel(dots(), 0.2, "d0", 'A "quoted" <b>')
    assert {"Federated", "0.80", "0.75–0.85", "no figure", "0.35"} <= set(words(svg))
    assert 'aria-label="A &#34;quoted&#34; &lt;b&gt;"' in svg
    assert "var(--federated)" in svg
    assert "#0000" not in svg
    assert "<style" not in svg
    assert "http" not in svg


def test_two_panels_share_no_id():
    first, second = (figures.dot_panel(dots(), 0.2, name, "x") for name in ("d0-0", "d0-1"))
    ids = [
        {element.get("id") for element in ET.fromstring(svg.replace("xlink:href", "href")).iter() if element.get("id")}
        for svg in (first, second)
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(("low", "expected"), [(0.45, 0.4), (0.28, 0.2), (0.0, 0.0)])
def test_the_axis_holds_every_interval(low, expected):
    assert figures.axis_floor([figures.Dot("x", "floor", "o", low + 0.1, (low, 0.9))]) == pytest.approx(expected)


def line(n=400, **values):
    points = [Point(step=step, site="A", **values) for step in range(n)]
    return figures.Line("federated", "", points, [])


def test_curves_show_log_k_and_only_what_there_is():
    svg = figures.strips_panel([line(dino=5.0, ibot=4.0, log_k=5.545)], figures.CURVES, "c0", "x")
    assert {"DINO loss", "iBOT loss", "dashed: log K = 5.54"} <= set(words(svg)) or "dashed: log K = 5.55" in words(svg)
    assert not {"KoLeo loss", "Head loss"} & set(words(svg))
    assert figures.strips_panel([line(n=0)], figures.CURVES, "c0", "x") is None
    assert figures.strips_panel([line(n=1, dino=5.0)], figures.CURVES, "c0", "x") is not None


def test_health_shows_each_figure_against_its_collapse():
    def titles(**values):
        return set(words(figures.strips_panel([line(**values)], figures.HEALTH, "h0", "x") or "<svg/>"))

    seen = titles(dino=5.0, log_k=5.0, teacher_entropy=4.0, feature_std=0.5, rankme=20.0, knn_auroc=0.7)
    assert {strip.title for strip in figures.HEALTH} < seen
    assert {f"dashed: {strip.bound_says}" for strip in figures.HEALTH} < seen
    assert titles(dino=5.0, teacher_entropy=4.0, ibot=3.0) == set()  # without log K they tell nothing
    gap, entropy = (
        strip.series(line(n=5, dino=5.5, log_k=5.0, teacher_entropy=4.0))[1] for strip in figures.HEALTH[:2]
    )
    assert gap == pytest.approx([0.5] * 5)
    assert entropy == pytest.approx([80.0] * 5)


def test_a_probe_now_and_then_is_a_line_through_its_points():
    points = [Point(step=step, rankme=9.0 if step % 100 == 99 else None) for step in range(300)]
    steps, _ = figures.HEALTH[3].series(figures.Line("local", "", points, []))
    assert steps.tolist() == [99, 199, 299]


@given(st.integers(1, 2000))
@settings(deadline=None, max_examples=25)
def test_series_are_short_and_stay_within_the_values(n):
    values = np.sin(np.arange(n))
    points = [Point(step=int(step), dino=float(value)) for step, value in enumerate(values)]
    steps, means = figures.CURVES[0].series(figures.Line("local", "", points, []))
    assert 1 <= len(steps) == len(means) <= figures.CURVE_POINTS
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == n - 1
    assert means.min() >= values.min() - 1e-9
    assert means.max() <= values.max() + 1e-9


def test_even_attention_leaves_the_image_clear_and_a_peak_covers_it():
    image = np.full((32, 32), 100, np.uint8)
    even = figures.relative(np.full((8, 8), 1 / 64, np.float32))
    assert even == pytest.approx(np.ones((figures.HEAT_PX, figures.HEAT_PX)), abs=1e-4)
    bare, covered = figures.overlay(image, even, 4.0)
    assert np.abs(covered.astype(int) - bare[..., None]).max() <= 1
    peak = np.full((8, 8), 0.5 / 63, np.float32)
    peak[2, 5] = 0.5
    heat = figures.relative(peak)
    assert heat.max() > 20
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert (row * 8 // figures.HEAT_PX, column * 8 // figures.HEAT_PX) == (2, 5)
    _, covered = figures.overlay(image, heat, 4.0)
    assert covered[row, column].astype(int).max() - covered[row, column].astype(int).min() > 60


def test_an_image_survives_its_data_uri():
    image = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    uri = figures.jpeg(image)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))))
    assert np.abs(back.astype(int) - image).max() < 12
