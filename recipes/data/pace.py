"""When requests begin: at a set rate, at a lower one where the other side is busy, and after pauses."""

import asyncio
import random
import time


class Pace:
    """Lets requests begin one after the other, no faster than a rate, and none before a pause has passed.

    Where a request is turned away, the rate is halved, and there is a pause. Every answer then raises the rate by the
    same small step.

    Args:
        per_minute: the highest rate; None sets no limit.
        first_wait, longest_wait: seconds of the first pause and of the longest one; see `Manners`. The eighth part of
            the first is the first interval between requests where there was none.
    """

    def __init__(self, per_minute: float | None, *, first_wait: float = 1.0, longest_wait: float = 60.0):
        self._least = self._interval = 60.0 / per_minute if per_minute else 0.0
        self._first_wait, self._longest_wait = first_wait, longest_wait
        self._next, self._lowered, self._step = 0.0, float("-inf"), 0.0
        self._turned_away = 0
        self._turn = asyncio.Lock()

    async def turn(self) -> None:
        """Returns when the next request may begin."""
        async with self._turn:
            # While one waits, a pause may move the time further.
            while (wait := self._next - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self._next = time.monotonic() + self._interval

    def pause(self, seconds: float) -> None:
        """No request begins for some seconds from now."""
        self._next = max(self._next, time.monotonic() + seconds)

    def turned_away(self, began: float, retry_after: float) -> None:
        """Slows down after a request that began at a time of `time.monotonic`, and pauses for `retry_after` or longer.

        Requests that had begun before the rate was lowered say nothing about the lower rate.
        """
        wait = 0.0
        if began > self._lowered:
            self._turned_away += 1
            self._lowered = time.monotonic()
            self._interval = min(max(2 * self._interval, self._first_wait / 8), max(self._longest_wait, self._least))
            # So many answers make up for one halving.
            self._step = 1 / self._interval / 15
            wait = waiting(self._first_wait, self._longest_wait, self._turned_away)
        self.pause(max(retry_after, wait))

    def answered(self) -> None:
        """A request was answered, so the rate may rise again."""
        self._turned_away = 0
        if self._interval > self._least:
            self._interval = max(self._least, 1 / (1 / self._interval + self._step))


def waiting(first: float, longest: float, times: int) -> float:
    """Seconds to wait after so many failures: doubled with each, and shortened at random by up to half."""
    return min(longest, first * 2 ** min(times - 1, 60)) * random.uniform(0.5, 1.0)
