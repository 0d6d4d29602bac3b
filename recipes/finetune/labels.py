"""Turns into ids and labels: the loss stands on answers and on what ends them, and on nothing else.

The ids are those that `MiniGeminiProcessor.encode` gives for the rendered conversation: texts between pictures are
tokenized piece by piece, and one BOS is kept. A label is the token itself from the end of a prompt for an answer (which
is where generation begins) to the end of the answer's terminator, and -100 elsewhere.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mg_fast.models.templates import IMAGE_TAG, get_template

from .samples import BadSample

PLAIN = "plain"
IGNORED = -100
# The templates whose language models are first trained on captions without roles; the others use their own template.
PLAIN_FIRST = ("vicuna_v1", "mistral_instruct", "chatml_direct")


class EncodedSample(NamedTuple):
    """Rows of one sample, all of the same length.

    Attributes:
        ids: token ids; a picture is as many filler ids as it has image tokens.
        labels: the ids that are to be learned, and -100.
        marks: 1 where a picture stands.
    """

    ids: list[int]
    labels: list[int]
    marks: list[int]


class _Piece(NamedTuple):
    """Text between pictures, and the ranges of its characters that are to be learned."""

    text: str
    learned: list[tuple[int, int]]


def training_template(stage: int, family: str) -> str:
    """The template that a stage of the original trains with, for a family's own template."""
    return PLAIN if stage == 1 and family in PLAIN_FIRST else family


def segments(template: str, turns: Sequence[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """The parts of a rendered conversation in order, each with whether it is to be learned.

    Args:
        template: one of `mg_fast.templates.TEMPLATES`, or "plain": the picture and its caption, with a newline.
        turns: (question, answer) pairs.
    """
    if template == PLAIN:
        for question, answer in turns:
            yield question, False
            yield f"{answer}\n", True
        return
    style = get_template(template)
    yield style.system.replace("{}", style.system_text), False
    for i, (question, answer) in enumerate(turns):
        yield (style.between if i else "") + style.user.replace("{}", question) + style.generation, False
        yield style.assistant.replace("{}", answer).removeprefix(style.generation), True


def encode_turns(
    processor, template: str, turns: Sequence[tuple[str, str]], *, longest: int, places: int | None = None
) -> EncodedSample:
    """The rows of a sample.

    Args:
        processor: a MiniGeminiProcessor, for its tokenizer, its filler id and the places that a picture takes.
        template: as in `segments`.
        turns: (question, answer) pairs.
        longest: the most tokens, those of pictures included.
        places: the positions of a picture. Default: as many as it has image tokens.

    Raises:
        BadSample: there are more tokens, or none to learn.
    """
    tokenizer = processor.tokenizer
    places = processor.image_processor.tokens_per_picture if places is None else places
    ids: list[int] = []
    labels: list[int] = []
    marks: list[int] = []
    has_bos = False
    for number, piece in enumerate(_pieces(template, turns)):
        found, learned = _tokens(tokenizer, piece)
        begins = tokenizer.bos_token_id is not None and found[:1] == [tokenizer.bos_token_id]
        if number == 0:
            has_bos = begins
        else:
            if begins and has_bos:
                found, learned = found[1:], learned[1:]
            ids += [processor.filler_id] * places
            labels += [IGNORED] * places
            marks += [1] * places
        ids += found
        labels += [token if wanted else IGNORED for token, wanted in zip(found, learned)]
        marks += [0] * len(found)
    if len(ids) > longest:
        raise BadSample(f"{len(ids):,} tokens, those of pictures included, but max_length is {longest:,}")
    # The first token of a row is never a target: nothing stands before it.
    if all(label == IGNORED for label in labels[1:]):
        raise BadSample("no token is left to learn")
    return EncodedSample(ids, labels, marks)


def _pieces(template: str, turns: Sequence[tuple[str, str]]) -> list[_Piece]:
    """The rendered conversation without its tags, cut where they stood. Two or more pictures are numbered."""
    numbered = template != PLAIN and sum(question.count(IMAGE_TAG) for question, _ in turns) > 1
    pieces = [_Piece("", [])]
    for text, learned in segments(template, turns):
        for place, part in enumerate(text.split(IMAGE_TAG)):
            if place:
                if numbered:
                    # As `render` numbers the pictures of a prompt.
                    last = pieces[-1]
                    pieces[-1] = _Piece(f"{last.text}Image {len(pieces)}:", last.learned)
                pieces.append(_Piece("", []))
            before, ranges = pieces[-1]
            if learned and part:
                ranges = [*ranges, (len(before), len(before) + len(part))]
            pieces[-1] = _Piece(before + part, ranges)
    return pieces


def _tokens(tokenizer, piece: _Piece) -> tuple[list[int], list[bool]]:
    """The ids of a piece, and for each whether it is to be learned."""
    if not piece.learned:
        ids = tokenizer(piece.text).input_ids
        return ids, [False] * len(ids)
    if tokenizer.is_fast:
        encoded = tokenizer(piece.text, return_offsets_mapping=True)
        ids = encoded.input_ids
        spans = [_by_offsets(encoded["offset_mapping"], ids, tokenizer.bos_token_id, *span) for span in piece.learned]
    else:
        ids = tokenizer(piece.text).input_ids
        spans = [by_prefixes(tokenizer, piece.text, ids, *span) for span in piece.learned]
    learned = [False] * len(ids)
    for first, end in spans:
        learned[first:end] = [True] * (end - first)
    return ids, learned


def _by_offsets(offsets: Sequence[tuple[int, int]], ids: Sequence[int], bos: int | None, begin: int, end: int):
    """The range of tokens that hold characters of a range, by the tokens' own ranges."""
    if begin == 0:
        # A mark of a word's beginning, which stands for no character, belongs to the text that it begins.
        first = int(bool(ids) and ids[0] == bos)
    else:
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > begin), len(ids))
    after = next((i for i in range(len(ids) - 1, first - 1, -1) if offsets[i][0] < end), first - 1) + 1
    return first, after


def by_prefixes(tokenizer, text: str, ids: Sequence[int], begin: int, end: int) -> tuple[int, int]:
    """The same range for a tokenizer that tells no ranges of characters: where the tokens of a prefix end.

    A token that a prefix has and the whole text has not would merge with what follows, so it does not count.
    """

    def common(prefix: str) -> int:
        found = tokenizer(prefix).input_ids
        return next((i for i, pair in enumerate(zip(found, ids)) if pair[0] != pair[1]), min(len(found), len(ids)))

    first = int(bool(ids) and ids[0] == tokenizer.bos_token_id) if begin == 0 else common(text[:begin])
    return first, len(ids) if end == len(text) else common(text[:end])
