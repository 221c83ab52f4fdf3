"""Faults that are planted, one a test: each is found and named, and no other check fails because of it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from chexfound.data.intake.ingest import ingest
from chexfound.host import machine
from chexfound.identity.bundle import Bundle
from chexfound.identity.roster import Address
from chexfound.recipe import load as recipes
from client import cli
from client.answer import asked
from client.home import approval, ledger, link, membership, secret, template
from client.home.paths import close, store_path
from client.node import flwr_private
from client.operator import options
from client.operator.preflight import checks, local, remote
from client.operator.preflight.order import CHECKS
from server.federation import pki
from server.services import guard

RELEASE = Bundle({"client/app.py": 64 * "0"})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is not packed, little is uploaded, and the machine has no GPU."""
    monkeypatch.setattr(flwr_private, "release_bundle", lambda: RELEASE)
    monkeypatch.setattr(remote, "UPLINK_BYTES", (2**16, 2**17))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CHEXFOUND_DEVICE", raising=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rows = ["file,source,patient_id,findings"]
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), np.random.default_rng(number).integers(0, 256, (20, 20), np.uint8))
        rows.append(f"{number}.png,a,p{number},Nodule")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def prepare(authority: Path, open_door: Callable[..., int], enrolled: Callable[..., Path], images: Path):
    """`prepare()`: a site's home at which nothing is wrong, with a coordinator; or one that differs as told."""

    def make(server: Address | None = None, shown: Path | None = authority, approve: bool = True) -> Path:
        home = enrolled(authority, server or Address("localhost", open_door(shown)))
        if approve:
            approval.approve(home, RELEASE.digest())
        close(home)
        ingest(images, store_path(home, 16), 16, naming=secret.of_site(home).naming)
        close(home)  # as if the umask had been a site's
        return home

    return make


def check(home: Path, **options: Any) -> dict[str, checks.CheckResult]:
    return {result.name: result for result in checks.run(checks.Subject("NORTH", home, **options), CHECKS)}


def only(found: dict[str, checks.CheckResult], name: str) -> checks.CheckResult:
    """The one that failed; what stands on it was left out, and everything else is well."""
    assert [one.name for one in found.values() if one.state == "failed"] == [name], found
    left_out = {name}
    for one in CHECKS:
        if left_out.intersection(one.needs):
            left_out.add(one.name)
    assert {one.name for one in found.values() if one.state == "skipped"} == left_out - {name}
    assert found[name].remedy
    return found[name]


def test_nothing_is_wrong(prepare: Callable[..., Path], superlink: Any) -> None:
    found = check(prepare(), data=None)
    assert {name for name, one in found.items() if one.state != "ok"} <= {"disk", "memory"}  # of this machine
    assert "3 images of 3 patients, 16 px" in found["store"].text
    assert "a minute" in found["uplink"].text or "minutes" in found["uplink"].text
    assert superlink.uploaded > 2**16


# ---- this machine


def test_names_that_stay(prepare: Callable[..., Path], tmp_path: Path) -> None:
    """A warning, with the line of site.yaml; and how few patients are told of."""
    home = prepare()
    assert "fewer than 10 patients" in check(home)["findings"].text
    images = tmp_path / "more"
    images.mkdir()
    cv2.imwrite(str(images / "9.png"), np.random.default_rng(9).integers(0, 256, (20, 20), np.uint8))
    (images / "manifest.csv").write_text("file,source,patient_id,findings\n9.png,b,p9,Valve replaced")
    ingest(images, store_path(home, 16), 16, naming=secret.of_site(home).naming)
    one = check(home)["findings"]
    assert one.state == "warning"
    assert "Valve replaced (1 images)" in one.text
    assert "findings: ['Valve replaced']" in one.remedy


def test_a_key_that_others_can_read(prepare: Callable[..., Path]) -> None:
    home = prepare()
    (home / "keys" / "node.key").chmod(0o644)
    one = only(check(home), "keys")
    assert "mode 0644" in one.text
    assert "chmod 600" in one.remedy


def test_no_keys(tmp_path: Path, enrolled: Callable[..., Path]) -> None:
    found = check(tmp_path / "home" / "sites" / "NORTH")
    assert "has no keys" in found["keys"].text
    assert found["roster"].state == found["uplink"].state == "skipped"


