"""The container's health check, before a real guard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn

from server.federation import pki
from server.services import guard
from tests.server.doors import ROOT, Behind, Node, free_port, running, write_roster


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    pki.make_authority(folder, "thorax")
    pki.make_server(folder, ["localhost"])
    write_roster(folder / "roster.json", NORTH=Node())
    return folder


def check(port: int, authority: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "deploy" / "health.py", f"https://localhost:{port}/health", authority / "ca.crt"]
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # which must not be asked
    return subprocess.run(command, env=proxy, capture_output=True, text=True, check=False)


def test_a_coordinator_that_answers_is_healthy(authority: Path, tmp_path: Path) -> None:
    config = uvicorn.Config(Behind(), lifespan="off", log_config=None, access_log=False, http="h11", ws="none")
    with running(uvicorn.Server(config)) as superlink:
        files = {"certificate": str(authority / "server.crt"), "key": str(authority / "server.key")}
        with running(
            guard.server("127.0.0.1", 0, f"127.0.0.1:{superlink}", authority / "roster.json", **files)
        ) as port:
            assert check(port, authority).returncode == 0
            pki.make_authority(tmp_path, "another")
            done = check(port, tmp_path)
            assert done.returncode == 1
            assert "CERTIFICATE_VERIFY_FAILED" in done.stderr


def test_one_that_does_not_is_not(authority: Path) -> None:
    files = {"certificate": str(authority / "server.crt"), "key": str(authority / "server.key")}
    with running(guard.server("127.0.0.1", 0, f"127.0.0.1:{free_port()}", authority / "roster.json", **files)) as port:
        assert "503" in check(port, authority).stderr
    done = check(port, authority)
    assert (done.returncode, "refused" in done.stderr) == (1, True)


def test_one_whose_certificate_is_lost_is_not(tmp_path: Path) -> None:
    assert check(9, tmp_path).returncode == 1
