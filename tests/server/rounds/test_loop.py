"""A run's journal, its resumption from wherever it stopped, and replies that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chexfound.contract.request import Reply, Request
from chexfound.durable import journal
from chexfound.durable.journal import read_journal
from chexfound.errors import CheckpointError, ConfigError, DataError, ProtocolError
from chexfound.model import checkpoint
from chexfound.recipe.batch_sizes import BatchSizes, dealt
from chexfound.recipe.schema import Stage
from server.rounds.loop import Outcome
from server.rounds.start import run_of
from server.rounds.work import choose_findings

SITES = ["alpha", "beta"]
MakeExchange = Callable[..., Any]


@pytest.fixture(scope="module")
def short(tiny_recipe: Any) -> Any:
    """Everything once or twice."""
    return replace(
        tiny_recipe,
        train=replace(tiny_recipe.train, local_steps=1),
        adapt=replace(tiny_recipe.adapt, local_steps=1, views=0),
        evaluate=replace(tiny_recipe.evaluate, bootstrap_samples=10),
    )


@pytest.fixture(scope="module")
def head_only(short: Any) -> Any:
    return replace(short, phases=("adapt", "evaluate"))


@pytest.fixture(scope="module")
def calm(short: Any, make_exchange: MakeExchange, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run that nothing disturbed: a folder with its `run` and `homes`, and its outcome."""
    folder = tmp_path_factory.mktemp("calm")
    return folder, run_of(short, make_exchange(short, SITES, folder / "homes"), folder / "run").run()


@pytest.fixture
def undisturbed(calm: tuple[Path, Outcome], tmp_path: Path) -> Outcome:
    """The outcome; a copy of the run's folder is `tmp_path / "calm"`."""
    shutil.copytree(calm[0] / "run", tmp_path / "calm")
    shutil.copytree(calm[0] / "homes", tmp_path / "calm homes")
    return calm[1]


def rounds(folder: Path) -> list[Any]:
    return [
        (e["phase"], e["round"], e["sha256"]) for e in read_journal(folder / "journal.jsonl") if e["event"] == "round"
    ]


def test_what_the_journal_holds(undisturbed: Outcome, tmp_path: Path) -> None:
    folder = tmp_path / "calm"
    entries = read_journal(folder / "journal.jsonl")
    assert [entry["event"] for entry in entries] == ["start", "round", "round", "features", "round", "round", "done"]
    start, first, *_, last, done = entries
    assert start["findings"] == ["Bar", "Blob"] == list(undisturbed.findings)
    assert [member["site"] for member in start["roster"]] == SITES
    assert start["backbone_sha256"] is None
    assert first["bytes"]["up"] == first["bytes"]["down"] > 0
    assert [(site["site"], len(site["history"])) for site in first["sites"]] == [("alpha", 1), ("beta", 1)]
    assert [site["labelled"] for site in last["sites"]] == [[23, 23], [0, 15]]
    assert done["model_sha256"] == undisturbed.model_sha256
    assert done["unscored"] == {}
    assert len(done["results"]) == 4
    assert checkpoint.digest(checkpoint.load(folder / "model.safetensors")) == undisturbed.model_sha256
    left = sorted(path.name for path in (folder / "rounds").iterdir())
    assert left == ["adapt-000001.safetensors", "pretrain-000001.safetensors"]  # only the last round of each phase
    assert "Jane" not in json.dumps(entries)
    assert not any(f"a{number:02d}" in json.dumps(start["roster"][0]["findings"]) for number in range(24))


def test_the_order_of_the_nodes_does_not_matter(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path
) -> None:
    again = run_of(short, make_exchange(short, SITES[::-1], tmp_path / "other homes"), tmp_path / "other").run()
    assert again.model_sha256 == undisturbed.model_sha256


def test_arrays_in_parts_give_the_same_model(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path
) -> None:
    recipe = replace(short, federation=replace(short.federation, part_mb=0.05))
    exchange = make_exchange(recipe, SITES, tmp_path / "homes")
    exchange.spool = tmp_path / "run" / "parts"
    assert run_of(recipe, exchange, tmp_path / "run").run().model_sha256 == undisturbed.model_sha256
    for site in SITES:
        assert [
            path.name.partition("-")[0] for path in sorted((tmp_path / "homes" / site / "parts" / "1").iterdir())
        ] == ["in", "out"]
    assert not list((tmp_path / "run" / "parts").iterdir())


