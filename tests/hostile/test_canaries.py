"""Names, numbers, UIDs and dates are planted wherever a hospital has them, and looked for wherever they must not be.

Real processes: SuperLink, two sites and their nodes, three runs (one that a site refuses, one that its images fail, one
that is done).  Between sites and coordinator stands a recorder; nothing is encrypted there, so what it keeps is what
TLS would hide.  One label of the other site may leave, by its own site.yaml: that one the search has to find.
"""

from __future__ import annotations

import json
import random
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import md5, sha1, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.data.store.index import INDEX
from chexfound.data.store.texts import TEXTS
from chexfound.host import logs
from chexfound.recipe import load as recipes
from chexfound.report import build
from client.operator import status
from tests.data.conftest import dicom_file
from tests.e2e.conftest import PX, RECIPE, Federation, write_site
from tests.hostile.recorder import Recorder, Search

ALLOWED = "SCHMIDT Anna 1.2.1961"  # a label of south's, whose operator lets it out: the search must find it
LABEL = "MUELLER Hans 12.3.1954 HIV"
ROUNDS = 5  # that north grants
FOLDER = "Ostrogorsky_Wilhelmina/20190817_1.2.826.0.1.3680043.8.498.77310442"
HEADER = {
    "PatientName": "Ostrogorsky^Wilhelmina",
    "PatientBirthDate": "19540312",
    "OtherPatientIDs": "SVNR-4417120354",
    "AccessionNumber": "ACC55190277",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.77310442",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.90817263",
    "StudyDate": "20190817",
    "InstitutionName": "Klinikum Sonnenhof",
    "ReferringPhysicianName": "Brandauer^Klara",
    "StudyDescription": "chest, asked by the widow Przybylski",
    "ImageComments": "compare Przybylski 2011",
}
CANARIES = [
    LABEL,
    "Ostrogorsky",
    "Wilhelmina",
    *(f"PID-7741-9035-{number}" for number in range(4)),
    *(HEADER[name] for name in HEADER if name not in ("PatientName", "StudyDescription", "ImageComments")),
    "Brandauer",
    "Przybylski",
    "ZIMMERMANN",  # in the ViewPosition for which an image is refused
    *(f"REG-00481516-{number:03d}" for number in range(40)),
    "Abernathy_Josephine",
    "Josephine",
    "Kontrastmittel",
    "AOK-77120045",
    "Archiv Lindenbach",
    "Station Kastanienhof",
    "Unbekannt-Divers",
    "Verschollen_Balduin",  # the file that the failing manifest names
]


