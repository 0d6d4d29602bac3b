"""The journal keeps every reply, outlives a kill at any byte, and belongs to one run."""

import json
import os

import pytest

from recipes.data.errors import JournalError
from recipes.data.journal import Journal, Reply

SETTINGS = {"model": "m", "wording": 1, "temperature": 0.7}
REPLIES = [
    ("a", Reply("one", "stop", None, 7, 3)),
    ("b", Reply("zwei \ud83d\n", "length")),
    ("a", Reply("", refusal="No.")),
]


def written(path):
    with Journal(path, SETTINGS) as journal:
        for key, reply in REPLIES:
            journal.add(key, reply)
    return path


def test_replies_come_back(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    names = set()
    for settings in (SETTINGS, None):
        with Journal(path, settings) as journal:
            names.add(journal.run)
            assert journal.settings == SETTINGS and journal.lines == {"a": 2, "b": 1}
            assert journal.replies == {"a": [REPLIES[0][1], REPLIES[2][1]], "b": [REPLIES[1][1]]}
    assert len(names) == 1


def test_every_journal_has_a_name_of_its_own_that_stays(tmp_path):
    names = set()
    for file in "aab":
        with Journal(tmp_path / file, SETTINGS) as journal:
            names.add((file, journal.run))
    assert len(names) == len({name for _, name in names}) == 2 and all(len(name) == 16 for _, name in names)


def test_refusals_count_once_there_is_a_reply(tmp_path):
    with Journal(tmp_path / "journal.jsonl", SETTINGS) as journal:
        journal.refuse("a", "HTTP 400: too early to tell")
        journal.add("b", Reply("one"))
        journal.refuse("c", "HTTP 400: too long")
        journal.refuse("d", "HTTP 400: too long")
        journal.add("d", Reply("after all"))
    for settings in (SETTINGS, None):
        with Journal(tmp_path / "journal.jsonl", settings) as journal:
            assert journal.refused == {"c": "HTTP 400: too long"} and journal.doubtful == {"a"}
            assert journal.lines["d"] == 2 and sorted(journal.replies) == ["b", "d"]


def test_a_kill_at_any_byte_loses_no_whole_line(tmp_path):
    whole = written(tmp_path / "journal.jsonl").read_bytes()
    path = tmp_path / "torn.jsonl"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS) as journal:
            kept = sum(map(len, journal.replies.values()))
            assert kept == max(0, whole[:length].count(b"\n") - 1)
            journal.add("c", Reply("again"))
        with Journal(path, SETTINGS) as journal:
            assert journal.replies["c"] == [Reply("again")] and sum(map(len, journal.replies.values())) == kept + 1


def test_a_reply_is_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    synchronized = []
    with Journal(tmp_path / "journal.jsonl", SETTINGS) as journal:
        monkeypatch.setattr(os, "fsync", lambda number: synchronized.append(os.fstat(number).st_size))
        journal.add("a", Reply("one"))
        assert synchronized == [(tmp_path / "journal.jsonl").stat().st_size]
        last = (tmp_path / "journal.jsonl").read_bytes().split(b"\n")[-2]
        assert json.loads(last) == {"key": "a", "text": "one", "finish": "stop"}


def test_other_settings_are_refused(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"'temperature': 0\.7.*'temperature': 0\.5"):
        Journal(path, {**SETTINGS, "temperature": 0.5})
    assert path.read_bytes() == before
    with Journal(path, SETTINGS):
        pass


def test_settings_may_change_until_there_is_a_reply(tmp_path):
    path, corrected = tmp_path / "journal.jsonl", {**SETTINGS, "model": "another"}
    with Journal(path, SETTINGS):
        pass
    with Journal(path, corrected) as journal:
        journal.add("a", Reply("one"))
    with Journal(path) as journal:
        assert journal.settings == corrected and journal.replies == {"a": [Reply("one")]}


@pytest.mark.parametrize("text", [b"my notes, of one line", b"{", b"my notes\n", b'{"journal": 1}\nmy not'])
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path, text):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(text)
    if text == b"{":
        # That could be the beginning of a journal, and without settings nothing is changed in it.
        with Journal(path) as journal:
            assert not journal.replies
    else:
        for settings in (SETTINGS, None):
            with pytest.raises(JournalError, match="line 1: expected a JSON object|no journal of this recipe"):
                Journal(path, settings)
    assert path.read_bytes() == text


def test_reading_changes_nothing(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    path.write_bytes(path.read_bytes() + b'{"key": "a", "te')
    before = path.read_bytes()
    with Journal(path) as journal:
        assert sum(map(len, journal.replies.values())) == len(REPLIES)
    assert path.read_bytes() == before
    with pytest.raises(JournalError, match="cannot be opened: No such file"):
        Journal(tmp_path / "nothing.jsonl")


def test_a_full_disk_is_an_error_of_the_journal(tmp_path, monkeypatch):
    with Journal(tmp_path / "journal.jsonl", SETTINGS) as journal:
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(JournalError, match="cannot be written: No space left"):
            journal.add("a", Reply("one"))
        assert not journal.replies


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(JournalError, match="cannot be opened: Is a directory"):
        Journal(tmp_path, SETTINGS)


def test_two_processes_do_not_share_a_journal(tmp_path):
    pytest.importorskip("fcntl")
    with Journal(tmp_path / "journal.jsonl", SETTINGS), pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "journal.jsonl", SETTINGS)
    with Journal(tmp_path / "journal.jsonl", SETTINGS):
        pass


@pytest.mark.parametrize(
    "number, line, message",
    [
        (0, b'{"caption": "a"}', "no journal"),
        (0, b"[]", "line 1: expected a JSON object"),
        (2, b'{"key": "a", "te', "line 3: expected a JSON object"),
        (2, b'{"key": 7, "text": "a"}', "line 3: expected a reply"),
        (2, b'{"key": "a", "text": "a", "mood": "good"}', "line 3: expected a reply"),
        (2, b'{"key": "a", "text": "a", "finish": 5}', "line 3: expected a reply"),
        (2, b'{"key": "a", "text": "a", "prompt_tokens": "5"}', "line 3: expected a reply"),
        (2, b'{"key": "a", "refused": 5}', "line 3: expected a reply"),
        (2, b'{"key": "a", "text": ' + b"9" * 5000 + b"}", "line 3: expected a JSON object"),
    ],
)
def test_damage_within_is_an_error(tmp_path, number, line, message):
    path = written(tmp_path / "journal.jsonl")
    lines = path.read_bytes().split(b"\n")
    lines[number] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(JournalError, match=message):
        Journal(path, SETTINGS)
