"""A coordinator that listens for words and for single patients: what an honest site's replies tell it of them.

Over the product's own path: a message in, `client.app.handle`, a message out.  The site is a deployed one with the
policy that it has without a `site.yaml` (but that so small a model passes), and its labels hold a name that somebody
typed where a finding belongs.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from chexfound.contract import cells
from chexfound.contract.request import Reply, Request
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.phases import parted
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes
from client.answer import hospital as site
from client.app import handle
from client.home import secret
from tests.hostile.weights_door import demand, short, whole_run

NAME = "MUELLER Hans 12.3.1954 HIV"
MODEL = "model: {min_tokens: 1, min_crop_tokens: 1}\nmin_bootstrap: 1\n"  # of the tests' recipe
UNHEARD = "No such finding anywhere 12345"
TRAIN, TEST = 44, 26  # patients, of one image each; none validates
Row = dict[str, str]


class Hospital:
    """A deployed site in this process: its images, and what it answers."""

    def __init__(self, folder: Path, recipe: Recipe, message: Callable[..., Message]) -> None:
        self.folder, self.recipe, self.message, self.number = folder, recipe, message, 1

    def ask(self, request: Request, recipe: Recipe | None = None) -> Message:
        """What it answers."""
        run = {"recipe": recipes.to_json(recipe or self.recipe)}
        node = {"site": "north", "data": str(self.folder)}
        context = Context(run_id=self.number, node_id=1, node_config=node, state=RecordDict(), run_config=run)
        message = self.message(envelopes.pack_request(request), envelopes.MESSAGE_TYPES[request.phase])
        message.metadata.__dict__["_run_id"] = self.number
        return handle(message, context)

    def reply(self, request: Request, recipe: Recipe | None = None) -> Reply:
        """Likewise, unpacked."""
        answered = self.ask(request, recipe)
        assert answered.has_content(), answered.error
        return envelopes.unpack_reply(answered.content).message

    def run(self, findings: tuple[str, ...], recipe: Recipe | None = None) -> list[Reply]:
        """What it answers in an honest run over these findings, to one request of each phase."""
        recipe = recipe or self.recipe
        self.number += 1
        return whole_run(lambda request: self.reply(request, recipe), recipe, findings)


def write(folder: Path, change: Callable[[list[Row]], Any] = lambda rows: None) -> Path:
    """A hospital: Nodule on 3 of 7 patients, Effusion on two of those who train, Mass known of two who test."""
    folder.mkdir(parents=True)
    rows, lots = [], np.random.default_rng(0)
    for number in range(TRAIN + TEST + 2):
        tests, extra = number >= TRAIN, number >= TRAIN + TEST
        found = ["Nodule"] * (number % 7 < 3 and not extra) + ["Effusion"] * (number in (3, 4))
        found += ["Mass"] * (number == TRAIN + TEST)
        image = lots.normal(90, 12, (64, 64))
        cv2.imwrite(str(folder / f"{number:03d}.png"), image.clip(0, 255).astype(np.uint8))
        rows.append(
            {
                "file": f"{number:03d}.png",
                "source": "old archive" if extra else "archive",
                "patient_id": f"p{number:03d}",
                "findings": "|".join(found or ["No Finding"]),
                "view": "PA",
                "split": "test" if tests else "train",
            }
        )
    change(rows)
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "labelled.json").write_text(json.dumps({"archive": ["Nodule", "Effusion"], "old archive": ["Mass"]}))
    return folder


def labelled(*numbers: int, finding: str = NAME) -> Callable[[list[Row]], None]:
    """Puts a finding on some images."""

    def change(rows: list[Row]) -> None:
        for number in numbers:
            rows[number]["findings"] = "|".join([*rows[number]["findings"].split("|"), finding])

    return change


@pytest.fixture
def hospital(
    tmp_path: Path, tiny_recipe: Recipe, make_message: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Hospital]:
    """`hospital(change, place)`: the site "north" on a machine of its own, with labels that `change` has edited."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))

    def make(change: Callable[[list[Row]], Any] = lambda rows: None, name: str = "") -> Hospital:
        site.forget()
        if name:
            monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / f"home-{name}"))
        home = site.folder_of({"site": "north"})
        demand(home, MODEL)
        secret.path_of(home).write_bytes(bytes(range(32)))  # by which images are in the same order at each of them
        return Hospital(write(tmp_path / "images" / (name or "north"), change), short(tiny_recipe), make_message)

    return make


