"""A coordinator that asks for more than its recipe has, or for a recipe that no hospital should train.

Over the real message path, to a site as it is deployed, with the policy that it has if nobody writes one.  After each
refusal no image was touched, nothing lies about, and the site answers the honest request with the same bytes as before.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from chexfound.contract.limits import Limits
from chexfound.contract.request import Reply, Request
from chexfound.model import checkpoint
from chexfound.model.glori import build_head
from chexfound.phases.payload import Settings
from chexfound.pretrain import positions
from chexfound.pretrain.beginning import frozen_gains
from chexfound.pretrain.optimizer import zero_moments
from chexfound.pretrain.train import initial_weights
from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes, error_replies
from client.answer import hospital as client_site
from client.answer import refusals
from client.app import handle
from tests.staged import staged

pytest_plugins = ("tests.secagg.fixtures",)

SMALL = {  # a model and a run that the default policy grants, and that two cores train in seconds
    "name": "small",
    "image_px": 112,
    "crops": {"global_crops_size": 48, "local_crops_size": 48, "local_crops_number": 1},
    "dino": {"head_n_prototypes": 32, "head_bottleneck_dim": 16, "head_hidden_dim": 32, "head_nlayers": 2},
    "ibot": {"head_n_prototypes": 32, "head_bottleneck_dim": 16, "head_hidden_dim": 32, "head_nlayers": 2},
    "train": {"rounds": 3, "local_steps": 2, "pooled_batch_size": 8},
    "adapt": {"findings": ["Bar", "Blob"], "rounds": 2, "local_steps": 2, "pooled_batch_size": 8, "views": 0},
}


FINDINGS = "findings: [Bar, Blob]\n"  # which the released vocabulary does not have; the rest is by the defaults


def small(**changed: Any) -> Recipe:
    return check.validate({**SMALL, **changed}, "small")


SECRET = bytes(range(32))  # by which patients fall into the same parts each time


class Hospital:
    """One of two sites of a federation, by the defaults of its site.yaml.

    Args:
        folder: for its home.
        images: of its own.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        self.home, self.node = folder / "sites" / "NORTH", {"site": "NORTH", "data": str(images)}

    def demand(self, text: str) -> None:
        """What its operator writes."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "secret.key").write_bytes(SECRET)
        (self.home / "site.yaml").write_text(FINDINGS * ("findings" not in text) + text)

    def ask(
        self,
        make_message: Any,
        request: Request,
        recipe: Recipe,
        run: int = 1,
        edit: Callable[[RecordDict], None] = lambda content: None,
    ) -> Any:
        """Its reply, or the code of its refusal."""
        content = envelopes.pack_request(request)
        edit(content)
        message = make_message(content, envelopes.MESSAGE_TYPES[request.kind])
        message.metadata.__dict__["_run_id"] = run
        config = {"recipe": recipes.to_json(recipe)}
        context = Context(run_id=run, node_id=1, node_config=dict(self.node), state=RecordDict(), run_config=config)
        reply = handle(message, context)
        return error_replies.error_code(reply) if reply.has_error() else envelopes.unpack_reply(reply.content).message


@pytest.fixture
def hospital(tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    images = make_images(tmp_path / "images", {"alpha": 60, "beta": 60}, {"alpha": ["Blob", "Bar"], "beta": []})
    one = Hospital(tmp_path / "home", images)
    one.demand(FINDINGS)
    yield one
    client_site.forget()


@pytest.fixture
def ask(hospital: Hospital, make_message: Any) -> Callable[..., Any]:
    def ask(request: Request, recipe: Recipe, **options: Any) -> Any:
        return hospital.ask(make_message, request, recipe, **options)

    return ask


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_site, "site_of", lambda *_, **__: pytest.fail("its images were touched"))


def round_of(recipe: Recipe, number: int = 0, **changed: Any) -> Request:
    """The honest request of a round of pretraining."""
    steps = recipe.train.local_steps
    work = {"round": number, "step": number * steps, "steps": steps, "batch_size": 4}
    return Request(phase="pretrain", tensors=initial_weights(recipe), **{**work, **changed})


def test_honest_rounds_are_answered_before_a_refusal_and_after_it(ask: Any, hospital: Hospital) -> None:
    recipe = small()
    assert ask(Request(phase="enrol"), recipe).values["train"] > 20
    first = ask(round_of(recipe), recipe)
    assert ask(round_of(recipe, steps=2 * 10**9), recipe) == "request.beyond"
    again = ask(round_of(recipe), recipe)
    assert checkpoint.digest(first.tensors) == checkpoint.digest(again.tensors)


BEYOND: dict[str, dict[str, Any]] = {
    "two thousand million steps": {"steps": 2 * 10**9},
    "one step": {"steps": 1},
    "a round after the last": {"round": 3, "step": 6},
    "a step that is not the round's": {"step": 4},
    "a step before the first": {"round": 1, "step": 0},
    "all sites' images a step": {"batch_size": 8},
    "a batch that is no share": {"batch_size": 7},
    "findings that the recipe does not name": {"findings": ("Bar", "HIV")},
}


@pytest.mark.parametrize("change", BEYOND.values(), ids=BEYOND)
def test_a_request_for_more_than_its_recipe_has_is_refused(ask: Any, untouched: None, change: dict[str, Any]) -> None:
    recipe = small()
    assert ask(round_of(recipe, **change), recipe) == "request.beyond"


@pytest.mark.parametrize("phase", ["enrol", "features", "evaluate"])
@pytest.mark.parametrize("field", ["round", "step", "steps", "batch_size"])
def test_a_phase_without_rounds_has_none(ask: Any, untouched: None, phase: str, field: str) -> None:
    assert ask(Request(phase=phase, **{field: 1}), small()) == "request.beyond"


def test_one_image_a_step_is_refused(ask: Any, untouched: None) -> None:
    recipe = small(train={**SMALL["train"], "pooled_batch_size": None, "batch_size": 1})
    assert ask(round_of(recipe, batch_size=1), recipe) == "policy.work"
    shared = small()
    assert ask(round_of(shared, batch_size=2), shared) == "policy.work"


SGD = {"optimizer": "sgd", "lr": 1.0, "warmup_epochs": 0, "clip_grad": 0}
ONE = {"rounds": 1, "local_steps": 1, "pooled_batch_size": None, "batch_size": 1}
LINEAR = {"stem": "linear"}
TOO_MUCH: dict[str, tuple[str, dict[str, Any]]] = {
    "one patch is the image": ("policy.model", {"student": {**LINEAR, "patch_size": 112}, "crops": {
        "global_crops_size": 112, "local_crops_size": 112}}),
    "a few wide patches": ("policy.model", {"student": {**LINEAR, "patch_size": 28}, "crops": {
        "global_crops_size": 112, "local_crops_size": 112}}),
    "few patches": ("policy.model", {"image_px": 64}),
    "crops of one patch": ("policy.model", {"crops": {"global_crops_size": 48, "local_crops_size": 16}}),
    "a LayerScale of one": ("policy.model", {"student": {"layerscale": 1.0}}),
    "no LayerScale at all": ("policy.model", {"student": {"layerscale": 0.0}}),
    "a thousand registers": ("policy.model", {"student": {"num_register_tokens": 1000}}),
    "images of 2048 px": ("policy.model", {"image_px": 2048}),
    "images of 16 px": ("policy.model", {"image_px": 16}),
    "a mean as threshold": ("policy.model", {"input": {"normalization": "mean_std", "mean": 0.731, "std": 0.001}}),
    "one step of SGD on one image": ("policy.rate", {"optim": SGD, "train": ONE}),
    "a rate of one": ("policy.rate", {"optim": {"lr": 1.0}}),
    "a multiplied rate": ("policy.rate", {"optim": {"lr": 0.002, "patch_embed_lr_mult": 100}}),
    "gradients that are not clipped": ("policy.rate", {"optim": {"clip_grad": 0}}),
    "a head's rate of one": ("policy.rate", {"adapt": {**SMALL["adapt"], "lr": 1.0}}),
    "one step": ("policy.work", {"train": {**SMALL["train"], "local_steps": 1}}),
    "a million steps": ("policy.work", {"train": {**SMALL["train"], "local_steps": 1_000_000}}),
    "a million rounds": ("policy.work", {"train": {**SMALL["train"], "rounds": 1_000_000}}),
    "a million images a step": ("policy.work", {"train": {**SMALL["train"], "pooled_batch_size": 1_000_000}}),
    "an interval of three draws": ("policy.work", {"evaluate": {"bootstrap_samples": 3}}),
    "one image a step": ("policy.work", {"train": {**SMALL["train"], "pooled_batch_size": None, "batch_size": 1}}),
}  # fmt: skip


@pytest.mark.parametrize(("code", "change"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_recipe_that_asks_too_much_learns_nothing_but_the_policy(
    ask: Any, untouched: None, hospital: Hospital, code: str, change: dict[str, Any]
) -> None:
    """At enrolment the limits leave and no count; later requests are refused; no store is made of any size."""
    recipe = small(**change)
    reply = ask(Request(phase="enrol"), recipe)
    assert set(reply.values) == {"site", "versions", "policy"}
    assert not Limits.parse(reply.values["policy"], "the policy").masked
    noted = refusals.read(hospital.home)  # for the operator's `status`
    assert noted is not None
    assert (noted.phase, noted.code) == ("enrol", code)
    for phase in ("pretrain", "features", "adapt", "evaluate"):
        assert ask(Request(phase=phase, steps=1, batch_size=1), recipe) == code
    noted = refusals.read(hospital.home)
    assert noted is not None
    assert (noted.phase, noted.code) == ("evaluate", code)
    assert not list(hospital.home.glob("store-*"))


def test_a_step_larger_than_the_machine_is_refused(ask: Any, untouched: None, hospital: Hospital) -> None:
    train, crops = {"pooled_batch_size": 4096}, {"local_crops_number": 256, "local_crops_size": 384}
    recipe = small(train={**SMALL["train"], **train}, crops=crops)
    for request in (Request(phase="enrol"), round_of(recipe, batch_size=2048)):
        assert ask(request, recipe) == "policy.machine"
    assert not list(hospital.home.glob("store-*"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("phases: [pretrain]", "policy.phase"),
        ("tensors: [student, head]", "policy.tensors"),
        ("machine: {memory_gb: 0.5}", "policy.machine"),
        ("machine: {disk_gb: 0.000001}", "policy.machine"),
        ("max_steps: 1", "policy.work"),
        ("max_lr: 1", "config"),  # of `model`: a file that is not understood grants nothing
    ],
)
def test_what_the_operator_writes_holds(ask: Any, hospital: Hospital, untouched: None, text: str, code: str) -> None:
    hospital.demand(text)
    assert ask(round_of(small()), small()) == code


@pytest.mark.parametrize("text", ["min_patients: 45", "min_images: 45"])
def test_few_patients_with_a_label_are_answered_for_as_none(ask: Any, hospital: Hospital, text: str) -> None:
    """No features and no head: the reply is that of a site that labels nothing."""
    recipe = small(phases=["adapt", "evaluate"])
    head = build_head(recipe, 2)
    backbone = positions.with_grid(initial_weights(recipe), recipe.position_px // recipe.student.patch_size)
    backbone = checkpoint.with_prefix(backbone, "student.backbone.")
    named = {"findings": ("Bar", "Blob")}
    adapt = Request(phase="adapt", tensors=dict(head.state_dict()) | zero_moments(head), steps=2, batch_size=4, **named)
    features = Request(phase="features", tensors=backbone, **named)
    assert ask(Request(phase="enrol"), recipe).values["train"] > 45
    assert ask(features, recipe) == Reply()
    assert (hospital.home / "features").exists()
    assert 20 < ask(adapt, recipe).values["images"] < 45
    hospital.demand(text)
    client_site.forget()
    assert ask(features, recipe) == Reply()
    assert not (hospital.home / "features").exists()
    reply = ask(adapt, recipe)
    assert (reply.values["labelled"], reply.values["images"]) == (["suppressed"] * 2, "suppressed")
    assert (reply.values["history"], reply.tensors) == ([], {})


def test_a_run_that_has_had_its_hours_is_refused(ask: Any, hospital: Hospital) -> None:
    hospital.demand("machine: {hours: 0.0000001}")
    assert ask(Request(phase="enrol"), small()).values["images"]
    assert ask(round_of(small()), small()) == "policy.machine"
    assert ask(Request(phase="enrol"), small(), run=2).values["images"]


def test_one_run_more_in_a_month_than_the_policy_has_is_refused(ask: Any, hospital: Hospital) -> None:
    for run in range(1, 6):
        assert ask(Request(phase="enrol"), small(), run=run).values["images"]
    assert ask(Request(phase="enrol"), small(), run=6) == "policy.runs"
    assert ask(Request(phase="enrol"), small(), run=5).values["images"]
    ledger = hospital.home / "runs.json"
    assert ledger.stat().st_mode & 0o077 == 0
    runs = json.loads(ledger.read_text())
    month = {
        key: {**one, "began": one["began"] - 31 * 86400, "last": one["last"] - 31 * 86400} for key, one in runs.items()
    }
    ledger.write_text(json.dumps(month))
    assert ask(Request(phase="enrol"), small(), run=6).values["images"]


@pytest.mark.parametrize("key", ["name", "seed"])
def test_other_recipes_under_one_run_s_number_are_other_runs(ask: Any, key: str) -> None:
    """Whatever they differ in: by another seed it is another training, and its name is the coordinator's word."""
    for number in range(5):
        assert ask(Request(phase="enrol"), small(**{key: f"run {number}" if key == "name" else number}), run=1).values
    assert ask(Request(phase="enrol"), small(**{key: "one more" if key == "name" else 5}), run=1) == "policy.runs"


