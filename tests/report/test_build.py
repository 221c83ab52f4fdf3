"""The page: what it holds, what it says where parts are absent, and how a browser shows it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil

import pytest

from chexfound.errors import DataError
from chexfound.report import build as module
from chexfound.report.build import build

SITES = ("nih-chestxray14", "guangzhou-pediatric")
HOSTILE = '<script>alert("site")</script>'
VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}


class Outline(html.parser.HTMLParser):
    """Tags, attributes and headings of a page; checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.ids, self._open, self._heading = [], [], [], [], None
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID_TAGS:
            self._open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self._heading = (int(tag[1]), [])
            self.headings.append(self._heading)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if re.fullmatch(r"h[1-6]", tag):
            self._heading = None

    def handle_data(self, data):
        if self._heading:
            self._heading[1].append(data)

    def titles(self, level):
        return ["".join(words) for at, words in self.headings if at == level]


@pytest.fixture(scope="module")
def page(whole):
    return whole.read_text()


def test_leads_with_the_sentence_and_the_figure_then_the_rest_in_order(page):
    outline = Outline(page)
    assert outline.titles(1)[0].startswith("Pneumonia: federating lost 0.0")
    assert outline.titles(2) == [
        "Pneumonia, site by site",
        "How to read this",
        "Sample images of each site",
        "Learning curves",
        "All results, with 95 % intervals",
        "Where the head looks",
        "What was left out",
        "Bytes and seconds",
        "The data",
        "How it was made",
    ]
    levels = [level for level, _ in outline.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_needs_nothing_but_itself(page):
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    for tag, attributes in Outline(page).tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)


def test_every_figure_has_words_and_every_id_is_one(page):
    outline = Outline(page)
    images = [attributes for tag, attributes in outline.tags if tag == "img"]
    drawings = [
        attributes for tag, attributes in outline.tags if tag == "svg" and attributes.get("aria-hidden") != "true"
    ]
    assert len(images) == 4 * 6 + 2 * 4
    assert len(drawings) == 3 + 2 + 2 + 2 + 4
    assert all(attributes["alt"] for attributes in images)
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 40 for attributes in drawings)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(outline.ids)


def test_tells_the_reasons_and_what_was_left_out(page):
    text = re.sub(r"<[^>]+>", "", page)
    assert "No figure at hannover-mhh: no negative among the test images." in text
    assert "Local: hannover-mhh was not trained: its training images hold no finding with both classes" in text
    assert "covid-chestxray: 3 files were refused" in text
    assert "batch 32 gives each of the sites 8 images a step" in text
    assert "the DINO loss ended at log K" in text
    for word in (
        "48.2 MB",
        "6 min 41 s",
        "PA 250",
        "federated 12.5",
        "40 / 300 / 60",
        "2.14.1",
        "2 cores",
        f"{0xA17:064x}",
        "local_steps: 60",
    ):
        assert word in text, word


def test_says_no_more_than_the_steps_allow(make_run, page):
    assert (
        "too short to show that self-supervised learning helps" in build(make_run(steps=100, sites=SITES)).read_text()
    )
    assert "too short" not in page


def test_void_comes_first(make_run):
    page = build(
        make_run(sites=SITES, change=lambda metrics: metrics.update(void="the pooled arm is below HOG"))
    ).read_text()
    assert Outline(page).titles(1) == ["This comparison is void: the pooled arm is below HOG"]
    assert "Conclude nothing from the figures below." in page


def _only_federated(metrics):
    metrics["results"] = [row for row in metrics["results"] if row["arm"] == "federated"]
    for key in list(metrics):
        if key not in ("schema", "results"):
            del metrics[key]


def test_a_deployed_run_has_the_federated_arm_and_metrics_alone(make_run):
    out = make_run(change=_only_federated)
    for path in list(out.iterdir()):
        if path.name != "metrics.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = build(out).read_text()
    assert "this run has nothing to compare it with" in Outline(page).titles(1)[0]
    assert "Not in this run: the pooled, local, random-weights and floor arms." in page
    for name in (
        "history.json",
        "sites.json",
        "recipe.yaml",
        "artifacts/samples.npz",
        "artifacts/attention.npz",
    ):
        assert f"The run left no {name}." in page


def test_no_result_at_all_is_said(make_run):
    page = build(make_run(sites=SITES, change=lambda metrics: metrics.update(results=[], differences=[]))).read_text()
    assert Outline(page).titles(1)[0].startswith("No AUROC could be computed")
    assert "metrics.json holds no result." in page


def test_damaged_parts_are_said_and_the_rest_stands(make_run):
    out = make_run(sites=SITES)
    for name, content in (
        ("history.json", b"{"),
        ("sites.json", b'{"a": 1}'),
        ("recipe.yaml", b"- a"),
        ("artifacts/samples.npz", b"torn"),
        ("artifacts/attention.npz", b""),
    ):
        (out / name).write_bytes(content)
    page = build(out).read_text()
    for said in (
        "history.json cannot be read",
        "sites.json is damaged",
        "recipe.yaml cannot be read",
        "samples.npz cannot be read",
        "attention.npz cannot be read",
    ):
        assert page.count(said) == 1
    assert Outline(page).titles(1)[0].startswith("Pleural Thickening: federating")


