"""The process that does what the SuperExec was given: it runs the installed release, and no other code.

`python -m server.services.task HOST:PORT AUTHORITY PARENT`, with the task's token on its standard input.  Whoever
reaches the SuperLink on loopback can submit a bundle; it would run as the federation's account, which reads the
authority's key.  So the bundle is hashed, and if it is not what this release ships the run has failed; of one that is,
the code is not used either, but that of this installation.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from chexfound.errors import ProtocolError
from chexfound.host import logs
from chexfound.identity import bundle
from server.exchange import flwr_private

log = logging.getLogger("chexfound.server")


def refusal(content: bytes, config: Mapping[str, object]) -> str:
    """Why a run may not be run here: another bundle than the release's, or another place than a run's for its files.

    Returns: a sentence; empty if it may.
    """
    try:
        shipped = bundle.read(content)
    except ProtocolError as error:
        return str(error)
    release = flwr_private.release_bundle()
    if differences := shipped.differences(release):
        return (
            f"the run ships {shipped.digest()[:12]}…, and only the installed release {release.digest()[:12]}… is run "
            f"here ({len(differences)} files differ, the first: {differences[0]}); start it with chexfound-server run"
        )
    runs = Path(os.environ["CHEXFOUND_HOME"]) / "runs"
    where = config.get("run-dir")
    if where and Path(os.path.realpath(str(where))).parent != runs.resolve():
        return f"run-dir {str(where)[:200]!r} is no folder of {runs}"
    return ""


def logged(content: bytes, config: Mapping[str, object]) -> str:
    """Say why a run may not be run here, as `refusal` does, and log it."""
    if why := refusal(content, config):
        log.error("event=refused reason=%r", why)
    return why


def main() -> None:
    """Run the task."""
    logs.show()
    address, authority, parent = sys.argv[1:]
    token = sys.stdin.read()
    flwr_private.run_task(address, Path(authority), int(parent), token, logged)


if __name__ == "__main__":
    main()
