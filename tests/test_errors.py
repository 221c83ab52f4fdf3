from __future__ import annotations

import pytest

from chexfound import errors
from chexfound.errors import (
    CheckpointError,
    ChexfoundError,
    CodeError,
    ConfigError,
    DataError,
    Problems,
    RosterError,
    StateError,
    StoppedError,
    VersionError,
)


def test_each_kind_has_its_own_exit_code_and_word():
    kinds = [ChexfoundError, *ChexfoundError.__subclasses__()]
    assert {kind.exit_code: kind.code for kind in kinds} == {
        1: "internal",
        2: "config",
        3: "data",
        4: "checkpoint",
        5: "protocol",
        6: "policy",
        7: "site",
        8: "storage",
    }
    finer = [StateError, VersionError, CodeError, RosterError, StoppedError]
    assert errors.CODES == {kind.code: kind for kind in [*kinds, *finer]}
    assert StateError.exit_code == CheckpointError.exit_code


def test_the_table_in_the_docstring_is_the_truth():
    for kind in errors.CODES.values():
        assert any(
            line.split()[-1] == str(kind.exit_code) or f" {kind.exit_code} " in line
            for line in errors.__doc__.splitlines()
            if kind.__name__ in line.split("──")[-1].split()
        )


def test_no_problem_is_no_error():
    Problems(ConfigError, "here").check()


def test_one_problem_stands_on_one_line():
    problems = Problems(DataError, "manifest.csv")
    problems.add("no column 'file'")
    with pytest.raises(DataError, match=r"^manifest\.csv: no column 'file'$"):
        problems.check()


def test_all_problems_are_told_at_once():
    problems = Problems(DataError, "manifest.csv")
    problems.add("first")
    problems.add("second")
    with pytest.raises(DataError, match=r"^manifest\.csv: 2 problems:\n  - first\n  - second$"):
        problems.check()
