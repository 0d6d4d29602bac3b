"""Reads a sample in LLaVA's format: its turns and its pictures, or the reason why it cannot be used.

    {"id": "42", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

As in the original, a turn's `<image>` is moved to its beginning. `image` may also be a list, with one tag for each
picture, and in a Hugging Face dataset a picture itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mg_fast.errors import quoted
from mg_fast.models.templates import IMAGE_TAG

# Who speaks in even and odd turns.
SPEAKERS = ("human", "gpt")


class BadSample(Exception):
    """A sample cannot be used; the text is the reason."""


class SampleTurns(NamedTuple):
    """What a sample says and shows.

    Attributes:
        turns: (question, answer) pairs; `<image>\\n` stands before a question for each of its pictures.
        pictures: paths as the sample writes them, or what a dataset holds in their place, in the order of the tags.
    """

    turns: tuple[tuple[str, str], ...]
    pictures: tuple[Any, ...]


def read_sample(sample: Any, *, plain: bool = False) -> SampleTurns:
    """The turns and pictures of a sample.

    Args:
        sample: the object of the JSON file, or the row of the dataset.
        plain: the sample is to be a caption: one picture and one answer. What is asked is left out.

    Raises:
        BadSample: the sample has another form, or cannot be trained on.
    """
    if not isinstance(sample, Mapping):
        raise BadSample(f"expected an object with conversations, got {type(sample).__name__}")
    texts = _texts(sample.get("conversations"))
    pictures = _pictures(sample.get("image"))
    asked, answers = texts[::2], texts[1::2]
    for number, answer in enumerate(answers):
        if not answer.strip():
            raise BadSample(f"turn {2 * number + 2} is an empty answer")
        if IMAGE_TAG in answer:
            raise BadSample(f"turn {2 * number + 2} is an answer and holds {IMAGE_TAG}")
    tags = sum(text.count(IMAGE_TAG) for text in asked)
    if tags != len(pictures):
        raise BadSample(f"{tags} {IMAGE_TAG} tag(s) for {len(pictures)} picture(s)")
    if plain:
        if len(answers) != 1 or len(pictures) != 1:
            raise BadSample(
                f"the plain template takes one picture and one caption, "
                f"got {len(pictures)} picture(s) and {len(answers)} answer(s)"
            )
        return SampleTurns(((IMAGE_TAG, answers[0]),), pictures)
    questions = [_tags_first(text) for text in asked]
    for number, question in enumerate(questions):
        if not question.strip():
            raise BadSample(f"turn {2 * number + 1} is an empty question")
    return SampleTurns(tuple(zip(questions, answers)), pictures)


def words_of(sample: Mapping) -> int:
    """The number of words of all turns, negative for a sample without a picture, as the original groups lengths."""
    words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
    return words if sample.get("image") else -words


def _texts(turns: Any) -> list[str]:
    """The texts of turns that alternate between the two speakers and end with an answer."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadSample(f"expected a list of turns under conversations, got {quoted(turns)}")
    texts = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadSample(f"turn {number + 1}: expected from and value, got {quoted(turn)}")
        expected = SPEAKERS[number % 2]
        if turn.get("from") != expected:
            raise BadSample(f"turn {number + 1} is from {quoted(turn.get('from'))}, expected {expected!r}")
        try:
            turn["value"].encode()
        except UnicodeEncodeError:
            raise BadSample(f"turn {number + 1} cannot be encoded as UTF-8") from None
        texts.append(turn["value"])
    if len(texts) % 2:
        raise BadSample(f"turn {len(texts)} is a question without an answer")
    return texts


def _pictures(given: Any) -> tuple[Any, ...]:
    if given is None or given == "" or (isinstance(given, (list, tuple)) and not given):
        return ()
    pictures = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for picture in pictures:
        if isinstance(picture, (int, float, bool)) or picture is None or picture == "":
            raise BadSample(f"image: expected a path, or a list of paths, got {quoted(given)}")
    return pictures


def _tags_first(text: str) -> str:
    """The text with its tags before the rest, as the original trains; a text without tags stays as it is."""
    tags = text.count(IMAGE_TAG)
    return (f"{IMAGE_TAG}\n" * tags + text.replace(IMAGE_TAG, "").strip()).strip() if tags else text
