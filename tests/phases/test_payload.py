"""What is summed of a phase: as plain aggregation has it, and nothing that one site could be told by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chexfound.contract.request import COUNTS, Reply, Request
from chexfound.durable.files import canonical
from chexfound.errors import ProtocolError, RefusedError
from chexfound.evaluate.histograms import BINS
from chexfound.model.glori import build_head
from chexfound.phases import payload
from chexfound.phases.payload import FIGURE_RANGE, FIGURES, PHASES, Payload, plan
from chexfound.phases.payload import Settings as Told
from chexfound.pretrain.bounds import UpdateBound, squared
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Adapt, Recipe
from chexfound.secagg import fixed, mask, messages, moments
from strategies.fedavg import FedAvg

N = 4
HEAD = Adapt(head="linear", glori_stats=False, glori_grid=0, optimizer_state="local")
RECIPE = Recipe(aggregation="secagg", adapt=HEAD)
GLORI = replace(RECIPE, adapt=Adapt(glori_dim=8, glori_heads=2, glori_ffn_dim=8, optimizer_state="local"))
CHANNELS = HEAD.n_last_blocks * ARCHS[RECIPE.student.arch][0]
FINDINGS = ("Edema", "Nodule", "Pneumonia")
SHAPES = {"b": (3,), "a.weight": (2, 2)}
SENT = {name: torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape) for name, shape in SHAPES.items()}


def pretrain(*, images: int = 100, ring: int = 32, largest: float = 2.0, steps: int = 2, **request: Any) -> Payload:
    asked = Request(**({"phase": "pretrain", "step": 4, "steps": steps, "tensors": SENT} | request))
    return plan(RECIPE, asked, Told(ring=ring, images=images, ranges=dict.fromkeys(SHAPES, largest)), N, SHAPES)


def head(recipe: Recipe = RECIPE, findings: Sequence[str] = FINDINGS) -> dict[str, Tensor]:
    made = build_head(recipe, len(findings))
    return {name: value.detach() for name, value in made.named_parameters() if value.requires_grad}


def adapt(
    recipe: Recipe = RECIPE, *, images: int = 100, labelled: Sequence[int] = (60, 60, 60), ring: int = 32, **told: Any
) -> Payload:
    sent = head(recipe)
    asked = Request(phase="adapt", steps=1, findings=FINDINGS, tensors=sent)
    shapes = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    ranges = dict.fromkeys(shapes, 2.0)
    return plan(recipe, asked, Told(ring=ring, images=images, labelled=list(labelled), ranges=ranges), N, shapes)


def counts(findings: Sequence[str] = FINDINGS) -> Payload:
    return plan(RECIPE, Request(phase="counts", findings=tuple(findings)), Told(ring=32, images=1), N, {})


def evaluate() -> Payload:
    return plan(RECIPE, Request(phase="evaluate", findings=FINDINGS), Told(ring=32, images=1), N, {})


def summed(made: Payload, replies: Sequence[Reply], zeroed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The sum over sites, by way of the ring; under one mask that is taken off, since none may be without."""
    layout = made.layout
    total = layout.zeros()
    for reply in replies:
        arrays, one = layout.zeros(), [(1, b"\1" * 32)]
        mask.masked(layout, *made.values(reply, zeroed), one, arrays)
        mask.add_masks(arrays, layout, [(-1, b"\1" * 32)])
        for ring, array in arrays.items():
            total[ring] += array
    return fixed.decode(layout, total)


def trained(by: float, images: Any = 10, steps: Sequence[Mapping[str, Any]] = (), **values: Any) -> Reply:
    tensors = {name: tensor + by for name, tensor in SENT.items()}
    return Reply(tensors=tensors, values={"images": images, "history": list(steps), **values})


# -- the layout

ALL = [pretrain, adapt, counts, evaluate]


@pytest.mark.parametrize("make", ALL)
def test_the_layout_is_one_that_both_ends_can_tell(make: Any) -> None:
    layout = make().layout
    assert fixed.Layout.from_list(layout.as_list(), N) == layout