def sent(message: Message) -> bytes:
    """All bytes of a message's content."""
    whole = b""
    for record in message.content.values():
        for value in record.values():
            whole += value if isinstance(value, bytes) else getattr(value, "data", None) or repr(value).encode()
    return whole


@pytest.fixture
def probing(tiny_recipe: Recipe) -> Recipe:
    """A recipe that looks at the model after each step."""
    return replace(short(tiny_recipe), health=replace(tiny_recipe.health, eval_period_iterations=1))


# -- words


@pytest.mark.parametrize("aggregation", ["fedavg", "secagg"])
def test_a_name_typed_as_a_label_does_not_leave_at_enrolment(hospital: Any, aggregation: str) -> None:
    """Neither on one image nor on a dozen; that something is withheld is told of the dozen only."""
    for numbers in ([5], range(12)):
        place = hospital(labelled(*numbers), name=str(len(numbers)))
        answered = place.ask(Request(phase="enrol"), replace(place.recipe, aggregation=aggregation))
        assert answered.has_content()
        whole, values = sent(answered), envelopes.unpack_reply(answered.content).message.values
        assert b"MUELLER" not in whole
        assert base64.b64encode(b"MUELLER") not in whole
        assert "Nodule" in values["findings"]
        assert values["withheld"] is (len(numbers) > 1)


def test_a_name_typed_as_a_label_is_in_no_advert(hospital: Any, probing: Recipe) -> None:
    """Whatever the coordinator asks a part in."""
    place = hospital(labelled(*range(12)))
    place.reply(Request(phase="enrol"))
    here = site.site_of({"site": "north", "data": str(place.folder)}, probing.image_px, enrolling=False)
    for phase in ("counts", "adapt", "evaluate"):
        told = parted.declared(here, probing, Request(phase=phase, findings=(NAME, "Nodule", "Effusion", "Mass")))
        assert told == ["Nodule"]


def test_a_name_typed_as_a_label_is_in_no_reply_to_who_guesses_it(hospital: Any, probing: Recipe) -> None:
    """The site answers, to the bit, as to a finding that nobody has."""
    place, answers = hospital(labelled(*range(24))), []
    place.reply(Request(phase="enrol"), probing)
    for guess in (NAME, UNHEARD):
        replies = place.run(("Nodule", guess), probing)
        rows = [row for row in replies[-1].values["results"] if row.pop("finding") == guess]
        assert [row["n"] for row in rows] == [cells.SUPPRESSED]
        answers.append([([*one.values.items()], checkpoint.digest(one.tensors)) for one in replies])
    assert answers[0] == answers[1]


def test_the_health_probe_judges_no_name_that_may_not_leave(hospital: Any, probing: Recipe) -> None:
    """It takes all findings of the store where the run names none; of the odd one no figure can be had."""
    place = hospital(lambda rows: [row.update(source="notes") for row in rows] and labelled(*range(0, 44, 2))(rows))
    (place.folder / "labelled.json").write_text(json.dumps({"notes": [NAME]}))
    place.reply(Request(phase="enrol"), probing)
    reply = place.run((), probing)[0]
    assert "rankme" in reply.values["history"][0]
    assert "knn_auroc" not in reply.values["history"][0]


# -- single patients


