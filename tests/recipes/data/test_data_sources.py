"""Captions and conversations are read in the formats that they are published in."""

import json

import pytest

from recipes.data.errors import SourceError
from recipes.data.sources import IN_CONTEXT, RECAPTION, Source, read_captions, read_dialogues


def written(path, rows):
    """Writes rows as .txt, .json or .jsonl, by the name of the file."""
    lines = rows if path.suffix == ".txt" else [json.dumps(row) for row in rows]
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_captions_of_every_form(tmp_path, name):
    rows = [
        "A boat.",
        {"caption": "A cat.", "text": "not this"},
        {
            "image": "x.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
        },
        {"url": "x"},
        {"caption": None, "description": " A tree. "},
    ]
    read = read_captions(written(tmp_path / name, rows))
    assert [source.caption for source in read.usable] == ["A boat.", "A cat.", "A dog.", "A tree."]
    assert [source.kind for source in read.usable] == [RECAPTION] * 4 and read.skipped[0][1] == "no caption"
    assert name in read.usable[0].name and read.usable[0].name != read.usable[1].name


def test_a_text_file_has_one_caption_a_line(tmp_path):
    # U+2028 ends a line for str.splitlines, and stands within texts.
    read = read_captions(written(tmp_path / "a.txt", ["A boat\u2028on a lake.", "", "A cat."]))
    assert [source.caption for source in read.usable] == ["A boat\u2028on a lake.", "A cat."]


LLAVA = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye?"},
    ]
}
LIMA = {"conversations": ["Hi?", "Hello."], "source": "stackexchange"}


@pytest.mark.parametrize("row", [LLAVA, OPENAI, LIMA])
def test_conversations_of_every_form(tmp_path, row):
    [source] = read_dialogues(written(tmp_path / "a.jsonl", [row])).usable
    assert (source.kind, source.turns) == (IN_CONTEXT, (("Hi?", "Hello."),))


def test_broken_conversations_are_skipped_with_a_reason(tmp_path):
    rows = [
        LIMA,
        {"conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi?"}]},
        {"conversations": ["only a question"]},
        {"conversations": [{"from": "robot", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        {"conversations": ["Hi?", "  "]},
        7,
    ]
    read = read_dialogues(written(tmp_path / "a.json", rows))
    assert len(read.usable) == 1
    reasons = [reason for _, reason in read.skipped]
    assert (
        "take turns" in reasons[0] and "no answer" in reasons[1] and "'robot'" in reasons[2] and "empty" in reasons[3]
    )
    assert "got 7" in reasons[4]


def test_openassistants_messages_become_conversations(tmp_path):
    def message(name, parent, text, role, **more):
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, **more}

    rows = [
        message("a", None, "Hi?", "prompter"),
        message("c", "a", "Worse.", "assistant", rank=1),
        message("b", "a", "Better.", "assistant", rank=0),
        message("u", "a", "Unranked.", "assistant", rank=None),
        message("d", "b", "And?", "prompter"),
        message("e", "d", "So.", "assistant"),
        message("x", None, "Hallo?", "prompter", lang="de"),
        message("y", None, "Nobody answers.", "prompter", lang="en"),
        message(["z"], None, "A list as a name.", "prompter"),
        message("z", {"a": 1}, "An object as a parent.", "prompter"),
    ]
    read = read_dialogues(written(tmp_path / "a.jsonl", rows), turns=2)
    assert [source.turns for source in read.usable] == [(("Hi?", "Better."), ("And?", "So."))]
    reasons = sorted(reason for _, reason in read.skipped)
    assert reasons[2:] == ["no answer", "not in English"] and all("expected a message" in one for one in reasons[:2])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        read_captions(tmp_path / "none.json")
    with pytest.raises(SourceError, match=r"\.json, \.jsonl or \.txt"):
        read_captions(written(tmp_path / "a.parquet", []))
    (tmp_path / "b.jsonl").write_text('{"caption": "A cat."}\n{"caption"\n')
    with pytest.raises(SourceError, match="line 2: expected JSON"):
        read_captions(tmp_path / "b.jsonl")
    for broken in ('{"caption": ' + "9" * 5000 + "}", "[" * 200_000):
        (tmp_path / "b.jsonl").write_text(broken)
        with pytest.raises(SourceError, match="line 1: expected JSON"):
            read_captions(tmp_path / "b.jsonl")
    with pytest.raises(SourceError, match="the first row: no answer"):
        read_dialogues(written(tmp_path / "c.json", [{"conversations": ["Hi?"]}]))
    with pytest.raises(SourceError, match="found none"):
        read_captions(written(tmp_path / "d.json", []))


def test_the_key_is_of_the_contents():
    one = Source(RECAPTION, "a", caption="A  cat.\n")
    assert one.key == Source(RECAPTION, "b", caption="A cat.").key != Source(RECAPTION, "a", caption="A dog.").key
    # Texts that are joined elsewhere are other contents.
    pair = Source(IN_CONTEXT, "a", turns=(("a b", "c"),))
    assert pair.key != Source(IN_CONTEXT, "a", turns=(("a", "b c"),)).key
