"""Everything of the site that touches Flower's private API, so that a new minor version breaks one file loudly."""

from __future__ import annotations

from flwr.cli.build import build_fab_from_files

from chexfound import bundle
from chexfound.bundle import Bundle


def release_bundle() -> Bundle:
    """The bundle that the installed release ships, built as `flwr run` builds it."""
    return bundle.read(build_fab_from_files(bundle.release_files())[0])
