"""Names and passwords from a file, and HTTP's Basic scheme."""

import base64

import pytest

from mg_fast import PromptError
from mg_fast.web.accounts import Accounts


def basic(name, password):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.fixture
def write(tmp_path):
    def writing(text, mode=0o600):
        file = tmp_path / "accounts"
        file.write_text(text, encoding="utf-8")
        file.chmod(mode)
        return str(file)

    return writing


def test_who_is_known(write):
    accounts = Accounts.read(write("# colleagues\n\nann:correct horse\nbjörk:a:b \n"))
    assert accounts.name_of(basic("ann", "correct horse")) == "ann"
    assert accounts.name_of(basic("björk", "a:b ")) == "björk"
    for wrong in ("", "Basic", "Basic !", "Bearer x", basic("ann", ""), basic("ann", "correct"), basic("bob", "\0")):
        assert accounts.name_of(wrong) is None
    assert accounts.name_of("Basic " + base64.b64encode(b"ann").decode()) is None
    assert accounts.name_of("Basic " + base64.b64encode(b"\xff\xfe:").decode()) is None
    # Passwords themselves are not held.
    assert b"correct horse" not in repr(vars(accounts)).encode()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least one line"),
        ("ann", "line 1: expected name:password"),
        ("ann:x\n:y", "line 2: expected name:password"),
        ("ann:", "line 1: expected"),
        ("ann:x\nann:y", "line 2: 'ann' stands there twice"),
    ],
)
def test_wrong_files(write, text, message):
    with pytest.raises(PromptError, match=message):
        Accounts.read(write(text))


def test_a_file_that_others_can_read(write, tmp_path):
    with pytest.raises(PromptError, match="others may read this file: chmod 600"):
        Accounts.read(write("ann:x", 0o640))
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        Accounts.read(str(tmp_path / "nowhere"))
