"""A generator of run folders, and a browser to look at the report with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chexfound.rng import numpy_generator

SITES = ("nih-chestxray14", "guangzhou-pediatric", "hannover-mhh", "covid-chestxray")
FINDINGS = ("Effusion", "Pneumonia", "Cardiomegaly", "Pleural_Thickening", "COVID-19", "Hernia")
LABELLED = {  # finding -> sites with both classes
    "Effusion": SITES[:1],
    "Pneumonia": (SITES[0], SITES[1], SITES[3]),
    "Cardiomegaly": SITES[:2],
    "Pleural_Thickening": SITES[:2],
    "COVID-19": SITES[2:],
    "Hernia": (),
}
NO_NEGATIVE = "no negative among the test images"
LEVEL = {
    "federated": 0.80,
    "centralized": 0.81,
    "random": 0.74,
    "shuffled": 0.50,
    "site-view": 0.58,
    "histogram": 0.66,
    "histogram:linear": 0.62,
    "histogram:boosted": 0.66,
    "histogram:pooled": 0.52,
    "histogram:pooled-boosted": 0.6,
}


def _results(sites: tuple[str, ...]) -> list[dict[str, Any]]:
    noise = numpy_generator(0, "report fixture")
    rows = []
    arms = [
        "federated",
        "centralized",
        *(f"local:{site}" for site in sites if site != SITES[2]),
        "random",
        "shuffled",
        *(arm for arm in LEVEL if arm.startswith(("site-view", "histogram"))),
    ]
    for arm in arms:
        for finding in FINDINGS:
            for site in sites:
                row: dict[str, Any] = dict.fromkeys(("auroc", "auroc_ci", "auprc", "auprc_ci", "reason"))
                row |= {
                    "arm": arm,
                    "trained_on": list(sites),
                    "tested_on": site,
                    "finding": finding,
                    "n": 100 + 40 * len(site),
                    "positives": 0,
                }
                if site in LABELLED[finding]:
                    row["positives"] = 30 + 5 * len(finding)
                    if arm.startswith("histogram"):
                        row |= {"variant": arm.partition(":")[2] or "boosted", "validation_auroc": LEVEL[arm]}
                    own = arm == f"local:{site}"
                    auroc = (
                        LEVEL.get(arm, 0.86 if own and site == SITES[0] else 0.79 if own else 0.55)
                        + 0.07 * (site == SITES[1])
                        + noise.normal(0, 0.012)
                    )
                    half = 0.035 + 0.02 * (site == SITES[3])
                    row |= {
                        "auroc": auroc,
                        "auroc_ci": [auroc - half, min(1.0, auroc + half)],
                        "auprc": auroc - 0.1,
                        "auprc_ci": [auroc - 0.16, auroc - 0.04],
                    }
                else:
                    row["reason"] = NO_NEGATIVE
                rows.append(row)
    return rows


def _history(sites: tuple[str, ...], steps: int, stuck: bool) -> dict[str, Any]:
    noise = numpy_generator(0, "report fixture", "history")
    log_k = math.log(256)
    pretrain: dict[str, list[dict[str, Any]]] = {}
    adapt: dict[str, list[dict[str, Any]]] = {}
    for arm in ["federated", "centralized", *(f"local:{site}" for site in sites)]:
        where = sites if arm == "federated" else ["pooled"] if arm == "centralized" else [arm.removeprefix("local:")]
        pretrain[arm], adapt[arm] = [], []
        for site in where:
            for step in range(steps):
                done = step / steps
                flat = stuck and arm == "federated" and site == sites[-1]
                dino = log_k * (1 - (0.001 if flat else 0.22) * done) + noise.normal(0, 0.01 if flat else 0.03)
                ibot, koleo = (
                    5.5 - 1.6 * done + noise.normal(0, 0.05),
                    1.2 - 2.0 * done + noise.normal(0, 0.05),
                )
                probed = {"probe_images": 240, "rankme": 20 + 40 * done, "knn_auroc": 0.5 + 0.2 * done}
                pretrain[arm].append(
                    {
                        "step": step,
                        "site": site,
                        "loss": dino + ibot,
                        "dino": dino,
                        "ibot": ibot,
                        "koleo": koleo,
                        "log_k": log_k,
                        "teacher_entropy": log_k * (0.95 - 0.2 * done),
                        "feature_std": 0.5 + 0.4 * done,
                        **(probed if step % 50 == 0 else {}),
                    }
                )
            adapt[arm] += [
                {"step": step, "site": site, "loss": 0.7 - 0.35 * step / 200 + noise.normal(0, 0.02)}
                for step in range(0, 200, 5)
            ]
    return {"pretrain": pretrain, "adapt": adapt}


def _sites(sites: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "name": site,
            "images": 400 + 100 * i,
            "patients": 300 + 90 * i,
            "train": 240,
            "val": 60,
            "test": 100 + 100 * i,
            "refused": i,
            "epochs": {"federated": 12.5, "local": 50.0, "centralized": 14.1},
            "views": {"PA": 250, "AP": 150 + 100 * i},
            "findings": {
                f: {"positives": 40, "negatives": 300 if site in LABELLED[f] else 0, "unknown": 60} for f in FINDINGS
            },
        }
        for i, site in enumerate(sites)
    ]


def chest(px: int, noise: np.random.Generator) -> np.ndarray:
    """Two dark lungs in a grey body, uint8."""
    y, x = np.mgrid[-1 : 1 : px * 1j, -1 : 1 : px * 1j]
    lungs = sum(np.exp(-((((x - side) / 0.28) ** 2 + ((y + 0.05) / 0.6) ** 2) ** 2)) for side in (-0.45, 0.45))
    body = 190 * np.exp(-((x / 0.95) ** 8)) - 120 * lungs + noise.normal(0, 6, (px, px))
    return body.clip(0, 255).astype(np.uint8)


def _artifacts(folder: Path, sites: tuple[str, ...], px: int) -> None:
    noise = numpy_generator(0, "report fixture", "artifacts")
    folder.mkdir()
    names = {f"site {number}": site for number, site in enumerate(sites)}
    np.savez(folder / "samples.npz", **{name: np.stack([chest(px, noise) for _ in range(6)]) for name in names})
    (folder / "samples.json").write_text(json.dumps(names))
    n, findings, side = 4, 3, 8
    maps = noise.gamma(0.5, size=(n, findings, side, side)).astype(np.float32)
    maps /= maps.sum((2, 3), keepdims=True)
    np.savez(
        folder / "attention.npz",
        images=np.stack([chest(px, noise) for _ in range(n)]),
        maps=maps,
        scores=noise.uniform(size=(n, findings)),
        labels=noise.integers(-1, 2, (n, findings)).astype(np.int8),
    )
    captions = {
        "findings": list(FINDINGS[:findings]),
        "sites": [sites[i % len(sites)] for i in range(n)],
        "captions": [f"test image {i}" for i in range(n)],
    }
    (folder / "attention.json").write_text(json.dumps(captions))


def _comparison(arm: str, site: str, finding: str, federated: float | None, other: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"first": "federated", "second": arm, "finding": finding, "tested_on": site}
    if federated is None or other is None:
        return row | {"difference": None, "ci": None, "reason": NO_NEGATIVE}
    value = federated - other
    return row | {"difference": value, "ci": [value - 0.025, value + 0.025], "reason": None}


def write_run(
    out: Path,
    *,
    sites: tuple[str, ...] = SITES,
    steps: int = 300,
    stuck: bool = False,
    px: int = 48,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A complete run's folder; `change` edits the metrics before they are written."""
    out.mkdir(parents=True)
    results = _results(sites)
    at = {(row["arm"], row["tested_on"], row["finding"]): row["auroc"] for row in results}
    comparisons = [
        _comparison(arm, site, finding, at[("federated", site, finding)], value)
        for (arm, site, finding), value in at.items()
        if arm in ("random", "histogram") or arm.startswith("local:")
    ]
    differences = []
    for finding in FINDINGS:
        for site in sites:
            fed, cen = at[("federated", site, finding)], at[("centralized", site, finding)]
            value = None if fed is None else fed - cen
            differences.append(
                {
                    "finding": finding,
                    "tested_on": site,
                    "federated_minus_centralized": value,
                    "ci": None if value is None else [value - 0.02, value + 0.02],
                    "reason": NO_NEGATIVE if value is None else None,
                }
            )
    arms = ["federated", "centralized", *(f"local:{site}" for site in sites if site != SITES[2])]
    metrics: dict[str, Any] = {
        "schema": 1,
        "seed": 0,
        "sites": list(sites),
        "findings": list(FINDINGS),
        "results": results,
        "differences": differences,
        "comparisons": comparisons,
        "model_sha256": {arm: f"{i:064x}" for i, arm in enumerate(arms, 0xA17)},
        "void": None,
        "notes": ["batch 32 gives each of the sites 8 images a step"],
        "not_trained": [
            {"arm": f"local:{SITES[2]}", "reason": "its training images hold no finding with both classes"}
        ],
        "seconds": {
            "ingest": 12.1,
            "federated/pretrain": 131.0,
            "federated/adapt": 25.2,
            "federated/evaluate": 4.0,
            "centralized": 160.4,
            "total": 400.9,
        },
        "bytes": {
            "federated/pretrain": {"down": 48_200_000, "up": 48_200_000},
            "federated/adapt": {"down": 3_100_000, "up": 1_550_000},
        },
        "rounds": {"pretrain": 5, "adapt": 5},
        "machine": {"cpu": "2 cores", "platform": "Linux"},
        "versions": {"chexfound": "0.1.0", "torch": "2.14.1"},
        "date": "2026-11-25",
    }
    if change:
        change(metrics)
    (out / "metrics.json").write_text(json.dumps(metrics))
    recipe = {
        "name": "laptop",
        "seed": 0,
        "image_px": px,
        "train": {"rounds": 5, "local_steps": steps // 5},
        "evaluate": {"confidence": 0.95},
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (out / "history.json").write_text(json.dumps(_history(sites, steps, stuck)))
    (out / "sites.json").write_text(json.dumps(_sites(sites)))
    _artifacts(out / "artifacts", sites, px)
    return out


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(**options)` writes a run's folder and returns it; see `write_run`."""

    def make(name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def run_writer() -> Callable[..., Path]:
    """`write_run` itself, for fixtures that outlive a test."""
    return write_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a complete run, built once; not to be changed."""
    from chexfound.report.build import build

    return build(write_run(tmp_path_factory.mktemp("whole") / "run", stuck=True))


class Browser:
    """Headless Chromium, spoken to over the DevTools pipe; collects what it complains about."""

    def __init__(self, program: str, profile: Path) -> None:
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        reads, writes = (
            fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)
        )  # clear of 3 and 4, which chromium wants
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        plug = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-', "bash"]
        self._process = subprocess.Popen(
            [*plug, program, *flags],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_child, from_child, reads, writes):
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError("chromium ended")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        what, values = message.get("method"), message.get("params", {})
        if what == "Log.entryAdded":
            self.complaints.append(values["entry"]["text"])
        elif what == "Runtime.consoleAPICalled":
            self.complaints.append(str(values["args"]))
        elif what == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif what == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        return message

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        self.complaints.clear()
        self.requests.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(RuntimeError, OSError):
            self.send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    require("chromium")
    one = Browser(shutil.which("chromium") or "chromium", tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()