def write_north(folder: Path) -> Path:
    """A PACS's export beside a registrar's table, with canaries in all that is not pixels."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (PX, PX), np.uint8)
        tags: dict[str, Any] = HEADER | {"PatientID": f"PID-7741-9035-{number}"}
        tags |= {"ViewPosition": "LL ZIMMERMANN"} if number == 3 else {}
        dicom_file(folder / FOLDER / f"PID-7741-9035-{number}.dcm", noise, **tags)
    registry = write_site(folder / "registry", "Archiv Lindenbach", 40, PX)
    (registry / "Abernathy_Josephine").mkdir()
    lines = (registry / "manifest.csv").read_text().splitlines()
    table = [lines[0] + ",sex,site,remarks,insurance"]
    for number, line in enumerate(lines[1:]):
        file, source, _, finding = line.split(",")
        (registry / file).rename(registry / "Abernathy_Josephine" / file)
        finding += f"|{LABEL}" * (number % 2)
        row = [f"Abernathy_Josephine/{file}", source, f"REG-00481516-{number:03d}", finding, "Unbekannt-Divers"]
        table.append(",".join([*row, "Station Kastanienhof", "no Kontrastmittel", "AOK-77120045"]))
    (registry / "manifest.csv").write_text("\n".join(table))
    return folder


def write_south(folder: Path) -> Path:
    write_site(folder, "south", 40, PX)
    table = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(table.replace("Nodule", f"Nodule|{ALLOWED}"))
    return folder


class Story:
    """What the federation left, and what passed on the way."""

    def __init__(self, processes: Federation, images: Path) -> None:
        self.processes, self.folder = processes, processes.folder
        self.images, self.home = write_north(images / "north"), self.folder / "home-north" / "sites" / "north"
        south = write_south(images / "south")
        processes.superlink()
        recorder = Recorder(processes.port)
        processes.address = f"127.0.0.1:{recorder.port}"
        for name, data, line in (
            ("north", self.images, f"max_rounds: {ROUNDS}"),
            ("south", south, f"findings: ['{ALLOWED}']"),
        ):
            processes.client(name, data, self.folder / f"home-{name}", PX)
            with open(self.folder / f"home-{name}" / "sites" / name / "site.yaml", "a") as policy:
                policy.write(f"{line}\n")
        train, adapt = replace(RECIPE.train, rounds=1), replace(RECIPE.adapt, rounds=1)
        recipe = replace(RECIPE, train=train, adapt=adapt)
        self.runs = [self.run("refused", replace(recipe, train=replace(train, rounds=ROUNDS + 1)))]
        table = self.images / "registry" / "manifest.csv"
        whole = table.read_text()
        table.write_text(whole.replace("Abernathy_Josephine/007.png", "Verschollen_Balduin/007.png"))
        self.runs.append(self.run("failed", recipe))
        table.write_text(whole)
        self.runs.append(self.run("done", recipe))
        build.build(self.folder / "done")
        self.status = status.read("north", self.home)
        processes.stop()
        recorder.stop()
        self.wire = b"\n".join(recorder.streams)

    def run(self, name: str, recipe: Any) -> str:
        config = self.folder / f"{name}.toml"
        config.write_text(recipes.to_run_config(recipe) + f'run-dir = "{self.folder / name}"\n')
        process = self.processes.run(f"run-{name}", config)
        process.wait()
        return process.text

    def coordinator(self) -> bytes:
        """Its logs, and every file of its runs."""
        paths = [self.folder / "superlink.log", *self.folder.glob("run-*.log")]
        paths += [path for name in ("refused", "failed", "done") for path in (self.folder / name).rglob("*")]
        return b"\n".join(path.read_bytes() for path in paths if path.is_file())

    def log(self, site: str) -> bytes:
        return (self.folder / f"client-{site}.log").read_bytes()

    def stores(self) -> list[Path]:
        return [path.parent for path in self.home.glob(f"store-*/{INDEX}")]


def index(store: Path) -> bytes:
    """Its bytes, and those of its journals."""
    return b"\n".join(path.read_bytes() for path in sorted(store.glob(f"{INDEX}*")))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    processes = Federation(tmp_path_factory.mktemp("canaries"))
    try:
        yield Story(processes, tmp_path_factory.mktemp("images"))
    finally:
        processes.stop()


@pytest.fixture(scope="module")
def search() -> Search:
    return Search(CANARIES)


pytestmark = pytest.mark.e2e


def test_all_that_is_looked_through_has_happened(story: Story) -> None:
    refused, failed, done = story.runs
    assert "event=failed" in refused
    assert "max_rounds" in refused
    assert "error 'data' (exit code 3)" in failed
    assert "event=done model_sha256=" in done
    files = {path.name for path in (story.folder / "done").rglob("*")}
    assert files >= {"journal.jsonl", "report.html", "metrics.json", "model.safetensors", "sites.json"}
    assert {
        row["tested_on"] for row in json.loads((story.folder / "done" / "metrics.json").read_text())["results"]
    } == {
        "north",
        "south",
    }


def test_the_site_itself_has_them(story: Story, search: Search) -> None:
    """It read them all, and its operator is told what stays: in files for this account only."""
    assert {canary for canary, _ in search((story.home / logs.REASONS).read_bytes())} >= {"Verschollen_Balduin"}
    (store,) = story.stores()
    texts = {canary for canary, how in search((store / TEXTS).read_bytes()) if how == "plain"}
    assert texts >= {LABEL, "Ostrogorsky", "Abernathy_Josephine", "ZIMMERMANN", "Station Kastanienhof"}
    assert story.status["stores"][0]["withheld"] == {LABEL: 20}
    assert story.status["stores"][0]["images"] == 43
    assert (story.home / logs.REASONS).stat().st_mode & 0o077 == 0
    refused = status.refused(story.home)
    assert refused == [f"{FOLDER}/PID-7741-9035-3.dcm: not frontal: ViewPosition 'LL ZIMMERMANN'"]


def test_the_search_finds_what_leaves(story: Story) -> None:
    allowed = Search([ALLOWED])
    for place in (story.wire, story.coordinator(), *map(Path.read_bytes, (story.folder / "done").glob("j*.jsonl"))):
        assert (ALLOWED, "plain") in allowed(place)
    assert allowed((story.folder / "done" / "report.html").read_bytes())


def test_nothing_of_them_is_sent(story: Story, search: Search) -> None:
    assert len(story.wire) > 1e7  # weights and all
    assert search(story.wire) == set()


def test_the_coordinator_has_nothing_of_them(story: Story, search: Search) -> None:
    assert search(story.coordinator()) == set()


@pytest.mark.parametrize("site", ["north", "south"])
def test_the_log_of_a_site_tells_nothing_of_them(story: Story, search: Search, site: str) -> None:
    assert b"images of" in story.log(site)
    assert search(story.log(site)) == set()


def test_the_index_of_a_site_tells_nothing_of_them(story: Story, search: Search, tmp_path: Path) -> None:
    """One that a researcher makes of the same images does: there the search finds them."""
    (store,) = story.stores()
    assert search(index(store)) == set()
    ingest(story.images, tmp_path / "store", PX)
    found = {canary for canary, _ in search(index(tmp_path / "store"))}
    assert found >= {LABEL, "Ostrogorsky", "PID-7741-9035-0", "REG-00481516-000", "20190817"}
    assert ("PID-7741-9035-0", "sha256") in search(index(tmp_path / "store"))


DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "hex": lambda text: text.hex().encode(),
    "base64": lambda text: b64encode(b"a" + text + b"bc"),
    "base64 of another place": lambda text: b64encode(b"ab" + text),
    "base64 of a third place": lambda text: b64encode(text + b"z"),
    "upper": bytes.upper,
    "the pseudonym of before": lambda text: sha256(text).hexdigest()[:16].encode(),
    "a hash in bytes": lambda text: sha1(text, usedforsecurity=False).digest(),
    "a hash in base64": lambda text: b64encode(md5(text, usedforsecurity=False).digest()),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_the_search_sees_through(search: Search, disguise: str) -> None:
    lots = random.Random(disguise)
    hidden = lots.randbytes(5000) + b"\0" + DISGUISES[disguise](b"Ostrogorsky") + b"\0" + lots.randbytes(5000)
    assert {canary for canary, _ in search(hidden)} == {"Ostrogorsky"}
