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
        "Health of pretraining",
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
    assert len(drawings) == 3 + 2 + 2 + 2 + 4 + 4
    assert all(attributes["alt"] for attributes in images)
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 40 for attributes in drawings)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(outline.ids)


def test_the_best_grey_level_floor_stands_beside_each_arm(page):
    text = re.sub(r"<[^>]+>", " ", page)
    panel = page[page.index('id="gain"') : page.index('id="read"')]
    assert panel.count('<th scope="row">grey levels alone</th>') == 3  # a paired difference at each site
    assert panel.count("fill: var(--floor); opacity: 0.12") == 3  # the shade, up to which it reaches
    assert "boosted trees on the site’s own images" in text  # which variant was chosen
    assert "Grey levels: regression on all sites’ images" in text


def test_tells_the_reasons_and_what_was_left_out(page):
    text = re.sub(r"<[^>]+>", "", page)
    assert "No figure at hannover-mhh: no negative among the test images." in text
    assert "Local: hannover-mhh was not trained: its training images hold no finding with both classes" in text
    assert "covid-chestxray: 3 files were refused" in text
    assert "batch 32 gives each of the sites 8 images a step" in text
    assert text.count("Pretraining ended ailing, cls-plateau: Federated (covid-chestxray: DINO loss 5.5") == 1
    assert "Best otherOf the models that other sites trained alone, the one with the highest AUROC" in text
    assert "It is picked on the patients that it is then shown on" in text
    assert "a bound of exactly 0 (0.000) counts as including it" in text
    assert (
        "hannover-mhh has no figure for Effusion, Pneumonia, Cardiomegaly, Pleural Thickening and Hernia: no negative"
        in text
    )
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


def test_health_is_shown_where_it_was_looked_at(make_run, page):
    panels = page.split('<section id="health">')[1].split("</section>")[0]
    assert panels.count("<svg viewBox=") - panels.count('aria-hidden="true"') == 4  # sites
    assert re.search(r"; Effective rank centralized from [\d.]+ to [\d.]+, local from .*federated from", panels)
    assert '<a href="#health">' in page
    out = make_run()
    history = json.loads((out / "history.json").read_text())
    for rows in history["pretrain"].values():
        for row in rows:
            del row["log_k"], row["teacher_entropy"], row["feature_std"]
            row.pop("rankme", None), row.pop("knn_auroc", None)
    (out / "history.json").write_text(json.dumps(history))
    bare = build(out).read_text()
    assert "iBOT loss" in bare
    assert "Health of pretraining" not in bare
    assert "#health" not in bare


def test_void_comes_first(make_run):
    page = build(
        make_run(sites=SITES, change=lambda metrics: metrics.update(void="the pooled arm is below HOG"))
    ).read_text()
    assert Outline(page).titles(1) == ["This comparison is void."]
    assert "Conclude nothing from the figures below.</b> the pooled arm is below HOG" in page


FLOOR = {"finding": "Pneumonia", "tested_on": SITES[0], "seeds": [0, 1], "ours": 0.711, "rival": 0.813}


@pytest.mark.parametrize("void", ["too weak", None])
def test_the_bar_that_the_pooled_model_was_held_against_is_a_table(make_run, void):
    page = build(make_run(change=lambda metrics: metrics.update(void=void, floor=[FLOOR]))).read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"nih-chestxray14\s+Pneumonia, seeds 0, 1\s+0\.711\s+0\.813\s+−0\.102", text)
    assert "Not checked against HOG" not in text
    assert Outline(page).titles(1)[0].startswith("This comparison is void." if void else "Pneumonia: federating")


def test_an_unchecked_comparison_says_how_to_check_it(make_run, page):
    assert "python benchmarks/hog_floor.py --run OUT" in page
    assert "hog_floor" not in build(make_run(change=_only_federated)).read_text()


