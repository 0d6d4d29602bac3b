"""What one server of the web page gives to its users: the limits, their defaults, and their names on a command line."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import MgFastError, quoted

MIB = 2**20


class RequestRefused(MgFastError):
    """A request that this server does not serve; the message tells its user why, and what to do."""


@dataclass(frozen=True)
class Limits:
    """The limits of a server. All are whole numbers of 1 or more, except that `queue` may be 0.

    Attributes:
        sessions: browser sessions at once; each has a conversation.
        address_sessions: browser sessions at once from one address, where the address is known.
        parallel: answers that are made at the same time.
        queue: questions that wait for their turn.
        pictures: pictures of one question.
        megabytes: size of a picture file in MiB, checked before the file is read.
        megapixels: pixels of a picture in millions, checked before the picture is decoded.
        session_megabytes: files of the pictures of one session, in MiB.
        turns: questions of one conversation.
        characters: length of a question.
        tokens: tokens of an answer.
        idle_minutes: a session without a request for so long is closed.
        connections: connections that have sent no complete request; the oldest of more is closed.
    """

    sessions: int = 100
    address_sessions: int = 50
    parallel: int = 1
    queue: int = 64
    pictures: int = 4
    megabytes: int = 10
    megapixels: int = 25
    session_megabytes: int = 64
    turns: int = 50
    characters: int = 8000
    tokens: int = 512
    idle_minutes: int = 30
    connections: int = 200

    def __post_init__(self):
        for limit in dataclasses.fields(self):
            value, least = getattr(self, limit.name), 0 if limit.name == "queue" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{limit.name}: expected a whole number of {least} or more, got {quoted(value)}")

    @property
    def picture_bytes(self) -> int:
        """The most bytes of a picture file."""
        return self.megabytes * MIB

    @property
    def picture_pixels(self) -> int:
        """The most pixels of a picture."""
        return self.megapixels * 1_000_000

    @property
    def session_bytes(self) -> int:
        """The most bytes of all picture files of a session."""
        return self.session_megabytes * MIB

    @property
    def upload_bytes(self) -> int:
        """The most bytes of one request with picture files: a question's pictures, and what stands between them."""
        return self.pictures * (self.picture_bytes + 4096)

    @property
    def message_bytes(self) -> int:
        """The most bytes of any other request: a character of a question may take twelve bytes as JSON."""
        return 12 * self.characters + 64 * 1024


NAMES = tuple(limit.name for limit in dataclasses.fields(Limits))


def limit_of(word: str) -> tuple[str, int]:
    """A limit from a command line, such as `sessions=200`, as its name and its number.

    Raises:
        ValueError: there is no such limit, or the number is no number for it.
    """
    name, equals, number = word.partition("=")
    if not equals or name not in NAMES:
        raise ValueError(f"expected NAME=NUMBER with a name of {', '.join(NAMES)}, got {quoted(word)}")
    if not number.isascii() or not number.isdigit():
        raise ValueError(f"{name}: expected a whole number, got {quoted(number)}")
    Limits(**{name: int(number)})
    return name, int(number)


def limits_of(pairs: Iterable[tuple[str, int]]) -> Limits:
    """The limits in which these pairs of a name and a number replace the defaults; of two alike the later one holds."""
    return Limits(**dict(pairs))
