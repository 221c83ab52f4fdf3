"""The machine, the versions and the day, which stand beside every figure.

No host name, no path, no user: a line can be published as it is.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chexfound.errors import ConfigError

if TYPE_CHECKING:
    import torch

# What a run's bits and figures may depend on.
RUN_PACKAGES = (
    "federated-chexfound",
    "flwr",
    "torch",
    "numpy",
    "opencv-python-headless",
)


def machine() -> dict[str, Any]:
    """The processor's model, the cores that this process may use, memory, and the system's kind."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": None if (there := memory()) is None else round(there / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listing.read_text(), re.M) if listing.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine() or "unknown"


def memory() -> int | None:
    """The machine's memory in bytes, or what its container may have of it; None where the system does not tell."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(text)) if text.isdigit() else whole


def device() -> str:
    """Choose where a model's arithmetic is done: $CHEXFOUND_DEVICE, else the first GPU, else the processor.

    Raises: ConfigError if $CHEXFOUND_DEVICE names none that this machine has.
    """
    import torch

    asked = os.environ.get("CHEXFOUND_DEVICE", "")
    if asked not in ("", "cpu") and not re.fullmatch(r"cuda(:\d{1,3})?", asked):
        raise ConfigError(f"CHEXFOUND_DEVICE={asked!r}: write cpu, cuda, or cuda:NUMBER")
    if asked.startswith("cuda") and int(asked.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"CHEXFOUND_DEVICE={asked!r}: PyTorch finds {torch.cuda.device_count()} GPUs here")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def gpus(asked: str | int | None = None) -> int:
    """How many GPUs a site trains on: as asked ("all" of them), else $CHEXFOUND_GPUS, else 1.

    With $CHEXFOUND_DEVICE=cpu it is as many processes without a GPU.

    Raises: ConfigError if it is no such number, or the machine has fewer.
    """
    text = str(asked if asked not in (None, "") else os.environ.get("CHEXFOUND_GPUS") or 1).strip()
    if text == "1":
        return 1
    if text != "all" and not (text.isascii() and text.isdigit() and 0 < int(text) <= 1024):
        raise ConfigError(f"gpus {text!r}: give a number of GPUs of this machine, or all")
    if not device().startswith("cuda"):
        if "CHEXFOUND_DEVICE" not in os.environ:
            check_gpus(1 if text == "all" else int(text))
        return 1 if text == "all" else int(text)
    import torch

    number = torch.cuda.device_count() if text == "all" else int(text)
    check_gpus(number)
    return number


def check_gpus(number: int) -> None:
    """Raise ConfigError if the machine has fewer GPUs than that."""
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise ConfigError(
            "--gpus: PyTorch finds no GPU in this machine; leave it out, or set CHEXFOUND_DEVICE=cpu to start "
            "that many processes without one"
        )
    if number > found:
        there = f"there are {found}" if found > 1 else "there is one"
        raise ConfigError(f"{number} GPUs are asked for, but {there} in this machine; give --gpus {found}")


@functools.cache
def slowdown(dtype: torch.dtype, device: str = "cpu") -> float:
    """How many times as long as in float32 a matrix product takes in another type here: the best of a few each.

    Below 1 where the processor has instructions for it; on one that has none it is done element by element, and
    takes some fifty times as long.
    """
    import torch

    def seconds(kind: torch.dtype) -> float:
        one = torch.ones(256, 256, dtype=kind, device=device)
        best = math.inf
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            (one @ one)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(dtype) / seconds(torch.float32)


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