def test_run_again_when_done_changes_nothing(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path
) -> None:
    before = (tmp_path / "calm" / "journal.jsonl").read_bytes()
    again = run_of(short, make_exchange(short, SITES, tmp_path / "calm homes"), tmp_path / "calm").run()
    assert again.model_sha256 == undisturbed.model_sha256
    assert again.results == undisturbed.results
    assert (tmp_path / "calm" / "journal.jsonl").read_bytes() == before


class Crash(BaseException):
    """As hard as a kill: no handler of ours takes it."""


def fail_at(monkeypatch: Any, where: tuple[Any, str], number: int, *, after: bool) -> None:
    """The `number`-th call of a function raises, before it has done its work or after."""
    module, name = where
    real, calls = getattr(module, name), iter(range(1, 10**6))

    def failing(*arguments: Any, **named: Any) -> Any:
        now = next(calls) == number
        if now and not after:
            raise Crash
        result = real(*arguments, **named)
        if now:
            raise Crash
        return result

    monkeypatch.setattr(module, name, failing)


COMMITS = {"journal append": (journal.Journal, "append"), "checkpoint save": (checkpoint, "save")}


@pytest.mark.parametrize("commit", list(COMMITS))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_that_dies_at_every_commit_ends_the_same(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path, commit: str, after: bool
) -> None:
    """It dies at the first commit, is resumed and dies at the second of what is left, and so on to the end."""
    folder, crashes = tmp_path / "torn", 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, COMMITS[commit], crashes + 1, after=after)
            try:
                outcome = run_of(short, make_exchange(short, SITES, tmp_path / "torn homes"), folder).run()
                break
            except Crash:
                crashes += 1
        assert crashes < 40
    assert crashes >= 3
    assert outcome.model_sha256 == undisturbed.model_sha256
    assert outcome.results == undisturbed.results
    assert rounds(folder) == rounds(tmp_path / "calm")
    assert not list(folder.rglob("*.tmp"))


# ---- a folder that holds something else


