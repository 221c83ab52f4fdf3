"""HOME/site.yaml: what an operator writes holds, and what is not understood is refused and never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from client.home.policy import SIZE_MAX, Policy, SecAggPolicy


def load(home: Path, text: str | bytes) -> Policy:
    (home / "site.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return Policy.load(home)


def test_a_site_without_a_file_has_the_defaults(tmp_path: Path) -> None:
    assert Policy.load(tmp_path) == Policy() == Policy(secagg=SecAggPolicy(required=None, colluders=None, minimum=3))


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "{}", "secagg: {}"])
def test_an_empty_file_too(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Policy()


def test_what_an_operator_writes_holds(tmp_path: Path) -> None:
    text = "secagg:\n  required: true\n  colluders: 2  # of eight\n  minimum: 7\n  attempt_s: 3600\n"
    policy = load(tmp_path, text)
    assert policy == Policy(secagg=SecAggPolicy(required=True, colluders=2, minimum=7, attempt_s=3600.0))
    parameters = policy.parameters(8)
    assert (parameters.n, parameters.c, parameters.t, parameters.minimum) == (8, 2, 6, 7)
    assert parameters.survivors == 7


@pytest.mark.parametrize("word", ["true", "yes", "on", "True"])
def test_yaml_s_words_for_yes(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, f"secagg: {{required: {word}}}").secagg.required


HOSTILE = [
    ("secagg: {requierd: true}", "unknown field 'secagg.requierd'; did you mean 'secagg.required'"),
    ("secag: {required: true}", "unknown field 'secag'; did you mean 'secagg'"),
    ("required: true", "unknown field 'required'"),
    ("secagg: {required: 'true'}", "secagg.required: .*valid boolean"),
    ("secagg: {required: 1}", "secagg.required"),
    ("secagg: {colluders: -1}", "secagg.colluders"),
    ("secagg: {colluders: 1.0}", "secagg.colluders"),
    ("secagg: {colluders: true}", "secagg.colluders"),
    ("secagg: {colluders: '1'}", "secagg.colluders"),
    ("secagg: {minimum: 2}", "secagg.minimum: .*greater than or equal to 3"),
    ("secagg: {minimum: null}", "secagg.minimum"),
    ("secagg: {attempt_s: 0}", "secagg.attempt_s"),
    ("secagg: {attempt_s: .inf}", "not a site's policy"),
    ("secagg: {attempt_s: .nan}", "not a site's policy"),
    (f"secagg: {{attempt_s: {'9' * 400}}}", "secagg.attempt_s"),
    (f"secagg: {{colluders: {'9' * 5000}}}", "not a site's policy"),
    ("secagg:", "secagg: Input should be an object"),
    ("secagg: [required]", "secagg: Input should be an object"),
    ("secagg: true", "secagg: Input should be an object"),
    ("secagg: 2026-01-01", "not a site's policy"),
    ("secagg: !!binary aaaa", "not a site's policy"),
    ("secagg: {1: 2, a: 3}", "not a site's policy"),
    ("secagg: {required: true}\nsecagg: {required: false}", "given twice"),
    ("secagg: {required: true, required: false}", "given twice"),
    ("a: &x 1\nsecagg: *x", "aliases"),
    ("--- {}\n--- {}", "not a site's policy"),
    ("!!python/object/apply:os.system [ls]", "not a site's policy"),
    ("[]", "all of it: Input should be an object"),
    ("false", "all of it: Input should be an object"),
    ("0", "all of it"),
    ("''", "all of it"),
    ("secagg: {", "not a site's policy"),
    ("split: {train: 0.9, val: 0.1}", "must leave patients for the test"),
    ("[" * 2000, "not a site's policy"),
    (b"\xff\xfesecagg", "not a site's policy"),
    (b"\0", "not a site's policy"),
    (b"#" * (SIZE_MAX + 1), "larger than"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=lambda part: str(part)[:30])
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)site\.yaml: .*{message}"):
        load(tmp_path, text)


@given(
    st.one_of(st.binary(max_size=40), st.text(max_size=40), st.text("secagrquidmnut: {}[]-&*!|>\n\t#0.5", max_size=40))
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_policy_or_an_error_of_ours(tmp_path: Path, text: str | bytes) -> None:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        policy = load(tmp_path, data)
    except ConfigError:
        return
    assert policy.secagg.minimum >= 3


def test_a_file_that_cannot_be_read_is_no_absent_one(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.load(tmp_path)


@pytest.mark.parametrize(
    ("n", "text"), [(2, "{}"), (129, "{}"), (8, "secagg: {colluders: 7}"), (5, "secagg: {minimum: 6}")]
)
def test_numbers_that_do_not_protect_are_refused(tmp_path: Path, n: int, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, text).parameters(n)
