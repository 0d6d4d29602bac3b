"""Results that were kept, bounded by their bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable


class ByteLRU:
    """Values by key, whose bytes have a limit: what was used longest ago goes first. Threads may share it.

    Args:
        limit: most bytes held; what is larger by itself is not kept. None: everything is kept.

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
        """What is kept under the key, which is then the one used last; None where there is nothing."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def fits(self, nbytes: int) -> bool:
        """Whether a value of so many bytes is kept at all."""
        return self.limit is None or nbytes <= self.limit

    def put(self, key: Hashable, value: object, nbytes: int, *, replace: bool = True) -> None:
        """Keeps a value that is not None.

        Args:
            replace: a value that is already there gives way; without, it stays, since whoever was given it may rely on
                its being kept.
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

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.held_bytes = 0
