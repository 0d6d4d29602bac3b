"""Decides whether an answer of the writing model becomes a dialogue, and whether a source can be used at all."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mg_fast.drawing.prompts import CLOSING, OPENING, find_prompts
from mg_fast.errors import shortened
from mg_fast.models.templates import TEMPLATES

from .journal import Reply
from .sources import IN_CONTEXT, RECAPTION, Source
from .wording import FIELDS, GEN

# The positions of CLIP's text encoders, with a token before and one after the text.
CLIP_TOKENS = 77
MOST_WISH_WORDS = 30
LEAST_PROMPT_WORDS = 4
# Longer conversations would not leave room for the rest of a training row of 2048 tokens.
LONGEST_CONVERSATION = 5000

_PICTURE = r"(?:images?|pictures?|pics?|photos?|photographs?|screenshots?|diagrams?|attachments?)"
# Pictures that a text may speak of without showing them, for instance one that hangs in a museum.
_WORK = rf"(?:{_PICTURE}|paintings?|drawings?|sketch(?:es)?|illustrations?|charts?|graphs?|maps?)"
_POINTING = r"(?:this|the|these|that|those|your|my|above|attached|following|given|provided|uploaded|enclosed)"
# Words after which `picture` is no picture but a thing or a trade.
_THING = (
    r"(?!\s+(?:frames?|books?|albums?|windows?|rails?|editors?|editing|booths?|shoots?|galler\w+|studios?|process\w+))"
)
# Words about a picture that a text-only dialogue does not have.
_PICTURE_TALK = re.compile(
    rf"\b{_POINTING}\s+(?:\w+\s+){{0,2}}{_PICTURE}\b{_THING}"
    rf"|\b(?:look at|describe|identify|analy[sz]e|explain|caption|see)\s+(?:this|these)\s+(?:\w+\s+){{0,2}}{_WORK}\b"
    rf"|\b(?:attached|uploaded|enclosed)\s+(?:\w+\s+)?(?:{_WORK}|files?|documents?|pdfs?)\b"
    rf"|\b{_PICTURE}\s+(?:above|below|attached|shows?|depicts?|shown|features?|displays?|captures?|provided)\b"
    rf"|\b{_PICTURE}\s*#?\d+\b"
    r"|\bas (?:shown|seen|pictured) (?:above|below|here)\b"
    r"|\bfig(?:ure|\.)\s*\d"
    r"|!\[[^\]]*\]\(|<img\b"
    r"|(?:https?:/|www\.|/)[^\s/]\S{0,300}?\.(?:jpe?g|png|gif|webp|bmp)\b",
    re.IGNORECASE,
)
# A wish may name the picture that it asks for: `Generate the image of a boat`.
_WISHED = re.compile(
    r"\b(?:generate|create|draw|make|paint|render|sketch|produce|design|imagine|give|show|see)\s+(?:(?:me|us)\s+)?"
    rf"the\s+(?:\w+\s+){{0,2}}{_WORK}\s+(?:of|with|that|in which|where)\b",
    re.IGNORECASE,
)
# A prompt names what is seen, and not that it is a picture.
_PROMPT_BEGINS = re.compile(rf"^\W*(?:(?:an?|the)\s+)?(?:\w+\s+)?{_PICTURE}\s+(?:of|showing|with)\b", re.IGNORECASE)
# How a refusal begins, and what a model says of itself when it refuses. People's own words may begin so, too.
_REFUSAL_BEGINS = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry\b|i can(?:not|['’]?t)\b|i(?: a|['’])m (?:not able|unable)\b|unfortunately)",
    re.IGNORECASE,
)
_OF_ITSELF = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi (?:cannot|can['’]t|am unable to|['’]m unable to) (?:create|generate|draw|display|show|see|view)\b",
    re.IGNORECASE,
)
# Words of somebody who speaks. Small models write wishes, questions and introductions in the place of a prompt.
_SPEECH = re.compile(
    r"\bI['’](?:d|m|ve|ll)\b|\bI (?:am|can|like|love|need|want|wish|would)\b|\?$"
    r"|^\W*(?:here(?:['’]s| is| are)\b|sure\b[,!.]|(?:the )?prompt\s*:|let me\b|tell me\b)"
    r"|\bthe prompt\b|\b(?:could|can|would|will) you\b|\b(?:tell|show) me\b",
    re.IGNORECASE,
)
# What a picture shows as writing is nobody's speech.
_WRITING = re.compile(
    r"\"[^\"]*\"|“[^”]*”|\b(?:says?|saying|reads?|reading|lettering|slogan|words?|text)\b[^,.;]*", re.IGNORECASE
)
# What a reasoning model thinks before its answer. Some templates write the opening tag themselves.
_THOUGHT_ENDS = "</think>"
# So many braces are tried as the beginning of the object that was asked for.
_MOST_BRACES = 50
_TAG = re.compile(r"<\s*/?\s*h\s*>|<\s*GEN\s*>|<\s*im(?:age|_start|_end|_patch)\s*>", re.IGNORECASE)
# What prompt templates put around turns. In a training text it would be read as the border of a turn.
_BORDERS = {part for style in TEMPLATES.values() for part in style.stops} | {"<s>", "<bos>", "[INST]", "[/INST]"}
_BORDER = re.compile(
    "|".join(re.escape(part) for part in sorted(_BORDERS)) + r"|<\|[^|>\s]+\|>|<start_of_turn>|^\s*(?:USER|ASSISTANT):",
    re.IGNORECASE | re.MULTILINE,
)


class Fault(Exception):
    """A reason why something is not used.

    Attributes:
        reason: the kind of the fault, for counting.
        detail: what it was in this case.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Verdict:
    """What has become of a source so far.

    Attributes:
        fields: the fields of a good answer; None where there is none.
        faults: the faults of the other answers, in order.
    """

    fields: Mapping[str, str] | None
    faults: tuple[Fault, ...]

    def settled(self, tries: int) -> bool:
        """Whether nothing more is asked about this source, of which at most `tries` answers are read."""
        return self.fields is not None or len(self.faults) >= tries


