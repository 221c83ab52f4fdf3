"""What `flwr … --format json` printed (flwr 1.42.0, captured), and what becomes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from chexfound.errors import SiteError
from chexfound.identity.roster import Address
from server.federation import flower_cli, settings
from server.federation.settings import Federation

SUBMITTED = """{
  "success": true,
  "run-id": "10052800853966591009",
  "federation-id": "@none/default",
  "fab-id": "federated-chexfound/federated-chexfound",
  "fab-hash": "6728b64a"
}
"""
NO_SUCH_RUN = """{
  "success": false,
  "error-message": "Using SuperLink: federation (127.0.0.1:18001)\\n Stopping run ID 123...\\n\\n[code: 16] Run ID not found."
}
"""  # noqa: E501 (as it was printed)
NO_SUPERLINK = """{
  "success": false,
  "error-message": "Using SuperLink: federation (127.0.0.1:18001)\\n Listing all runs...\\nConnection to the SuperLink is unavailable."
}
"""  # noqa: E501 (as it was printed)


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    public = Address("localhost", 18443)
    return settings.create(tmp_path / "f", "thorax", public, public, Address("127.0.0.1", 18001))


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of the program: what it prints, and how it was called."""
    told: dict[str, Any] = {"stdout": "", "stderr": "", "code": 0}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "error" in told:
            raise told["error"]
        told["command"], told["env"] = command, options["env"]
        return subprocess.CompletedProcess(command, told["code"], told["stdout"], told["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return told


def test_the_answer_is_what_it_printed(made: Federation, printed: dict[str, Any]) -> None:
    printed["stdout"] = SUBMITTED
    assert flower_cli.ask(made, ["run", "APP", "federation"])["run-id"] == "10052800853966591009"
    assert printed["command"] == ["flwr", "run", "APP", "federation", "--format", "json"]
    assert printed["env"]["FLWR_HOME"] == str(made.path("flower"))


@pytest.mark.parametrize(
    ("stdout", "stderr", "message"),
    [
        (NO_SUCH_RUN, "", r"flwr stop: refused.*127.0.0.1:18001: \[code: 16\] Run ID not found\.$"),
        (NO_SUPERLINK, "", r"^no SuperLink answers at 127.0.0.1:18001; start it: chexfound-server up \S+$"),
        ('{"success": false}', "", "nothing was said"),
        ('["success"]', "", "refused"),
        ('{"success": "false"}', "", "refused"),
        ("", "Traceback\nModuleNotFoundError: no click\n", r"no SuperLink answers .*no click"),
    ],
)
def test_a_refusal_is_an_error(made, printed, stdout: str, stderr: str, message: str) -> None:
    printed |= {"stdout": stdout, "stderr": stderr}
    with pytest.raises(SiteError, match=message):
        flower_cli.ask(made, ["stop", "123", "federation"])


def test_no_answer_and_no_program(made: Federation, printed: dict[str, Any]) -> None:
    printed["error"] = subprocess.TimeoutExpired("flwr", 60)
    with pytest.raises(SiteError, match="flwr supernode list: no answer"):
        flower_cli.ask(made, ["supernode", "list", "federation"])
    printed["error"] = FileNotFoundError(2, "No such file")
    with pytest.raises(SiteError, match="install the package again"):
        flower_cli.show(made, ["log", "1", "federation", "--show"])


def test_a_text_is_shown_unless_it_failed(made: Federation, printed: dict[str, Any]) -> None:
    printed["stdout"] = "lines"
    assert flower_cli.show(made, ["log", "1", "federation", "--show"]) == "lines"
    printed |= {"code": 1, "stderr": "Error: no such run\n"}
    with pytest.raises(SiteError, match="flwr log: Error: no such run"):
        flower_cli.show(made, ["log", "1", "federation", "--show"])