def _hostile(metrics):
    text = (
        json.dumps(metrics)
        .replace("hannover-mhh", HOSTILE.replace('"', '\\"'))
        .replace("COVID-19", '\\"><img src=x onerror=alert(1)>')
    )
    metrics.update(json.loads(text), notes=[HOSTILE, "\ud800 alone"], machine={HOSTILE: HOSTILE}, date=HOSTILE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, run_writer):
    out = run_writer(tmp_path_factory.mktemp("hostile") / "run", change=_hostile)
    for name in ("history.json", "sites.json"):
        (out / name).write_text((out / name).read_text().replace("hannover-mhh", HOSTILE.replace('"', '\\"')))
    (out / "recipe.yaml").write_text(f"name: '{HOSTILE}'\n")
    names = {f"site {number}": site for number, site in enumerate((HOSTILE, "b", '"><img src=x>', "d"))}
    (out / "artifacts/samples.json").write_text(json.dumps(names))
    captions = {
        "findings": [HOSTILE, "b", "c"],
        "sites": [HOSTILE] * 4,
        "captions": ["</figcaption>" + HOSTILE] * 4,
    }
    (out / "artifacts/attention.json").write_text(json.dumps(captions))
    return build(out)


def test_hostile_names_are_text(hostile):
    page = hostile.read_text()
    outline = Outline(page)
    assert "script" not in {tag for tag, _ in outline.tags}
    assert not any("onerror" in attributes for _, attributes in outline.tags)
    assert page.count("&lt;script&gt;") > 20


def test_same_run_same_bytes_and_a_failure_leaves_them(make_run, whole, monkeypatch):
    out = make_run(stuck=True)
    before = build(out).read_bytes()
    assert before == whole.read_bytes()
    assert len(before) < 1_000_000
    monkeypatch.setattr(module, "render", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(out)
    (out / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        build(out)
    assert (out / "report.html").read_bytes() == before
    assert not list(out.glob(".report*"))


VISIBLE = """
Promise.all([...document.images].map(image => image.decode())).then(() => {
  const box = one => { const r = one.getBoundingClientRect();
                       return [one.tagName, r.left, r.right, r.width, r.height]; };
  const shown = [...document.querySelectorAll("figure, figure img, .panel, .panel svg")].map(box);
  const words = [...document.querySelectorAll(".panel svg text")].map(box);
  return {shown, words, scroll: document.documentElement.scrollWidth, width: document.documentElement.clientWidth,
          boxes: [...document.querySelectorAll(".box")].map(b => [b.scrollWidth, b.clientWidth]),
          scripts: document.scripts.length, alien: document.querySelectorAll("img[src=x]").length};
})
"""
CONTRAST = """
(() => {
  const light = text => { const c = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                          return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = ink => { const l = light(ink); return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05); };
  return {paper, ink: ratio(getComputedStyle(document.body).color),
          words: [...document.querySelectorAll(".panel svg text")].map(one => ratio(getComputedStyle(one).fill)),
          small: ratio(getComputedStyle(document.querySelector(".small")).color)};
})()
"""


def _shown(browser, path):
    seen = browser.evaluate(VISIBLE)
    assert browser.complaints == []
    assert browser.requests[0] == path.as_uri()
    assert all(url.startswith("data:image/") for url in browser.requests[1:])
    assert seen["scroll"] <= seen["width"], "the page scrolls sideways"
    assert len(seen["shown"]) > 60
    for tag, left, right, width, height in seen["shown"]:
        assert width > 40, tag
        assert height > 30, tag
        assert left >= 0, tag
        assert right <= seen["width"] + 0.5, tag
    assert len(seen["words"]) > 200
    for _, left, right, width, _ in seen["words"]:
        assert width > 0
        assert left >= 0
        assert right <= seen["width"]
    assert seen["scripts"] == seen["alien"] == 0
    return seen


@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_visible_in_chromium(whole, browser, width):
    browser.open(whole, width)
    _shown(browser, whole)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_light_and_in_the_dark(whole, browser, scheme):
    browser.open(whole, 390, scheme)
    seen = browser.evaluate(CONTRAST)
    assert (seen["paper"] > 0.9) == (scheme == "light")
    assert (seen["paper"] < 0.02) == (scheme == "dark")
    assert seen["ink"] > 7
    assert min(*seen["words"], seen["small"]) > 4.5


def test_hostile_names_do_nothing_in_chromium(hostile, browser):
    browser.open(hostile, 390)
    _shown(browser, hostile)


def test_long_and_many_names_fit_a_phone(run_writer, tmp_path, browser):
    names = ("Universitätsklinikum-" + "x" * 60, "日本 病院", *(f"shard-{number}" for number in range(4)))
    rows = [
        {"arm": arm, "tested_on": site, "finding": "Pneumonia", "auroc": 0.8, "auroc_ci": [0.7, 0.9]}
        for site in names
        for arm in ("federated", *(f"local:{other}" for other in names))
    ]
    path = build(run_writer(tmp_path / "run", change=lambda metrics: metrics.update(sites=names, results=rows)))
    browser.open(path, 390)
    seen = browser.evaluate(VISIBLE)
    assert seen["width"] == 390
    assert seen["scroll"] <= seen["width"]


def test_print_clips_no_table(whole, browser):
    browser.open(whole, 695)  # A4 less its margins, in CSS pixels
    browser.send("Emulation.setEmulatedMedia", media="print")
    seen = browser.evaluate(VISIBLE)
    browser.send("Emulation.setEmulatedMedia", media="")
    assert seen["boxes"]
    assert all(content <= box for content, box in seen["boxes"])
    assert seen["scroll"] <= seen["width"]