def test_an_auroc_over_two_patients_is_suppressed(hospital: Any, tiny_recipe: Recipe) -> None:
    """One has a mass and one has none: 1 or 0 says which of them scored higher."""
    place = hospital()
    place.reply(Request(phase="enrol"))
    nodule, mass = place.run(("Nodule", "Mass"))[-1].values["results"]
    assert (nodule["n"], nodule["positives"]) == (26, 10)
    assert 0 <= nodule["auroc"] <= 1
    assert {mass[key] for key in cells.FIGURES} == {cells.SUPPRESSED}
    assert mass["reason"] is None


def test_a_cell_of_one_is_not_told_from_an_empty_one(hospital: Any, probing: Recipe) -> None:
    """A hospital where one patient has the finding answers each question as where none has it."""
    findings, told = ("Nodule", "Effusion"), []
    for name, change in (("none", (3, 4)), ("one", (3,)), ("two", ())):

        def without(rows: list[Row], taken: tuple[int, ...] = change) -> None:
            for number in taken:
                rows[number]["findings"] = rows[number]["findings"].replace("|Effusion", "").replace("Effusion", "")
                rows[number]["findings"] = rows[number]["findings"] or "No Finding"

        place = hospital(without, name=name)
        enrolled = place.reply(Request(phase="enrol"), probing).values
        assert enrolled["findings"]["Effusion"] == {"positives": cells.SUPPRESSED, "negatives": cells.SUPPRESSED}
        replies = place.run(findings, probing)
        assert replies[2].values["labelled"] == [TRAIN, cells.SUPPRESSED]
        values = [one.values for one in replies]
        told.append(json.dumps([{**enrolled, "store_hmac": ""}, *values]))
    assert told[0] == told[1] == told[2]


def test_who_is_in_a_small_part_is_not_told_by_a_total(hospital: Any) -> None:
    """Three patients validate: neither their number leaves, nor the totals that it could be taken from."""

    def change(rows: list[Row]) -> None:
        for number in range(3):
            rows[number]["split"] = "val"

    values = hospital(change).reply(Request(phase="enrol")).values
    assert values["val"] == values["images"] == values["patients"] == cells.SUPPRESSED
    assert (values["train"], values["test"]) == (TRAIN - 3, TEST + 2)


def test_a_finding_of_few_patients_moves_no_head(hospital: Any, tiny_recipe: Recipe) -> None:
    """Its rows come back as they were sent: no gradient of two patients is in them."""
    place = hospital()
    place.reply(Request(phase="enrol"))
    given, back = build_head(tiny_recipe, 2).state_dict(), place.run(("Nodule", "Effusion"))[2].tensors
    rows = build_head(tiny_recipe, 2).row_parameters
    assert rows
    decay = {name: tensor for name, tensor in given.items() if name in rows}
    for name, before in decay.items():
        moved = (back[name][1] - before[1]).abs().max()
        assert moved <= before[1].abs().max() * tiny_recipe.adapt.lr * tiny_recipe.adapt.weight_decay * 10, name


def test_a_policy_lets_out_the_names_that_its_operator_wrote(hospital: Any) -> None:
    """And no other; a name of few patients stays where it is."""
    place = hospital(lambda rows: (labelled(*range(0, 44, 2), finding="Trap")(rows), labelled(5)(rows)))
    demand(site.folder_of({"site": "north"}), f"{MODEL}findings: ['Trap', '{NAME}']\n")
    told = place.reply(Request(phase="enrol")).values["findings"]
    assert sorted(told) == ["Effusion", "No Finding", "Nodule", "Trap"]


def test_a_wrong_policy_tells_nothing_at_all(hospital: Any) -> None:
    """A site.yaml that cannot be read is refused, not taken for none."""
    place = hospital()
    demand(site.folder_of({"site": "north"}), f"{MODEL}cells: {{patients: none}}\n")
    answered = place.ask(Request(phase="enrol"))
    assert answered.has_error()
    assert answered.error.reason == "config"
