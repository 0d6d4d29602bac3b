"""Asks many questions at once: at a set rate, with pauses where the other side asks for them, until stopped."""

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .errors import AskingError
from .journal import Journal, Reply

logger = logging.getLogger(__name__)

# The run ends after this many questions in a row of which none was answered: then something is wrong with all of them.
MOST_UNANSWERED = 5


class Trouble(Exception):
    """A request that failed and may be sent again, now or in a later run.

    Args:
        cause: a few words for the report, such as `HTTP 503` or `no answer in time`.
        retry_after: seconds to wait before any request, if the other side says so.
    """

    def __init__(self, cause: str, *, retry_after: float | None = None):
        super().__init__(cause)
        self.cause, self.retry_after = cause, retry_after


class Refused(Exception):
    """A request that the other side will not take as it is, so that sending it again would be of no use."""


class Asker(Protocol):
    """What answers questions: an endpoint or a local model. `AskingError` ends the run."""

    async def ask(self, messages: Sequence[dict], name: str) -> Reply:
        """The reply to a chat; `name` tells one request from another. Raises Trouble, Refused or AskingError."""


@dataclass(frozen=True)
class Question:
    """A chat whose last message is to be answered, and the key of its source."""

    key: str
    messages: Sequence[dict]


@dataclass(frozen=True)
class Manners:
    """How requests are sent.

    Attributes:
        at_once: the most requests on their way at a time.
        per_minute: the most requests a minute; None sets no limit.
        attempts: how often one request is sent before it is left for a later run.
        first_wait, longest_wait: seconds before the second attempt and the most before a later one. They double from
            attempt to attempt, and are shortened by up to half at random.
        longest_pause: the longest wait, in seconds, that the other side may ask for; a longer one ends the run.
    """

    at_once: int = 8
    per_minute: float | None = None
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_pause: float = 900.0


@dataclass
class Tally:
    """What happened in this run.

    Attributes:
        sent: requests that were sent.
        replies: replies that came.
        troubles: how often requests failed, by cause.
        left: questions without a reply that are left for a later run, by cause.
        seconds: how long it took.
        stopped: whether the run was stopped before its end.
    """

    sent: int = 0
    replies: int = 0
    troubles: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    stopped: bool = False


class Pace:
    """Lets requests begin one after the other, no faster than a rate, and none before a pause has passed."""

    def __init__(self, per_minute: float | None):
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
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


async def ask_all(
    questions: Sequence[Question],
    asker: Asker,
    journal: Journal,
    settled: Callable[[str], bool],
    manners: Manners,
    progress: Callable[[], None] = lambda: None,
) -> Tally:
    """Asks every question until it is settled, several at once, and writes every reply to the journal.

    An interrupt (SIGINT, SIGTERM) lets the requests that are on their way end and then stops; a second one ends the
    process at once. Either way the journal has every reply that came.

    Args:
        questions: the questions; those that are settled from the start are not asked.
        asker: what answers.
        journal: where replies are written.
        settled: whether the replies in the journal to the question with a key are enough.
        progress: called whenever a question is settled or left.

    Raises:
        AskingError: nothing can be asked any more. The requests that were on their way have ended.
    """
    tally, began = Tally(), time.monotonic()
    open_questions = []
    for question in questions:
        if settled(question.key):
            progress()
        else:
            open_questions.append(question)
    run = _Run(asker, journal, settled, manners, progress, iter(open_questions), tally)
    with _stopping(run.stop):
        workers = [asyncio.ensure_future(run.work()) for _ in range(min(manners.at_once, len(open_questions)))]
        await asyncio.gather(*workers)
    tally.seconds, tally.stopped = time.monotonic() - began, run.stop.is_set()
    if run.error is not None:
        raise run.error
    return tally


class _Run:
    """One run, which several workers share."""

    def __init__(self, asker, journal, settled, manners, progress, questions, tally):
        self.stop = asyncio.Event()
        self.error: AskingError | None = None
        self._asker, self._journal, self._settled, self._manners = asker, journal, settled, manners
        self._progress, self._questions, self._tally = progress, questions, tally
        self._pace = Pace(manners.per_minute)
        self._unanswered = 0

    async def work(self) -> None:
        """Takes one question after the other until there are none, or until the run stops."""
        for question in self._questions:
            try:
                while not self.stop.is_set() and not self._settled(question.key):
                    if not await self._ask(question):
                        break
            except AskingError as error:
                # The other workers still take the replies that are on their way.
                self.error = self.error or error
                self.stop.set()
            if self.stop.is_set():
                return
            self._progress()

    async def _ask(self, question: Question) -> bool:
        """Sends one request, again where that may help, and writes the reply; False if none came."""
        manners, cause = self._manners, ""
        number = len(self._journal.replies.get(question.key, ())) + 1
        for attempt in range(1, manners.attempts + 1):
            await self._unless_stopped(self._pace.turn())
            if self.stop.is_set():
                return False
            self._tally.sent += 1
            try:
                reply = await self._asker.ask(question.messages, f"{question.key}-{number}")
            except Refused as refused:
                cause = str(refused)
                self._tally.troubles[cause] += 1
                break
            except Trouble as trouble:
                cause = trouble.cause
                self._tally.troubles[cause] += 1
                await self._wait(trouble, attempt)
                continue
            self._journal.add(question.key, reply)
            self._tally.replies += 1
            self._unanswered = 0
            return True
        if not self.stop.is_set():
            self._leave(cause)
        return False

    async def _wait(self, trouble: Trouble, attempt: int) -> None:
        manners = self._manners
        if trouble.retry_after is not None:
            if trouble.retry_after > manners.longest_pause:
                raise AskingError(
                    f"the endpoint asks to wait for {trouble.retry_after:.0f} seconds ({trouble.cause}), longer than "
                    f"the {manners.longest_pause:.0f} that are allowed: call again then, and the run goes on"
                )
            # It concerns everybody, not this request alone.
            self._pace.pause(trouble.retry_after)
        elif attempt < manners.attempts:
            seconds = min(manners.longest_wait, manners.first_wait * 2 ** (attempt - 1))
            await self._unless_stopped(asyncio.sleep(seconds * random.uniform(0.5, 1.0)))

    def _leave(self, cause: str) -> None:
        self._tally.left[cause] += 1
        self._unanswered += 1
        if self._unanswered >= MOST_UNANSWERED:
            raise AskingError(
                f"{self._unanswered} questions in a row were not answered, the last one because of: {cause}. The "
                "replies so far are in the journal, and another call goes on from there"
            )

    async def _unless_stopped(self, waiting) -> None:
        """Waits for something, or until the run is to stop."""
        waits = [asyncio.ensure_future(waiting), asyncio.ensure_future(self.stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


@contextlib.contextmanager
def _stopping(stop: asyncio.Event):
    """Within it, the first interrupt sets the event, and the next one has its usual effect."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def first(number: int) -> None:
        logger.warning("stopping: the requests that are on their way are waited for; interrupt again to end at once")
        stop.set()
        restore()

    def restore() -> None:
        for number in numbers:
            # Windows has no such handlers, and neither have loops outside of the main thread.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(number)

    for number in numbers:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        restore()
