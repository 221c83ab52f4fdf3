"""The picture is what the source is, and the page's examples run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import client.app
from chexfound.contract.request import Reply
from chexfound.data.intake import pictures
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.errors import ConfigError, ProtocolError
from chexfound.phases import dispatch
from chexfound.wire import envelopes
from client.answer import declared
from server.rounds.start import run_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "draw_architecture", module)  # where a dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def measured(drawing: Any) -> tuple[dict[str, int], dict[str, set[str]]]:
    return drawing.measure()


def test_no_room_imports_one_that_imports_it(drawing: Any, measured: Any) -> None:
    assert drawing.circles(measured[1]) == []


def test_the_picture_is_what_the_script_draws(drawing: Any, measured: Any) -> None:
    """But for the numbers of lines, which each change moves."""
    there, drawn = (
        re.sub(r"[\d,]+ lines", "", text) for text in (drawing.PICTURE.read_text(), drawing.draw(*measured))
    )
    assert there == drawn, f"docs/architecture.svg is not what the code is now; redraw it: {drawing.REDRAW}"


def test_every_room_is_in_the_table(measured: Any) -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    rooms = {room for room in measured[0] if not room.endswith(".py") and "." in room}
    lacking = {room for room in rooms if f"{room.split('.')[-1]}`" not in table}
    assert not lacking


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:chexfound|client|server|sim|strategies|tests|docs|examples)/[\w/]+\.py)`", PAGE))
    assert len(named) > 30
    assert not {name for name in named if not (ROOT / name).exists()}


def example(heading: str, number: int = 0) -> str:
    """Give a block of Python below a heading of the page."""
    section = PAGE.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)[number]


def run(code: str, **names: Any) -> dict[str, Any]:
    namespace = {"__name__": "docs_architecture", **names}
    exec(compile(code, "docs/architecture.md", "exec", dont_inherit=True), namespace)
    return namespace


def test_a_phase(tiny_recipe: Any, make_exchange: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (dispatch.PHASES, envelopes.MESSAGE_TYPES, declared.KINDS):
        monkeypatch.setitem(table, "views", None)  # so that the example's entry goes with the test
    told = run(example("A phase"))
    monkeypatch.setitem(client.app.PHASES, "query.views", "")
    client.app.listen("views")  # in a program that has the entry from the beginning, the app does so by itself
    exchange = make_exchange(tiny_recipe, ["alpha", "beta"])
    answers = told["ask"](exchange, tiny_recipe)
    members = {member.name: member.values["train"] for member in exchange.enrol(tiny_recipe)}
    assert {name: values["pa"] + values["ap"] for name, values in answers.items()} == members
    assert all(values["pa"] for values in answers.values())


def test_what_a_phase_may_not_tell_does_not_leave(
    tiny_recipe: Any, make_exchange: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (dispatch.PHASES, envelopes.MESSAGE_TYPES, declared.KINDS):
        monkeypatch.setitem(table, "views", None)
    told = run(example("A phase"))
    monkeypatch.setitem(client.app.PHASES, "query.views", "views")
    dispatch.PHASES["views"] = lambda site, recipe, request: Reply(values={"pa": 1, "ap": 2, "patient": "a01"})
    assert told["ask"](make_exchange(tiny_recipe, ["alpha", "beta"]), tiny_recipe) == {}


def test_a_strategy(with_findings: Any, make_exchange: Callable[..., Any], tmp_path: Path) -> None:
    recipe = replace(
        with_findings,
        train=replace(with_findings.train, local_steps=1),
        adapt=replace(with_findings.adapt, local_steps=1, views=0),
        evaluate=replace(with_findings.evaluate, bootstrap_samples=10),
    )
    median = run(example("A strategy"))["Median"]
    names = {"recipe": recipe, "exchange": make_exchange(recipe, ["alpha", "beta", "gamma"])}
    outcome = run(example("A strategy", 1), folder=tmp_path / "run", Median=median, **names)["outcome"]
    assert len(outcome.results) == 6
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "middle"), [([1.0, 2.0, 1000.0], 2.0), ([1.0, 2.0, 4.0, 1000.0], 3.0)], ids=["odd", "even"]
)
def test_the_strategys_median(values: list[float], middle: float) -> None:
    reducer = run(example("A strategy"))["Median"]("pretrain", {"w": torch.zeros(2)})
    for value in values:
        reducer.admit(Reply(tensors={"w": torch.full((2,), value)}))()
    with pytest.raises(ProtocolError, match="finite"):
        reducer.admit(Reply(tensors={"w": torch.full((2,), float("nan"))}))
    assert reducer.result()["w"].tolist() == [middle, middle]


def test_masks_take_no_other_strategy(tiny_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregation=fedavg"):
        run_of(replace(tiny_recipe, aggregation="secagg"), None, tmp_path, reducer=lambda *_, **__: None)  # type: ignore


def test_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pictures.READERS, ".raw", pictures.read_picture)
    side = run(example("A reader"))["SIDE"]
    images = tmp_path / "images"
    images.mkdir()
    rows = np.linspace(0, 4095, side * side).reshape(side, side)
    rows.astype(">u2").tofile(images / "a.raw")
    (images / "b.raw").write_bytes(b"\0" * 10)
    cv2.imwrite(str(images / "c.png"), cv2.resize(rows / 16, (64, 64)).astype(np.uint8).T.copy())
    (images / "manifest.csv").write_text(
        "file,source,patient_id,findings\n"
        + "".join(f"{name},one,p{name[0]},\n" for name in ("a.raw", "b.raw", "c.png"))
    )
    summary = ingest(images, tmp_path / "store", 64)
    assert summary.images == 2
    assert [(file, "10 bytes" in reason) for file, reason in summary.refused] == [("b.raw", True)]
    store = Store.open(tmp_path / "store")
    place = store.patients.index("pa")
    pixels = store.pixels([place])[0].astype(int)
    assert pixels[0].mean() < 10
    assert pixels[-1].mean() > 245
