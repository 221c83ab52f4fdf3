"""Flower's command line, through which the coordinator's commands reach the SuperLink."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from chexfound.errors import SiteError
from server.federation.settings import Federation

SECONDS = 60.0  # that one command may take
AWAY = "Connection to the SuperLink is unavailable"  # as Flower says it


def ask(federation: Federation, arguments: Sequence[str]) -> dict[str, Any]:
    """Give what `flwr ARGUMENTS --format json` says; it ends with 0 whatever happened, so the answer is looked at.

    Raises: SiteError if the SuperLink cannot be reached, does not answer, or refuses.
    """
    said = " ".join(["flwr", *arguments[: 2 if arguments[0] == "supernode" else 1]])
    output = _run(federation, [*arguments, "--format", "json"], said)
    try:
        values = json.loads(output.stdout)
    except ValueError:
        values = {"error-message": output.stderr}
    if not isinstance(values, dict) or values.get("success") is not True:
        message = str(values.get("error-message", "")) if isinstance(values, dict) else ""
        if "success" not in values or AWAY in message:
            why = "" if AWAY in message else f" ({said}: {_last(message)})"
            up = f"chexfound-server up {shlex.quote(str(federation.folder))}"
            raise SiteError(f"no SuperLink answers at {federation.superlink}{why}; start it: {up}")
        raise SiteError(f"{said}: refused by the SuperLink at {federation.superlink}: {_last(message)}")
    return values


def show(federation: Federation, arguments: Sequence[str]) -> str:
    """The text that a `flwr` command without JSON prints.

    Raises: SiteError if it failed.
    """
    said = f"flwr {arguments[0]}"
    output = _run(federation, arguments, said)
    if output.returncode:
        raise SiteError(f"{said}: {_last(output.stderr)}")
    return output.stdout


def _run(federation: Federation, arguments: Sequence[str], said: str) -> subprocess.CompletedProcess[str]:
    federation.connect()
    try:
        return subprocess.run(  # noqa: S603 (our own arguments, no shell)
            ["flwr", *arguments],  # noqa: S607 (the environment's path begins with this installation)
            env=federation.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SiteError(f"{said}: no answer of the SuperLink at {federation.superlink} in {SECONDS:.0f} s") from error
    except OSError as error:
        raise SiteError(f"{said}: cannot be started ({error}); install the package again") from error


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]