def test_the_layout_does_not_hang_on_the_order_of_names() -> None:
    made = pretrain()
    turned = dict(reversed(SHAPES.items()))
    ranges = dict(reversed(made.settings.ranges.items()))
    tensors = dict(reversed(SENT.items()))
    other = plan(
        RECIPE,
        replace(made.request, tensors=tensors),
        Told(ring=32, images=100, ranges=ranges),
        N,
        {name: list(shape) for name, shape in turned.items()},
    )
    assert list(SHAPES) != sorted(SHAPES)
    assert other.layout.as_list() == made.layout.as_list()
    assert other.layout.places == made.layout.places


def test_the_site_has_the_layout_without_the_tensors() -> None:
    """It deals its shares, bound to the layout, before it is sent what it trains from."""
    for made in (pretrain(), adapt()):
        bare = replace(made.request, tensors={})
        told = messages.parse(Told, asdict(made.settings), "the settings")
        assert plan(made.recipe, bare, told, N, made.shapes).layout.as_list() == made.layout.as_list()


def test_every_phase_has_one() -> None:
    assert {make().request.phase for make in ALL} == set(PHASES)
    names = {make().request.phase: [section.name for section in make().layout.sections] for make in ALL}
    assert names["counts"] == [*COUNTS, "positives", "negatives"]
    assert [section.name for section in counts(()).layout.sections] == list(COUNTS)
    assert names["evaluate"] == ["histograms"]
    assert names["pretrain"][:3] == ["tensor/a.weight", "tensor/b", "images"]
    assert "labelled" in names["adapt"]


@pytest.mark.parametrize("recipe", [RECIPE, GLORI])
def test_rows_are_those_of_the_head_itself(recipe: Recipe) -> None:
    made = adapt(recipe)
    known = {"weight", "bias"} if recipe is RECIPE else {"duplicate_pooling", "duplicate_pooling_bias"}
    assert made.rows == known
    assert all(made.shapes[name][0] == len(FINDINGS) for name in made.rows)


def test_all_that_sites_are_told_of_the_numbers_is_in_the_context() -> None:
    """What is not in the layout too: how many images a weight of 1 stands for."""
    made = adapt()
    told = [
        made.asked(),
        adapt(images=99).asked(),
        adapt(labelled=(60, 60, 59)).asked(),
        adapt(ring=16).asked(),
        replace(made, request=replace(made.request, steps=2)).asked(),
        replace(made, request=replace(made.request, findings=FINDINGS[::-1])).asked(),
        replace(made, settings=replace(made.settings, ranges=dict.fromkeys(made.shapes, 1.0))).asked(),
    ]
    assert len({canonical(one) for one in told}) == len(told)
    assert replace(made, request=replace(made.request, tensors={}, roster_index=3)).asked() == told[0]  # a site's own


def with_recipe(made: Payload, **changes: Any) -> str:
    return replace(made, recipe=replace(RECIPE, **changes)).question()


def test_two_sums_are_one_question_only_where_a_site_s_part_is_the_same() -> None:
    """Else their difference tells of one site though both are over the same."""
    made = pretrain()
    told = [
        made.question(),
        pretrain(images=99).question(),
        pretrain(ring=16).question(),
        pretrain(largest=2.5).question(),
        pretrain(steps=3).question(),
        with_recipe(made, seed=1),
        with_recipe(made, optim=replace(RECIPE.optim, weight_decay=0.5)),
    ]
    assert len(set(told)) == len(told)
    beside = {"name": "other", "adapt": replace(HEAD, lr=0.1), "federation": replace(RECIPE.federation, wait_s=1.0)}
    for name, value in beside.items():
        assert with_recipe(made, **{name: value}) == told[0], name


def test_a_question_goes_by_what_its_phase_hangs_on() -> None:
    rate, views = replace(HEAD, lr=0.1), replace(HEAD, views=1)
    optim = replace(RECIPE.optim, weight_decay=0.5)
    for made in (adapt(), evaluate()):
        assert with_recipe(made, adapt=rate) != made.question()
        assert with_recipe(made, adapt=views) != made.question()
        assert with_recipe(made, seed=1) != made.question()
        assert with_recipe(made, optim=optim) == made.question()  # which has made the weights, that are told by digest
    assert counts(()).question() == counts().question() == with_recipe(counts(), seed=1)  # asked for in every run


# -- settings from the coordinator


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-300, "1", None, True, [1.0]])
def test_a_range_is_a_number_that_can_be_one(wrong: Any) -> None:
    with pytest.raises(ProtocolError):
        messages.parse(Told, {"ring": 32, "images": 1, "ranges": {"b": wrong}}, "the settings")