def test_a_key_that_is_damaged(prepare: Callable[..., Path]) -> None:
    home = prepare()
    (home / "keys" / "identity.key").write_bytes(b"x")
    assert "identity key cannot be read" in only(check(home), "keys").text


def test_nothing_was_approved(prepare: Callable[..., Path]) -> None:
    home = prepare()
    (home / "federation.json").unlink()
    one = only(check(home), "roster")
    assert "no federation was approved yet" in one.text
    assert one.remedy.endswith("chexfound-client join FILE")


def test_runs_that_are_used_up(prepare: Callable[..., Path]) -> None:
    home = prepare()
    for run in range(5):
        ledger.asked(home, str(run))
    one = check(home)["policy"]
    assert (one.state, one.remedy.endswith(f"raise max_runs in {home / 'site.yaml'}")) == ("warning", True)
    (home / "runs.json").write_text("{")
    assert str(home / "runs.json") in only(check(home), "policy").text


def test_a_policy_that_cannot_be_read(prepare: Callable[..., Path]) -> None:
    home = prepare()
    (home / "site.yaml").write_text("secagg: {require: true}")
    one = only(check(home), "policy")
    assert "secagg.require" in one.text
    assert str(home / "site.yaml") in one.remedy


def test_a_policy_that_this_federation_cannot_meet(prepare: Callable[..., Path]) -> None:
    home = prepare()
    (home / "site.yaml").write_text("secagg: {required: true}")
    assert "this federation has 1; runs in the clear are refused" in only(check(home), "policy").text
    (home / "site.yaml").write_text("secagg: {minimum: 4}")
    assert check(home)["policy"].state == "warning"
    (home / "site.yaml").unlink()
    template.write(home)  # as `enrol` does: nothing that an operator should change
    found = check(home)["policy"]
    assert (found.state, found.remedy) == ("ok", "")
    assert "runs in the clear are accepted; secure aggregation is for 3 to 128 sites" in found.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("min_steps: 9\nmax_steps: 8", "min_steps 9 is above max_steps 8"),
        ("model: {max_lr: 0.0000001}", "none of the presets demo,"),
        ("phases: []", "phases: none is granted"),
    ],
)
def test_a_policy_that_no_recipe_can_meet(prepare: Callable[..., Path], text: str, said: str) -> None:
    home = prepare()
    (home / "site.yaml").write_text(text)
    one = only(check(home), "policy")
    assert "no recipe can be granted" in one.text
    assert said in one.text
    assert str(home / "site.yaml") in one.remedy


