"""Which code may run: nothing without the operator's word, and what came is kept to be looked at."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chexfound.errors import REFUSALS, ConfigError
from chexfound.identity import bundle
from chexfound.identity.bundle import Bundle
from chexfound.model import checkpoint
from client import cli
from client.home import approval
from client.node import flwr_private


def packed(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.py", text)
    return buffer.getvalue()


CAME = packed(a="1")
DIGEST = bundle.read(CAME).digest()


def test_nothing_is_approved_at_first(tmp_path: Path) -> None:
    assert approval.approved(tmp_path) == {}
    said = approval.check(tmp_path, CAME)
    assert said is not None
    assert f"the code {DIGEST} was not approved here" in said
    assert f"chexfound-client approve {DIGEST[:12]}" in said
    assert (tmp_path / "refused" / f"{DIGEST}.fab").read_bytes() == CAME
    assert approval.refused(tmp_path) == {DIGEST: bundle.read(CAME)}


def test_where_several_sites_share_the_home_the_command_names_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    for name in "AB":
        (tmp_path / "sites" / name / "keys").mkdir(parents=True)
    said = approval.check(tmp_path / "sites" / "A", CAME)
    assert said is not None
    assert said.endswith(f"chexfound-client approve {DIGEST[:12]} --name A")


def test_approve_and_withdraw(tmp_path: Path) -> None:
    approval.check(tmp_path, CAME)
    approval.approve(tmp_path, DIGEST)
    assert approval.check(tmp_path, CAME) is None
    assert approval.refused(tmp_path) == {}
    assert approval.check(tmp_path, packed(a="2")) is not None
    approval.approve(tmp_path, "0" * 64)
    assert set(approval.approved(tmp_path)) == {DIGEST, "0" * 64}
    approval.withdraw(tmp_path, DIGEST)
    assert list(approval.approved(tmp_path)) == ["0" * 64]
    assert approval.check(tmp_path, CAME) is not None
    with pytest.raises(ConfigError, match="was not approved"):
        approval.withdraw(tmp_path, DIGEST)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"format": 2, "approved": {}}', '{"format": 1, "approved": []}',
        '{"format": 1, "approved": {"0123": "now"}}',
    ],
)  # fmt: skip
def test_a_damaged_file_approves_nothing(tmp_path: Path, text: str) -> None:
    """And is an answer, not an exception, where a run asks."""
    (tmp_path / "code.json").write_text(text)
    with pytest.raises(ConfigError, match=r"code\.json: (damaged; remove it|cannot be read)"):
        approval.approved(tmp_path)
    said = approval.check(tmp_path, CAME)
    assert said is not None
    assert "code.json" in said


def test_what_is_no_bundle_is_refused_and_not_kept(tmp_path: Path) -> None:
    assert approval.check(tmp_path, b"no archive") == "the bundle is not a readable archive"
    assert not (tmp_path / "refused").exists()


def test_a_disk_that_takes_nothing_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "refused").write_text("in the way")
    assert "refused" in (approval.check(tmp_path, CAME) or "")


def test_the_latest_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval, "KEPT", 2)
    contents = [packed(a=str(number)) for number in range(3)]
    digests = [bundle.read(content).digest() for content in contents]
    for when, number in enumerate((0, 1, 0, 2)):  # the first comes again, and is then later than the second
        approval.check(tmp_path, contents[number])
        os.utime(tmp_path / "refused" / f"{digests[number]}.fab", (when, when))
    assert list(approval.refused(tmp_path)) == [digests[2], digests[0]]


def test_the_latest_comes_first_and_what_was_damaged_is_left_out(tmp_path: Path) -> None:
    contents = {bundle.read(content).digest(): content for content in (packed(a=str(number)) for number in range(4))}
    folder = tmp_path / "refused"
    for when, (digest, content) in enumerate(contents.items()):
        approval.keep(tmp_path, digest, content)
        os.utime(folder / f"{digest}.fab", (when, when))
    first, *others, last = contents
    (folder / f"{others[0]}.fab").write_bytes(b"damaged")
    (folder / f"{others[1]}.fab").write_bytes(contents[first])  # another's
    os.utime(folder / f"{others[1]}.fab", (9, 9))
    assert list(approval.refused(tmp_path)) == [last, first]


# ---- the command

RELEASE = bundle.read(packed(a="1", b="2"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site A, whose installed release is RELEASE, and which a person serves at a terminal."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    monkeypatch.setattr(flwr_private, "release_bundle", lambda: RELEASE)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked {question!r}"))
    return tmp_path / "sites" / "A"


@pytest.fixture
def approve(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`approve(*options)`: exit code, and what it said."""

    def run(*options: str) -> tuple[int, str]:
        code = cli.main(["approve", "--name", "A", *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: text)


def test_the_installed_release_is_approved_without_a_question(approve: Callable[..., tuple[int, str]]) -> None:
    code, said = approve()
    assert code == 0
    assert f"code {RELEASE.digest()}" in said
    assert ": nothing" in said
    assert "approved: runs with this code are accepted" in said
    assert f"code {RELEASE.digest()}: approved on 20" in approve("--list")[1]
    assert ", the installed release" in approve("--list")[1]


@pytest.mark.parametrize(("word", "code"), [("yes", 0), ("no", 6), ("", 6), ("y", 6)])
def test_what_differs_is_shown_and_asked_about(
    approve: Callable[..., tuple[int, str]], home: Path, monkeypatch: pytest.MonkeyPatch, word: str, code: int
) -> None:
    approval.check(home, packed(a="9", c="3"))
    (digest,) = approval.refused(home)
    assert f"code {digest}: REFUSED: 3 files other than the installed release's" in approve("--list")[1]
    answer(monkeypatch, word)
    got, said = approve(digest[:6])
    assert got == code
    assert ["  'a.py': differs", "  'b.py': missing", "  'c.py': not in the installed release"] == [
        line for line in said.splitlines() if line.startswith("  ")
    ]
    assert (digest in approval.approved(home)) == (code == 0)
    assert (digest in approval.refused(home)) == (code != 0)


def test_without_a_terminal_it_wants_yes(
    approve: Callable[..., tuple[int, str]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approval.check(home, CAME)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    code, said = approve(DIGEST[:6])
    assert code == 2
    assert "there is no terminal to ask on; look at what is above, then give --yes" in said
    assert "'b.py': missing" in said
    assert approval.approved(home) == {}
    assert approve(DIGEST[:6], "--yes")[0] == 0
    assert DIGEST in approval.approved(home)


def test_a_refused_bundle_that_is_the_release_is_not_asked_about(
    approve: Callable[..., tuple[int, str]], home: Path
) -> None:
    approval.check(home, packed(b="2", a="1"))
    assert approve(RELEASE.digest()[:8])[0] == 0
    assert RELEASE.digest() in approval.approved(home)


def test_digits_that_name_none_or_several(
    approve: Callable[..., tuple[int, str]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"ab" + "0" * 62: Bundle({}), "ac" + "0" * 62: Bundle({})}
    monkeypatch.setattr(approval, "refused", lambda home: held)
    assert approve("a", "--yes") == (2, "error: 'a': the first digits of 2 bundles that were refused; see --list\n")
    for digits in ("b", "", "ab" + "0" * 63, "northfield.pub"):
        assert approve(digits, "--yes") == (2, f"error: no refused bundle begins with {digits!r}; see --list\n")
    assert approval.approved(home) == {}
    assert approve("ab", "--yes")[0] == 0


def test_withdraw(approve: Callable[..., tuple[int, str]], home: Path) -> None:
    approve()
    for digits in ("", "x"):
        code, said = approve("--withdraw", digits)
        assert code == 2
        assert "no approved bundle begins with" in said
    assert list(approval.approved(home)) == [RELEASE.digest()]
    code, said = approve("--withdraw", RELEASE.digest()[:6])
    assert code == 0
    assert f"code {RELEASE.digest()}: not approved any more" in said
    assert approval.approved(home) == {}


# -- weights


def test_a_file_of_weights_is_approved_by_its_hash_and_taken_back(
    approve: Callable[..., tuple[int, str]], home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.safetensors"
    checkpoint.save(path, {"cls_token": torch.ones(1, 1, 4)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    code, said = approve("--weights", str(path), "--yes")
    assert code == 0
    assert f"weights {digest}" in said
    assert "1 tensors, 4 numbers" in said
    assert list(approval.approved_weights(home)) == [digest]
    assert f"weights {digest}: approved on 20" in approve("--list")[1]
    assert approve("--withdraw", digest[:8])[0] == 0
    assert approval.approved_weights(home) == {}
    assert approval.approved(home) == {}


def test_weights_that_were_refused_are_shown_and_approved_by_their_first_digits(
    approve: Callable[..., tuple[int, str]], home: Path
) -> None:
    for number in range(8):
        approval.keep_weights(home, f"{number}{'a' * 63}", "weights.lost")
    assert len(approval.refused_weights(home)) == approval.KEPT
    assert f"weights 7{'a' * 63}: REFUSED: {REFUSALS['weights.lost']} (weights.lost)" in approve("--list")[1]
    code, said = approve("--weights", "7aa", "--yes")
    assert code == 0
    assert "refused when it came" in said
    assert f"7{'a' * 63}" not in approval.refused_weights(home)
    assert approve("--weights", "b" * 64, "--yes")[0] == 0
    assert set(approval.approved_weights(home)) == {f"7{'a' * 63}", "b" * 64}


@pytest.mark.parametrize("given", ["no-such.safetensors", "", "0aa", "A" * 64])
def test_weights_that_are_neither_a_file_nor_digits(
    approve: Callable[..., tuple[int, str]], home: Path, given: str
) -> None:
    code, said = approve("--weights", given, "--yes")
    assert code == 2
    assert given in said
    assert approval.approved_weights(home) == {}


def test_a_file_that_is_no_safetensors_is_not_approved(
    approve: Callable[..., tuple[int, str]], home: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.pth").write_bytes(b"pickle")
    assert approve("--weights", str(tmp_path / "x.pth"), "--yes")[0] == 4
    assert approval.approved_weights(home) == {}


@pytest.mark.parametrize("text", ["[]", '{"format": 1}', '{"format": 1, "approved": {"x": ""}, "refused": {}}'])
def test_damaged_weights_approvals(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "weights.json").write_text(text)
    with pytest.raises(ConfigError, match="approve the weights again"):
        approval.approved_weights(home)
