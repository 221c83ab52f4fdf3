"""Evaluation at a site: backbone and head on its held-out patients."""

from __future__ import annotations

from chexfound.adapt.fit import predict
from chexfound.contract import cells
from chexfound.contract.request import ARM, TRAINED_ON, Reply, Request
from chexfound.evaluate.histograms import histograms
from chexfound.evaluate.rows import result_rows
from chexfound.evaluate.scores import Scores, save_scores
from chexfound.model import checkpoint
from chexfound.model.checkpoint import load_tensors
from chexfound.model.glori import build_head
from chexfound.phases.adapt import backbone_of
from chexfound.phases.site_state import Site
from chexfound.recipe.schema import Recipe


def evaluate(site: Site, recipe: Recipe, request: Request) -> Reply:
    """Judge backbone and head on the site's held-out patients; the scores stay at the site."""
    backbone_tensors = checkpoint.with_prefix(request.tensors, "backbone.")
    backbone = backbone_of(recipe, backbone_tensors or checkpoint.load(site.home / "backbone.safetensors"))
    head = build_head(recipe, len(request.findings))
    load_tensors(head, checkpoint.with_prefix(request.tensors, "head."), list(head.state_dict()))
    ids = site.split(recipe, "test")
    labels = site.labels(ids, request.findings)
    probabilities = predict(backbone, head, site.view.store.pixels(ids), recipe.adapt.n_last_blocks)
    scores = Scores(
        patients=site.patients(ids),
        labels=labels,
        scores=probabilities.reshape(len(ids), len(request.findings)),
        findings=list(request.findings),
    )
    save_scores(site.home / "scores.npz", scores)
    if recipe.aggregation == "secagg":
        return Reply(values={"histograms": histograms(labels, scores.scores)})
    rows = result_rows(
        ARM,
        TRAINED_ON,
        site.name,
        scores,
        recipe.evaluate.bootstrap_samples,
        recipe.evaluate.confidence,
        recipe.seed,
    )
    if site.cells:
        rows = [row if row["n"] else cells.row(row) for row in rows]
    return Reply(values={"results": rows})
