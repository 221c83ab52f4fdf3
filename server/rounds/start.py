"""Which rounds a recipe's run has: in the clear, or under masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from chexfound.errors import ConfigError
from chexfound.recipe.batch_sizes import BatchSizes
from chexfound.recipe.schema import Recipe
from server.exchange.grid import GridExchange
from server.exchange.protocol import Exchange
from server.rounds.loop import Run
from server.rounds.masked import MaskedRounds
from server.rounds.plain import PlainRounds
from server.rounds.record import Event, Record
from strategies.fedavg import FedAvg
from strategies.reducer import MakeReducer


def run_of(
    recipe: Recipe,
    exchange: Exchange,
    folder: Path,
    *,
    batches: BatchSizes | None = None,
    backbone: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    reducer: MakeReducer = FedAvg,
) -> Run:
    """Compose the run of a recipe, in a folder of its own; arguments as of `Run`, `Record` and `PlainRounds`.

    Raises: ConfigError for another reducer than the mean under secure aggregation, which can only add up.
    """
    record = Record(folder, on_event)
    secure = recipe.aggregation == "secagg"
    if secure and reducer is not FedAvg:
        raise ConfigError("aggregation: secagg: masks leave only the updates' sum; choose --set aggregation=fedavg")
    rounds = (
        MaskedRounds(recipe, cast(GridExchange, exchange), record)
        if secure
        else PlainRounds(recipe, exchange, record, reducer)
    )
    return Run(recipe, exchange, record, rounds, batches=batches, backbone=backbone)
