from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import pytest
import torch

from chexfound.errors import ConfigError
from chexfound.host import machine
from chexfound.host.machine import benchmark_line


def test_a_line_says_what_where_and_when():
    record = json.loads(benchmark_line("x", ("numpy", "no-such-distribution"), ours=1.5))
    assert list(record) == ["name", "ours", "machine", "versions", "date"]
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["cpu"]
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["numpy"][0].isdigit()
    assert record["versions"]["no-such-distribution"] == "not installed"
    age = datetime.date.today() - datetime.date.fromisoformat(record["date"])
    assert age in (datetime.timedelta(0), datetime.timedelta(days=1))
    with pytest.raises(ValueError, match="not JSON compliant"):
        benchmark_line("x", (), ours=float("nan"))


def test_a_line_names_no_host_and_no_path(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "ward-7-pc")
    text = benchmark_line("x", ("numpy",))
    assert "ward-7-pc" not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


@pytest.fixture
def cards(monkeypatch):
    """`cards(n)`: a machine with n GPUs."""
    for name in ("CHEXFOUND_DEVICE", "CHEXFOUND_GPUS"):
        monkeypatch.delenv(name, raising=False)

    def have(number: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: number > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: number)

    return have


@pytest.mark.parametrize(("there", "asked", "taken"), [(4, None, 1), (4, "", 1), (4, "all", 4), (4, 3, 3), (0, "1", 1)])
def test_gpus_as_asked(cards, there, asked, taken):
    cards(there)
    assert machine.gpus(asked) == taken


def test_gpus_of_the_environment(cards, monkeypatch):
    cards(4)
    monkeypatch.setenv("CHEXFOUND_GPUS", "2")
    assert machine.gpus() == 2
    assert machine.gpus("3") == 3
    monkeypatch.setenv("CHEXFOUND_DEVICE", "cpu")
    assert machine.gpus("7") == 7  # processes without a GPU
    assert machine.gpus("all") == 1


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        (2, "4", "4 GPUs are asked for, but there are 2 in this machine; give --gpus 2"),
        (1, "2", "there is one in this machine; give --gpus 1"),
        (0, "2", "PyTorch finds no GPU in this machine; leave it out"),
        (0, "all", "PyTorch finds no GPU"),
        (2, "0", "gpus '0': give a number"),
        (2, "-1", "gpus '-1': give a number"),
        (2, "two", "gpus 'two': give a number"),
        (2, "9" * 30, "give a number"),
        (2, "٣", "give a number"),
    ],
)
def test_gpus_that_cannot_be_had(cards, there, asked, message):
    cards(there)
    with pytest.raises(ConfigError, match=message):
        machine.gpus(asked)


@pytest.mark.parametrize("asked", ["tpu", "cuda:x", "cpu:0", "CUDA", "cuda:4", "cuda"])
def test_a_device_that_is_none(cards, monkeypatch, asked):
    cards(4 if asked == "cuda:4" else 0)
    monkeypatch.setenv("CHEXFOUND_DEVICE", asked)
    with pytest.raises(ConfigError, match="CHEXFOUND_DEVICE"):
        machine.device()


def test_a_device_that_is_there(cards, monkeypatch):
    cards(4)
    for asked in ("cpu", "cuda", "cuda:3"):
        monkeypatch.setenv("CHEXFOUND_DEVICE", asked)
        assert machine.device() == asked


def test_how_much_slower_a_type_is():
    assert machine.slowdown(torch.float32) == pytest.approx(1.0, abs=0.9)
    assert machine.slowdown(torch.bfloat16) > 0