@pytest.mark.parametrize("wrong", [0, -1, 2**32, 2**70, 1.5, "1", None, True])
def test_a_weight_is_a_count(wrong: Any) -> None:
    for told in ({"ring": 32, "images": wrong}, {"ring": 32, "images": 1, "labelled": [wrong]}):
        with pytest.raises(ProtocolError):
            messages.parse(Told, told, "the settings")


@pytest.mark.parametrize(
    "told", [{}, {"ring": 32}, {"ring": 32, "images": 1, "more": 1}, [], None, {"ring": "32", "images": 1}]
)
def test_what_are_no_settings(told: Any) -> None:
    with pytest.raises(ProtocolError):
        messages.parse(Told, told, "the settings")


@pytest.mark.parametrize("ring", [0, 8, 15, 64, -32])
def test_there_is_no_other_ring(ring: int) -> None:
    with pytest.raises(ProtocolError, match="no ring"):
        pretrain(ring=ring)


def test_ranges_are_of_what_is_summed() -> None:
    made = pretrain()
    for ranges in ({}, {"b": 1.0}, dict.fromkeys([*SHAPES, "more"], 1.0), {"b": 1.0, "A.weight": 1.0}):
        with pytest.raises(ProtocolError, match="the ranges are not those"):
            plan(RECIPE, made.request, Told(ring=32, images=1, ranges=ranges), N, SHAPES)


def test_labelled_is_one_weight_a_finding_and_none_in_other_phases() -> None:
    for labelled in ([], [1, 1], [1, 1, 1, 1]):
        with pytest.raises(ProtocolError, match="the weights are not those"):
            adapt(labelled=labelled)
    with pytest.raises(ProtocolError, match="the weights are not those"):
        plan(RECIPE, Request(phase="counts", findings=FINDINGS), Told(ring=32, images=1, labelled=[1, 1, 1]), N, {})


def test_the_sum_of_weights_cannot_pass_two_to_the_32() -> None:
    most = (2**32 - 1) // N
    assert pretrain(images=most).layout
    with pytest.raises(ProtocolError, match="could pass 2\\*\\*32"):
        pretrain(images=most + 1)
    with pytest.raises(ProtocolError, match="could pass 2\\*\\*32"):
        adapt(labelled=[1, most + 1, 1])
    sums = summed(pretrain(images=most), [trained(0.5, images=2**40)] * N)
    assert int(sums["images"]) == N * most < 2**32


def test_shapes_of_another_head_or_phase_are_refused() -> None:
    made = adapt()
    for shapes in (
        {},
        {"weight": made.shapes["weight"]},
        dict(made.shapes) | {"more": (1,)},
        dict(made.shapes) | {"bias": (4,)},
        {"bias": made.shapes["weight"], "weight": made.shapes["bias"]},
    ):
        with pytest.raises(ProtocolError):
            plan(RECIPE, made.request, made.settings, N, shapes)
    with pytest.raises(ProtocolError, match="no tensor to sum"):
        plan(RECIPE, Request(phase="evaluate", findings=FINDINGS), Told(ring=32, images=1), N, {"b": (3,)})
    for phase in ("enrol", "features"):
        with pytest.raises(ProtocolError, match="no phase that is summed"):
            plan(RECIPE, Request(phase=phase), Told(ring=32, images=1), N, {})


@pytest.mark.parametrize("shape", [(0,), (4,), (3, 1), (), (2**40,), (2**60, 2**60)])
def test_another_shape_than_was_sent_is_refused_before_there_are_arrays_of_it(shape: tuple[int, ...]) -> None:
    made = plan(
        RECIPE,
        Request(phase="pretrain", steps=1, tensors=SENT),
        Told(ring=32, images=100, ranges={"b": 1.0}),
        N,
        {"b": shape},
    )
    for reply in (trained(0.1), Reply(values={"images": 0, "history": []})):
        with pytest.raises(ProtocolError, match="not trained here"):
            made.values(reply, [])


