"""Reads what dialogues are made of: detailed captions of pictures, and conversations of people with an assistant."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mg_fast.errors import quoted, shortened

from .errors import SourceError

RECAPTION, IN_CONTEXT = "recaption", "in_context"
KINDS = (RECAPTION, IN_CONTEXT)
# The names that data sets give to a detailed caption, in the order in which they are looked for.
CAPTION_NAMES = ("caption", "detailed_caption", "text", "description")
USERS, ASSISTANTS, SYSTEMS = ("human", "user", "prompter"), ("gpt", "assistant", "chatgpt", "model"), ("system",)
# The most turns of a conversation that are kept.
MOST_TURNS = 3


@dataclass(frozen=True)
class Source:
    """What one dialogue is made of.

    Attributes:
        kind: `recaption` for a caption, `in_context` for a conversation.
        name: the file and the place in it, for reports.
        caption: the detailed caption; empty for a conversation.
        turns: (user, assistant) pairs; empty for a caption.
    """

    kind: str
    name: str
    caption: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """A name of the contents, which stays the same from run to run: sources with equal words have equal keys."""
        said = "\x1e".join(" ".join(text.split()) for text in (self.kind, *self.texts))
        return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that the source consists of."""
        return (self.caption,) if self.kind == RECAPTION else tuple(text for turn in self.turns for text in turn)


@dataclass(frozen=True)
class Sources:
    """The sources of one file.

    Attributes:
        usable: the sources, in the order of the file.
        skipped: (name, reason) of each row that no source could be made of.
    """

    usable: tuple[Source, ...]
    skipped: tuple[tuple[str, str], ...]


def read_captions(path: str | Path) -> Sources:
    """Reads detailed captions.

    Args:
        path: a .txt file with one caption a line; or a .json or .jsonl file whose rows are texts, objects with one of
            `CAPTION_NAMES`, or LLaVA's dialogues, of which the first answer counts.

    Raises:
        SourceError: the file cannot be read, or no row of it holds a caption.
    """
    usable, skipped = [], []
    for name, row in _rows(Path(path)):
        caption = _caption(row)
        if caption:
            usable.append(Source(RECAPTION, name, caption=caption))
        else:
            skipped.append((name, "no caption"))
    return _checked(path, usable, skipped, f"a text, or an object with {', '.join(CAPTION_NAMES)} or conversations")


def read_dialogues(path: str | Path, *, turns: int = MOST_TURNS) -> Sources:
    """Reads conversations, of which the first turns are kept.

    Args:
        path: a .json or .jsonl file. Its rows are LLaVA's or ShareGPT's (`conversations` with `from` and `value`),
            LIMA's (`conversations` with texts, the user's first), OpenAI's (`messages` with `role` and `content`), or
            the single messages of OpenAssistant (`message_id`, `parent_id`, `role`, `text`), whose best-ranked English
            replies are followed.
        turns: the most (user, assistant) pairs of one conversation.

    Raises:
        SourceError: the file cannot be read, or no row of it holds a conversation.
    """
    rows = list(_rows(Path(path)))
    if rows and isinstance(rows[0][1], Mapping) and "message_id" in rows[0][1]:
        conversations: Iterable[tuple[str, object]] = _threads(rows)
    else:
        conversations = ((name, _messages(row)) for name, row in rows)
    usable, skipped = [], []
    for name, messages in conversations:
        found = _turns(messages, turns) if isinstance(messages, list) else str(messages)
        if isinstance(found, str):
            skipped.append((name, found))
        else:
            usable.append(Source(IN_CONTEXT, name, turns=found))
    return _checked(path, usable, skipped, "an object with conversations or messages, or a message of OpenAssistant")