@pytest.mark.parametrize("asked", ["demo", "laptop"])
def test_a_recipe_is_held_against_the_policy_line_by_line(
    prepare: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: str
) -> None:
    home = prepare()
    assert options.run(["check", "--recipe", asked]) == 0
    said = capsys.readouterr().out
    assert "ok       model: {max_patch_px: 16}                    asked: student.patch_size 16" in said
    assert "REFUSED" not in said
    assert said.startswith("min_batch is reckoned with 1 site, of the approved roster\n")
    assert f"lines of {home / 'site.yaml'} that bear on a recipe grant it" in said
    path = tmp_path / "masked.yaml"
    path.write_text("aggregation: secagg")
    assert options.run(["check", "--recipe", str(path)]) == 6
    assert "REFUSED: masks need 3 sites, and the roster has 1" in capsys.readouterr().out
    (home / "site.yaml").write_text("max_rounds: 10")
    assert options.run(["check", "--recipe", asked]) == 6
    said = capsys.readouterr().out
    assert "REFUSED  max_rounds: 10 " in said
    assert str(home / "site.yaml") in said
    assert options.run(["check", "--recipe", asked, "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert found["sites"] == 1
    assert [row["code"] for row in found["lines"] if not row["ok"]] == ["policy.work"]
    path = tmp_path / "own.yaml"
    path.write_text("student: {patch_size: 48, stem: linear}\nimage_px: 96")
    assert options.run(["check", "--recipe", str(path)]) == 6
    assert "asked: student.patch_size 48" in capsys.readouterr().out
    (home / "federation.json").unlink()
    assert options.run(["check", "--recipe", asked]) == 6
    n = recipes.load(asked).federation.min_sites
    assert (
        f"with {n} sites, the recipe's federation.min_sites, since no roster is approved\n" in capsys.readouterr().out
    )


def test_a_policy_that_holds_is_told(prepare: Callable[..., Path], tmp_path: Path) -> None:
    home = prepare()
    held = membership.approved(home)
    assert held is not None
    sites = held.sites
    for name in ("EAST", "SOUTH", "WEST"):
        sites = sites.with_site(name, membership.make_keys(tmp_path / name)[0])
    membership.approve(home, dataclasses.replace(held, sites=sites))
    for demand in ("secagg: {required: true, colluders: 1}", "secagg: {colluders: 1}", ""):
        (home / "site.yaml").write_text(demand)
        assert check(home)["policy"].text.startswith("runs in the clear are refused; ")
    (home / "site.yaml").write_text("plain: accepted")
    assert check(home)["policy"].text.startswith("runs in the clear are accepted; ")
    (home / "site.yaml").write_text("secagg: {required: true, colluders: 1}")
    text = "runs in the clear are refused; a masked sum is over 3 of 4 sites or more, of which 1 may collude"
    assert check(home)["policy"].text == text


def test_other_keys_in_the_roster(prepare: Callable[..., Path]) -> None:
    home = prepare()
    shutil.rmtree(home / "keys")
    membership.make_keys(home)
    assert "other keys for 'NORTH'" in only(check(home), "roster").text


def test_an_authority_beside_the_approved_one(prepare: Callable[..., Path], tmp_path: Path) -> None:
    home = prepare()
    pki.make_authority(tmp_path / "other", "thorax")
    shutil.copy(tmp_path / "other" / "ca.crt", home / "ca.crt")
    assert "ca.crt is not the authority that was approved" in only(check(home), "roster").text


def test_code_that_was_not_approved(prepare: Callable[..., Path]) -> None:
    one = only(check(prepare(approve=False)), "code")
    assert "was not approved here" in one.text
    assert one.remedy == "chexfound-client approve"


@pytest.mark.parametrize(("part", "size"), [("index.sqlite", 100), ("shard-00000.npy", 100), ("index.sqlite", None)])
def test_a_store_that_is_damaged(prepare: Callable[..., Path], part: str, size: int | None) -> None:
    home = prepare()
    if size is None:
        (store_path(home, 16) / part).unlink()
    else:
        os.truncate(store_path(home, 16) / part, size)
    one = only(check(home), "store")
    assert str(store_path(home, 16)) in one.text
    assert "made anew" in one.remedy


def test_where_several_sites_share_the_home_commands_name_the_site(prepare: Callable[..., Path]) -> None:
    home = prepare(approve=False)
    (home.parent / "SOUTH" / "keys").mkdir(parents=True)
    assert check(home)["code"].remedy == "chexfound-client approve --name NORTH"
    (home / "federation.json").unlink()
    assert check(home)["roster"].remedy.endswith("chexfound-client join FILE --name NORTH")


def test_no_store_yet_is_no_fault(prepare: Callable[..., Path], images: Path) -> None:
    home = prepare()
    shutil.rmtree(store_path(home, 16))
    found = check(home, data=images)
    assert found["store"].state == "ok"
    assert "none yet" in found["store"].text
    assert "with no image yet" in found["disk"].text


def test_a_store_that_is_served_as_it_is(prepare: Callable[..., Path]) -> None:
    home = prepare()
    found = check(home, data=store_path(home, 16).rename(home.parent / "own"))
    assert "16 px, in" in found["store"].text


def test_images_that_are_not_there(prepare: Callable[..., Path], tmp_path: Path) -> None:
    home = prepare()
    assert "no folder that this account may read" in only(check(home, data=tmp_path / "absent"), "store").text
    (tmp_path / "empty").mkdir()
    assert "is empty" in only(check(home, data=tmp_path / "empty"), "store").text


def test_a_disk_that_is_nearly_full(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepare()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 5 * 10**7))
    assert "0.1 GB free" in only(check(home), "disk").text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 5 * 10**9))
    found = check(home)["disk"]
    assert (found.state, "ViT-L" in found.text) == ("warning", True)