@pytest.mark.parametrize("name", ["teacher.b", "optimizer.b.exp_avg", ""])
def test_a_sum_of_what_is_not_trained_is_refused(name: str) -> None:
    asked = Request(phase="pretrain", steps=1, tensors=SENT)
    made = plan(RECIPE, asked, Told(ring=32, images=100, ranges={name: 1.0}), N, {name: (3,)})
    with pytest.raises(ProtocolError, match="not trained here"):
        made.values(trained(0.1), [])
    with pytest.raises(
        ProtocolError, match="not trained here"
    ):  # the site holds it, and the coordinator did not send it
        made.values(Reply(tensors={name: torch.zeros(3)}, values={"images": 1, "history": []}), [])


def test_a_tensor_that_the_site_does_not_train_is_refused() -> None:
    reply = trained(0.1)
    reply.tensors.pop("b")
    with pytest.raises(ProtocolError, match="of 'b' .3,., which is not trained here"):
        pretrain().values(reply, [])


# -- against plain aggregation

numbers = st.floats(-1, 1, width=32)


@st.composite
def replies_of_pretrain(draw: st.DrawFn) -> list[Reply]:
    replies = []
    for _ in range(draw(st.integers(1, N))):
        moved = {
            name: SENT[name] + torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(shape)
            for name, shape in SHAPES.items()
            for size in [torch.Size(shape).numel()]
        }
        images = draw(st.integers(1, 100))
        replies.append(Reply(tensors=moved, values={"images": images, "history": []}))
    return replies


def folded(
    phase: str, sent: dict[str, Tensor], replies: Sequence[Reply], rows: Sequence[str] = ()
) -> dict[str, Tensor]:
    strategy = FedAvg(phase, sent, len(FINDINGS) if phase == "adapt" else 0, rows)
    for reply in replies:
        strategy.add(reply)
    return strategy.result()


def rounding(sent: Tensor, moved: Tensor) -> Tensor:
    """Of float32, in either way: the difference that a site takes, and the result."""
    return 2.0**-23 * (sent.abs() + moved.abs() + 1).double()


@given(replies_of_pretrain(), st.sampled_from([16, 32]), st.integers(50, 100))
def test_the_update_is_fedavg_s_within_the_bound(replies: list[Reply], ring: int, most: int) -> None:
    """Error without clipping at most |U3| (R/L) / sum of weights (docs: fixed point); weights are cut at `images`."""
    made = pretrain(ring=ring, images=most)
    sums = summed(made, replies)
    assert sums["clipped"].sum() == 0
    cut = [replace(one, values=one.values | {"images": min(one.values["images"], most)}) for one in replies]
    plain, found = folded("pretrain", SENT, cut), made.update(sums)
    weight = sum(one.values["images"] for one in cut) / most
    bound = len(replies) * 2.0 / fixed.levels(ring, N) / weight
    for name, expected in plain.items():
        gap = (found[name].double() - expected.double()).abs()
        assert bool((gap <= bound + rounding(SENT[name], expected)).all())
        assert found[name].dtype == SENT[name].dtype
    assert int(sums["images"]) == sum(one.values["images"] for one in cut)


@st.composite
def replies_of_adapt(draw: st.DrawFn) -> list[Reply]:
    sent, replies = head(), []
    for _ in range(draw(st.integers(1, N))):
        labelled = draw(st.lists(st.integers(0, 60), min_size=3, max_size=3))
        if not any(labelled):
            replies.append(Reply(values={"images": 0, "labelled": labelled, "history": []}))
            continue
        seed = draw(st.integers(0, 2**32 - 1))
        generator = torch.Generator().manual_seed(seed)
        moved = {name: one + torch.rand(one.shape, generator=generator) * 2 - 1 for name, one in sent.items()}
        images = draw(st.integers(max(labelled), 100))
        replies.append(Reply(tensors=moved, values={"images": images, "labelled": labelled, "history": []}))
    return replies


@given(replies_of_adapt(), st.lists(st.sampled_from(FINDINGS), unique=True, max_size=3), st.sampled_from([16, 32]))
@settings(max_examples=60)
def test_a_finding_s_rows_are_fedavg_s_within_the_bound(replies: list[Reply], zeroed: list[str], ring: int) -> None:
    made, sent = adapt(ring=ring), head()
    sums = summed(made, replies, zeroed)
    found = made.update(sums)
    plain = folded("adapt", sent, replies, list(made.rows))
    step = len(replies) * 2.0 / fixed.levels(ring, N)
    for row, finding in enumerate(FINDINGS):
        labelled = sum(one.values["labelled"][row] for one in replies)
        assert int(sums["labelled"][row]) == (0 if finding in zeroed else labelled)
        for name in made.rows:
            if finding in zeroed or not labelled:
                assert torch.equal(found[name][row], sent[name][row])  # as it was, bit for bit
                assert not sums[f"tensor/{name}"][row].any()
            else:
                gap = (found[name][row].double() - plain[name][row].double()).abs()
                slack = rounding(sent[name][row], plain[name][row])
                assert bool((gap <= step / (labelled / 60) + slack).all())