def check_source(source: Source) -> None:
    """Raises `Fault` for a source that would make a bad dialogue, so that nothing is asked about it."""
    for text in source.texts:
        _check_encoding(text)
        _check_tags(text)
    if source.kind != IN_CONTEXT:
        return
    if (length := sum(map(len, source.texts))) > LONGEST_CONVERSATION:
        raise Fault("long conversation", f"{length} characters")
    for text in source.texts:
        _check_words(text)


def judge(source: Source, replies: Sequence[Reply]) -> Verdict:
    """What the replies to a source's question are worth; the first good one counts."""
    faults = []
    for reply in replies:
        try:
            return Verdict(read(source, reply), tuple(faults))
        except Fault as fault:
            faults.append(fault)
    return Verdict(None, tuple(faults))


def read(source: Source, reply: Reply) -> dict[str, str]:
    """The fields in a reply, with single spaces between words.

    Raises:
        Fault: the reply is a refusal, was cut, is not the JSON object that was asked for, or its texts cannot be used.
    """
    if reply.refusal or reply.finish == "content_filter":
        raise Fault("refusal", reply.refusal or "filtered by the endpoint")
    if reply.finish == "length":
        raise Fault("cut", f"ends with {_end(reply.text)}")
    if not reply.text.strip():
        raise Fault("empty")
    found = _json_object(reply.text, FIELDS[source.kind])
    fields = {}
    for name in FIELDS[source.kind]:
        value = found[name]
        fields[name] = " ".join(value.split())
        _check_encoding(value)
        _check_tags(value)
        if found_words := _REFUSAL_BEGINS.search(value):
            raise Fault("refusal", found_words.group())
        _check_words(_WISHED.sub("", value) if name == "wish" else value)
    _check_prompt(fields["prompt"])
    if source.kind == RECAPTION:
        _check_wish(fields["wish"], source.caption)
        if _same(fields["wish"], fields["prompt"]):
            raise Fault("copied prompt")
    return fields


