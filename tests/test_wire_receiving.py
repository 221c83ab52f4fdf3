"""An array that arrives is put together once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from flwr.app import Array
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chexfound.wire import inflate
from chexfound.wire.inflate import inflate_once


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Array, "inflate", Array.__dict__["inflate"])  # which is put back
    inflate_once()


def contents(array: Array) -> tuple[str, dict[str, bytes]]:
    objects = get_all_nested_objects(array)
    return array.object_id, {name: one.deflate() for name, one in objects.items()}


@given(arrays(np.float32, st.integers(0, 50), elements=st.sampled_from([0.0, 1.0, 2.0])))
def test_an_array_arrives_as_it_left(values: np.ndarray) -> None:
    """Of several chunks, some of them alike, as Flower cuts a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 32)
        patch.setattr(Array, "inflate", Array.__dict__["inflate"])
        name, objects = contents(Array(values))
        plain = inflatable_utils.inflate_object_from_contents(name, dict(objects))
        inflate_once()
        ours = inflatable_utils.inflate_object_from_contents(name, objects)
    assert ours == plain
    assert isinstance(ours.data, bytes)
    assert ours.numpy().tobytes() == values.tobytes()


@pytest.mark.usefixtures("once")
def test_an_array_without_its_chunks_is_refused() -> None:
    array = Array(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="without its chunks"):
        Array.inflate(array.deflate(), {})
    with pytest.raises(ValueError, match="do not match"):
        Array.inflate(next(iter(array.children.values())).deflate(), {})


@pytest.mark.usefixtures("once")
def test_an_array_is_put_together_in_one_copy() -> None:
    array = Array(np.zeros(0, np.float32))
    array.data = bytes(8_000_000)
    chunks = dict(array.children)
    content = array.deflate()
    assert inflate._inflate.__name__ in repr(Array.inflate)
    tracemalloc.start()
    try:
        found = Array.inflate(content, chunks)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.data) == 8_000_000
    assert peak < 1.1 * 8_000_000