def test_runs_that_were_refused_use_up_none(ask: Any) -> None:
    for run in range(1, 9):
        ask(Request(phase="enrol"), small(student={"layerscale": 1.0}), run=run)
    assert ask(Request(phase="enrol"), small(), run=9).values["images"]


# -- tensors


def listing(rows: int) -> Callable[[RecordDict], None]:
    table = json.dumps({"tensors": [[f"student.{number}", "float32", [0]] for number in range(rows)]})

    def edit(content: RecordDict) -> None:
        content["request"]["tensors"] = table

    return edit


@pytest.mark.parametrize("rows", [10**6, 10**5])
def test_a_list_of_a_million_tensors_costs_neither_time_nor_memory(ask: Any, untouched: None, rows: int) -> None:
    recipe, edit = small(), listing(rows)
    request = replace(round_of(recipe), tensors={})
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ask(request, recipe, edit=edit) == "protocol"
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # kB


def other(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "one more": other("student.images", torch.zeros(4)),
    "one less": other("student.backbone.cls_token", None),
    "another shape": other("student.backbone.cls_token", torch.zeros(1, 1, 9)),
    "another dtype": other("student.backbone.cls_token", torch.zeros(1, 1, 96, dtype=torch.float64)),
    "a huge moment": other("optimizer.backbone.cls_token.exp_avg", torch.zeros(1, 1, 4096)),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_of_its_recipe_s_model_are_refused(ask: Any, untouched: None, change: Any) -> None:
    recipe = small()
    request = round_of(recipe)
    change(request.tensors)
    assert ask(request, recipe) == "request.tensors"


def test_a_delivery_that_is_larger_than_its_recipe_s_model_is_refused(
    ask: Any, hospital: Hospital, untouched: None
) -> None:
    recipe = small()
    told = {"sha256": "0" * 64, "start": 0, "size": 2**40}
    chunk = np.zeros(10, np.uint8)
    request = staged(round_of(recipe), "deliver", told, chunk=chunk)
    assert ask(request, recipe) == "request.tensors"
    assert not (hospital.home / "parts").exists()


# -- what is told


def test_the_first_request_of_a_run_is_in_the_log_line_by_line(
    ask: Any, untouched: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "chexfound.client"):
        ask(Request(phase="enrol"), small(student={"layerscale": 1.0}))
    assert "REFUSED  model: {max_layerscale: 0.1}" in caplog.text
    assert "asked: student.layerscale 1" in caplog.text
    assert "ok       min_steps: 2" in caplog.text


# -- under masks

PERMISSIVE = """
model: {min_tokens: 1, min_crop_tokens: 1}
min_patients: 0
min_images: 0
min_batch: 2
min_bootstrap: 1
min_steps: 1
"""


@pytest.fixture
def deployed(fed: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The four hospitals of tests/secagg as they are deployed, each with a site.yaml for so small a recipe."""
    home = fed.folder / "deployed"
    home.mkdir()
    (home / "sites").symlink_to(fed.folder / "homes")
    monkeypatch.setenv("CHEXFOUND_HOME", str(home))
    for name, node in fed.nodes.items():
        del node["home"]
        (fed.homes[name] / "site.yaml").write_text(PERMISSIVE)
    return fed


def pretraining(fed: Any, **changed: Any) -> Any:
    weights = initial_weights(fed.recipe)
    gains = frozen_gains(fed.recipe, weights)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items() if name not in gains}
    settings = Settings(ring=32, images=60, ranges=dict.fromkeys(shapes, 1.0))
    given = {"steps": 1, "batch_size": 2, "tensors": weights, "settings": settings, "shapes": shapes}
    return fed.attempt("pretrain", **(given | changed))


def test_an_honest_sum_passes_and_no_other_work_under_masks(deployed: Any) -> None:
    fed = deployed
    assert int(fed.attempt("counts").finish()["images"]) > 60
    one = pretraining(fed)
    for change in ({"steps": 2 * 10**9}, {"round": 7}, {"batch_size": 8}):
        assert one.ask("advertise", "alpha", **change) == "request.beyond"
    one = pretraining(fed).until("masked")
    more = one.request.tensors | {"student.images": torch.zeros(4)}
    assert one.ask("masked", "alpha", tensors=more) == "request.tensors"
    assert one.ask("masked", "alpha", tensors={}) == "request.tensors"
    assert pretraining(fed, number=2).finish()["images"] > 0


def test_a_recipe_that_is_not_granted_gets_no_key_under_masks(deployed: Any) -> None:
    for home in deployed.homes.values():
        (home / "site.yaml").unlink()
    assert pretraining(deployed).ask("advertise", "alpha") == "policy.model"
    assert not deployed.attempt_folder("alpha").exists()
