"""Work that must wait for a better moment, by name, and is done at most once."""

import threading
from collections.abc import Callable

_lock = threading.Lock()
_waiting: dict[str, Callable[[], None]] = {}


def defer(name: str, work: Callable[[], None]) -> None:
    """Keeps work for `do_deferred`; of one name only the first counts."""
    with _lock:
        _waiting.setdefault(name, work)


def do_deferred() -> None:
    """Does all work that was deferred, in its order. What it does may call this function again."""
    while True:
        with _lock:
            if not _waiting:
                return
            work = _waiting.pop(next(iter(_waiting)))
        work()
