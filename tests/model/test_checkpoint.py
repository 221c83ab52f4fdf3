from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from chexfound.durable import journal
from chexfound.errors import CheckpointError, StorageError
from chexfound.model import checkpoint
from tests.patience import PATIENCE_S

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.c": torch.tensor([True, False]),
    "d": torch.tensor(7, dtype=torch.int64),
    "e": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "f": torch.empty(0, 3),
}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    checkpoint.save(path, TENSORS, {"step": "3"})
    loaded = checkpoint.load(path)
    assert checkpoint.digest(loaded) == checkpoint.digest(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "3"}
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_a_digest_is_the_stated_one():
    """Written out once, so that a run recorded today is recognised by a later release."""
    assert checkpoint.digest({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    import hashlib

    text = b"\0\0\0\1w" + b"\0\0\0\7float32" + b"\0\0\0\4(1,)" + b"\0" * 7 + b"\4" + b"\0\0\x80?"
    assert checkpoint.digest({"w": torch.tensor([1.0])}) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.zeros(4)},  # name
        {"a": torch.zeros(4, dtype=torch.int32)},  # dtype, the same bytes
        {"a": torch.zeros(2, 2)},  # shape, the same bytes
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},  # one bit
        {"a": torch.zeros(4), "b": torch.zeros(0)},
        {},
    ],
)
def test_a_digest_changes_with_name_dtype_shape_and_bytes(changed):
    assert checkpoint.digest(changed) != checkpoint.digest({"a": torch.zeros(4)})


def test_a_digest_does_not_hang_on_order_or_memory():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    assert checkpoint.digest({"a": a, "b": b}) == checkpoint.digest({"b": b, "a": a.T.contiguous().T})
    assert checkpoint.digest({"a": a.requires_grad_()}) == checkpoint.digest({"a": a.detach()})


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_a_checkpoint_error(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="absent, truncated or of another kind"):
        checkpoint.load(path)


def test_what_is_no_checkpoint_is_a_checkpoint_error(tmp_path):
    for path, content in ((tmp_path / "absent", None), (tmp_path / "pickle", b"\x80\x04]\x94."), (tmp_path, None)):
        if content:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            checkpoint.load(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, TENSORS)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, function, full)
        with pytest.raises(StorageError, match="no space left"):
            checkpoint.save(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    for text, number in (("I/O error: No space left on device (os error 28)", 28), ("Quota (os error 122)", 122)):

        def full(*_: object, text: str = text, **__: object) -> None:
            raise safetensors.SafetensorError(f"Error while serializing: {text}")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.safetensors.torch, "save_file", full)
            with pytest.raises(StorageError, match=os.strerror(number)):
                checkpoint.save(path, TENSORS)
    assert os.listdir(tmp_path) == []


FULL = """
import resource, signal, sys
import torch
from pathlib import Path
from chexfound.errors import StorageError
from chexfound.model import checkpoint
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoint.save(path, {"a": torch.zeros(10)})
before = path.read_bytes()
try:
    checkpoint.save(path, {"a": torch.zeros(100_000)})
except StorageError as error:
    assert "no space left" in str(error), error
else:
    raise SystemExit("more than the limit was written")
assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
"""


def test_a_write_that_the_kernel_refuses_leaves_the_old_file(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "m"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_prefixes():
    tensors = {"head.a": torch.zeros(1), "headless": torch.ones(1), "backbone.head.b": torch.ones(2)}
    assert set(checkpoint.with_prefix(tensors, "head.")) == {"a"}
    assert set(checkpoint.add_prefix({"a": torch.zeros(1)}, "head.")) == {"head.a"}