def _checked(path: str | Path, usable: list[Source], skipped: list[tuple[str, str]], expected: str) -> Sources:
    if not usable:
        first = f"; the first row: {skipped[0][1]}" if skipped else ""
        raise SourceError(f"{shortened(str(path), 120)}: expected rows with {expected}, and found none{first}")
    return Sources(tuple(usable), tuple(skipped))


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file, each with its name."""
    where = shortened(str(path), 120)
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise SourceError(f"{where}: expected a .json, .jsonl or .txt file; `datasets` writes other formats as .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{where} cannot be read: {error}") from None
    if path.suffix == ".json":
        rows = _parsed(text, where)
        if isinstance(rows, Mapping):
            rows = rows.get("data")
        if not isinstance(rows, list):
            raise SourceError(f'{where}: expected a list of rows, or an object with one under "data"')
        yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(rows))
        return
    # str.splitlines would also end a row at characters that JSON allows within texts.
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{i}", line.strip() if path.suffix == ".txt" else _parsed(line, f"{where}, line {i}")


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: expected JSON: {error}") from None


def _caption(row: object) -> str:
    if isinstance(row, Mapping):
        if isinstance(messages := _messages(row), list):
            row = next((text for role, text in messages if role == "assistant"), "")
        else:
            row = next((row[name] for name in CAPTION_NAMES if isinstance(row.get(name), str)), "")
    return row.strip() if isinstance(row, str) else ""


def _messages(row: object) -> list[tuple[str, str]] | str:
    """The (role, text) pairs of a conversation, or why there are none. The roles are `user` and `assistant`."""
    if not isinstance(row, Mapping):
        return f"expected an object, got {quoted(row)}"
    messages = row.get("conversations", row.get("messages"))
    if not isinstance(messages, list) or not messages:
        return "no conversations and no messages"
    found = []
    for i, message in enumerate(messages):
        if isinstance(message, str):
            found.append(("assistant" if i % 2 else "user", message))
            continue
        if not isinstance(message, Mapping):
            return f"expected a message, got {quoted(message)}"
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not isinstance(text, str) or role not in (*USERS, *ASSISTANTS, *SYSTEMS):
            return f"a message of {quoted(role)} without a text, or of an unknown role"
        if role not in SYSTEMS:
            found.append(("user" if role in USERS else "assistant", text))
    return found


def _turns(messages: Sequence[tuple[str, str]], most: int) -> tuple[tuple[str, str], ...] | str:
    """The first (user, assistant) pairs of a conversation, or why there are none. A last question may be unanswered."""
    found = []
    for (role, text), (next_role, answer) in zip(messages[::2], messages[1::2]):
        if (role, next_role) != ("user", "assistant"):
            return "user and assistant do not take turns"
        if not text.strip() or not answer.strip():
            return "an empty text"
        found.append((text.strip(), answer.strip()))
    return tuple(found[:most]) if found else "no answer"


def _threads(rows: Sequence[tuple[str, object]]) -> Iterator[tuple[str, list[tuple[str, str]] | str]]:
    """The conversations in OpenAssistant's single messages: from every first message along the best-ranked replies."""
    replies: dict[object, list[Mapping]] = {}
    names = {}
    for name, row in rows:
        if (
            not isinstance(row, Mapping)
            or not isinstance(row.get("text"), str)
            or not isinstance(row.get("message_id"), (str, int))
            or not isinstance(row.get("parent_id"), (str, int, type(None)))
        ):
            yield name, "expected a message with message_id, parent_id and text"
        elif row.get("lang", "en") != "en":
            yield name, "not in English"
        elif not row.get("deleted"):
            replies.setdefault(row.get("parent_id"), []).append(row)
            names[row["message_id"]] = name
    for first in replies.get(None, ()):
        messages, at, seen = [], first, set()
        while at is not None and at["message_id"] not in seen:
            seen.add(at["message_id"])
            messages.append(("user" if at.get("role") in USERS else "assistant", at["text"]))
            # Messages that nobody has ranked come last.
            at = min(replies.get(at["message_id"], ()), key=_rank, default=None)
        yield names[first["message_id"]], messages


def _rank(message: Mapping) -> float:
    rank = message.get("rank")
    return rank if isinstance(rank, (int, float)) else float("inf")
