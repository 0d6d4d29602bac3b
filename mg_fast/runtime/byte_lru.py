"""A cache of results that is bounded by their bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class ByteLRU:
    """Values by key, with a limit on their bytes; the least recently used value is dropped first. Threads may share it.

    Args:
        limit: most bytes held. A value that is larger by itself is not kept. None keeps everything.

    Attributes:
        held_bytes: bytes of the values held now.
    """

    def __init__(self, limit: int | None):
        self.limit, self.held_bytes = limit, 0
        self._entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> object | None:
        """The value under the key, which becomes the most recently used one; None if there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def fits(self, nbytes: int) -> bool:
        """Whether a value of this many bytes would be kept at all."""
        return self.limit is None or nbytes <= self.limit

    def put(self, key: Hashable, value: object, nbytes: int, *, replace: bool = True) -> None:
        """Keeps a value, which must not be None.

        Args:
            replace: replace a value that is already there. If False, the old value stays, because a caller that was
                given it may rely on its being kept.
        """
        if not self.fits(nbytes):
            return
        with self._lock:
            if key in self._entries:
                if not replace:
                    return
                self.held_bytes -= self._entries.pop(key)[1]
            self._entries[key] = value, nbytes
            self.held_bytes += nbytes
            while self.limit is not None and self.held_bytes > self.limit:
                self.held_bytes -= self._entries.popitem(last=False)[1][1]

    def drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Drops the values whose keys are unwanted."""
        with self._lock:
            for key in [key for key in self._entries if unwanted(key)]:
                self.held_bytes -= self._entries.pop(key)[1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.held_bytes = 0