def test_what_is_not_rows_goes_by_images() -> None:
    made, sent = adapt(GLORI), head(GLORI)
    replies = [
        Reply(
            tensors={name: tensor + by for name, tensor in sent.items()},
            values={"images": images, "labelled": labelled, "history": []},
        )
        for by, images, labelled in ((0.5, 30, [30, 0, 10]), (-0.25, 90, [0, 0, 60]))
    ]
    replies.append(Reply(values={"images": 0, "labelled": [0, 0, 0], "history": []}))
    found = made.update(summed(made, replies))
    plain = folded("adapt", sent, replies, list(made.rows))
    weight = 120 / 100
    assert set(found) == set(plain) == set(sent)
    for name in sent:
        weights = torch.tensor([30, 60, 70]) / 60 if name in made.rows else torch.tensor([weight])
        bound = 3 * 2.0 / fixed.levels(32, N) / float(weights.min())
        assert bool(((found[name] - plain[name]).abs() <= bound + rounding(sent[name], plain[name])).all()), name


def test_tensors_that_are_not_summed_stay_as_they_were() -> None:
    sent = SENT | {"frozen": torch.ones(2)}
    made = pretrain(tensors=sent)
    found = made.update(summed(made, [trained(0.25)]))
    assert torch.equal(found["frozen"], sent["frozen"])
    assert found["b"].tolist() == pytest.approx((SENT["b"] + 0.25).tolist(), abs=1e-5)
    assert torch.equal(SENT["b"], torch.linspace(-1, 1, 3))  # what was sent is not written over


def test_a_sum_without_weight_moves_nothing() -> None:
    made = adapt()
    empty = Reply(values={"images": 0, "labelled": [0, 0, 0], "history": []})
    found = made.update(summed(made, [empty] * N))
    assert all(torch.equal(found[name], tensor) for name, tensor in head().items())


def test_an_update_that_is_not_a_number_is_not_sent() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ProtocolError, match="not a finite number"):
            summed(pretrain(), [trained(value)])


def test_clipping_is_counted() -> None:
    sums = summed(pretrain(largest=0.25, images=10), [trained(1.0), trained(0.125), trained(-1.0)])
    assert sums["clipped"][:2].tolist() == [2 * 4, 2 * 3]
    assert sums["tensor/b"] == pytest.approx(0.125, abs=1e-5)


# -- zeroed findings


@pytest.mark.parametrize("zeroed", [[], ["Nodule"], ["Edema", "Pneumonia"], list(FINDINGS)])
def test_a_zeroed_finding_is_zero_in_values_and_weights(zeroed: list[str]) -> None:
    keep = [finding not in zeroed for finding in FINDINGS]
    table = {"Edema": {"positives": 3, "negatives": 5}, "Nodule": {"positives": 1, "negatives": 2}}
    values, weights = counts().values(Reply(values={**dict.fromkeys(COUNTS, 7), "findings": table}), zeroed)
    assert values["positives"].tolist() == [3 * keep[0], 1 * keep[1], 0]
    assert values["negatives"].tolist() == [5 * keep[0], 2 * keep[1], 0]
    assert [int(values[name]) for name in COUNTS] == [7] * 5
    assert weights == {}

    histograms = np.ones((3, 2, BINS), np.uint32)
    values, _ = evaluate().values(Reply(values={"histograms": histograms}), zeroed)
    assert values["histograms"].any(axis=(1, 2)).tolist() == keep

    made, sent = adapt(), head()
    reply = Reply(
        tensors={name: tensor + 1 for name, tensor in sent.items()},
        values={"images": 50, "labelled": [10, 20, 30], "history": []},
    )
    values, weights = made.values(reply, zeroed)
    assert values["labelled"].tolist() == [10 * keep[0], 20 * keep[1], 30 * keep[2]]
    for name in made.rows:
        assert (weights[f"tensor/{name}"] > 0).tolist() == keep
    sums = summed(made, [reply], zeroed)
    for name in made.rows:
        assert sums[f"tensor/{name}"].reshape(3, -1).any(axis=1).tolist() == keep


