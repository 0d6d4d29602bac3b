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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mg_fast.errors import quoted, shortened

from .errors import JournalError

logger = logging.getLogger(__name__)

FORMAT = 1


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


class Journal:
    """The replies of this run and of the runs before it, by the keys of their sources.

    Only one process at a time can have a journal open, where the system has file locks.

    Args:
        path: the file; it is made where there is none.
        settings: what the replies depend on. They stand in the first line, and a later run must have the same, unless
            there are no replies yet; None takes those that stand there.

    Attributes:
        replies: the replies by key, in the order in which they came.
        settings: what the replies depend on; empty for a new journal without settings.

    Raises:
        JournalError: the file cannot be opened, another process has it open, it was written with other settings, or a
            line is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping | None = None):
        self._path = Path(path)
        self.replies: dict[str, list[Reply]] = {}
        self.settings: dict = dict(settings or {})
        try:
            self._file = open(self._path, "a+b")  # noqa: SIM115  (it stays open, and is closed by close)
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
        self.replies.setdefault(key, []).append(reply)

    def close(self) -> None:
        """Closes the file, after which another process can open it."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, line: Mapping) -> None:
        # ASCII alone keeps half surrogates, which a model can write, readable.
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

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
        if torn:
            # The process was killed while it wrote this line, so nothing was made of it.
            logger.warning("%s: the last line is not whole and is left out", self._name)
            self._file.truncate(len(whole) + len(newline))
        lines = whole.split(b"\n") if newline else []
        if not lines:
            self._append({"journal": FORMAT, "settings": self.settings})
            return
        head = self._line(1, lines[0])
        if head.get("journal") != FORMAT or not isinstance(head.get("settings"), dict):
            raise JournalError(f"{self._name} is no journal of this recipe: its first line is {quoted(head)}")
        if settings is not None and len(lines) == 1:
            # Nothing was answered yet, for instance because the model's name was wrong, which may be corrected now.
            self._file.truncate(0)
            self._append({"journal": FORMAT, "settings": self.settings})
            return
        if settings is not None and head["settings"] != dict(settings):
            changed = sorted(
                name for name in {*settings, *head["settings"]} if settings.get(name) != head["settings"].get(name)
            )
            was, now = ({name: values.get(name) for name in changed} for values in (head["settings"], settings))
            raise JournalError(
                f"{self._name} was written with {quoted(was)}, and now came {quoted(now)}: give the same settings, or "
                "another --out"
            )
        self.settings = head["settings"]
        names = {field.name for field in dataclasses.fields(Reply)}
        for i, line in enumerate(lines[1:], 2):
            row = self._line(i, line)
            if (
                not isinstance(row.get("key"), str)
                or not isinstance(row.get("text"), str)
                or row.keys() - names - {"key"}
            ):
                raise JournalError(f"{self._name}, line {i}: expected a reply with its key, got {quoted(row)}")
            reply = Reply(**{name: row[name] for name in row if name != "key"})
            self.replies.setdefault(row["key"], []).append(reply)

    def _line(self, number: int, line: bytes) -> dict:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                return row
        raise JournalError(
            f"{self._name}, line {number}: expected a JSON object, got {quoted(line[:80].decode(errors='replace'))}"
        )

    @property
    def _name(self) -> str:
        return shortened(str(self._path), 160)
