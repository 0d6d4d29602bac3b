"""The journal of a run: every reply, as it came, in a file that is only ever appended to.

A reply is written and synchronized to the disk before anything else is done with it. So a run that is killed knows all
replies that had come, and asks nothing of them again. What the replies are worth is not written: it is decided anew
from the replies each time, so that checks can change without asking again.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mg_fast.errors import quoted, shortened

from .errors import JournalError

logger = logging.getLogger(__name__)

FORMAT = 1
# How the first line begins.
_HEAD = b'{"journal": '


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    Attributes:
        text: what the model wrote.
        finish: why it ended: `stop`, `length` where the answer was cut, `content_filter`, or an endpoint's own word.
        refusal: the endpoint's note that the model refuses; None where there is none.
        prompt_tokens, completion_tokens: as the endpoint counts them; None where it does not say.
    """

    text: str
    finish: str = "stop"
    refusal: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


# What the fields of a line about a reply may be.
_TYPES = {"text": str, "finish": str, "refusal": str, "prompt_tokens": int, "completion_tokens": int}


class Journal:
    """The replies of this run and of the runs before it, by the keys of their sources.

    Only one process at a time can have a journal open, where the system has file locks.

    Args:
        path: the file; it is made where there is none.
        settings: what the replies depend on. They stand in the first line, and a later run must have the same, unless
            there are no replies yet. None opens a journal that exists for reading, and changes nothing in it.

    Attributes:
        replies: the replies by key, in the order in which they came.
        refused: why a question was refused, by key.
        doubtful: questions that were refused while there was no reply at all. That says little about the question,
            because the request may have been wrong altogether.
        lines: how many lines there are about a key.
        settings: what the replies depend on.
        run: a random name that no other journal has.

    Raises:
        JournalError: the file cannot be opened, is no journal, is open in another process, was written with other
            settings, or a line is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping | None = None):
        self._path = Path(path)
        self.replies: dict[str, list[Reply]] = {}
        self.refused: dict[str, str] = {}
        self.doubtful: set[str] = set()
        self.lines: Counter = Counter()
        self.settings: dict = dict(settings or {})
        self.run = secrets.token_hex(8)
        try:
            # It stays open until `close`.
            self._file = open(self._path, "rb" if settings is None else "a+b")  # noqa: SIM115
        except OSError as error:
            raise JournalError(f"{self._name} cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, reply: Reply) -> None:
        """Writes a reply. When this returns, the reply is on the disk."""
        self._append({"key": key, **{name: v for name, v in dataclasses.asdict(reply).items() if v is not None}})
        self._take(key, reply)

    def refuse(self, key: str, reason: str) -> None:
        """Writes that a question was refused, and why. When this returns, it is on the disk."""
        self._append({"key": key, "refused": reason})
        self._take(key, reason)

    def _take(self, key: str, said: Reply | str) -> None:
        self.lines[key] += 1
        if isinstance(said, Reply):
            self.replies.setdefault(key, []).append(said)
            self.refused.pop(key, None)
        elif self.replies:
            self.refused[key] = said
        else:
            self.doubtful.add(key)

    def close(self) -> None:
        """Closes the file, after which another process can open it."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, line: Mapping) -> None:
        try:
            # ASCII alone keeps half surrogates, which a model can write, readable.
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(f"{self._name} cannot be written: {error.strerror or error}") from None

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(f"{self._name} is in use by another process") from None

    def _read(self, settings: Mapping | None) -> None:
        self._file.seek(0)
        whole, newline, torn = self._file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        # A file is only ever cut if it is a journal, or could be the beginning of one.
        begin = lines[0] if lines else torn
        if lines or not (begin.startswith(_HEAD) or _HEAD.startswith(begin)):
            head = self._head(begin)
        if torn and settings is not None:
            # The process was killed while it wrote this line, so nothing was made of it.
            logger.warning("%s: the last line is not whole and is left out", self._name)
            self._file.truncate(len(whole) + len(newline))
        if lines:
            self.run = head.get("run") or self.run
            for i, line in enumerate(lines[1:], 2):
                self._take(*self._entry(i, self._line(i, line)))
        if settings is None:
            self.settings = head["settings"] if lines else {}
            return
        if not lines or (not self.replies and head["settings"] != dict(settings)):
            # Nothing was answered yet, for instance because the model's name was wrong, which may be corrected now.
            self._file.truncate(0)
            self.doubtful.clear()
            self.lines.clear()
            self._append({"journal": FORMAT, "run": self.run, "settings": self.settings})
            return
        if head["settings"] != dict(settings):
            changed = sorted(
                name for name in {*settings, *head["settings"]} if settings.get(name) != head["settings"].get(name)
            )
            was, now = ({name: values.get(name) for name in changed} for values in (head["settings"], settings))
            raise JournalError(
                f"{self._name} was written with {quoted(was)}, and now came {quoted(now)}: give the same settings, or "
                "another --out"
            )

    def _head(self, line: bytes) -> dict:
        head = self._line(1, line)
        if (
            head.get("journal") != FORMAT
            or not isinstance(head.get("settings"), dict)
            or not isinstance(head.get("run", ""), str)
        ):
            raise JournalError(f"{self._name} is no journal of this recipe: its first line is {quoted(head)}")
        return head

    def _entry(self, number: int, row: Mapping) -> tuple[str, Reply | str]:
        """The key of a line, and its reply or the reason of a refusal."""
        fields = {name: row[name] for name in row if name != "key"}
        if isinstance(row.get("key"), str):
            if set(fields) == {"refused"} and isinstance(row["refused"], str):
                return row["key"], row["refused"]
            if "text" in fields and all(name in _TYPES and isinstance(v, _TYPES[name]) for name, v in fields.items()):
                return row["key"], Reply(**fields)
        raise JournalError(f"{self._name}, line {number}: expected a reply with its key, got {quoted(row)}")

    def _line(self, number: int, line: bytes) -> dict:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                return row
        raise JournalError(
            f"{self._name}, line {number}: expected a JSON object, got {quoted(line[:80].decode(errors='replace'))}"
        )

    @property
    def _name(self) -> str:
        return shortened(str(self._path), 160)