def test_a_zeroed_finding_out_of_range_is_not_counted_as_clipped() -> None:
    made, sent = adapt(), head()
    reply = Reply(
        tensors={name: tensor + 100 for name, tensor in sent.items()},
        values={"images": 50, "labelled": [60, 60, 60], "history": []},
    )
    assert summed(made, [reply], FINDINGS)["clipped"].sum() == 0
    assert summed(made, [reply], [])["clipped"].sum() > 0


# -- what a site counts


def test_sums_of_counts_are_the_sites_counts() -> None:
    replies = [
        Reply(
            values={
                **{name: 10 * number + place for place, name in enumerate(COUNTS)},
                "findings": {"Edema": {"positives": number, "negatives": 2}},
            }
        )
        for number in (1, 2, 3)
    ]
    sums = summed(counts(), replies)
    assert [int(sums[name]) for name in COUNTS] == [60, 63, 66, 69, 72]
    assert (sums["positives"].tolist(), sums["negatives"].tolist()) == ([6, 0, 0], [6, 0, 0])


def test_sums_of_histograms() -> None:
    draws = np.random.default_rng(0)
    parts = [draws.integers(0, 50, (3, 2, BINS)).astype(np.uint32) for _ in range(N)]
    sums = summed(evaluate(), [Reply(values={"histograms": one}) for one in parts])
    assert np.array_equal(sums["histograms"], np.sum(parts, axis=0))


def test_weights_are_cut_at_the_settings_images() -> None:
    made = pretrain(images=50)
    values, weights = made.values(trained(1.0, images=80, steps=[{"step": 4, "loss": 2.0}]), [])
    assert int(values["images"]) == 50
    assert weights["tensor/b"] == weights["figure/loss"] == 1.0
    assert values["figure/loss/images"].tolist() == [50, 0]
    made = adapt(images=50, labelled=[20, 20, 20])
    reply = Reply(tensors=head(), values={"images": 80, "labelled": [10, 20, 30], "history": []})
    values, weights = made.values(reply, [])
    assert int(values["images"]) == 50
    assert values["labelled"].tolist() == [10, 20, 20]
    assert weights["tensor/weight"].tolist() == [0.5, 1, 1]


# -- figures of the steps


def test_history_is_the_mean_by_images_of_the_sites_that_have_a_figure() -> None:
    made = pretrain()
    replies = [
        trained(0, 10, [{"step": 4, "loss": 2.0, "dino": 1.0, "rankme": 7.0}, {"step": 5, "loss": 4.0}]),
        trained(0, 30, [{"step": 4, "loss": 6.0, "dino": None}, {"step": 5, "loss": 8.0}]),
    ]
    rows = made.history(summed(made, replies), {"log_k": 3.5})
    assert [row["step"] for row in rows] == [4, 5]
    assert rows[0]["loss"] == pytest.approx(5.0, abs=0.01)
    assert rows[1]["loss"] == pytest.approx(7.0, abs=0.01)
    assert rows[0]["dino"] == pytest.approx(1.0, abs=0.01)
    assert rows[0]["rankme"] == pytest.approx(7.0, abs=0.01)
    assert "rankme" not in rows[1]
    assert "ibot" not in rows[0]  # that no site has
    assert [row["log_k"] for row in rows] == [3.5, 3.5]


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.one_of(st.none(), st.floats(-FIGURE_RANGE, FIGURE_RANGE, width=32))),
        min_size=1,
        max_size=N,
    )
)
def test_a_figure_is_off_by_no_more_than_fixed_point_is(sites: list[tuple[int, float | None]]) -> None:
    made = pretrain(images=200, steps=1, step=0)
    replies = [trained(0, images, [{"step": 0, "loss": loss}]) for images, loss in sites]
    rows = made.history(summed(made, replies), {})
    there = [(min(images, 200), loss) for images, loss in sites if loss is not None]
    if not there:
        assert rows == []
        return
    (row,) = rows
    images = sum(one for one, _ in there)
    mean = sum(one * loss for one, loss in there) / images
    bound = len(sites) * FIGURE_RANGE / fixed.levels(32, N) / (images / 200)
    assert abs(row["loss"] - mean) <= bound * (1 + 1e-6) + 1e-9


