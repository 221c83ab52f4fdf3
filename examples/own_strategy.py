"""A strategy of one's own in a small federation, in one process.

    python examples/own_strategy.py --out FOLDER

Three hospitals are drawn. The coordinator's loop, the messages, and each site's checks are those of a federation over a
network; only the network is left out. The strategy is a trimmed mean (Yin et al. 2018, arXiv:1803.01498): of each
weight the largest and the smallest value are left out, and the mean of the others is taken. So no single site, broken
or hostile, moves the model further than the others do.

What it shows:

1. A strategy is a class with `admit`, `result`, `ceiling` and `bound` (strategies/reducer.py). Each round has one.
2. `admit` checks a reply and returns a function. The loop calls that once its own checks have passed.
3. A site that labels none of the findings sends no tensors, and has no part.
4. What the strategy cannot do is said: it needs each site's own update, so it does not run under secure aggregation.
5. `run_of` composes a run. The recipe, the sites and the folder are its arguments, and so is the strategy.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import made_up
import torch
from torch import Tensor

from chexfound._launch import application_root

sys.path.insert(0, str(application_root()))  # where server, sim and strategies are, in a checkout and in a wheel

from chexfound.contract.request import MOMENTS, Reply  # noqa: E402
from chexfound.data.intake.ingest import ingest  # noqa: E402
from chexfound.data.store.reader import Store  # noqa: E402
from chexfound.recipe import load as recipes  # noqa: E402
from server.exchange.grid import GridExchange  # noqa: E402
from server.rounds.start import run_of  # noqa: E402
from sim.engine.in_process import InProcessGrid  # noqa: E402
from sim.engine.pool import Pool  # noqa: E402
from strategies.aggregate import check_tensors  # noqa: E402
from strategies.ceiling import Ceiling  # noqa: E402

SMALL = {  # of the preset "demo", so that a run takes seconds
    "image_px": 64,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 1,
    "dino.head_n_prototypes": 64,
    "dino.head_hidden_dim": 64,
    "ibot.head_n_prototypes": 64,
    "ibot.head_hidden_dim": 64,
    "train.rounds": 1,
    "train.local_steps": 2,
    "train.pooled_batch_size": 12,
    "adapt.rounds": 2,
    "adapt.views": 0,
    "adapt.glori_dim": 16,
    "adapt.glori_heads": 2,
    "adapt.glori_ffn_dim": 32,
    "adapt.local_steps": 2,
    "adapt.pooled_batch_size": 12,
    "adapt.min_positives": 2,
    "evaluate.bootstrap_samples": 20,
    "federation.min_sites": 3,
}


class TrimmedMean:
    """The mean of each weight without its largest and its smallest value; every site counts the same.

    It keeps the updates of a round in memory. Of the optimizer's moments it takes the plain mean: a site checks that
    the first moments fit the second, which holds for means of moments and not for trimmed ones.
    """

    def __init__(
        self,
        phase: str,
        previous: Mapping[str, Tensor],
        n_findings: int = 0,
        rows: Sequence[str] = (),
        *,
        ceiling: Ceiling | None = None,
        bound: float | None = None,
    ) -> None:
        self.previous = previous
        self.ceiling, self.bound = Ceiling(capped={}), None  # no weight is cut, and no update is shortened
        self.updates: list[Mapping[str, Tensor]] = []

    def admit(self, reply: Reply) -> Callable[[], None]:
        """Check a reply; what is returned takes it in."""
        if not reply.tensors:
            return lambda: None
        check_tensors(reply.tensors, self.previous)
        return functools.partial(self.updates.append, reply.tensors)

    def result(self) -> dict[str, Tensor]:
        """Give the round's weights; those that were sent where no site trained."""
        if not self.updates:
            return dict(self.previous)
        return {name: self._reduce(name).to(sent.dtype) for name, sent in self.previous.items()}

    def _reduce(self, name: str) -> Tensor:
        stacked = torch.stack([update[name].double() for update in self.updates])
        if name.startswith(MOMENTS) or len(stacked) < 3:
            return stacked.mean(0)
        return stacked.sort(0).values[1:-1].mean(0)


def exchange(folder: Path, recipe: recipes.Recipe) -> GridExchange:
    """Make a federation of three hospitals in this process, each with images and a disk of its own."""
    ingest(made_up.radiographs(folder / "images", sites=3, patients=16), folder / "store", recipe.image_px)
    store = Store.open(folder / "store")
    nodes = []
    for site in sorted(set(store.sources)):
        patients = folder / f"{site}.json"
        patients.write_text(json.dumps(sorted({key for key in store.keys if key.startswith(f"{site}/")})))
        home = folder / "homes" / site
        nodes.append({"site": site, "data": str(store.path), "home": str(home), "patients": str(patients)})
    return GridExchange(InProcessGrid(Pool(1), nodes, {"recipe": recipes.to_json(recipe)}))


def main() -> None:
    """Show the strategy on three numbers, then run a federation with it."""
    parser = argparse.ArgumentParser(description="a strategy of one's own in a small federation")
    parser.add_argument("--out", type=Path, help="folder for the run (default: none is kept)")
    given = parser.parse_args()
    reducer = TrimmedMean("pretrain", {"weight": torch.zeros(1)})
    for value in (1.0, 2.0, 1000.0):
        reducer.admit(Reply(tensors={"weight": torch.tensor([value])}))()
    print(f"sites send 1, 2 and 1000: the mean is 334.3, the trimmed mean {reducer.result()['weight'].item():g}")
    recipe = recipes.load("demo", SMALL)
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder) / "run"
        outcome = run_of(recipe, exchange(Path(folder), recipe), out, reducer=TrimmedMean).run()
    for row in outcome.results:
        figure = "-" if row["auroc"] is None else f"{row['auroc']:.3f}"
        print(f"{row['tested_on']:<12} {row['finding']:<14} n={row['n']:<4} AUROC {figure}")
    print(f"model {outcome.model_sha256}" + (f", in {out}" if given.out else ""))


if __name__ == "__main__":
    main()
