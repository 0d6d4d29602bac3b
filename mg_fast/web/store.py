"""Pictures in memory, by names that nobody can guess: what users send, what is drawn, and what is shown to them."""

import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from .limits import RequestRefused

# The endings of names by the kind of file.
ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif", "image/bmp": ".bmp"}
# A picture that no question has used for so long is dropped.
UNUSED_S = 600.0
# An address may have as many unused pictures as so many browsers.
BROWSERS_OF_ADDRESS = 4


@dataclass
class KeptPicture:
    """A picture file in memory.

    Attributes:
        data: the file.
        media_type: its kind, such as `image/png`.
        browser: who may see it: the browser's secret; empty for a client without one, which knows the picture's name.
        owner: the key of the session that it belongs to; None as long as no question has used it.
        since: when it came, in seconds of `time.monotonic`.
        address: where it came from; empty where that is not known.
    """

    data: bytes
    media_type: str
    browser: str
    owner: str | None
    since: float
    address: str = ""


class PictureStore:
    """Keeps picture files by name. It is used from one event loop.

    A name looks like a path in a folder, because the page's library takes files by their paths. No file has this path:
    a name is looked up here and nowhere else.

    Args:
        folder: the path that all names begin with.
        most_bytes: most bytes of all pictures together.
        unused_bytes: most bytes of a browser's pictures that no question has used; None: as many as there is room for.
        clock: what tells the time.
    """

    def __init__(
        self,
        folder: str,
        most_bytes: int,
        unused_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.most_bytes, self.unused_bytes = folder.rstrip("/"), most_bytes, unused_bytes
        self._clock = clock
        self._kept: dict[str, KeptPicture] = {}
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(
        self, data: bytes, media_type: str, *, browser: str = "", owner: str | None = None, address: str = ""
    ) -> str:
        """Keeps a picture file, and returns its new name.

        Raises:
            RequestRefused: there is no more room, or none for pictures that this client sends and does not ask about.
        """
        if owner is None:
            self.check_unused(browser, address, len(data))
        if self.held_bytes + len(data) > self.most_bytes:
            raise RequestRefused("this server holds as many pictures as it can: try again in a few minutes")
        name = f"{self.folder}/{secrets.token_hex(16)}/picture{ENDINGS[media_type]}"
        self._kept[name] = KeptPicture(data, media_type, browser, owner, self._clock(), address)
        self.held_bytes += len(data)
        return name

    def check_unused(self, browser: str, address: str, more: int = 0) -> None:
        """Raises RequestRefused where a client has so many unused pictures that it may not have so many bytes more."""
        if self.unused_bytes is None:
            return
        unused = [kept for kept in self._kept.values() if kept.owner is None]
        for one, held, most in (
            (browser, sum(len(kept.data) for kept in unused if kept.browser == browser), self.unused_bytes),
            (
                address,
                sum(len(kept.data) for kept in unused if kept.address == address),
                BROWSERS_OF_ADDRESS * self.unused_bytes,
            ),
        ):
            if one and held + more > most:
                raise RequestRefused(
                    f"{held // 2**20} MiB of pictures have been sent that no question has used: ask about them, or "
                    f"wait for {UNUSED_S / 60:.0f} minutes"
                )

    def get(self, name: str, browser: str) -> KeptPicture | None:
        """The picture of this name, if this browser may see it."""
        kept = self._kept.get(name)
        return kept if kept is not None and secrets.compare_digest(kept.browser, browser) else None

    def claim(self, name: str, browser: str, owner: str) -> KeptPicture:
        """The picture of this name, which belongs to a session from now on.

        Raises:
            RequestRefused: there is none, or it is not this session's.
        """
        kept = self.get(name, browser)
        if kept is None or kept.owner not in (None, owner):
            raise RequestRefused("a picture of this question is not here any more: add it again")
        kept.owner = owner
        return kept

    def bytes_of(self, owner: str) -> int:
        """The bytes of all pictures of a session."""
        return sum(len(kept.data) for kept in self._kept.values() if kept.owner == owner)

    def drop(self, name: str) -> None:
        """Forgets a picture; a name that is not known is no fault."""
        if (kept := self._kept.pop(name, None)) is not None:
            self.held_bytes -= len(kept.data)

    def drop_all_of(self, owner: str, *, keep: Collection[str] = ()) -> list[str]:
        """Forgets the pictures of a session but those to keep, and returns the names of those forgotten."""
        names = [name for name, kept in self._kept.items() if kept.owner == owner and name not in keep]
        for name in names:
            self.drop(name)
        return names

    def drop_unused(self) -> list[str]:
        """Forgets pictures that came long ago and that no question has used, and returns their names."""
        old = self._clock() - UNUSED_S
        names = [name for name, kept in self._kept.items() if kept.owner is None and kept.since < old]
        for name in names:
            self.drop(name)
        return names


def names_in(message: object) -> Iterator[str]:
    """Every name of a file in a message of the page's library, in order: the `path` of each object, at any depth."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "path" in part and part["path"] is not None:
                yield part["path"] if isinstance(part["path"], str) else ""
            waiting += reversed(part.values())
        elif isinstance(part, list):
            waiting += reversed(part)
