"""What stands beside every figure: the machine, the versions, the day.

No host name, no path, no user: a line can be published as it is.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

# What a run's bits and figures may depend on.
RUN_PACKAGES = (
    "federated-chexfound",
    "flwr",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
)


def machine() -> dict[str, Any]:
    """The processor's model, the cores that this process may use, memory, and the system's kind."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listing.read_text(), re.M) if listing.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def device() -> str:
    """Where a model's arithmetic is done: $CHEXFOUND_DEVICE, else the first GPU, else the processor."""
    import torch

    return os.environ.get("CHEXFOUND_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the named distributions; one that is absent says so."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def benchmark_line(name: str, packages: tuple[str, ...], **values: Any) -> str:
    """One JSON line: `name`, the values, then machine, versions and date (ISO 8601, local day)."""
    day = datetime.date.today().isoformat()
    record = {"name": name, **values, "machine": machine(), "versions": versions(*packages), "date": day}
    return json.dumps(record, allow_nan=False)
