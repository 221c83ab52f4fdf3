"""What memory each process of a federation takes, in payloads: under secure aggregation and under plain FedAvg.

    python benchmarks/round_memory.py [--small vit_tiny --large vit_small] [--json]

Three hospitals on this machine as `round_latency.py` starts them, and two rounds of pretraining of two steps, with a
small and with a large model, under both aggregations; a federation anew for each.  The anonymous memory (RssAnon: no
files) of each process is looked at ten times a second.  `ours` (secagg) and `rival` (fedavg) are how much the largest
figure grows from the small to the large model, over how much the payload does (the bytes of student and teacher, which
a site sends): so the interpreter and the libraries are not in it, and what grows with the model is.  At a site that is
the training state (student, teacher, gradients and Adam's two moments: two and a half payloads), and all copies of
messages, Flower's own included.  A line for each kind of process, of the sites' the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from round_latency import PX, SITES, Ours

from chexfound.errors import ChexfoundError
from chexfound.host.machine import benchmark_line
from chexfound.recipe import check
from chexfound.recipe.schema import Recipe

KINDS = {  # of processes, by their command lines
    "site: worker": "client.node.worker",
    "site: SuperNode": "client.node.flower_node",
    "coordinator: ServerApp": "server.services.task",
    "coordinator: SuperLink": "server.cli superlink",
    "coordinator: guard": "server.cli guard",
}
EVERY_S = 0.1
PACKAGES = ("federated-chexfound", "flwr", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", default="vit_tiny", help="an architecture (default: %(default)s)")
    parser.add_argument("--large", default="vit_small", help="a larger one (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        for row in measure(options.small, options.large):
            line = f"{row['process']:<24}{row['ours']:6.1f} payloads, with plain FedAvg {row['rival']:6.1f}"
            print(benchmark_line("round_memory", PACKAGES, **row) if options.json else line, flush=True)
    except ChexfoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(small: str, large: str) -> Iterator[dict[str, Any]]:
    """A row for each kind of process, when all four federations are done."""
    peaks, payloads = {}, {}
    for kind in ("secagg", "fedavg"):
        for arch in (small, large):
            peaks[kind, arch], payloads[kind, arch] = federation(recipe(kind, arch))
    for process in KINDS:
        grown = {
            kind: (peaks[kind, large][process] - peaks[kind, small][process])
            / (payloads[kind, large] - payloads[kind, small])
            for kind in ("secagg", "fedavg")
        }
        ours, rival = grown["secagg"], grown["fedavg"]
        yield {
            "process": process, "ours": round(ours, 2), "rival": round(rival, 2), "unit": "payloads",
            "ratio": round(rival / ours, 2) if ours > 0 else None, "small": small, "large": large,
            "payload_bytes": payloads["secagg", large], "peak_mib": round(peaks["secagg", large][process] / 2**20),
            "rival_peak_mib": round(peaks["fedavg", large][process] / 2**20),
        }  # fmt: skip


def recipe(kind: str, arch: str) -> Recipe:
    """Two rounds of a model with small heads; images so small that no activation counts."""
    return check.validate(
        {
            "name": "memory",
            "image_px": PX,
            "phases": ["pretrain"],
            "aggregation": kind,
            "federation": {"min_sites": len(SITES)},
            "student": {"arch": arch},
            "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
            "dino": {"head_n_prototypes": 512},
            "ibot": {"head_n_prototypes": 512},
            "train": {
                "rounds": 2, "local_steps": 2, "pooled_batch_size": 4 * len(SITES), "optimizer_state": "local",
            },
        },
        "the benchmark's recipe",
    )  # fmt: skip


def federation(recipe: Recipe) -> tuple[dict[str, int], int]:
    """Start one, run a recipe: the largest memory of each kind of process, and what a site sent in a round, bytes."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        ours = Ours(Path(scratch), running)
        with watching(scratch) as peaks:
            journal = ours.run("memory", recipe)
        rounds = [event for event in journal if event["event"] == "round"]
        return peaks, rounds[0]["bytes"]["up"] // len(SITES)


@contextlib.contextmanager
def watching(scratch: str) -> Iterator[dict[str, int]]:
    """The largest memory of each kind of process of the federation in a folder so far, bytes."""
    peaks = dict.fromkeys(KINDS, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            for kind, size in looked_at(scratch):
                peaks[kind] = max(peaks[kind], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def looked_at(scratch: str) -> Iterator[tuple[str, int]]:
    """Kind and anonymous memory of each process of the federation in a folder."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
            kind = next((kind for kind, words in KINDS.items() if words in command), None)
            if kind is None or scratch not in command + (entry / "environ").read_text(errors="replace"):
                continue
            if found := re.search(r"^RssAnon:\s+(\d+) kB", (entry / "status").read_text(), re.MULTILINE):
                yield kind, int(found[1]) * 1024
        except OSError:  # it has just ended, or is somebody else's
            continue


if __name__ == "__main__":
    sys.exit(main())
