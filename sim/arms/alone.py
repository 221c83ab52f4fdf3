"""The arms of one site: centralized on the pool, and each site by itself."""

from __future__ import annotations

import time

from chexfound.contract.request import Request
from chexfound.data.store.reader import Store
from chexfound.data.store.split import View
from chexfound.phases import dispatch
from chexfound.phases.site_state import Site
from sim.arms.plan import ArmPlan, trained_on
from sim.engine import listeners


def run_alone(plan: ArmPlan, arm: str) -> float:
    """The centralized arm, or a site alone: one site, asked directly; then tested at every site.

    Returns: the seconds that it took.
    """
    began = time.monotonic()
    from chexfound.recipe.batch_sizes import BatchSizes
    from client.answer import hospital as site_module
    from server.exchange.direct import DirectExchange
    from server.rounds.start import run_of

    store = Store.open(plan.store)
    listener = site_module.on_progress

    def progress(phase: str, done: int, total: int) -> None:
        if listener is not None:
            listener(arm, phase, done, total)

    patients = None if arm == "centralized" else plan.sites[arm.removeprefix("local:")]
    folder, n_sites, recipe = plan.arm_folder(arm), len(plan.sites), plan.recipe
    view, key = View.of(store, trained_on(arm), patients), plan.split_key
    own = Site(view=view, home=folder / "own", progress=progress, split_key=key, tally=True)
    batches = BatchSizes.pooled(recipe, n_sites)
    warn = listeners.warner(plan.recipe.seed, arm, listeners.on_warnings)
    outcome = run_of(plan.arm_recipe(arm), DirectExchange(own), folder, batches=batches, on_event=warn).run()
    for name, shard in plan.sites.items() if "evaluate" in recipe.phases else ():
        tested = Site(view=View.of(store, name, shard), home=plan.site_home(arm, name), split_key=key)
        request = Request(phase="evaluate", findings=outcome.findings, tensors=outcome.tensors)
        dispatch.run(tested, recipe, request)
    return time.monotonic() - began


def trainable(plan: ArmPlan, site: str) -> bool:
    """Whether a site alone has both classes of any finding among its training images."""
    from chexfound.adapt.fit import trainable_findings

    view = View.of(Store.open(plan.store), site, plan.sites[site])
    ids = view.split(plan.membership, "train")
    return bool(trainable_findings(view.store.labels(ids, list(plan.recipe.adapt.findings or ()))).any())
