"""Another account of the hospital's machine, which may read whatever its modes let it read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from chexfound.contract.request import Reply, Request
from chexfound.recipe import load as recipes
from chexfound.wire import envelopes
from client import cli
from client.answer import hospital
from client.app import app
from client.operator.preflight import local
from client.operator.preflight.checks import Subject
from tests.hostile.weights_door import demand, short, whole_run

FINDINGS = ("Bar", "Blob")


@pytest.fixture
def served(tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site's home as an earlier release left it, open to all, after `chexfound-client --data DIR` was started."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / "sites" / "A"
    before = os.umask(0o022)
    try:
        for name in ("scores.npz", "secagg/attempt/unmask.json", "state/x/pretrain/00000002.safetensors"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(b"of a patient")
        monkeypatch.setattr("client.node.supernode.keep_running", lambda *_: 15)
        options = ["--data", str(tiny_images), "--name", "A", "--superlink", "127.0.0.1:1", "--insecure"]
        assert cli.main([*options, "--image-px", "64"]) == 0
        yield home
    finally:
        os.umask(before)


def readable(folder: Path) -> list[str]:
    """What another account has any right to, in a folder and above, up to where sites are kept."""
    paths = [folder.parent, folder, *folder.rglob("*")]
    return sorted(str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077)


def test_a_home_that_was_open_is_closed_at_the_start(served: Path) -> None:
    assert {path.name for path in served.iterdir()} >= {"secret.key", "store-64", "scores.npz", "secagg"}
    assert readable(served) == []
    assert stat.S_IMODE((served / "secret.key").stat().st_mode) == 0o600


def test_pixels_labels_features_and_scores_of_a_run_are_closed(
    served: Path, tiny_images: Path, tiny_recipe: Any, make_message: Any
) -> None:
    """All phases, in the processes' umask."""
    recipe = short(tiny_recipe)
    demand(served)
    run = {"recipe": recipes.to_json(recipe)}
    node = {"site": "A", "data": str(tiny_images)}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)

    def ask(request: Request) -> Reply:
        reply = app(make_message(envelopes.pack_request(request), envelopes.MESSAGE_TYPES[request.phase]), context)
        assert reply.has_content(), (request.phase, reply.error)
        return envelopes.unpack_reply(reply.content).message

    ask(Request(phase="enrol"))
    whole_run(ask, recipe, FINDINGS)
    kept = {"index.sqlite", "patches.npy", "backbone.safetensors", "accepted.json", "runs.json"}
    assert {path.name for path in served.rglob("*")} >= kept
    (served / "site.yaml").unlink()  # the operator's own, of no patient
    assert readable(served) == []


def test_check_says_what_is_open_and_what_closes_it(served: Path) -> None:
    assert local.private(Subject("A", served)).state == "ok"
    for path in (served / "store-64" / "shard-00000.npy", served / "secret.key", served / "features", served):
        if not path.exists():
            path.mkdir()
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | 0o044)
        found = local.private(Subject("A", served))
        assert (found.state, found.remedy) == ("failed", f"chmod -R go= {served}")
        assert str(path) in found.text
        path.chmod(mode)
    served.parent.chmod(0o755)
    assert local.private(Subject("A", served)).remedy == f"chmod go= {served.parent}"


def test_a_store_that_is_served_as_it_is_has_a_warning(served: Path, tmp_path: Path) -> None:
    given = (served / "store-64").rename(tmp_path / "given")
    (given / "index.sqlite").chmod(0o644)
    found = local.private(Subject("A", served, data=given))
    assert (found.state, found.remedy) == ("warning", f"chmod -R go= {given}")


def test_a_second_start_mends_what_was_opened_since(served: Path, tiny_images: Path, tiny_recipe: Any) -> None:
    (served / "store-64").chmod(0o755)
    (served / "store-64" / "index.sqlite").chmod(0o644)
    hospital.site_of({"site": "A", "data": str(tiny_images)}, tiny_recipe.image_px, enrolling=True)
    assert readable(served) == []
