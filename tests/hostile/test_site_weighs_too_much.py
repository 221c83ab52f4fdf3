"""A hospital that claims so many images that the mean of all is its own update, or sends one that is far too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chexfound.contract.request import Reply, Request
from chexfound.model import checkpoint
from chexfound.phases import dispatch
from chexfound.phases.site_state import Site
from chexfound.pretrain.train import initial_weights
from chexfound.recipe.schema import Recipe
from server.rounds import validation
from server.rounds.start import run_of
from server.runs import words
from tests.secagg.federation import NAMES, Federation

pytest_plugins = ("tests.secagg.fixtures",)
LIAR = "alpha"
CLAIMED = 10**9


@pytest.fixture
def plain(fed: Federation) -> Federation:
    """Four hospitals whose operators take a run in the clear, of two rounds of pretraining at the same pace."""
    for home in fed.homes.values():
        (home / "site.yaml").write_text("plain: accepted")
    train = replace(fed.recipe.train, rounds=2, local_steps=2, optimizer_state="average")
    optim = replace(fed.recipe.optim, warmup_epochs=0.0)
    fed.recipe = replace(fed.recipe, aggregation="fedavg", phases=("pretrain",), train=train, optim=optim)
    return fed


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The liar's own program: it enrols with so many images, and counts them in each reply."""

    def lying(phase: str, key: str) -> Callable[..., Reply]:
        true = dispatch.PHASES[phase]

        def answer(site: Site, recipe: Recipe, request: Request, *decision: Any) -> Reply:
            reply = true(site, recipe, request, *decision)
            if site.name == LIAR:
                reply.values[key] = CLAIMED
                if phase == "enrol":
                    reply.values["images"] = CLAIMED + reply.values["val"] + reply.values["test"]
            return reply

        return answer

    for phase, key in (("enrol", "train"), ("pretrain", "images")):
        monkeypatch.setitem(dispatch.PHASES, phase, lying(phase, key))


class Heard:
    """The exchange, and the updates of its first round."""

    def __init__(self, exchange: Any, change: Callable[[str, Reply, int], Reply] | None = None) -> None:
        self.exchange, self.change = exchange, change
        self.updates: dict[str, Any] = {}
        self.sites, self.run_id = exchange.sites, exchange.run_id

    def enrol(self, *given: Any) -> Any:
        return self.exchange.enrol(*given)

    def ask(self, requests: Sequence[Request | None], timeout_s: float | None = None) -> Iterator[Any]:
        for name, request, reply in zip(NAMES, requests, self.exchange.ask(requests, timeout_s), strict=True):
            if self.change is not None and request is not None:
                reply = self.change(name, reply, request.round)
            self.updates.setdefault(name, reply.tensors)
            yield reply


def first_round(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "rounds" / "pretrain-000000.safetensors")


def test_a_claim_of_a_billion_images_is_cut_to_half_and_told(plain: Federation, claim: None, tmp_path: Path) -> None:
    plain.recipe = replace(plain.recipe, train=replace(plain.recipe.train, rounds=1))
    told: list[Any] = []
    exchange = Heard(plain.exchange())
    run_of(plain.recipe, exchange, tmp_path / "run", on_event=told.append).run()  # type: ignore[arg-type]
    start, one = told[0], next(event for event in told if event["event"] == "round")
    mean, worst = first_round(tmp_path / "run"), 0.0
    honest = {member["site"]: member["train"] for member in start["roster"] if member["site"] != LIAR}
    for name, tensor in mean.items():
        others = sum(exchange.updates[site][name].double() * n for site, n in honest.items()) / sum(honest.values())
        expected = (exchange.updates[LIAR][name].double() + others) / 2
        worst = max(worst, float((tensor.double() - expected).abs().max()))
    assert worst < 1e-6
    assert one["capped"] == {LIAR: 1.0}
    assert "alpha would be 100% of the sum: its weight is cut to the ceiling" in words.line(one, {})
    assert "times as many training images as the median of the sites" in words.line(start, {})


def test_honest_sites_of_unlike_sizes_are_not_cut(plain: Federation, tmp_path: Path) -> None:
    plain.recipe = replace(plain.recipe, train=replace(plain.recipe.train, rounds=1))
    told: list[Any] = []
    run_of(plain.recipe, plain.exchange(), tmp_path / "run", on_event=told.append).run()
    assert not [event for event in told if "capped" in event or "norms" in event]
    assert "median" not in words.line(told[0], {})


def boosted(name: str, reply: Reply, number: int, sent: dict[str, Any]) -> Reply:
    """From the second round on, an update of which each weight goes a hundred times as far as training took it."""
    if name != LIAR or not number:
        return reply
    tensors = {
        key: tensor if key.startswith("optimizer.") else sent[key] + 100 * (tensor - sent[key])
        for key, tensor in reply.tensors.items()
    }
    return replace(reply, tensors=tensors)


@pytest.mark.parametrize(("clip", "most"), [(2.0, 2.5), (None, None)])
def test_a_boosted_update_counts_up_to_the_median_s_norm(
    clip: float | None, most: float | None, plain: Federation, tmp_path: Path
) -> None:
    """As far as twice the median of the first round, by the option; without it, as far as its weight takes it.

    The bounds of single weights are not looked at here: they let pass what training could have sent.
    """
    plain.recipe = replace(plain.recipe, robust=replace(plain.recipe.robust, clip=clip))
    sent: dict[str, Any] = {}

    def change(name: str, reply: Reply, number: int) -> Reply:
        if number and not sent:
            sent.update(first_round(tmp_path / "run"))
        return boosted(name, reply, number, sent)

    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "check_update", lambda *_: None)
        run_of(plain.recipe, Heard(plain.exchange(), change), tmp_path / "run", on_event=told.append).run()  # type: ignore[arg-type]
    after = checkpoint.load(tmp_path / "run" / "rounds" / "pretrain-000001.safetensors")
    names = [name for name in after if not name.startswith("optimizer.")]
    moved = sum(float((after[name].double() - sent[name].double()).square().sum()) for name in names) ** 0.5
    began = initial_weights(plain.recipe)
    before = sum(float((sent[name].double() - began[name].double()).square().sum()) for name in names) ** 0.5
    second = [event for event in told if event["event"] == "round"][1]
    if most is None:
        assert moved > 5 * before
        assert "norms" not in second
    else:
        assert moved < most * before
        assert second["shortened"] == [LIAR]
        assert second["norms"][LIAR] > 10 * max(norm for site, norm in second["norms"].items() if site != LIAR)
    assert all(torch.isfinite(after[name]).all() for name in names)
