"""How long tests wait for what another process does: an upper bound for a machine that does much else."""

from __future__ import annotations

PATIENCE_S = 900.0  # on an idle machine a test takes a hundredth of it
