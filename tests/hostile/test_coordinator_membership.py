"""A coordinator who knows a patient's number, and chooses recipes to learn whether that patient is at a hospital.

Through the ClientApp of a site that is no simulation's.  The seeds and fractions are those that told it when the split
was an unkeyed hash: with one of them the named patient alone trained.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from chexfound.contract.request import Request
from chexfound.data.intake.dicom import pseudonym
from chexfound.data.intake.ingest import ingest
from chexfound.data.store.reader import Store
from chexfound.data.store.split import SIMULATED
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.pretrain.beginning import taken_backbone
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.rng import unit_interval
from chexfound.wire import envelopes
from client.answer.hospital import site_of
from client.app import app
from client.home import paths, secret
from tests.data.conftest import dicom_file, picture
from tests.hostile.weights_door import SMALL, demand

PATIENTS = [str(1000 + number) for number in range(120)]  # so many that no part is small
VICTIM = "1007"
PLAIN = {phase: envelopes.MESSAGE_TYPES[phase] for phase in ("enrol", "pretrain", "features", "adapt", "evaluate")}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose policy is that of the defaults, but that so small a recipe passes."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    for name in ("A", "B", "none", "one", "few", "many"):
        demand(paths.site_home(name), f"{SMALL}split: {{train: 0.5, val: 0.25}}\n")


@pytest.fixture
def hospital(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`hospital("A", numbers)`: the configuration of a node that serves these patients' DICOM files."""

    def make(name: str, patients: Sequence[str]) -> dict[str, Any]:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in patients:
            dicom_file(folder / f"{PATIENTS.index(number)}.dcm", picture(int(number)), PatientID=number)
        return {"site": name, "data": str(folder)}

    return make


@pytest.fixture
def ask(make_message: Callable[..., Any]) -> Callable[..., Any]:
    """`ask(node, recipe, phase)`: the values that the site tells, or the word by which it refuses."""

    def say(node: dict[str, Any], recipe: Recipe, phase: str = "enrol") -> Any:
        run = {"recipe": recipes.to_json(recipe)}
        context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
        reply = app(make_message(envelopes.pack_request(first(recipe, phase)), PLAIN[phase]), context)
        return reply.error.reason if reply.has_error() else envelopes.unpack_reply(reply.content).message.values

    return say


def first(recipe: Recipe, phase: str) -> Request:
    """A phase's first request, as an honest coordinator has it."""
    head = build_head(recipe, 1)
    tensors = {
        "pretrain": lambda: initial_weights(recipe),
        "features": lambda: taken_backbone(initial_weights(recipe)),
        "adapt": lambda: {**head.state_dict(), **zero_moments(head)},
        "evaluate": lambda: checkpoint.add_prefix(head.state_dict(), "head."),
    }
    steps = {"pretrain": recipe.train.local_steps, "adapt": recipe.adapt.local_steps}.get(phase, 0)
    given = tensors[phase]() if phase in tensors else {}
    findings = ("Nodule",) if phase in ("features", "adapt", "evaluate") else ()
    return Request(phase=phase, steps=steps, batch_size=4 if steps else 0, findings=findings, tensors=given)


def chosen(recipe: Recipe) -> list[Recipe]:
    """Recipes by which, under the unkeyed hash, the victim alone trained, or was the one who fell out of training."""

    def place(seed: int) -> float:
        return unit_interval(seed, "split", pseudonym(VICTIM))

    seed = next(n for n in range(10**6) if place(n) < 1e-4)
    other = next(n for n in range(100) if 0.3 < place(n) < 0.7)
    fractions = [(seed, 1e-4), *((other, place(other) + moved) for moved in (-1e-4, 1e-4)), (3, 0.02), (4, 0.9)]
    return [replace(recipe, seed=n, split=replace(recipe.split, train=train, val=0.05)) for n, train in fractions]


def test_a_seed_and_a_fraction_chosen_for_one_patient_tell_nothing(hospital, ask, tiny_recipe: Recipe) -> None:
    node = hospital("A", PATIENTS)
    told = [ask(node, recipe) for recipe in chosen(tiny_recipe)]
    assert (told[0]["images"], told[0]["train"] + told[0]["val"] + told[0]["test"]) == (120, 120)
    assert told == [told[0]] * len(told)


def test_two_fractions_that_differ_by_one_patient_give_the_same_training_set(hospital, tiny_recipe: Recipe) -> None:
    """The difference of what was learned over both was that patient's image, with a correlation of .999995."""
    site = site_of(hospital("A", PATIENTS), tiny_recipe.image_px, enrolling=True)
    parts = [[site.split(recipe, part).tolist() for part in ("train", "val", "test")] for recipe in chosen(tiny_recipe)]
    assert parts == [parts[0]] * len(parts)
    assert all(parts[0])


def test_which_patients_train_is_another_secret_s_at_another_hospital(hospital, tiny_recipe: Recipe) -> None:
    """Of two hospitals with the same patients one does not tell what is at the other."""
    sites = [site_of(hospital(name, PATIENTS), tiny_recipe.image_px, enrolling=True) for name in "AB"]
    hashes = [{one.view.store.images[place].sha256 for place in one.training_ids(tiny_recipe)} for one in sites]
    assert hashes[0] != hashes[1]
    assert not {image.patient for image in sites[0].view.store.images} & set(sites[1].view.store.patients)