def test_steps_that_were_not_asked_for_leave_nothing() -> None:
    made = pretrain()
    odd = trained(0, 10, [{"step": 3, "loss": 9.0}, {"step": 6, "loss": 9.0}])
    assert made.history(summed(made, [odd]), {"log_k": 3.5}) == []  # nor a row without a loss


def test_no_figure_of_one_site_stands_in_the_values_in_clear() -> None:
    """All that a site counts goes into the arrays that are masked; what has no section does not leave."""
    reply = trained(0, 10, [{"step": 4, "loss": 1.0, "probe_images": 77}], state="kept", more="text")
    values, weights = pretrain().values(reply, [])
    assert set(values) == {section.name for section in pretrain().layout.sections}
    assert set(weights) == {section.name for section in pretrain().layout.sections if section.fixed}
    assert not any("probe_images" in name for name in values)
    assert {name for name in values if name.startswith("figure/")} == {
        f"figure/{name}{part}" for name in FIGURES["pretrain"] for part in ("", "/images")
    }


# -- the digest that is signed


def test_a_digest_is_of_rings_sizes_and_values() -> None:
    one = {16: np.arange(4, dtype="<u2"), 32: np.arange(3, dtype="<u4")}
    others = [
        {16: one[16]},
        one | {16: one[16][:-1]},
        one | {32: one[32] + np.uint32(1)},
        one | {64: np.zeros(0, "<u8")},
        {16: one[16].view("<u4").astype("<u2"), 32: one[32]},
        {16: one[16], 64: np.arange(3, dtype="<u8")},
    ]
    digests = [payload.digest(one), *map(payload.digest, others)]
    assert len(set(digests)) == len(digests)
    assert payload.digest(dict(reversed(one.items()))) == digests[0]
    assert payload.digest({ring: array.astype(f">u{ring // 8}") for ring, array in one.items()}) == digests[0]


# -- averaged moments of the optimizer

MOMENTS = [f"optimizer.b.{key}" for key in ("exp_avg", "exp_avg_sq", "step")]
BETAS = (0.9, 0.99)
CLIP = 3.0


def with_moments(sent: Mapping[str, Tensor]) -> Payload:
    """Of one parameter `b` and its moments, as they were sent."""
    shapes = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    ranges = {"b": 2.0, MOMENTS[0]: 2 * CLIP, MOMENTS[1]: CLIP}
    asked = Request(phase="pretrain", step=4, steps=2, tensors=dict(sent))
    return plan(RECIPE, asked, Told(ring=32, images=100, ranges=ranges), N, shapes)


def stepped(gradients: Sequence[float], m: float = 0.0, v: float = 0.0) -> tuple[float, float]:
    for gradient in gradients:
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
    return m, v


def state(m: float, v: float, step: float) -> dict[str, Tensor]:
    return {
        "b": torch.ones(3),
        MOMENTS[0]: torch.full((3,), m),
        MOMENTS[1]: torch.full((3,), v),
        MOMENTS[2]: torch.tensor(step),
    }


gradients = st.lists(st.floats(-CLIP, CLIP, width=32), min_size=2, max_size=2)


@given(gradients, st.lists(st.tuples(st.integers(1, 100), gradients), min_size=1, max_size=N))
def test_averaged_moments_are_the_means_of_the_firsts_and_of_the_roots(
    before: list[float], sites: list[tuple[int, list[float]]]
) -> None:
    """Each site goes on from the same moments with gradients of its own; and no step from the mean is too long."""
    made = with_moments(state(*stepped(before), 2.0))
    ends = [(images, stepped(own, *stepped(before))) for images, own in sites]
    replies = [Reply(tensors=state(m, v, 4.0), values={"images": images, "history": []}) for images, (m, v) in ends]
    found = made.update(summed(made, replies))
    moments.lift(found, *BETAS)
    total = sum(images for images, _ in ends)
    error = len(sites) * 2 * CLIP / fixed.levels(32, N) / (total / 100) + 1e-6
    assert float(found[MOMENTS[2]]) == 4.0
    assert found[MOMENTS[0]][0].item() == pytest.approx(sum(w * m for w, (m, _) in ends) / total, abs=error)
    root = sum(w * v**0.5 for w, (_, v) in ends) / total
    most = squared(*BETAS, 4)
    # Lifted only by what rounding has moved the first moment.
    assert root - error <= found[MOMENTS[1]][0].item() ** 0.5 <= root + (1 + most**-0.5) * error
    m, v = (found[name].double() for name in MOMENTS[:2])
    assert bool((m**2 <= most * v * (1 + 1e-6) + 1e-30).all())


