from __future__ import annotations

import os

import pytest

from chexfound.parsing.names import counted, is_name, utf8, written


@pytest.mark.parametrize(
    ("value", "is_one"),
    [("a", True), ("Pleural effusion, 2 mm", True), ("x" * 64, True), ("x" * 65, False), ("", False)]
    + [("a\nb", False), ("a\x07", False), ("\ud800", False), (1, False), (None, False)],
)
def test_word(value, is_one):
    assert is_name(value) is is_one


def test_a_path_that_is_not_utf8_is_written_so_that_it_is():
    path = os.fsdecode(b"/caf\xe9/\xc3\xa9")
    assert not utf8(path)
    assert written(path) == "/caf\\xe9/é"
    assert utf8(written(path))
    assert written("/é") == "/é"


def test_one_thing_and_several() -> None:
    assert [counted(number, "site") for number in (0, 1, 2)] == ["0 sites", "1 site", "2 sites"]