def test_another_recipe_roster_or_backbone_in_the_folder(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "calm"
    before = (folder / "journal.jsonl").read_bytes()
    other = replace(short, seed=1)
    with pytest.raises(ConfigError, match="another recipe_sha256.*choose another folder"):
        run_of(other, make_exchange(other, SITES), folder).run()
    with pytest.raises(ConfigError, match="another .*roster"):
        run_of(short, make_exchange(short, ["alpha", "all"]), folder).run()
    checkpoint.save(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="another backbone_sha256"):
        run_of(short, make_exchange(short, SITES), folder, backbone=tmp_path / "b.safetensors").run()
    assert (folder / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["flipped", "truncated", "absent", "another"])
def test_a_damaged_round_file(
    short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "calm" / "rounds" / "adapt-000001.safetensors"
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "absent":
        path.unlink()
    else:
        checkpoint.save(path, {"x": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match="adapt-000001.safetensors: (is not what the journal says|not a readable)"
    ):
        run_of(short, make_exchange(short, SITES), tmp_path / "calm").run()


def test_a_damaged_journal(short: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path) -> None:
    path = tmp_path / "calm" / "journal.jsonl"
    path.write_text(path.read_text().replace('"round":0', '"round":1', 1))
    with pytest.raises(CheckpointError, match="line 2 does not continue the chain"):
        run_of(short, make_exchange(short, SITES), tmp_path / "calm").run()


def test_two_runs_in_one_folder(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    with journal.Journal(tmp_path / "run" / "journal.jsonl"), pytest.raises(ConfigError, match="another process"):
        run_of(short, make_exchange(short, SITES), tmp_path / "run").run()


# ---- where it starts from


def test_start_from_a_backbone(head_only: Any, undisturbed: Outcome, make_exchange: Any, tmp_path: Path) -> None:
    outcome = run_of(
        head_only, make_exchange(head_only, SITES), tmp_path / "run", backbone=tmp_path / "calm" / "model.safetensors"
    ).run()
    for name, tensor in undisturbed.tensors.items():
        if name.startswith("backbone."):
            assert torch.equal(outcome.tensors[name], tensor)


def test_a_backbone_of_another_shape(head_only: Any, make_exchange: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is not the recipe's backbone"):
        run_of(head_only, make_exchange(head_only, SITES), tmp_path / "run", backbone=tmp_path / "b.safetensors").run()


def test_no_training_image(short: Any, make_exchange: Any, tmp_path: Path) -> None:
    bare = replace(short, split=replace(short.split, train=1e-9, val=0.1))
    with pytest.raises(DataError, match="site 'alpha' has no training image"):
        run_of(bare, make_exchange(bare, SITES), tmp_path / "run").run()


def test_findings_that_nobody_labels_are_told_before_any_training(
    short: Any, make_exchange: Any, tmp_path: Path
) -> None:
    odd = replace(short, adapt=replace(short.adapt, findings=("Blub",)))
    with pytest.raises(DataError, match="no site has a training image labelled with any of Blub"):
        run_of(odd, make_exchange(odd, SITES), tmp_path / "run").run()
    assert not rounds(tmp_path / "run")


def test_choose_findings(tiny_recipe: Any) -> None:
    counts = [
        {"A": {"positives": 2, "negatives": 9}, "B": {"positives": 9, "negatives": 0}},
        {"A": {"positives": 1, "negatives": 0}, "B": {"positives": 0, "negatives": 2}},
    ]
    assert choose_findings(tiny_recipe, counts) == ("A",)
    with pytest.raises(ConfigError, match="the closest is 'A' with 3 and 9"):
        choose_findings(replace(tiny_recipe, adapt=replace(tiny_recipe.adapt, min_positives=4)), counts)
    with pytest.raises(ConfigError, match="no image is labelled"):
        choose_findings(tiny_recipe, [{}, {}])
    named = replace(tiny_recipe, adapt=replace(tiny_recipe.adapt, findings=("B", "A")))
    assert choose_findings(named, counts) == ("B", "A")


def test_a_batch_is_dealt_by_size(tiny_recipe: Any, make_exchange: Any, tmp_path: Path) -> None:
    """Each site is asked for its share, and the sites have different ones."""
    recipe = replace(
        tiny_recipe, train=replace(tiny_recipe.train, deal="by_size"), adapt=replace(tiny_recipe.adapt, deal="by_size")
    )
    exchange = make_exchange(recipe, ["alpha", "beta", "gamma"])
    asked: dict[str, set[tuple[int, ...]]] = {}
    ask = exchange.ask

    def note(requests: Any, *given: Any) -> Any:
        requests = list(requests)
        asked.setdefault(requests[0].phase, set()).add(tuple(request.batch_size for request in requests))
        return ask(requests, *given)

    exchange.ask = note
    run_of(recipe, exchange, tmp_path / "run").run()
    train = [site["train"] for site in read_journal(tmp_path / "run" / "journal.jsonl")[0]["roster"]]
    assert asked["pretrain"] == asked["adapt"] == {dealt(12, train)}
    assert len(set(dealt(12, train))) > 1


def test_a_finding_that_no_site_can_train_has_no_figures(head_only: Any, make_exchange: Any, tmp_path: Path) -> None:
    recipe = replace(head_only, adapt=replace(head_only.adapt, findings=("Bar", "Blob")))
    outcome = run_of(recipe, make_exchange(recipe, ["beta", "gamma"]), tmp_path / "run").run()
    rows = {(row["tested_on"], row["finding"]): row for row in outcome.results}
    assert rows["beta", "Blob"]["auroc"] is not None
    for site in ("beta", "gamma"):
        assert (rows[site, "Bar"]["auroc"], rows[site, "Bar"]["auroc_ci"]) == (None, None)
        assert rows[site, "Bar"]["reason"]
    before = checkpoint.with_prefix(outcome.tensors, "head.")
    assert read_journal(tmp_path / "run" / "journal.jsonl")[-1]["unscored"] == {
        "Bar": "not trained: no site has both classes among its training images"
    }
    assert before


# ---- hostile replies


class Recorded:
    """Keeps what each site replied."""

    def __init__(self, exchange: Any) -> None:
        self.exchange, self.roster, self.replies = exchange, [], {}  # type: ignore[var-annotated]

    def enrol(self, recipe: Any, before: Any = ()) -> Any:
        self.roster = self.exchange.enrol(recipe, before)
        return self.roster

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for request, reply in zip(requests, self.exchange.ask(requests), strict=True):
            self.replies[request.phase, request.roster_index] = reply
            yield reply


class Altered:
    """Recorded replies again, of which those of one site are changed in one phase."""

    def __init__(self, recorded: Recorded, phase: str, change: Callable[[Reply], Reply], site: int = 1) -> None:
        self.recorded, self.phase, self.change, self.site = recorded, phase, change, site

    def enrol(self, recipe: Any, before: Any = ()) -> Any:
        return self.recorded.roster

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for request in requests:
            reply = self.recorded.replies[request.phase, request.roster_index]
            changed = (request.phase, request.roster_index) == (self.phase, self.site)
            yield self.change(reply) if changed else reply


def values(**changes: Any) -> Callable[[Reply], Reply]:
    return lambda reply: Reply(tensors=reply.tensors, values=reply.values | changes)


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Reply], Reply]:
    return lambda reply: Reply(tensors=change(dict(reply.tensors)), values=reply.values)


def row(place: int = 0, **changes: Any) -> Callable[[Reply], Reply]:
    """Of beta's rows, 0 is of Bar, of which it has no label, and 1 of Blob."""

    def change(reply: Reply) -> Reply:
        rows = [one | changes if number == place else one for number, one in enumerate(reply.values["results"])]
        return Reply(values={"results": rows})

    return change


def filled(end: str, change: Callable[[Any], Any]) -> Callable[[Reply], Reply]:
    """Change every tensor whose name ends so."""
    return tensors(lambda t: {name: change(x) if name.endswith(end) else x for name, x in t.items()})


def curve(**changes: Any) -> Callable[[Reply], Reply]:
    return lambda reply: values(history=[reply.values["history"][0] | changes])(reply)


NAN, HUGE = float("nan"), 10**400
HOSTILE: list[Any] = [
    *(("pretrain", values(images=value)) for value in (None, -1, "9", NAN, HUGE, True)),
    *(
        ("pretrain", values(history=value))
        for value in (
            None,
            {},
            [1],
            [{}],
            [{"step": 1}],
            [{"step": 0, "loss": NAN}],
            [{"step": 0, "loss": HUGE}],
            [{"step": 0, "loss": "1"}],
            [{"step": 0, "loss": 1, "a\nb": 1}],
        )
    ),
    ("pretrain", values(images=2**39), "counts 549755813888 images, its enrolment 15 for training"),
    ("pretrain", values(images=14), "its enrolment 15"),
    *(("pretrain", curve(step=step), "a row for each of its 1 steps, in order") for step in (1, 2**30)),
    *(("pretrain", curve(step=step), "must be rows of finite numbers") for step in (0.5, -1e308, False)),
    ("pretrain", curve(**{"<b>x": 1.0}), "must be rows of finite numbers: dino, feature_std, koleo"),
    ("pretrain", curve(loss=1e308), "must be rows of finite numbers"),
    ("pretrain", lambda reply: values(history=reply.values["history"] * 2)(reply), "a row for each"),
    *((phase, values(history=[]), "a row for each") for phase in ("pretrain", "adapt")),
    ("adapt", curve(dino=1.0), "must be rows of finite numbers: loss, step"),
    ("pretrain", filled("weight", lambda x: torch.full_like(x, 3e38)), "holds a weight that is 3e.38 beyond where"),
    ("pretrain", filled(".weight_g", lambda x: x * 2), "weight_g', which is not trained, is another than before"),
    ("adapt", filled("pooling", lambda x: x - 1e3), "'duplicate_pooling' holds a weight that is 1e.03 beyond where"),
    ("adapt", filled("query_embed.weight", lambda x: x - 10), "query_embed.weight', which is not trained, is another"),
    *(
        (phase, filled(key, change), f"{key}.* holds what cannot be a moment of the optimizer")
        for phase in ("pretrain", "adapt")
        for key, change in (
            (".exp_avg", lambda x: x + 10 * x.abs() + 1),
            (".exp_avg", lambda x: torch.full_like(x, 3e38)),
            (".exp_avg_sq", lambda x: 10 * torch.ones_like(x)),
            (".step", lambda x: x - 5),
            (".step", lambda x: x + 1),
        )
    ),
    *((phase, filled(".exp_avg_sq", lambda x: -x), "cannot be a moment") for phase in ("pretrain", "adapt")),
    ("pretrain", tensors(lambda t: {})),
    ("pretrain", tensors(lambda t: dict(list(t.items())[1:])), "other tensors than were sent"),
    ("pretrain", tensors(lambda t: {**t, "student.x": torch.zeros(1)})),
    ("pretrain", tensors(lambda t: {name: x.double() for name, x in t.items()})),
    ("pretrain", tensors(lambda t: {name: x.reshape(-1) for name, x in t.items()})),
    ("pretrain", tensors(lambda t: {name: x * NAN for name, x in t.items()})),
    *(("adapt", values(labelled=value)) for value in (None, [1], [1, 1, 1], [1, -1], [1, NAN], "11")),
    *(
        ("adapt", values(labelled=value), r"not the counts enrolled, .0, 15.")
        for value in ([0, 0], [0, 2**39], [15, 15], [0, 14])
    ),
    *(("adapt", values(images=value), "does not fit what it enrolled") for value in (0, 14, 16, 2**39)),
    ("features", values(images=15), "holds something where nothing was asked for"),
    ("features", tensors(lambda t: {"cls.sum": torch.zeros(1)}), "holds something where nothing was asked for"),
    ("features", lambda reply: Reply(masked={32: np.zeros(1, np.uint32)}), "holds something where nothing was asked"),
    ("adapt", tensors(lambda t: {name: x[:1] if x.ndim else x for name, x in t.items()})),
    *(("evaluate", values(results=value)) for value in (None, {}, [], [1], [{}], "x")),
    *(
        ("evaluate", row(1, **change), "not of the federated model")
        for change in ({"arm": "centralized"}, {"arm": None}, {"trained_on": "<script>"}, {"trained_on": None})
    ),
    *(
        ("evaluate", row(1, **change), "an interval must be two numbers")
        for change in (
            {"auroc_ci": [None, None]},
            {"auroc_ci": [0.9, 0.1]},
            {"auprc_ci": [0.5, 1.5]},
            {"auroc_ci": None},
        )
    ),
    ("evaluate", row(auroc=1.0), "has figures, but not both classes"),
    ("evaluate", row(1, positives=0), "has figures, but not both classes"),
    ("evaluate", row(1, auroc=None), "not a number between 0 and 1"),
    ("evaluate", row(1, auroc=None, auprc=None, auroc_ci=None, auprc_ci=None, reason="x"), "not a number between"),
    ("evaluate", row(1, positives=11), "11 positives of 9 images; 9 are enrolled for the test"),
    ("evaluate", row(1, n=11), "5 positives of 11 images; 9 are enrolled for the test"),
    ("evaluate", row(1, reason="x"), "a reason exactly where"),
    ("evaluate", row(reason=None), "a reason exactly where"),
    ("evaluate", row(reason="\x1b[31m"), "reason is not text"),
    *(
        ("evaluate", row(**change))
        for change in (
            {"finding": "Other"},
            {"tested_on": "alpha"},
            {"extra": 1},
            {"n": -1},
            {"n": None},
            {"positives": 10**9},
            {"auroc": 1.5},
            {"auroc": NAN},
            {"auroc": "0.9"},
            {"auprc": HUGE},
            {"auroc_ci": 5},
            {"auroc_ci": [0.1]},
            {"auroc_ci": [0.1, "1"]},
            {"auprc_ci": {"a": 1}},
            {"reason": 3},
            {"reason": "x" * 401},
            {"arm": ["x"]},
        )
    ),
]


@pytest.fixture(scope="module")
def once(short: Any) -> Any:
    return replace(short, train=replace(short.train, rounds=1), adapt=replace(short.adapt, rounds=1))


@pytest.fixture(scope="module")
def recorded(once: Any, make_exchange: MakeExchange, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    recorded = Recorded(make_exchange(once, SITES))
    run_of(once, recorded, tmp_path_factory.mktemp("recorded")).run()
    return recorded


def test_replies_that_were_not_changed_pass(once: Any, recorded: Recorded, tmp_path: Path) -> None:
    run_of(once, Altered(recorded, "pretrain", lambda reply: reply), tmp_path).run()


def test_the_first_site_is_blamed_for_its_own_fault(once: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Not the one after it, whose update was once held against the first one's."""
    less = Altered(recorded, "pretrain", tensors(lambda t: dict(list(t.items())[1:])), site=0)
    with pytest.raises(ProtocolError, match="site 'alpha' in pretrain, round 1: an update holds other tensors"):
        run_of(once, less, tmp_path / "run").run()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_replies(once: Any, recorded: Recorded, tmp_path: Path, number: int) -> None:
    """A ProtocolError, and the journal ends with the round before."""
    phase, change, *message = HOSTILE[number]
    with pytest.raises(ProtocolError, match=f"site 'beta' in {phase}.*{''.join(message)}"):
        run_of(once, Altered(recorded, phase, change), tmp_path / "run").run()
    events = [entry["event"] for entry in read_journal(tmp_path / "run" / "journal.jsonl")]
    assert (
        events
        == {
            "pretrain": ["start"],
            "features": ["start", "round"],
            "adapt": ["start", "round", "features"],
            "evaluate": ["start", "round", "features", "round"],
        }[phase]
    )


# ---- the curriculum


@pytest.fixture(scope="module")
def staged(short: Any) -> Any:
    """Two stages of one round; teacher and moments of the first go on in the second, at the sites."""
    stage = Stage(rounds=2, global_crops_size=64, local_crops_size=32, pooled_batch_size=4)
    return replace(
        short,
        phases=("pretrain",),
        train=replace(short.train, rounds=1, optimizer_state="local"),
        teacher=replace(short.teacher, policy="local"),
        curriculum=(stage,),
    )


def test_a_curriculum_survives_a_crash_at_every_commit(staged: Any, make_exchange: Any, tmp_path: Path) -> None:
    calm = run_of(staged, make_exchange(staged, SITES, tmp_path / "homes"), tmp_path / "calm").run()
    assert calm.tensors["backbone.pos_embed"].shape == (1, 1 + 16, 96)
    batches = [len(entry["sites"][0]["history"]) for entry in read_journal(tmp_path / "calm" / "journal.jsonl")[1:4]]
    assert batches == [1, 1, 1]
    crashes = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, COMMITS["journal append"], crashes + 1, after=True)
            try:
                again = run_of(staged, make_exchange(staged, SITES, tmp_path / "torn homes"), tmp_path / "torn").run()
                break
            except Crash:
                crashes += 1
        assert crashes < 40
    assert crashes >= 2
    assert again.model_sha256 == calm.model_sha256


def test_batches_of_a_curriculum(staged: Any) -> None:
    batches = BatchSizes.of(staged, [9, 9, 9])
    assert batches.pretrain == ((4, 4, 4), (2, 1, 1))
    assert batches.pretrain_images(staged) == [4 + 2 * 2, 4 + 2, 4 + 2]
    assert BatchSizes.pooled(staged, 2).pretrain == ((12,), (4,))
    with pytest.raises(ConfigError, match=r"curriculum\.0\.pooled_batch_size: .* 4 images cannot be dealt among 5"):
        BatchSizes.of(staged, [9] * 5)


def test_a_backbone_of_another_resolution_starts_a_run(
    staged: Any, head_only: Any, make_exchange: Any, tmp_path: Path
) -> None:
    """Its positions are interpolated: for the first stage, or for the finished model where nothing is pretrained."""
    path = tmp_path / "backbone.safetensors"
    model = run_of(staged, make_exchange(staged, SITES), tmp_path / "first").run().tensors
    checkpoint.save(path, checkpoint.with_prefix(model, "backbone."))
    for recipe, side in ((staged, 4), (head_only, 2)):
        outcome = run_of(recipe, make_exchange(recipe, SITES), tmp_path / f"to {side}", backbone=path).run()
        assert outcome.tensors["backbone.pos_embed"].shape == (1, 1 + side**2, 96)