def check_dialogue(dialogue: Mapping) -> None:
    """Raises `Fault` unless this is a text-only dialogue in LLaVA's format that ends with one marked prompt."""
    turns = dialogue.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise Fault("form", "expected conversations with pairs of turns")
    for i, turn in enumerate(turns):
        role = "gpt" if i % 2 else "human"
        if not isinstance(turn, Mapping) or turn.get("from") != role or not isinstance(turn.get("value"), str):
            raise Fault("form", f"turn {i + 1}: expected a text from {role}")
    *earlier, question, answer = (turn["value"] for turn in turns)
    if not question.endswith(GEN):
        raise Fault("tags", f"the last question does not end with {GEN.strip()}")
    if answer.count(OPENING) != 1 or not answer.endswith(CLOSING) or len(find_prompts(answer)) != 1:
        raise Fault("tags", "the last answer does not end with one prompt between its tags")
    for text in (*earlier, question.removesuffix(GEN), answer.replace(OPENING, "", 1).removesuffix(CLOSING)):
        _check_tags(text)
    if "image" in dialogue:
        raise Fault("form", "expected no picture")


def clip_tokens(text: str) -> int:
    """The number of tokens of a text for CLIP, which is also SDXL's, with the two at its ends."""
    return len(_clip_tokenizer().encode(text)) + 2


@functools.cache
def _clip_tokenizer():
    # Its package imports torch, so only who counts tokens waits for that.
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _json_object(text: str, names: Sequence[str]) -> dict:
    """The first JSON object in a text with a text under each name. It may stand in a fence or after sentences."""
    answer = text.rpartition(_THOUGHT_ENDS)[2]
    start, fault = answer.find("{"), None
    for _ in range(_MOST_BRACES):
        if start < 0:
            break
        try:
            found, end = json.JSONDecoder(strict=False).raw_decode(answer, start)
        # A number of thousands of digits is a plain ValueError.
        except (ValueError, RecursionError) as error:
            fault, end = fault or Fault("bad JSON", shortened(str(error), 160)), start + 1
        else:
            missing = [name for name in names if not isinstance(found.get(name), str) or not found[name].strip()]
            if not missing:
                return found
            fault = fault or Fault("bad JSON", f'no text under "{missing[0]}"')
        start = answer.find("{", end)
    if fault is not None:
        raise fault
    refuses = _REFUSAL_BEGINS.search(answer) or _OF_ITSELF.search(answer)
    raise Fault("refusal" if refuses else "bad JSON", _end(text))


def _check_encoding(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault("encoding", "half of a surrogate pair") from None


def _check_tags(text: str) -> None:
    if found := _TAG.search(text) or _BORDER.search(text):
        raise Fault("tags", found.group().strip())


def _check_words(text: str) -> None:
    if found := _OF_ITSELF.search(text):
        raise Fault("refusal", found.group())
    if found := _PICTURE_TALK.search(text):
        raise Fault("picture talk", found.group())


def _check_prompt(prompt: str) -> None:
    if (words := len(prompt.split())) < LEAST_PROMPT_WORDS:
        raise Fault("short prompt", f"{words} words")
    if found := _PROMPT_BEGINS.search(prompt):
        raise Fault("picture talk", found.group())
    if found := _SPEECH.search(_WRITING.sub("", prompt).strip()):
        raise Fault("speech in the prompt", found.group())


def _check_wish(wish: str, caption: str) -> None:
    words = len(wish.split())
    if not 2 <= words <= MOST_WISH_WORDS:
        raise Fault("length of the wish", f"{words} words")
    if _same(wish, caption):
        raise Fault("copied wish")


def _same(text: str, other: str) -> bool:
    """Whether two texts have the same words; case and punctuation do not count."""
    return re.findall(r"\w+", text.casefold()) == re.findall(r"\w+", other.casefold())


def _end(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"...{words[-60:]}"