def unkeyed(number: str) -> set[bytes]:
    """What a list of all numbers would be searched by."""
    digests = {hashlib.new(kind, number.encode()).hexdigest() for kind in ("md5", "sha1", "sha256", "sha512")}
    return {digest[:16].encode() for digest in digests} | {pseudonym(number).encode(), bytes.fromhex(pseudonym(number))}


def test_a_known_number_finds_nobody_in_the_index(hospital, ask, tiny_recipe: Recipe) -> None:
    ask(hospital("A", PATIENTS), tiny_recipe)
    path = paths.store_path(paths.site_home("A"), tiny_recipe.image_px)
    assert len(Store.open(path)) == len(PATIENTS)
    files = [file.read_bytes() for file in path.iterdir()]
    assert not [number for number in PATIENTS for name in unkeyed(number) for held in files if name in held]


def test_a_manifest_s_patients_are_not_in_the_index(make_images, ask, tiny_recipe: Recipe, tmp_path: Path) -> None:
    def named(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["patient_id"] = f"Mueller-Hans-{row['patient_id']}"

    node = {"site": "A", "data": str(make_images(tmp_path / "images", {"alpha": 120}, change=named))}
    assert ask(node, tiny_recipe)["patients"] == 120
    path = paths.store_path(paths.site_home("A"), tiny_recipe.image_px)
    assert not [file for file in path.iterdir() if b"Mueller" in file.read_bytes()]
    assert ask(node, tiny_recipe)["patients"] == 120  # the manifest is read anew, and names the same


def test_none_and_few_patients_have_one_answer(hospital, ask, tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "images" / "none").mkdir(parents=True)
    none = {"site": "none", "data": str(tmp_path / "images" / "none")}
    for node in (none, hospital("one", [VICTIM]), hospital("few", PATIENTS[:19])):
        for aggregation in ("fedavg", "secagg"):
            assert ask(node, replace(tiny_recipe, aggregation=aggregation)) == "policy.patients", (node, aggregation)
        assert {ask(node, tiny_recipe, phase) for phase in PLAIN} == {"policy.patients"}
    assert ask(hospital("many", PATIENTS), tiny_recipe)["images"] == 120


def test_fewer_patients_than_a_count_is_told_of_are_too_few_whatever_else_the_policy_takes(
    hospital, ask, tiny_recipe: Recipe
) -> None:
    demand(paths.site_home("few"), f"{SMALL}min_patients: 0\nmin_images: 0\ncells: {{patients: 60}}\n")
    node = hospital("few", PATIENTS[:59])
    assert {ask(node, tiny_recipe, phase) for phase in PLAIN} == {"policy.patients"}
    demand(paths.site_home("few"), f"{SMALL}min_patients: 0\nmin_images: 0\ncells: {{patients: 2}}\n")
    assert ask(node, tiny_recipe)["images"] == 59


def test_a_store_as_it_is_has_the_same_answer(hospital, ask, tiny_recipe: Recipe, tmp_path: Path) -> None:
    ingest(Path(hospital("x", PATIENTS[:3])["data"]), tmp_path / "store", tiny_recipe.image_px)
    assert ask({"site": "A", "data": str(tmp_path / "store")}, tiny_recipe) == "policy.patients"


def test_the_digest_of_a_store_cannot_be_tried_against_a_guess(hospital, ask, tiny_recipe: Recipe) -> None:
    first, second = (hospital(name, PATIENTS) for name in "AB")
    told = [ask(node, tiny_recipe)["store_hmac"] for node in (first, second, first)]
    store = Store.open(paths.store_path(paths.site_home("A"), tiny_recipe.image_px))
    assert told[0] == told[2]  # by which a run that goes on sees that nothing has changed
    assert len({*told, store.digest()}) == 3
    hospital("A", PATIENTS[:1])
    dicom_file(Path(first["data"]) / "more.dcm", picture(1), PatientID="2000")
    assert ask(first, tiny_recipe)["store_hmac"] != told[0]


def test_nor_is_that_of_a_store_as_it_is(hospital, ask, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Whose names have no key: the key of what leaves is the site's own, and no key that everybody has."""
    path = tmp_path / "store"
    ingest(Path(hospital("x", PATIENTS)["data"]), path, tiny_recipe.image_px)
    told = [ask({"site": name, "data": str(path)}, tiny_recipe)["store_hmac"] for name in "AB"]
    guess = hmac.new(SIMULATED, Store.open(path).digest().encode(), "sha256").hexdigest()
    assert len({*told, guess}) == 3


def test_the_keys_tell_nothing_of_each_other(tmp_path: Path) -> None:
    paths.close(tmp_path / "sites" / "A")
    own = secret.of_site(tmp_path / "sites" / "A")
    held = (tmp_path / "sites" / "A" / "secret.key").read_bytes()
    keys = [held, own.split, own.digest, own.naming.key]
    assert len(set(keys)) == 4
    assert not any(own.naming.key_id in key.hex() for key in keys)
    assert not any(key.hex() in repr(own) or repr(key) in repr(own) for key in keys)
