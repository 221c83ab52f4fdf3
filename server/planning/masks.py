"""`chexfound-server plan-secagg`: what secure aggregation takes and gives, for so many sites."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from chexfound.errors import ConfigError
from chexfound.secagg.fixed import levels
from server.planning import cost
from server.planning.cost import Cost
from strategies.composition import LEVELS_MIN

SCHEMA = 1  # of what --json prints
PRESET = "vitl16-cxr1m"  # that values are counted of, if nothing is given
TENSOR_BYTES = 120  # of a tensor's name, shape and range, as a site is told them
HEAD = f"{'n':>4} {'c':>3} {'t':>3} {'lost':>5} {'site':>9} {'unmask':>16} {'up':>10} {'and':>9} {'down':>9}"


def plan_secagg(given: argparse.Namespace) -> int:
    """Print the table.

    Raises: ConfigError for a number of sites that was asked for and cannot be protected.
    """
    model, values, told_bytes, recipe_ring, recipe_colluders = _model(given)
    ring = given.ring or recipe_ring
    colluders = recipe_colluders if given.colluders is None else given.colluders
    found, refused = cost.possible(given.sites or list(cost.SITES), colluders, given.minimum, ring, LEVELS_MIN)
    if given.sites or not found:
        cost.check(refused)
    speeds = cost.measure(ring)
    rows = [cost.cost(parameters, values, told_bytes, ring, speeds) for parameters in found]
    if given.json:
        print(json.dumps(_as_dict(model, values, ring, speeds, rows, refused), indent=2))
    else:
        print("\n".join(_lines(model, values, ring, speeds, rows, refused)))
    return 0


def _model(given: argparse.Namespace) -> tuple[str, int, int, int, int | None]:
    """Describe what is summed: in words, its values, the bytes that tell of it; and the recipe's ring and colluders."""
    if given.values is not None:
        if given.values < 1:
            raise ConfigError("--values: give a number from 1")
        return f"{given.values:,} values", given.values, TENSOR_BYTES, 32, None
    import torch

    from chexfound.pretrain.beginning import frozen_gains
    from chexfound.pretrain.meta_arch import build_student
    from chexfound.recipe import load as recipes

    recipe = recipes.load(given.recipe or PRESET)
    with torch.device("meta"):
        student = dict(build_student(recipe).named_parameters())
    sizes = [student[name].numel() for name in set(student) - frozen_gains(recipe, dict(student))]
    parts = ["student"] + ["teacher"] * (recipe.teacher.policy == "average")
    if recipe.train.optimizer_state == "average":
        parts += ["moments"]
    travels = len(parts) + ("moments" in parts)  # of which there are two
    what = " and ".join(parts) if len(parts) < 3 else "student, teacher and moments"
    values = travels * sum(sizes)
    text = f"{what} with heads of {given.recipe or PRESET}, {values:,} values"
    return text, values, travels * len(sizes) * TENSOR_BYTES, recipe.secagg.ring, recipe.secagg.colluders


def _as_dict(
    model: str, values: int, ring: int, speeds: cost.Speeds, rows: list[Cost], refused: dict[int, str]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": model,
        "values": values,
        "ring": ring,
        "measured_s": asdict(speeds),
        "plans": [
            {**asdict(row.parameters), "dropouts": row.parameters.dropouts, "levels": levels(ring, row.parameters.n)}
            | {key: value for key, value in asdict(row).items() if key != "parameters"}
            for row in rows
        ],
        "refused": {str(n): reason for n, reason in refused.items()},
    }


def _lines(
    model: str, values: int, ring: int, speeds: cost.Speeds, rows: list[Cost], refused: dict[int, str]
) -> list[str]:
    said = [f"secure aggregation of {model}, in a ring of {ring} bits", "", HEAD]
    for row in rows:
        own = row.parameters
        unmask = f"{_seconds(row.unmask_s)} ({row.lost} lost)"
        said.append(
            f"{own.n:>4} {own.c:>3} {own.t:>3} {own.dropouts:>5} {_seconds(row.site_s):>9} {unmask:>16} "
            f"{_size(row.payload_bytes):>10} {_size(row.up_bytes):>9} {_size(row.down_bytes):>9}"
        )
    said += [
        "",
        "n       sites of the roster",
        "c       of these, that may collude with the coordinator",
        "t       sites that must agree to a sum, of which t - c or more are then honest",
        "lost    sites that a sum may be without; with more of them lost there is none",
        "site    seconds at each site for one sum, beside training: quantising, masks, hashes, keys",
        "unmask  seconds at the coordinator from shares to sum, with a tenth of the sites lost, as far as they may be",
        "up      bytes of a site's masked values, in place of its update; and: of its other messages",
        "down    bytes that a site is sent beside the weights",
        f"Seconds are measured here just now, on one thread ({speeds.quantise * 1e9:.2f} ns a value to quantise, "
        f"{speeds.mask * 1e9:.2f} a mask,",
        f"{speeds.agree * 1e6:.0f} us a key), in processor time, and scaled; disks and links are not in them.",
    ]
    return said + [f"not for n = {n}: {reason}" for n, reason in refused.items()]


def _seconds(value: float) -> str:
    return f"{value / 60:.0f} min" if value >= 120 else f"{value:.1f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def _size(value: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.2f} {name}" if unit == 1e9 else f"{value / unit:.1f} {name}"
    return f"{value} B"