def test_speaks_of_no_arm_that_was_not_run(make_run):
    def few(metrics):
        metrics["results"] = [row for row in metrics["results"] if row["arm"] in ("federated", "centralized")]
        metrics["comparisons"], metrics["not_trained"] = [], []
        metrics["model_sha256"] = {"federated": "0", "centralized": "1"}

    out = make_run(change=few)
    history = json.loads((out / "history.json").read_text())
    for phase, arms in history.items():
        history[phase] = {arm: rows for arm, rows in arms.items() if arm in ("federated", "centralized")}
    (out / "history.json").write_text(json.dumps(history))
    text = re.sub(r"<[^>]+>", " ", build(out).read_text())
    text = text.replace("Not in this run: the local, random-weights and floor arms.", "")
    for word in ("own model", "Own local", "own local", "Best other", "local 50", "andom weights", "not available"):
        assert word not in text.split("How it was made")[0], word
    assert "federated 12.5" in text
    assert "centralized 14.1" in text


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
    assert "this run trained no site’s own model and no pooled one" in Outline(page).titles(1)[0]
    assert "Not in this run: the pooled, local, random-weights and floor arms." in page
    for name in (
        "history.json",
        "sites.json",
        "recipe.yaml",
        "artifacts/samples.npz",
        "artifacts/attention.npz",
    ):
        assert f"The run left no {name}." in page


def test_a_deployed_run_shows_no_image_and_says_why(make_run):
    out = make_run(change=lambda metrics: (_only_federated(metrics), metrics.update(deployed=True)))
    shutil.rmtree(out / "artifacts")
    history = json.loads((out / "history.json").read_text())
    history = {phase: {"federated": arms["federated"]} for phase, arms in history.items()}
    (out / "history.json").write_text(json.dumps(history))
    page = build(out).read_text()
    outline = Outline(page)
    assert "No image leaves a site, so neither sample images nor attention maps are shown." in page
    assert "A deployed run trains the federated arm only" in page
    assert ".npz" not in page
    assert not {"samples", "attention"} & set(outline.ids)
    assert set(re.findall(r'href="#([^"]+)', page)) <= {*outline.ids, *re.findall(r' id="([^"]+)', page)}
    assert "Federated, at this site" in page
    assert "The site’s own model</li>" not in page
    assert "Pooled" not in page


def test_an_attention_caption_names_the_site_once_and_no_peak_is_beyond_the_scale(make_run):
    out = make_run()
    captions = json.loads((out / "artifacts/attention.json").read_text())
    captions["captions"] = [f"{site}, PA" for site in captions["sites"]]
    (out / "artifacts/attention.json").write_text(json.dumps(captions))
    page = build(out).read_text()
    assert ">nih-chestxray14, PA · peak" in page
    peaks = [float(found) for found in re.findall(r"peak ([\d.]+) × even", page)]
    assert float(re.search(r"([\d.]+) × even, the highest peak here", page)[1]) == max(peaks)


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


LETTERS = """
(() => {
  const shown = one => one.getBoundingClientRect().width > 0;
  return {sizes: [...document.querySelectorAll(".panel svg")].map(
            svg => 12.5 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width),
          hinted: [...document.querySelectorAll(".box")].filter(box => box.scrollWidth > box.clientWidth + 1)
            .map(box => Boolean(box.previousElementSibling?.matches(".hint") && shown(box.previousElementSibling))),
          lines: [...document.querySelectorAll(".verdicts tbody tr")].map(row => row.getBoundingClientRect().height),
          border: getComputedStyle(document.querySelector(".shots img")).borderTopWidth};
})()
"""


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_letters_are_of_one_size_and_a_wide_table_says_so(whole, browser, width):
    browser.open(whole, width)
    seen = browser.evaluate(LETTERS)
    assert max(seen["sizes"]) - min(seen["sizes"]) < 0.5
    assert min(seen["sizes"]) > 12
    assert seen["border"] == "1px"
    if width == 390:
        assert len(seen["hinted"]) > 5
        assert all(seen["hinted"])
        assert max(seen["lines"]) < 3 * 14 * 1.35 + 8  # two lines; a long name may take three


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
