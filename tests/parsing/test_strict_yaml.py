from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chexfound.parsing import strict_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii", categories=["L", "N"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_needs_no_alias_is_read_as_by_the_safe_loader(value):
    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True

    text = yaml.dump(value, Dumper=NoAliases)
    assert strict_yaml.load(text) == yaml.safe_load(text) == value


def test_an_alias_or_a_key_twice_is_an_error_of_yaml():
    for text in ("a: &x [1]\nb: *x", "a: 1\na: 2", "a: {b: 1, b: 2}"):
        with pytest.raises(yaml.YAMLError):
            strict_yaml.load(text)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["y" * 1000] * 1000, {"k": "z" * 1000}, pytest.param(10**5000, id="digits")]
)
def test_what_is_shown_fits_a_line(value):
    assert 0 < len(strict_yaml.shown(value)) <= 80
