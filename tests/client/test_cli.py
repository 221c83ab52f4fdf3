from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest

from chexfound import __version__
from chexfound.data.store.reader import Store
from chexfound.identity.roster import Address
from client import cli
from client.home import approval, link
from client.node import supernode


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of two patients, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["file,source,patient_id,findings"]
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), np.random.default_rng(number).integers(0, 256, (20, 20), np.uint8))
        rows.append(f"{number}.png,a,p{number // 2},Nodule")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "manifest.csv").write_text("\n".join([*rows, "broken.png,a,p9,"]))
    return folder


class Served:
    """`serve(*options)` with a stand-in for what keeps the two processes running; what that was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supernode, "keep_running", self._keep_running)

    def __call__(self, *options: str, asked: int = signal.SIGTERM) -> int:
        self._asked = asked
        return cli.main(options)

    def _keep_running(
        self, commands: Mapping[str, list[str]], env: Mapping[str, str], say: Callable[[str], None], drain_s: float
    ) -> int:
        self.commands, self.env, self.drain_s = commands, env, drain_s
        say("they run")
        return self._asked

    @property
    def node_config(self) -> str:
        command = self.commands["supernode"]
        return command[command.index("--node-config") + 1]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    return Served(monkeypatch)


def options(images: Path, *more: str, name: str = "A", superlink: str = "127.0.0.1:1") -> list[str]:
    return ["--data", str(images), "--name", name, "--superlink", superlink, "--image-px", "16", *more]


def test_images_are_taken_in_and_the_node_started(
    serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(*options(images, "--insecure")) == 0
    out = capsys.readouterr().out
    assert "3 new images of 2 patients, 0 files were there already, 1 refused" in out
    assert "1 refused: cannot be decoded" in out
    assert "nothing answers at 127.0.0.1:1 yet; trying again until it does" in out
    assert len(Store.open(tmp_path / "home" / "sites" / "A" / "store-16")) == 3
    assert "no code was approved here yet, so every run is refused: chexfound-client approve" in out
    assert "site A: they run" in out
    assert serve.node_config == f'site="A" data="{images}"'
    assert list(serve.commands) == ["supernode", "worker"]
    assert serve.drain_s == 120
    assert serve.env["FLWR_HOME"] == str(tmp_path / "home" / "sites" / "A" / "flower")
    assert serve(*options(images, "--insecure")) == 0
    assert "0 new images of 0 patients, 3 files were there already" in capsys.readouterr().out


def test_refused_files_are_counted_and_named_to_who_asks(
    serve: Served, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal of a service is kept by the machine: what a table or a header says stays off it."""
    head, *rows = (images / "manifest.csv").read_text().splitlines()[:4]
    views = ("LL MUELLER", "LL O'Hara", "")
    table = [f"{head},view", *(f"{row},{view}" for row, view in zip(rows, views, strict=True))]
    (images / "manifest.csv").write_text("\n".join(table))
    assert serve(*options(images, "--insecure")) == 0
    out = capsys.readouterr().out
    assert "2 refused: not frontal: view …\n" in out
    assert "which they are: chexfound-client status --refused --name A" in out
    assert "MUELLER" not in out
    assert "Hara" not in out
    assert cli.main(["status", "--refused", "--name", "A"]) == 0
    named = "0.png: not frontal: view 'LL MUELLER'\n1.png: not frontal: view \"LL O'Hara\"\n"
    assert capsys.readouterr().out == named


def test_a_store_is_served_as_it_is(
    serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chexfound.data.intake.ingest import ingest

    ingest(images, tmp_path / "store", 32)
    assert serve(*options(tmp_path / "store", "--insecure")) == 0
    assert "taking in" not in capsys.readouterr().out
    assert not (tmp_path / "home" / "sites" / "A" / "store-16").exists()


def test_images_of_a_folder_served_before_are_told(
    serve: Served, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(*options(images, "--insecure"))
    other = images.rename(images.with_name("moved"))
    cv2.imwrite(str(other / "0.png"), np.random.default_rng(9).integers(0, 256, (20, 20), np.uint8))
    capsys.readouterr()
    serve(*options(other, "--insecure"))
    assert "another folder that site 'A' was served from before take part too: 1 of 4" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "expected"), [(2, 130), (15, 0)])
def test_exit_codes(serve: Served, images: Path, asked: int, expected: int) -> None:
    assert serve(*options(images, "--insecure", "--drain", "7"), asked=asked) == expected
    assert serve.drain_s == 7