def test_the_disk_that_a_run_takes_grows_with_the_images(prepare: Callable[..., Path]) -> None:
    """ViT-L of 16 px images: 2 tokens of 4 x 1024 float32 each, beside what is there without images."""
    home = prepare()
    one = checks.Subject("NORTH", home)
    local.store(one)

    class Many(type(one.store)):
        def __len__(self) -> int:
            return 10**6

    one.store.__class__ = Many
    assert f"{(10**6 * 2 * 4 * 1024 * 4 + 11 * 1.61e9) / 1e9:.1f} GB (ViT-L" in local.disk(one).text


def test_too_little_memory(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepare()
    monkeypatch.setattr(machine, "memory", lambda: 2**30)
    assert "1.0 GiB; 2 are the least" in only(check(home), "memory").text


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_gpu_that_is_not_there(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    home = prepare()
    if by == "environment":
        monkeypatch.setenv("CHEXFOUND_GPUS", "2")
    one = only(check(home, gpus="2" if by == "option" else None), "gpu")
    assert "PyTorch finds no GPU" in one.text
    assert "nvidia-smi" in one.remedy


# ---- the way, and the other end


def test_a_name_that_does_not_resolve(prepare: Callable[..., Path]) -> None:
    one = only(check(prepare(Address("coordinator.invalid", 8443))), "dns")
    assert "coordinator.invalid has no address" in one.text


def test_nothing_listens(prepare: Callable[..., Path], closed_port: int) -> None:
    one = only(check(prepare(Address("127.0.0.1", closed_port))), "tcp")
    assert "Connection refused" in one.text
    assert "firewall" in one.remedy


def test_plain_http(prepare: Callable[..., Path]) -> None:
    assert "answers in plain HTTP" in only(check(prepare(shown=None)), "tls").text


def test_another_authority(prepare: Callable[..., Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    pki.make_authority(other, "a proxy that looks inside")
    pki.make_server(other, ["localhost"])
    one = only(check(prepare(shown=other)), "tls")
    assert "comes from 'a proxy that looks inside CA'" in one.text
    assert "exempted" in one.remedy


def test_another_authority_of_the_same_name(prepare: Callable[..., Path], tmp_path: Path) -> None:
    pki.make_authority(tmp_path / "other", "thorax")
    pki.make_server(tmp_path / "other", ["localhost"])
    assert "not from the authority that was approved" in only(check(prepare(shown=tmp_path / "other")), "tls").text


def test_the_certificate_of_another_host(
    prepare: Callable[..., Path], authority: Path, open_door: Callable[..., int]
) -> None:
    one = only(check(prepare(Address("127.0.0.2", open_door(authority, "127.0.0.2")))), "tls")
    assert "is for 'coordinator.invalid', 'localhost', 127.0.0.1, ::1, not for 127.0.0.2" in one.text


def dated(authority: Path, monkeypatch: pytest.MonkeyPatch, early: float, days: float) -> None:
    monkeypatch.setattr(pki, "EARLY", datetime.timedelta(days=early))
    monkeypatch.setattr(pki, "SERVER_DAYS", days)
    pki.make_server(authority, ["localhost"])


def test_a_certificate_that_expired(
    prepare: Callable[..., Path], authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated(authority, monkeypatch, 5, -2)
    home = prepare()
    one = only(check(home), "certificate")
    assert "the coordinator's certificate expired on" in one.text
    assert "chexfound-server renew" in one.remedy
    trusted = (authority / "ca.crt").read_bytes()
    with pytest.raises(httpx.ConnectError, match="certificate has expired"):  # Flower's node does not talk to it
        flwr_private.registered(str(membership.present(home).server), trusted, membership.node_key(home))


def test_a_certificate_from_the_future(
    prepare: Callable[..., Path], authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated(authority, monkeypatch, -2, 90)
    one = only(check(prepare()), "certificate")
    assert "not yet, by the coordinator's own clock" in one.text


def test_a_certificate_that_expires_soon(
    prepare: Callable[..., Path], authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated(authority, monkeypatch, 1, 10)
    found = check(prepare())
    assert found["certificate"].state == "warning"
    assert found["certificate"].text.endswith("in 9 days")
    assert found["key"].state == "ok"


@pytest.mark.parametrize(
    ("seconds", "state", "words"),
    [
        (86400, "failed", "24.0 hours ahead of"),
        (-86400, "failed", "24.0 hours behind"),
        (500 * 86400, "failed", "500.0 days ahead of"),  # beyond the certificate's end, by this clock
        (20, "failed", "ahead of"),
        (-402, "failed", "6.7 minutes behind"),  # give or take 3 s, which a busy machine takes
        (-150, "warning", "2.5 minutes behind"),
        (-30, "ok", "behind"),
    ],
)
def test_a_clock_that_is_wrong(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, seconds: float, state: str, words: str
) -> None:
    """Only here: by the coordinator's clock, the certificate is valid."""
    home, right = prepare(), link.now
    monkeypatch.setattr(link, "now", lambda: right() + datetime.timedelta(seconds=seconds))
    found = check(home)
    if state == "failed":
        only(found, "clock")
        assert "NTP" in found["clock"].remedy
    assert found["clock"].state == state
    assert words in found["clock"].text
    assert found["certificate"].state == "ok"


def test_a_superlink_that_is_down(prepare: Callable[..., Path], superlink: Any) -> None:
    home = prepare()
    superlink.status = 503
    assert "no SuperLink answers behind it (503)" in only(check(home), "coordinator").text


def test_something_else_at_the_port(prepare: Callable[..., Path], superlink: Any) -> None:
    home = prepare()
    superlink.status = 404
    assert "no coordinator of a federation does" in only(check(home), "coordinator").text


@pytest.mark.parametrize(
    ("chexfound", "flower", "remedy"), [(b"9.9.9", None, "chexfound==9.9.9"), (None, b"1.40.0", "flwr==1.40.0")]
)
def test_another_release_at_the_coordinator(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, chexfound: bytes, flower: bytes, remedy: str
) -> None:
    (first, ours), (second, its) = guard.VERSIONS
    monkeypatch.setattr(guard, "VERSIONS", [(first, chexfound or ours), (second, flower or its)])
    one = only(check(prepare()), "versions")
    assert (chexfound or flower).decode() in one.text
    assert remedy in one.remedy


def test_a_version_is_never_a_command(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is typed as it stands: pip install …==VERSION."""
    monkeypatch.setattr(guard, "VERSIONS", [(b"chexfound-version", b"9 --index-url http://x/"), guard.VERSIONS[1]])
    found = check(prepare())["versions"]
    assert "--index-url" not in found.text + str(found.remedy)


def test_a_coordinator_behind_another_door_tells_no_version(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "VERSIONS", [])
    found = check(prepare())["versions"]
    assert (found.state, "does not tell its own" in found.text) == ("ok", True)


def test_a_key_that_is_not_registered(prepare: Callable[..., Path], superlink: Any) -> None:
    home = prepare()
    superlink.registered = False
    one = only(check(home), "key")
    assert "does not know this site's node: it has not taken it in yet, or has removed it" in one.text
    assert "add-site" in one.remedy
    assert "If it was removed, that is refused: make new keys: mv " in one.remedy


def test_a_site_that_was_removed_is_told_what_helps(prepare: Callable[..., Path], superlink: Any) -> None:
    """Its keys are never taken again: `add-site` with them would be refused."""
    home = prepare()
    superlink.registered = False
    seconds = (home / "keys" / "node.key").stat().st_mtime + 60
    contact = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
    (home / "node.json").write_text(json.dumps({"contact": contact}))
    close(home)
    one = only(check(home), "key")
    assert "any more" in one.text
    assert "has removed this site" in one.text
    assert "add-site" not in one.remedy
    assert one.remedy.startswith(
        f"make new keys: mv {home / 'keys'} {home / 'keys-of-old'}, then chexfound-client enrol"
    )
    (home / "node.json").write_text(json.dumps({"contact": "2020-01-01T00:00:00+00:00"}))  # with keys before these
    assert "add-site" in str(only(check(home), "key").remedy)


def test_a_slow_uplink(prepare: Callable[..., Path], superlink: Any) -> None:
    home = prepare()
    superlink.bits_per_second = 400_000
    found = check(home)["uplink"]
    assert found.state == "warning"
    assert "0.4 Mbit/s" in found.text or "0.3 Mbit/s" in found.text
    assert "slowest site" in found.remedy


def test_an_uplink_is_reckoned_with_a_whole_message_of_vit_l(prepare: Callable[..., Path], superlink: Any) -> None:
    """The student with its heads, as it is asked for."""
    assert asked.model_bytes(recipes.load("vitl16-cxr1m")) == pytest.approx(local.VITL_BYTES, rel=0.001)
    found = check(prepare())["uplink"]
    assert "ViT-L's 1.61 GB take" in found.text


# ---- a proxy


def test_through_a_proxy(
    prepare: Callable[..., Path], authority: Path, open_door: Callable[..., int], make_proxy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The coordinator's name is one that the proxy alone can look up."""
    proxy = make_proxy({"coordinator.invalid": "127.0.0.1"}, "user:hunter2")
    server = Address("coordinator.invalid", open_door(authority))
    home = prepare(server)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    found = check(home)
    assert not [one for one in found.values() if one.state in ("failed", "skipped")]
    assert "the proxy's to look up" in found["dns"].text
    assert proxy.address in found["tcp"].text
    assert set(proxy.asked) == {f"CONNECT {server}"}
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("credentials", "known", "words"),
    [("", "elsewhere.invalid", "403"), ("user:hunter2", "coordinator.invalid", "407")],
)
def test_a_proxy_that_refuses(
    prepare: Callable[..., Path], make_proxy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    credentials: str, known: str, words: str,
) -> None:  # fmt: skip
    proxy = make_proxy({known: "127.0.0.1"}, credentials)
    home = prepare(Address("coordinator.invalid", 8443))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@{proxy.address}")
    found = check(home)
    one = only(found, "tcp")
    assert words in one.text
    assert "allow CONNECT to coordinator.invalid:8443" in one.remedy
    assert "wrong" not in str(found)


def test_a_proxy_that_is_not_there(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    home = prepare(Address("coordinator.invalid", 8443))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port}")
    assert "the proxy 127.0.0.1" in only(check(home), "tcp").text
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy.invalid:3128")
    found = check(home)
    assert "proxy.invalid has no address" in only(found, "dns").text
    assert "hunter2" not in str(found)


def test_a_proxy_that_no_program_can_use(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepare(Address("coordinator.invalid", 8443))
    monkeypatch.setenv("HTTPS_PROXY", "ftp://user:hunter2@proxy.invalid:3128")
    found = check(home)
    assert "names a proxy that cannot be used" in only(found, "dns").text
    assert "hunter2" not in str(found)


# ---- the command


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(_: checks.Subject) -> checks.Diagnosis:
        raise KeyError("x")

    plan = [
        checks.Check("a", breaks),
        checks.Check("b", lambda _: checks.ok("well")),
        checks.Check("c", breaks, ("a",)),
    ]
    found = checks.run(checks.Subject("NORTH", tmp_path), plan)
    assert [one.state for one in found] == ["failed", "ok", "skipped"]
    assert found[2].text == "not checked, for want of a"
    assert checks.summary(found) == "3 checks: 1 ok, 1 FAILED, 1 not checked"


def test_the_command(prepare: Callable[..., Path], superlink: Any, capsys: pytest.CaptureFixture[str]) -> None:
    home = prepare()
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out if not line.startswith(" ")][:-1] == [one.name for one in CHECKS]
    assert out[-1].startswith(f"{len(CHECKS)} checks: ")
    superlink.registered = False
    assert cli.main(["check", "--json", "--name", "NORTH", "--data", str(home)]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["site"], told["passed"]) == (1, "NORTH", False)
    assert {one["name"]: one["state"] for one in told["checks"]}["key"] == "failed"
    superlink.registered = True
    (home / "keys" / "identity.key").chmod(0o640)
    assert cli.main(["check"]) == 2
    assert "\n                      to do: chmod 600" in capsys.readouterr().out
