"""A federation as `chexfound-server` and `chexfound-client` make it: TLS, node keys, the guard; and who is kept out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chexfound.errors import RosterError
from chexfound.identity import signing
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from client.home import membership
from client.node import supernode
from server.federation import pki
from server.federation import settings as federations
from server.runs import submit
from tests.e2e.hospitals import Hospitals
from tests.server.doors import INSIDE, ask, request

pytestmark = pytest.mark.e2e
SITES = 3


@pytest.fixture(scope="module")
def small(recipe: Recipe) -> Recipe:
    """For three sites."""
    return replace(
        recipe,
        federation=replace(recipe.federation, min_sites=SITES),
        train=replace(recipe.train, pooled_batch_size=6),
        adapt=replace(recipe.adapt, pooled_batch_size=6),
    )


@pytest.fixture(scope="module")
def secured(federation: Any, small: Recipe, tmp_path_factory: Any) -> Hospitals:
    """Three hospitals, from nothing to the report; what they should refuse comes first, and must leave them well."""
    made = Hospitals(federation, tmp_path_factory.mktemp("images") / "phantoms", SITES)
    for name in made.names:
        made.enrol(name)
    for name in made.names:
        assert "differs from the installed release 0.1.0: nothing" in made.approve(name)
        made.accept_plain(name)
    made.running = made.up()
    made.sites = {name: made.serve(name, small.image_px) for name in made.names}
    made.recipe = federation.folder / "recipe.yaml"
    made.recipe.write_text(recipes.to_yaml(small))

    made.changed = run_of_changed_code(made, small)
    made.enrol("WEST")
    made.extended = made.server("run", made.recipe, "--name", "extended", code=RosterError.exit_code)
    made.server("remove-site", "WEST")

    made.run = made.server("run", made.recipe, "--name", "first")
    return made


def run_of_changed_code(made: Hospitals, recipe: Recipe) -> str:
    """By a coordinator who does not ship the release, and whose SuperExec is Flower's own: ours would not run it."""
    pids = [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/cmdline") if is_superexec(file, made.folder)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    held = federations.load(made.folder)
    program = str(Path(sys.executable).with_name("flower-superexec"))
    flowers = made.processes.start("flowers", [program, *held.superexec_options()], **held.settings())
    try:
        assert pids
        return submit_changed(made, recipe)
    finally:
        flowers.stop()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def is_superexec(cmdline: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return cmdline.read_bytes().rstrip(b"\0").endswith(f"superexec\0{folder}".encode())
    return False


def submit_changed(made: Hospitals, recipe: Recipe) -> str:
    """What Flower says of the run."""
    app = made.folder.parent / "app"
    submit.stage(app)
    (app / "client" / "app.py").write_text((app / "client" / "app.py").read_text() + "\n# and more\n")
    run_config = made.folder.parent / "changed.toml"
    run_config.write_text(recipes.to_run_config(recipe))
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(app), "federation", "--stream", "-c"]
    process = made.processes.start("changed", [*command, str(run_config)], FLWR_HOME=str(made.folder / "flower"))
    process.wait_for("event=failed")
    process.wait()
    return process.text


def refused_by(secured: Hospitals, said: str, word: str) -> str:
    """The first site that refused, by the coordinator's word; the run ends then, and the others may not be asked."""
    found = re.search(rf"site '([a-z-]+)' in enrol: replied with error '{word}' \(exit code 6\)", said)
    assert found, said[-3000:]
    return found[1]


def test_code_that_was_not_approved_is_refused_at_both_ends(secured: Hospitals) -> None:
    name = refused_by(secured, secured.changed, "code")
    assert "was not approved here; look at it with: chexfound-client approve" in secured.sites[name].text
    listed = secured.client(name, "approve", "--list")
    assert re.search(r"code [0-9a-f]{64}: REFUSED: 2 files other than the installed release's", listed)


def test_a_roster_with_one_more_name_is_refused_at_both_ends(secured: Hospitals) -> None:
    name = refused_by(secured, secured.extended, "roster")
    assert "has a site 'WEST' that was not approved here" in secured.sites[name].text


def test_the_model_is_that_of_the_run_in_process(
    secured: Hospitals, simulate: Callable[..., str], small: Recipe, tmp_path: Path
) -> None:
    metrics = json.loads((secured.folder / "runs" / "first" / "metrics.json").read_text())
    assert metrics["model_sha256"]["federated"] == simulate(secured.images, tmp_path, 2, small)
    assert metrics["sites"] == secured.names


def test_what_a_run_leaves(secured: Hospitals, tmp_path: Path) -> None:
    report = secured.server("report", "first")
    assert (secured.folder / "runs" / "first" / "report.html").exists(), report
    secured.server("fetch-model", "first", "--out", tmp_path / "model")
    assert (tmp_path / "model" / "head.safetensors").exists()
    states = {one["run"]: one["state"] for one in json.loads(secured.server("status", "--json"))["runs"]}
    assert (states["first"], states["extended"]) == ("done", "failed")


def test_the_sites_are_listed_as_connected(secured: Hospitals) -> None:
    told = json.loads(secured.server("sites", "--json"))
    assert told["superlink"] == "up"
    assert {one["site"]: one["status"] for one in told["sites"]} == dict.fromkeys(secured.names, "online")
    name = secured.names[0]
    keys = membership.public_keys(secured.home(name) / "sites" / name)
    assert told["sites"][0]["node"] == signing.fingerprint(keys.node)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_control_runtime_and_docs_do_not_answer_outside(secured: Hospitals, method: str) -> None:
    """To somebody who holds the certificate of the authority and no more."""
    trust = ssl.create_default_context(cafile=str(secured.folder / "ca.crt"))
    for path in INSIDE:
        answer = ask(secured.port, request(method, path, b"", "Content-Length: 0"), trust)
        assert answer.startswith(b"HTTP/1.1 404 "), (path, answer[:200])


def test_without_tls_nothing_answers(secured: Hospitals) -> None:
    trust = ssl.create_default_context(cafile=str(secured.folder / "ca.crt"))
    assert b"HTTP/1.1 2" not in ask(secured.port, request("GET", "/health"))
    assert ask(secured.port, request("GET", "/health"), trust).startswith(b"HTTP/1.1 200")


def node(secured: Hospitals, keys: Path, authority: Path, name: str) -> Any:
    """A site's node with some keys and some authority, until it ends or says something of itself."""
    home = secured.processes.folder / f"home-{name}"
    home.mkdir()
    held = supernode.Credentials(authority, keys / "keys" / "node.key")
    command = supernode.commands(home, secured.address, 'site="X" data="/nowhere"', held)["supernode"]
    return secured.processes.start(name, [*command, "--max-retries", "1"], FLWR_HOME=str(home / "flower"))


def test_a_key_that_is_not_registered_is_refused(secured: Hospitals, tmp_path: Path) -> None:
    membership.make_keys(tmp_path)
    stranger = node(secured, tmp_path, secured.folder / "ca.crt", "stranger")
    assert stranger.wait() != 0
    assert "SuperNode ID" not in stranger.text


def test_a_second_client_with_the_same_key_is_refused(secured: Hospitals) -> None:
    name = secured.names[0]
    second = node(secured, secured.home(name) / "sites" / name, secured.folder / "ca.crt", "second")
    assert second.wait() != 0
    assert "SuperNode ID" not in second.text
    assert secured.sites[name].running


def test_a_server_of_another_authority_is_not_talked_to(secured: Hospitals, tmp_path: Path) -> None:
    pki.make_authority(tmp_path / "other", "thorax")
    name = secured.names[0]
    deceived = node(secured, secured.home(name) / "sites" / name, tmp_path / "other" / "ca.crt", "deceived")
    assert deceived.wait() != 0
    assert "CERTIFICATE_VERIFY_FAILED" in deceived.text


def test_a_site_that_was_removed_is_out(secured: Hospitals) -> None:
    """Near the end: it changes the federation."""
    *others, last = secured.names
    secured.server("remove-site", last)
    told = json.loads(secured.server("sites", "--json"))
    assert [one["site"] for one in told["sites"]] == others
    secured.sites[last].stop()
    again = node(secured, secured.home(last) / "sites" / last, secured.folder / "ca.crt", "again")
    assert again.wait() != 0
    assert "SuperNode ID" not in again.text


def test_all_ends_with_the_coordinator(secured: Hospitals) -> None:
    assert secured.running.stop() == 0
    assert secured.running.text.rstrip().endswith("stopped")
    assert secured.sites[secured.names[0]].stop() == 0
    assert os.path.exists(secured.folder / "superlink.sqlite")
