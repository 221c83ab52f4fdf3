"""JSON from outside: a key given twice is refused, wherever such a text is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.intake.manifest import read_labelled
from chexfound.errors import ConfigError, DataError, ProtocolError
from chexfound.identity import roster
from chexfound.parsing import strict_json
from chexfound.recipe import load as recipes
from chexfound.wire import envelopes

TWICE = '{"a": {"sites": 1, "n": 2, "sites": 3}}'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert strict_json.loads(json.dumps(value)) == value


def test_a_key_given_twice_is_named() -> None:
    with pytest.raises(ValueError, match="the key 'sites' is given twice"):
        strict_json.loads(TWICE)


def test_it_is_refused_wherever_json_comes_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(TWICE)
    with pytest.raises(ConfigError, match="the key 'sites' is given twice"):
        roster.load(path)
    with pytest.raises(DataError, match="the key 'sites' is given twice"):
        read_labelled(path)
    with pytest.raises(ConfigError, match="not valid JSON"):
        recipes.from_json(TWICE)
    with pytest.raises(ProtocolError, match="no readable 'terms'"):
        envelopes.unpack_terms(RecordDict({"request": ConfigRecord({"terms": TWICE})}))