def test_afterwards_it_is_said_that_nothing_runs(serve: Served, images: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "sites" / "A"
    home.mkdir(parents=True)
    (home / "node.json").write_text('{"state": "idle", "pid": 1}')
    serve(*options(images, "--insecure"))
    values = json.loads((home / "node.json").read_text())
    assert (values["state"], values["pid"]) == ("stopped", 1)


def test_nothing_is_said_of_approving_once_code_was(
    serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    approval.approve(tmp_path / "home" / "sites" / "A", "0" * 64)
    assert serve(*options(images, "--insecure")) == 0
    assert "approve" not in capsys.readouterr().out


def test_a_site_that_has_joined_is_not_served_without_its_keys(
    enrolled: Callable[..., Path], authority: Path, serve: Served, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrolled(authority, Address("127.0.0.1", 8443))
    assert serve(*options(images, "--insecure", name="NORTH")) == 2
    assert "without TLS and its keys" in capsys.readouterr().err
    assert not hasattr(serve, "commands")  # nothing was started


def test_an_enrolled_site_connects_with_its_keys(
    enrolled: Callable[..., Path], authority: Path, closed_port: int, serve: Served, images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    home = enrolled(authority, Address("127.0.0.1", closed_port))
    assert serve("--data", str(images), "--image-px", "16") == 0
    command = serve.commands["supernode"]
    assert command[command.index("--root-certificates") + 1] == str(home / "ca.crt")
    assert command[command.index("--auth-supernode-private-key") + 1] == str(home / "keys" / "node.key")
    assert command[command.index("--superlink") + 1] == f"127.0.0.1:{closed_port}"
    assert serve.node_config == f'site="NORTH" data="{images}" secured=true'


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ([], {}, "--superlink: with TLS the approved file says where to connect"),
        (["--insecure"], {"superlink": "http://h:1"}, "write HOST:PORT without a prefix"),
        (["--insecure"], {"name": "a/b"}, "site name 'a/b'"),
        (["--insecure"], {"name": ".."}, "site name '..'"),
    ],
)
def test_options_that_are_refused(
    serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], changes: dict[str, str], message: str,
) -> None:  # fmt: skip
    assert serve(*options(images, *more, **changes)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "home").exists()


def test_a_site_that_was_not_enrolled_is_told_how(
    serve: Served, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("--data", str(images)) == 2
    assert "no site was enrolled on this machine yet; begin with: chexfound-client enrol" in capsys.readouterr().err
    assert serve("--data", str(images), "--name", "A") == 2
    assert "site 'A' is in no federation yet: chexfound-client enrol --name A" in capsys.readouterr().err
    assert serve("--data", str(images), "--name", "A", "--insecure") == 2
    assert "say where to connect, with --superlink" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.endswith(f" {__version__}\n")


def test_another_machine_is_warned_of(
    serve: Served, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "answers", lambda address, scheme: True)
    assert serve(*options(images, "--insecure", superlink="10.1.1.1:8000")) == 0
    assert "nothing on the way there is encrypted or authenticated" in capsys.readouterr().err


def test_no_images(serve: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(*options(tmp_path / "absent", "--insecure")) == 3
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "home" / "sites" / "A" / "store-16").exists()


def test_a_site_with_a_damaged_policy_is_not_served(
    serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "sites" / "A"
    home.mkdir(parents=True)
    (home / "site.yaml").write_text("secagg: {required: ture}")
    assert serve(*options(images, "--insecure")) == 2
    assert f"{home / 'site.yaml'}: secagg.required" in capsys.readouterr().err


def test_one_client_a_site(serve: Served, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home" / "sites" / "A"
    home.mkdir(parents=True)
    with open(home / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert serve(*options(images, "--insecure")) == 2
    assert "served already" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from client import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    loaded = json.loads(output.splitlines()[-1])
    assert not {"torch", "numpy", "cv2", "flwr", "rich", "pydantic"}.intersection(loaded)


def test_gpus_are_told_to_the_node(images, serve, monkeypatch, capsys):
    monkeypatch.delenv("CHEXFOUND_GPUS", raising=False)
    monkeypatch.setenv("CHEXFOUND_DEVICE", "cpu")
    assert serve(*options(images, "--insecure", "--gpus", "2")) == 0
    assert 'gpus="2"' in serve.node_config
    assert serve(*options(images, "--insecure")) == 0
    assert "gpus=" not in serve.node_config
    monkeypatch.delenv("CHEXFOUND_DEVICE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert serve(*options(images, "--insecure", "--gpus", "2")) == 2
    assert "PyTorch finds no GPU in this machine" in capsys.readouterr().err


NO_RIGHTS = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]  # root, without what makes modes mean nothing to it
PROGRAMS = """
import sys
from chexfound.commands import main as ingest
from client import cli as client
from sim import cli as sim
where, data = sys.argv[1:]
print(ingest.main(["ingest", data, where + "/store"]))
print(client.main(["--data", data, "--name", "A", "--superlink", "127.0.0.1:9", "--insecure"]))
print(sim.main(["--data", data, "--out", where + "/out"]))
"""


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="modes mean nothing to root")
@pytest.mark.parametrize("what", ["folder", "above", "names", "below"])
def test_images_that_may_not_be_read_are_a_sentence_of_each_program(tmp_path: Path, what: str) -> None:
    """The folder itself, one above it, one whose names alone can be read, and one below it of that kind."""
    data = tmp_path / "above" / "data"
    (data / "below" / "deeper").mkdir(parents=True)
    closed, mode = {"folder": (data, 0), "above": (data.parent, 0), "names": (data, 0o444)}.get(
        what, (data / "below", 0o444)
    )
    closed.chmod(mode)
    command = [*(NO_RIGHTS if os.geteuid() == 0 else []), sys.executable, "-c", PROGRAMS, str(tmp_path), str(data)]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "CHEXFOUND_HOME": str(tmp_path / "home")}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    finally:
        closed.chmod(0o700)
    told = done.stdout.splitlines()
    assert [line for line in told if line.isdigit()] in (["3", "3", "3"], ["3", "3", "2"]), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 3