@given(
    gradients | st.just([CLIP] * 5000),
    st.lists(st.tuples(st.integers(1, 100), gradients | st.just([CLIP] * 2)), min_size=1, max_size=N),
)
def test_averaged_moments_stand_in_the_box_whatever_fixed_point_made_of_them(
    before: list[float], sites: list[tuple[int, list[float]]]
) -> None:
    """Also where one weight has had all of a clipped gradient for so long that its square is as large as it can be."""
    done = len(before)
    made = with_moments(state(*stepped(before), float(done)))
    ends = [(images, stepped(own, *stepped(before))) for images, own in sites]
    replies = [
        Reply(tensors=state(m, v, done + 2.0), values={"images": images, "history": []}) for images, (m, v) in ends
    ]
    found = made.update(summed(made, replies))
    moments.lift(found, *BETAS)
    recipe = recipes.load("demo", {"optim.adamw_beta2": BETAS[1], "optim.clip_grad": CLIP, "train.rounds": 1001})
    bound = UpdateBound.of(recipe, "pretrain", range(done, done + 2))
    bound.check_moments({name: found[name] for name in MOMENTS})
    with pytest.raises(RefusedError, match="exp_avg_sq"):
        bound.check_moments({name: found[name] + 9.1 * (name == MOMENTS[1]) for name in MOMENTS})


def test_a_root_that_falls_to_nothing_does_not_blow_a_step_up() -> None:
    """Its gradient is a thousandth of a step of fixed point, and the first moment rounds up all the same."""
    made = with_moments(state(0.0, 0.0, 0.0))
    sums = summed(made, [Reply(tensors=state(1e-9, 1e-18, 2.0), values={"images": 100, "history": []})] * N)
    sums[f"tensor/{MOMENTS[0]}"] = np.full(3, 4 * CLIP / fixed.LEVELS)
    sums[f"tensor/{MOMENTS[1]}"] = np.zeros(3)
    found = made.update(sums)
    assert float(found[MOMENTS[1]].max()) == 0
    moments.lift(found, *BETAS)
    longest = found[MOMENTS[0]].abs() / found[MOMENTS[1]].sqrt()
    assert float(longest.max()) == pytest.approx(squared(*BETAS, 2) ** 0.5, rel=1e-5)


def test_what_no_site_has_trained_keeps_its_moments_to_the_last_bit() -> None:
    before = state(0.1, 0.0123, 2.0)
    made = with_moments(before)
    found = made.update(made.nothing())
    moments.lift(found, *BETAS)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_sums_of_squared_steps_by_hand() -> None:
    """After one step m² is (1 − β₁)²/(1 − β₂) of v; after many, that over 1 − β₁²/β₂."""
    assert squared(0.9, 0.99, 1) == pytest.approx(1.0)
    assert squared(0.9, 0.999, 10**6) == pytest.approx(10 / (1 - 0.81 / 0.999))


@pytest.mark.parametrize("recipe", [RECIPE, GLORI])
def test_a_head_s_moments_go_by_findings_where_its_weights_do(recipe: Recipe) -> None:
    averaged = replace(recipe, adapt=replace(recipe.adapt, optimizer_state="average"))
    weights = head(averaged)
    shapes = moments.with_moments({name: tuple(tensor.shape) for name, tensor in weights.items()})
    ranges = {name: 1.0 for name in shapes if not moments.is_step(name)}
    told = Told(ring=32, images=100, labelled=[60, 60, 60], ranges=ranges)
    made = plan(averaged, Request(phase="adapt", steps=1, findings=FINDINGS), told, N, shapes)
    assert len(made.rows) == 3 * len(adapt(recipe).rows)
    assert all(made.shapes[name][0] == len(FINDINGS) for name in made.rows)
    with pytest.raises(ProtocolError, match="not those of the head's trained tensors"):
        plan(recipe, made.request, told, N, shapes)
