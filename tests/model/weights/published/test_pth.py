"""Files from elsewhere: nothing of them is run, and whatever is wrong with them ends in our error."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chexfound
from chexfound.errors import CheckpointError
from chexfound.model.weights.published import pth

TENSORS = {"cls_token": torch.arange(6.0).reshape(1, 1, 6), "b": torch.ones(3)}


class Call:
    """Unpickled by whoever does not look, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def save_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def save_old(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [save_zip, save_old, save_pickle])
@pytest.mark.parametrize("load", [pth.read, chexfound.load_backbone, chexfound.load_head])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, save, load):
    path, marker = tmp_path / "teacher_checkpoint.pth", tmp_path / "it ran"
    save({"teacher": {"backbone.cls_token": [1.0]}, "extra": Call(marker)}, path)
    with pytest.raises(CheckpointError, match=r"refused, nothing of it was run: .* it would call posix\.mkdir"):
        load(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Call(marker)))  # so that the test is known to look for the right thing
    assert marker.exists()


def test_a_harmless_class_is_refused_too(tmp_path):
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it would call argparse\.Namespace"):
        pth.read(tmp_path / "a.pth")


@pytest.mark.parametrize("save", [save_zip, save_old])
def test_tensors_and_plain_values_are_read(tmp_path, save):
    value = {"model": TENSORS, "iteration": 7, "optimizer": {"state": {}, "param_groups": []}}
    save(value, tmp_path / "a.pth")
    file = pth.read(tmp_path / "a.pth")
    assert file.format == "pth"
    assert file.values == {"iteration": 7}
    assert file.left_out == {"optimizer": "training state, a dict of 2 entries"}
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_the_format_is_told_by_the_first_bytes(tmp_path):
    path = tmp_path / "a.pth"  # though it is safetensors
    safetensors.torch.save_file(TENSORS, path, {"made": "here"})
    file = pth.read(path)
    assert (file.format, file.values) == ("safetensors", {"made": "here"})


def test_whose_tensors_they_are_stays_in_their_names(tmp_path):
    torch.save({"teacher": {"a": torch.ones(1)}, "student": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    assert set(pth.read(tmp_path / "a.pth").tensors) == {"teacher.a", "student.a"}


def test_half_precision_is_read_as_float32(tmp_path):
    torch.save({"a": torch.tensor([1.5], dtype=torch.float16), "n": torch.tensor(3)}, tmp_path / "a.pth")
    file = pth.read(tmp_path / "a.pth")
    tensors = pth.float32(file.tensors)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"a": torch.float32, "n": torch.int64}
    assert tensors["a"].tolist() == [1.5]


@pytest.mark.parametrize("save", [save_zip, save_old])
@pytest.mark.parametrize("keep", [0, 1, 9, 40, 300, -200, -1])
def test_a_truncated_checkpoint_is_told(tmp_path, save, keep):
    path = tmp_path / "a.pth"
    save({"teacher": TENSORS}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated|damaged"):
        pth.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a" * 9, "neither safetensors nor a PyTorch checkpoint"),
        (pickle.dumps([1, 2]), "not written by torch.save"),
        (b"\x08" + b"\0" * 7 + b'{"a": 1}' + b"\0" * 9, "not a readable safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        pth.read(tmp_path / "a.pth")


def test_absent(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth: cannot be read"):
        pth.read(tmp_path / "none.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="a compressed archive"):
        pth.read(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.zeros(1).expand(10**6)}, "claims more values than the file has bytes"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "not a plain tensor"),
        ({"model": {"a": 3}}, "is a int, not a plain tensor"),
        ([torch.zeros(2)], "holds a list, not a state dict"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        pth.read(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    torch.save({"teacher": TENSORS}, folder / "zip")
    save_old({"teacher": TENSORS}, folder / "old")
    safetensors.torch.save_file(TENSORS, folder / "safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["zip", "old", "safetensors"]), at=st.integers(0), bytes_=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_end_in_our_error_or_in_tensors(good, tmp_path, kind, at, bytes_):
    data = bytearray(good[kind])
    at %= len(data)
    data[at : at + len(bytes_)] = bytes_
    path = tmp_path / "a"
    path.write_bytes(data)
    try:
        tensors = pth.read(path).tensors
    except CheckpointError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.zeros(2)}}, "two tensors are called a"),
        ({"teacher": {"a": torch.ones(2)}, "teacher.a": torch.zeros(2)}, "two tensors are called teacher.a"),
        ({str(n): torch.ones(1).expand(1) for n in range(1)} | {3: torch.ones(1)}, "a key that is a int"),
    ],
)
def test_no_name_counts_twice(tmp_path, value, message):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        pth.read(tmp_path / "a.pth")


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.full((100,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\0\0\xc0\x3f" * 4)] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        pth.read(path)


def test_many_names_on_the_same_bytes_are_refused_and_tied_ones_are_not(tmp_path):
    tensor = torch.ones(8, dtype=torch.float16)
    torch.save({str(n): tensor for n in range(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="together claim more than twice"):
        pth.read(tmp_path / "a.pth")
    torch.save({"a": tensor, "b": tensor}, tmp_path / "b.pth")
    assert set(pth.read(tmp_path / "b.pth").tensors) == {"a", "b"}


def test_what_is_said_can_be_written_as_json_and_shown(tmp_path):
    torch.save({"a": torch.ones(1), "best": float("inf"), "x\x1b[31m\n": "\udce9", "n": 10**100}, tmp_path / "a.pth")
    values = pth.read(tmp_path / "a.pth").values
    assert values["best"] == "inf"
    assert values["x\\x1b[31m\\n"] == "\\udce9"
    assert values["n"].endswith("bits")


@pytest.mark.parametrize("function", [torch.load, torch.hub.load])
@pytest.mark.parametrize("save", [save_zip, save_old])
def test_torch_s_own_calls_are_refused_by_name(tmp_path, function, save):
    class Loads:
        def __reduce__(self) -> Any:
            return function, ("x",)

    save({"a": torch.ones(1), "x": Loads()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"it would call {function.__module__}\.load when"):
        pth.read(tmp_path / "a.pth")
